using System.Security.Cryptography;
using System.Text;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Updates;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// What a run starts from: the model's files and the adapter's, opened and checked, nothing large
/// read. What a save takes over is held from here on, so that a run does not depend on its model's
/// folder once it trains: small files as their bytes, frozen weights as open files.
/// </summary>
public sealed class BaseModel : IDisposable
{
    private const long MostSmallBytes = 256 << 20;

    private BaseModel(
        ModelSpec spec, Checkpoint weights, AdapterFile? start, TunedParts parts, DType storage)
    {
        (Spec, Weights, Start, Parts, Storage) = (spec, weights, start, parts, storage);
        Saved = [];
    }

    public ModelSpec Spec { get; }

    public Checkpoint Weights { get; }

    /// <summary>The adapter to start from, or null.</summary>
    public AdapterFile? Start { get; }

    public TunedParts Parts { get; }

    /// <summary>Type that weights are stored in.</summary>
    public DType Storage { get; }

    /// <summary>
    /// Small files that a whole model is saved with, as it was trained; with adapters the
    /// tokenizer's, as the official script leaves them.
    /// </summary>
    public IReadOnlyList<(string Name, byte[] Content)> Saved { get; private init; }

    /// <summary>Tensors of parts that are not run, which a save hands on as they are.</summary>
    public IReadOnlyList<StoredTensor> Untouched { get; private init; } = [];

    /// <summary>Bytes of what the run saves.</summary>
    public SavedBytes SavedBytes => new(
        Parts.Config is null
            ? (Spec.Parameters.Count * Storage.Size()) + Untouched.Sum(t => t.Bytes)
            : Parts.Tensors.Sum(t => t.Shape.Count * t.Type.Size()
                * (Parts.Config.Start.Splits && Parts.Adapters.Owner(t.Name) is not null ? 2 : 1)),
        Parts.Tensors.Sum(t => StateBytes(t) + (t.Shape.Count * MasterBytes(t))));

    /// <summary>
    /// Bytes of weights, gradients and optimizer state on the device, activations not counted.
    /// </summary>
    public long DeviceBytes => Bytes(new TrainArguments());

    /// <summary>
    /// Whether the weights on the disk are no longer those that were loaded: frozen ones cannot be
    /// saved any more.
    /// </summary>
    public bool HasChanged => Weights.Files.Any(file => file.HasChanged);

    /// <summary>What a dry run needs to know.</summary>
    public PlannedModel Planned
    {
        get
        {
            var types = Weights.Tensors.Where(t => !Spec.Parameters.IsUntouched(t.Name))
                .ToDictionary(t => t.Name, t => IsSplit(t.Name)
                    ? Storage : ModelWeights.StoredAs(t.Type, Storage), StringComparer.Ordinal);
            return new(Spec, Parts, name => types[name], Kind);
        }
    }

    /// <summary>Makes the frozen weights that a run keeps in fewer bits.</summary>
    public required QuantisedKind Kind { get; init; }

    private OptimizerForm Optimizer { get; init; } = new();

