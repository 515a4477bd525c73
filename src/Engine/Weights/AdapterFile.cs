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

    private const string Prefix = "base_model.model.";

    private readonly SafetensorsFile _file;

    private AdapterFile(string directory, AdapterConfig config, SafetensorsFile file) =>
        (Directory, Config, _file) = (directory, config, file);

    public string Directory { get; }

    public AdapterConfig Config { get; }

    /// <summary>All tensors under PEFT's names, whatever model they are for.</summary>
    internal IReadOnlyCollection<StoredTensor> Tensors => _file.Tensors;

    /// <exception cref="InputException">
    /// A file is missing or broken, or asks for what is not supported.
    /// </exception>
    public static AdapterFile Open(string directory)
    {
        if (!System.IO.Directory.Exists(directory))
            throw new InputException($"{directory}: there is no such directory");
        AdapterConfig config = AdapterConfig.Read(Path.Combine(directory, AdapterConfig.FileName));
        string weights = Path.Combine(directory, WeightsName);
        if (!File.Exists(weights) && File.Exists(Path.Combine(directory, "adapter_model.bin")))
            throw new InputException(
                $"{directory}: has adapter_model.bin only; convert it to {WeightsName}");
        return new AdapterFile(directory, config, SafetensorsFile.Open(weights));
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
            .Where(tensor => !tensor.Optional || _file.Find(tensor.FileName) is not null)];
        var stored = TensorMatch.Require(
            _file.Path, [.. _file.Tensors.Where(t => Copied(t) is not { } own
                || !layout.Targets.Any(target => target.Weight == own))],
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
        foreach (StoredTensor copy in _file.Tensors)
        {
            if (Copied(copy) is not { } name || model.Find(name) is not { } own) continue;
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
    private static string? Copied(StoredTensor tensor) =>
        tensor.Name.StartsWith(Prefix, StringComparison.Ordinal)
        && tensor.Name.EndsWith(".base_layer.weight", StringComparison.Ordinal)
            ? tensor.Name[Prefix.Length..].Replace(".base_layer.", ".", StringComparison.Ordinal)
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
        return name.StartsWith(Prefix, StringComparison.Ordinal)
            ? "not among modules_to_save" : "not a PEFT name";
    }
}
