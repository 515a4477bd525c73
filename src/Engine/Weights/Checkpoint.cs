namespace MiniCpmNative.Engine.Weights;

/// <summary>
/// The weights of a Hugging Face model directory: model.safetensors, or the shards that
/// model.safetensors.index.json names. A single file wins over an index,
/// as it does in transformers.
/// </summary>
public sealed class Checkpoint : IDisposable
{
    public const string SingleFile = "model.safetensors";
    public const string IndexFile = "model.safetensors.index.json";

    private readonly List<SafetensorsFile> _files = [];
    private readonly Dictionary<string, StoredTensor> _tensors = new(StringComparer.Ordinal);

    private Checkpoint(string directory) => Directory = directory;

    public string Directory { get; }

    /// <summary>All tensors, in the order of the index or of the single file.</summary>
    public IReadOnlyCollection<StoredTensor> Tensors => _tensors.Values;

    /// <summary>Whether a directory holds weights that can be opened.</summary>
    public static bool IsIn(string directory) =>
        File.Exists(Path.Combine(directory, SingleFile))
        || File.Exists(Path.Combine(directory, IndexFile));

    /// <summary>The weight files.</summary>
    public IReadOnlyList<SafetensorsFile> Files => _files;

    /// <exception cref="InputException">
    /// No weights there, a shard is missing or broken, or index and shards disagree.
    /// </exception>
    public static Checkpoint Open(string directory)
    {
        if (!System.IO.Directory.Exists(directory))
            throw new InputException($"{directory}: there is no such directory");
        var checkpoint = new Checkpoint(directory);
        try
        {
            string single = Path.Combine(directory, SingleFile),
                index = Path.Combine(directory, IndexFile);
            if (File.Exists(single)) checkpoint.AddSingle(single);
            else if (File.Exists(index)) checkpoint.AddShards(index);
            else throw NoWeights(directory);
            PackedTensors.Fold(directory, checkpoint._tensors);
            return checkpoint;
        }
        catch
        {
            checkpoint.Dispose();
            throw;
        }
    }

    /// <summary>Whether a folder has weights at all.</summary>
    public static bool IsThere(string directory) =>
        File.Exists(Path.Combine(directory, SingleFile))
        || File.Exists(Path.Combine(directory, IndexFile));

    public StoredTensor? Find(string name) => _tensors.GetValueOrDefault(name);

    /// <exception cref="InputException">There is no such tensor.</exception>
    public StoredTensor Get(string name) => Find(name)
        ?? throw new InputException($"{Directory}: there is no tensor {Messages.Quote(name)}");

    /// <summary>
    /// Requires exactly the model's tensors; returns them in the order of its table.
    /// </summary>
    /// <exception cref="InputException">
    /// Missing, unmatched, misshaped or non-float tensors.
    /// </exception>
    public IReadOnlyList<StoredTensor> MustMatch(
        ParameterTable parameters, Func<string, string?>? explain = null) => TensorMatch.Require(
            Directory, [.. Tensors.Where(tensor => !parameters.IsUntouched(tensor.Name))],
            parameters.All, explain);

    /// <summary>
    /// Has, in the place of the numbered modules behind a prefix, copies of them as a list says.
    /// </summary>
    /// <exception cref="InputException">One of them is quantised.</exception>
    public void Replicate(string prefix, IReadOnlyList<int> modules)
    {
        StoredTensor[] all = [.. _tensors.Values];
        var byNumber = all.Where(t => Number(t) is not null).ToLookup(t => Number(t)!.Value);
        _tensors.Clear();
        foreach (StoredTensor tensor in all)
            if (Number(tensor) is null) _tensors.Add(tensor.Name, tensor);
        for (int i = 0; i < modules.Count; i++)
            foreach (StoredTensor tensor in byNumber[modules[i]])
            {
                if (tensor is PackedTensor)
                    throw new InputException($"{tensor.Place} is quantised, of which no layers are "
                        + "replicated: make the model whole first with cpmx merge --dequantize");
                string rest = tensor.Name[tensor.Name.IndexOf('.', prefix.Length)..];
                string name = FormattableString.Invariant($"{prefix}{i}{rest}");
                _tensors.Add(name, tensor.As(name));
            }

        int? Number(StoredTensor tensor) =>
            tensor.Name.StartsWith(prefix, StringComparison.Ordinal)
            && tensor.Name.IndexOf('.', prefix.Length) is > 0 and var end
            && int.TryParse(tensor.Name.AsSpan(prefix.Length, end - prefix.Length), out int number)
                ? number : null;
    }

    public void Dispose()
    {
        foreach (var file in _files) file.Dispose();
    }

    private static InputException NoWeights(string directory)
    {
        bool pickled = System.IO.Directory.EnumerateFiles(directory, "*.bin").Any();
        return new InputException($"{directory}: has neither {SingleFile} nor {IndexFile}"
            + (pickled ? "; convert its PyTorch .bin files to safetensors first" : ""));
    }

    private void AddSingle(string path)
    {
        var file = OpenFile(path);
        foreach (var tensor in file.Tensors) _tensors.Add(tensor.Name, tensor);
    }

    private void AddShards(string index)
    {
        var shards = new Dictionary<string, SafetensorsFile>(StringComparer.Ordinal);
        List<string> absent = [];
        foreach (var (name, value) in JsonInput.ReadObject(index)["weight_map"].Members())
        {
            string shard = value.Text();
            if (!IsPlainName(shard)) throw value.Expected("a file name in the same directory");
            if (!shards.TryGetValue(shard, out var file))
                shards.Add(shard, file = OpenFile(Path.Combine(Directory, shard)));
            if (file.Find(name) is { } tensor) _tensors.Add(name, tensor);
            else absent.Add($"{Messages.OneLine(name)} (expected in {Messages.OneLine(shard)})");
        }

        List<string> unlisted = [.. shards.Values.SelectMany(file => file.Tensors)
            .Where(tensor => !ReferenceEquals(Find(tensor.Name), tensor))
            .Select(tensor => Messages.OneLine(tensor.Name))];
        if (absent.Count > 0)
            throw new InputException($"{index}: {absent.Count} tensors are not in their shards:"
                + $" {Messages.List(absent)}");
        if (unlisted.Count > 0)
            throw new InputException(
                $"{index}: {unlisted.Count} tensors of the shards are not listed for"
                + $" them: {Messages.List(unlisted)}");
    }

    private SafetensorsFile OpenFile(string path)
    {
        var file = SafetensorsFile.Open(path);
        _files.Add(file);
        return file;
    }

    // An index from elsewhere must not make the program open files outside the model's directory.
    private static bool IsPlainName(string name) =>
        name.EndsWith(".safetensors", StringComparison.Ordinal)
        && name.AsSpan().IndexOfAny('/', '\\', '\0') < 0;
}