    /// <param name="arguments">Say what is loaded, and what of it is trained.</param>
    /// <param name="say">Takes a line on the adapter, and on files that are not taken over.</param>
    /// <exception cref="InputException">The model, the adapter or what is to be trained is
    /// unusable.</exception>
    public static BaseModel Open(TrainArguments arguments, Action<string>? say = null)
    {
        string folder = arguments.ModelNameOrPath!;
        ModelSpec spec = ModelSpec.Read(folder).Hearing(arguments.InitAudio);
        Checkpoint weights = Checkpoint.Open(folder);
        AdapterFile? start = null;
        try
        {
            weights.MustMatch(spec.Parameters, Families.Explain);
            spec = spec.Replicated(arguments.LoraLayerReplication, weights);
            DType storage = TunedModel.StorageOf(arguments);
            foreach (StoredTensor tensor in weights.Tensors) tensor.MustBeFinite(storage);
            AdapterConfig? adapter = TunedParts.AdapterOf(arguments, spec);
            if (arguments.LoraWeightPath is { } path)
            {
                start = AdapterFile.Open(path, spec.Parameters);
                adapter = AdapterStart.Settled(adapter!, start);
                AdapterStart.MustFit(adapter, start, spec.Parameters);
            }

            TunedParts parts = TunedParts.Choose(spec, arguments, adapter, storage);
            RefuseQuantised(weights, parts);
            if (start is not null)
            {
                AdapterStart.MustKeepModules(parts.Layout!, start, spec.Parameters);
                start.Match(spec.Parameters);
                start.MustBeOn(weights);
                say?.Invoke(FormattableString.Invariant(
                    $"starting from adapter {start.Directory}: lora_r {arguments.LoraR}, ")
                    + FormattableString.Invariant(
                        $"lora_alpha {arguments.LoraAlpha}, lora_dropout {arguments.LoraDropout}")
                    + (arguments.TrainedWhole is { Count: > 0 } whole
                        ? $", modules_to_save {string.Join(' ', whole)}" : ""));
            }

            if (parts.OfTied(spec.Parameters) is { } tied) say?.Invoke(tied);
            return new BaseModel(spec, weights, start, parts, storage)
            {
                Optimizer = TunedModel.OptimizerOf(arguments),
                Kind = new(spec.Parameters, storage, Quantisation.Of(arguments), weights),
                Untouched = [.. weights.Tensors.Where(t => spec.Parameters.IsUntouched(t.Name))],
                Saved = adapter is null
                    ? SavedFiles.Read(folder, spec, arguments, storage, say)
                    : SavedFiles.Read(
                        folder, spec, null, storage, say, ResultFiles.IsTokenizer),
            };
        }
        catch
        {
            start?.Dispose();
            weights.Dispose();
            throw;
        }
    }

    /// <summary>
    /// What there is to say of a GPU that computes in float32 although the weights have 16 bits.
    /// </summary>
    public string? Widened(OpenDevice device) =>
        device.FreeBytes is null || device.Device.Activations != DType.F32 || Storage != DType.F32
            || !Weights.Tensors.Any(t => t.Shape.Rank > 1 && t.Type == DType.BF16) ? null
        : "the weights are bfloat16, the GPU computes in float32: bf16=true is several times "
            + "faster and takes half the memory";

    /// <summary>Refuses a device whose free memory the weights alone exceed.</summary>
    /// <param name="device">Where to.</param>
    /// <param name="arguments">Say what stays in the machine's memory.</param>
    /// <param name="isOpen">Whether what they leave open may stay there too.</param>
    /// <exception cref="RunException">Says what is needed, free, and takes less.</exception>
    public void MustFitOn(OpenDevice device, TrainArguments arguments, bool isOpen)
    {
        long needed = Bytes(!isOpen ? arguments : arguments with
        {
            StreamWeights = arguments.StreamWeights ?? StreamedWeights.True,
            OffloadOptimizer = arguments.OffloadOptimizer ?? true,
            OffloadParam = arguments.OffloadParam
                ?? arguments.StreamWeights is null or StreamedWeights.True,
        });
        if (device.FreeBytes is not { } free || needed <= free) return;
        throw new RunException(
            $"out of memory: weights, gradients and optimizer state take {RunPlaces.Gib(needed)}, "
            + $"{RunPlaces.Gib(free)} are free on {device.Name}; bf16, use_lora, optim=adamw_8bit, "
            + "offload_optimizer or offload_param take less, and device=cpu uses the machine's "
            + "memory");
    }

    /// <summary>
    /// Tells the model from others, by its weights and the files that say what it computes; known
    /// once it is loaded.
    /// </summary>
    public string Identity { get; private set; } = "";

