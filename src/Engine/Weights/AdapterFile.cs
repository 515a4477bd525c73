using MiniCpmNative.Engine.Config;

namespace MiniCpmNative.Engine.Weights;

/// <summary>
/// A PEFT adapter directory: adapter_config.json and adapter_model.safetensors. Tensors may be of
/// any float type; the engine's names (see <see cref="AdapterTensor"/>) stand on this side of the
/// file's.
/// </summary>
public sealed class AdapterFile : IDisposable
{
    public const string WeightsName = "adapter_model.safetensors";

    /// <summary>Behind the name of a module with an adapter: a copy of its matrix.</summary>
    internal const string CopyEnd = ".base_layer.weight";

    private readonly SafetensorsFile _file;
    private Dictionary<string, StoredTensor> _tensors;

    private AdapterFile(string directory, AdapterConfig config, SafetensorsFile file)
    {
        (Directory, Config, _file) = (directory, config, file);
        try
        {
            _tensors = ForeignAdapter.Named(file);
        }
        catch
        {
            file.Dispose();
            throw;
        }
    }

    public string Directory { get; }

    /// <summary>Its configuration, in the names of the whole model.</summary>
    public AdapterConfig Config { get; private set; }

    /// <summary>As the file has it, where it was made for the decoder alone; else null.</summary>
    internal AdapterConfig? OfDecoder { get; private set; }

    /// <summary>All tensors by PEFT's names, whatever model they are for.</summary>
    internal Dictionary<string, StoredTensor> Tensors => _tensors;

    /// <param name="directory">Its folder.</param>
    /// <param name="table">The model it is for, where names of the decoder alone are to be
    /// told.</param>
    /// <exception cref="InputException">
    /// A file is missing or broken, or asks for what is not supported.
    /// </exception>
    public static AdapterFile Open(string directory, ParameterTable? table = null)
    {
        if (!System.IO.Directory.Exists(directory))
            throw new InputException($"{directory}: there is no such directory");
        AdapterConfig config = AdapterConfig.Read(Path.Combine(directory, AdapterConfig.FileName));
        string weights = Path.Combine(directory, WeightsName);
        if (!File.Exists(weights) && File.Exists(Path.Combine(directory, "adapter_model.bin")))
            throw new InputException(
                $"{directory}: has adapter_model.bin only; convert it to {WeightsName}");
        var file = new AdapterFile(directory, config, SafetensorsFile.Open(weights));
        if (table is not null
            && ForeignAdapter.OfDecoder(table, config, file._tensors) is { } whole)
            (file.Config, file._tensors, file.OfDecoder) = (whole.Config, whole.Tensors, config);
        return file;
    }

    /// <summary>
    /// The stored tensor of each tensor of the adapter, by the engine's name; without the biases
    /// that PEFT trains but does not save.
    /// </summary>
    /// <exception cref="InputException">
    /// The configuration does not fit the model, or tensors are missing, unmatched or misshaped.
    /// </exception>
    public IReadOnlyDictionary<string, StoredTensor> Match(ParameterTable table) =>
        Match(Layout(table));

    /// <summary>What its configuration means for a model.</summary>
    /// <exception cref="InputException">The configuration does not fit the model.</exception>
    public AdapterLayout Layout(ParameterTable table) =>
        AdapterLayout.Create(table, Config, Path.Combine(Directory, AdapterConfig.FileName));

    /// <inheritdoc cref="Match(ParameterTable)"/>
    public IReadOnlyDictionary<string, StoredTensor> Match(AdapterLayout layout)
    {
        AdapterTensor[] wanted = [.. layout.Tensors
            .Where(tensor => !tensor.Optional || _tensors.ContainsKey(tensor.FileName))];
        var stored = TensorMatch.Require(
            _file.Path,
            _tensors.Where(t => Copied(t.Key) is not { } own
                || !layout.Targets.Any(target => target.Weight == own))
                .ToDictionary(StringComparer.Ordinal),
            [.. wanted.Select(t => new ExpectedTensor(t.FileName, t.Shape))], Explain);
        return wanted.Zip(stored).ToDictionary(
            pair => pair.First.Name, pair => pair.Second, StringComparer.Ordinal);
    }