    /// <summary>Closes what no save needs, and frees what reading took.</summary>
    /// <exception cref="InputException">
    /// The weights were changed while they were read, or cannot be read.
    /// </exception>
    public void EndLoading()
    {
        foreach (SafetensorsFile file in Weights.Files) file.Trim();
        if (HasChanged)
            throw new InputException(
                $"{Weights.Directory}: its weights were changed while they were read; start again");
        Start?.Dispose();
        Identity = Identify();
        if (Parts.Config is not null
            || (Parts.Tensors.Count == Spec.Parameters.All.Count && Untouched.Count == 0))
            Weights.Dispose();
    }

    public void Dispose()
    {
        Start?.Dispose();
        Weights.Dispose();
    }

    private bool IsSplit(string weight) => Parts.Config?.Start.Splits == true
        && weight.EndsWith(".weight", StringComparison.Ordinal)
        && Parts.Adapters.Find(weight[..^".weight".Length]) is not null;

    private string Identify()
    {
        using var hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
        try
        {
            foreach (SafetensorsFile file in
                Weights.Files.OrderBy(file => file.Path, StringComparer.Ordinal))
                hash.AppendData(Encoding.ASCII.GetBytes(file.Digest()));
        }
        catch (IOException failure)
        {
            throw new InputException(
                $"{Spec.Directory}: cannot read: {Messages.OneLine(failure.Message)}", failure);
        }

        foreach (string name in (string[])["config.json", "tokenizer.json", "tokenizer.model",
            "tokenizer_config.json", Spec.Family.ProcessorFile(Spec.Directory).Name])
        {
            try
            {
                hash.AppendData(SHA256.HashData(
                    InputFile.ReadAll(Path.Combine(Spec.Directory, name), MostSmallBytes)));
            }
            catch (InputException)
            {
                // What the model needs was read before; the others may be missing.
            }
        }

        return Convert.ToHexStringLower(hash.GetHashAndReset());
    }

    // What is trained needs more bits than these, and a whole model is saved in one form.
    private static void RefuseQuantised(Checkpoint weights, TunedParts parts)
    {
        if (weights.Tensors.FirstOrDefault(t => t is PackedTensor) is not { } packed) return;
        if (parts.Config is null)
            throw new InputException($"{packed.Place} is quantised, which cannot be trained whole: "
                + "set use_lora, or make the model whole first with cpmx merge --dequantize");
        if (parts.Config.Start.Splits)
            throw new InputException($"{packed.Place} is quantised, of which init_lora_weights="
                + $"{parts.Config.Start.Text} can take nothing out: leave it out, or make the "
                + "model whole first with cpmx merge --dequantize");
        foreach (TunedTensor tensor in parts.Tensors)
            if (weights.Find(tensor.Name) is PackedTensor trained)
                throw new InputException($"{trained.Place} is quantised, which cannot be trained: "
                    + "leave its module out of modules_to_save, or make the model whole first with "
                    + "cpmx merge --dequantize");
    }

    private long StateBytes(TunedTensor tensor) =>
        tensor.StatesOf(Optimizer).Sum(state => state.Spec.Bytes);

    private long Bytes(TrainArguments arguments)
    {
        bool paged = Optimizer.Paged || arguments.OffloadOptimizer == true;
        bool offloads = arguments.OffloadParam == true;
        var trained = Parts.Tensors.Select(t => t.Name).ToHashSet(StringComparer.Ordinal);
        ParameterTable table = Spec.Parameters;
        long frozen = Weights.Tensors.Where(t => !trained.Contains(t.Name)
            && !table.IsUntouched(t.Name)
            && !(arguments.Streams && table.IsInBlock(t.Name))
            && !(arguments.EmbeddingsInHost && table.IsLookedUp(t.Name))).Sum(Kind.Bytes);
        const int gradient = 4;
        return frozen + Parts.Tensors.Sum(t =>
            (paged ? 0 : StateBytes(t) + (t.Shape.Count * MasterBytes(t)))
            + (offloads && t.Place != TunedPlace.Elsewhere ? 0
                : t.Shape.Count * (t.Type.Size() + gradient)));
    }

    private static int MasterBytes(TunedTensor tensor) => tensor.Type == DType.F32 ? 0 : 4;
}