    /// <summary>
    /// Refuses matrices of the model, which PEFT writes beside adapters of the embedding and the
    /// head, where they are not this model's.
    /// </summary>
    /// <exception cref="InputException">A matrix is another one.</exception>
    public void MustBeOn(Checkpoint model)
    {
        const int piece = 1 << 22;
        foreach (var (stored, copy) in _tensors)
        {
            if (Copied(stored) is not { } name || model.Find(name) is not { } own) continue;
            bool same = copy.Sizes.SequenceEqual(own.Sizes);
            if (same && copy.StoredType == own.StoredType && own is not PackedTensor)
            {
                byte[] a = new byte[piece], b = new byte[piece];
                for (long done = 0; same && done < own.Bytes; done += piece)
                {
                    int count = (int)Math.Min(piece, own.Bytes - done);
                    copy.Read(done, a.AsSpan(0, count));
                    own.Read(done, b.AsSpan(0, count));
                    same = a.AsSpan(0, count).SequenceEqual(b.AsSpan(0, count));
                }
            }
            else if (same)
            {
                same = copy.ToFloats().AsSpan().SequenceEqual(own.ToFloats());
            }

            if (!same)
                throw new InputException($"{copy.Place} is not the model's {name}: the adapter was "
                    + "trained on another model, or on one whose vocabulary was changed");
        }
    }

    // The model's own matrix that a tensor is a copy of, by its name.
    private static string? Copied(string name) =>
        name.StartsWith(AdapterLayout.Prefix, StringComparison.Ordinal)
        && name.EndsWith(CopyEnd, StringComparison.Ordinal)
            ? name[AdapterLayout.Prefix.Length..].Replace(".base_layer.", ".",
                StringComparison.Ordinal)
            : null;

    /// <summary>
    /// Writes an adapter directory that PEFT loads. Tensors carry the engine's names and are
    /// exactly those of the layout; the configuration comes last,
    /// so a directory with one is complete.
    /// </summary>
    /// <exception cref="RunException">A file cannot be written.</exception>
    /// <exception cref="ArgumentException">The tensors are not those of the layout.</exception>
    public static void Write(
        string directory, AdapterConfig config, AdapterLayout layout,
        IEnumerable<TensorToSave> tensors)
    {
        var byName = tensors.ToDictionary(tensor => tensor.Name, StringComparer.Ordinal);
        List<TensorToSave> renamed = [];
        foreach (var tensor in layout.Tensors)
        {
            if (!byName.Remove(tensor.Name, out var given)
                || !given.Sizes.SequenceEqual(TensorToSave.SizesOf(tensor.Shape)))
                throw new ArgumentException(
                    $"{tensor.Name} {tensor.Shape} is missing or misshaped");
            renamed.Add(given with { Name = tensor.FileName });
        }

        if (byName.Count > 0)
            throw new ArgumentException($"{byName.Keys.First()} is not of the adapter");
        Write(directory, config, renamed);
    }

    /// <summary>The same of tensors that have PEFT's names already.</summary>
    internal static void Write(
        string directory, AdapterConfig config, IReadOnlyList<TensorToSave> tensors)
    {
        System.IO.Directory.CreateDirectory(directory);
        SafetensorsWriter.Write(Path.Combine(directory, WeightsName), tensors);
        AtomicFile.WriteText(Path.Combine(directory, AdapterConfig.FileName), config.ToJson());
    }

    public void Dispose() => _file.Dispose();

    private static string? Explain(string name)
    {
        if (name.EndsWith("lora_magnitude_vector", StringComparison.Ordinal))
            return "DoRA's, without use_dora or not among target_modules";
        if (name.Contains("lora_embedding_", StringComparison.Ordinal))
            return "adapter of an embedding, not among target_modules";
        if (name.EndsWith(AdapterLayout.TokensEnd, StringComparison.Ordinal))
            return "rows of tokens, without trainable_token_indices";
        if (name.EndsWith("lora_B.bias", StringComparison.Ordinal))
            return "bias of B, without lora_bias";
        if (name.Contains(".lora_", StringComparison.Ordinal)) return "not among target_modules";
        return name.StartsWith(AdapterLayout.Prefix, StringComparison.Ordinal)
            ? "not among modules_to_save" : "not a PEFT name";
    }
}
