using System.Runtime.InteropServices;
using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Quantised;
using MiniCpmNative.Kernels.Updates;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// A model on a device, ready to train or evaluate:
/// what a configuration loads before the first row.
/// </summary>
public sealed class TunedModel : IDisposable
{
    private readonly LoadedModel _loaded;
    private readonly SplitWeights? _split;
    private readonly bool _owns;

    private TunedModel(
        BaseModel source, LoadedModel loaded, bool owns, ParameterRanges trainables,
        Recomputation recomputation, SplitWeights? split) =>
        (Base, _loaded, _owns, ParameterRanges, Recomputation, _split) =
            (source, loaded, owns, trainables, recomputation, split);

    /// <summary>What it was loaded from.</summary>
    public BaseModel Base { get; }

    public Device Device => _loaded.Device;

    /// <summary>The device in words.</summary>
    public string DeviceName => _loaded.DeviceName;

    public Graph Graph => _loaded.Graph;

    public ModelSpec Spec => _loaded.Spec;

    public TunedParts Parts => Base.Parts;

    public ParameterRanges ParameterRanges { get; }

    /// <summary>What layers compute again in backward; may change between steps.</summary>
    public Recomputation Recomputation { get; }

    public MiniCpmModel Model => _loaded.Model;

    /// <summary>The model without what trains it, for generation.</summary>
    public LoadedModel Loaded => _loaded;

    /// <summary>Trainable and frozen numbers together, adapters included.</summary>
    public long TotalParameters => Spec.Parameters.Count + Base.Untouched.Sum(t => t.Count)
        + Parts.Adapters.List.Sum(a => a.Count)
        + Parts.Adapters.Tokens.Sum(t => (long)t.Ids.Count * t.Cols);

    /// <summary>Storage type of weights: fp16, bf16, else F32, as the official flags say.</summary>
    public static DType StorageOf(TrainArguments arguments) =>
        arguments.Fp16 ? DType.F16 : arguments.Bf16 ? DType.BF16 : DType.F32;

    /// <summary>What the optimizer keeps, as optim says it.</summary>
    public static OptimizerForm OptimizerOf(TrainArguments arguments)
    {
        OptimizerForm form = Form(arguments.Optim);
        return arguments.OffloadOptimizer == true ? form with { Paged = true } : form;
    }

    private static OptimizerForm Form(OptimizerKind optim) => optim switch
    {
        OptimizerKind.AdamwBf16 => new(Moments: DType.BF16),
        OptimizerKind.Adamw8bit or OptimizerKind.AdamwBnb8bit =>
            new(UpdateRule.AdamWDecaysLast, DType.U8),
        OptimizerKind.PagedAdamw8bit => new(UpdateRule.AdamWDecaysLast, DType.U8, Paged: true),
        OptimizerKind.PagedAdamw32bit or OptimizerKind.PagedAdamw =>
            new(UpdateRule.AdamWDecaysLast, Paged: true),
        OptimizerKind.Lion32bit or OptimizerKind.Lion => new(UpdateRule.Lion),
        OptimizerKind.Lion8bit => new(UpdateRule.Lion, DType.U8),
        OptimizerKind.PagedLion32bit => new(UpdateRule.Lion, Paged: true),
        OptimizerKind.PagedLion8bit => new(UpdateRule.Lion, DType.U8, Paged: true),
        OptimizerKind.Sgd => new(UpdateRule.Sgd),
        OptimizerKind.Adafactor => new(UpdateRule.Adafactor),
        _ => new(),
    };

    /// <param name="arguments">Say what is loaded where, and what of it is trained.</param>
    /// <param name="devices">Opens the device; null takes the machine's.</param>
    /// <param name="say">Takes a line on the choice of the device.</param>
    /// <param name="kind">Makes frozen weights of linear layers; null as the configuration
    /// says.</param>
    /// <exception cref="InputException">The model, the adapter, the device or what is to be trained
    /// is unusable.</exception>
    public static TunedModel Open(
        TrainArguments arguments, DeviceSource? devices = null, Action<string>? say = null,
        IWeightKind? kind = null)
    {
        BaseModel source = BaseModel.Open(arguments, say);
        OpenDevice? device = null;
        try
        {
            device = (devices ?? DeviceSource.Default).Open(arguments, say);
            source.MustFitOn(device, arguments, isOpen: false);
            if (source.Widened(device) is { } line) say?.Invoke(line);
            return Load(source, device, arguments, owns: true, kind, say: say);
        }
        catch
        {
            device?.Dispose();
            source.Dispose();
            throw;
        }
    }

    /// <summary>Loads onto a device that is open.</summary>
    /// <param name="source">What is loaded.</param>
    /// <param name="device">Where to.</param>
    /// <param name="arguments">The run's configuration.</param>
    /// <param name="owns">Whether source and device are disposed with the model.</param>
    /// <param name="kind">See <see cref="LoadOptions.Kind"/>.</param>
    /// <param name="resumeFrom">The checkpoint that the run goes on from, or null.</param>
    /// <param name="say">Takes lines on what takes long.</param>
    /// <exception cref="InputException">The weights cannot be read.</exception>
    public static TunedModel Load(
        BaseModel source, OpenDevice device, TrainArguments arguments, bool owns = false,
        IWeightKind? kind = null, string? resumeFrom = null, Action<string>? say = null)
    {
        TunedParts parts = source.Parts;
        var trainables = new ParameterRanges(device.Device, parts.Tensors, OptimizerOf(arguments),
            offloads: arguments.OffloadParam == true);
        Recomputation recomputation = parts.NewRecomputation(source.Spec, arguments);
        SplitWeights? split = Split(source, arguments, resumeFrom, say);
        var norms = new FrozenNorms(source.Weights, source.Storage, kind ?? source.Kind);
        LoadedModel loaded = LoadedModel.Load(
            device, source.Spec, source.Weights, source.Storage, new()
            {
                Trainables = trainables,
                Adapters = parts.Adapters,
                Recomputation = recomputation,
                Kind = kind ?? source.Kind,
                Split = split,
                Norms = norms,
                Streams = arguments.Streams,
                EmbeddingsInHost = arguments.EmbeddingsInHost,
            });
        var model = new TunedModel(source, loaded, owns, trainables, recomputation, split);
        foreach (TunedTensor tensor in trainables.List)
            if (source.Weights.Find(tensor.Name) is { } stored)
                trainables.Write(tensor.Name, stored.ToFloats());
        parts.Adapters.Initialise(
            trainables, (ulong)arguments.Seed, arguments.InitLoraWeights, split,
            norms.Of);
        foreach (TokenTarget tokens in parts.Adapters.Tokens)
            trainables.Write(
                tokens.Name, source.Weights.Get(tokens.Module.Weight).RowsToFloats(tokens.Ids));
        if (source.Start is { } start) model.CopyFrom(start);
        source.EndLoading();
        return model;
    }

    /// <summary>Takes the trained values of an adapter of the same layout.</summary>
    /// <exception cref="InputException">Its tensors are not those that are trained.</exception>
    public void CopyFrom(AdapterFile adapter)
    {
        MustBeOf(Parts, adapter);
        foreach (var (name, stored) in adapter.Match(Spec.Parameters))
        {
            if (!ParameterRanges.Contains(name))
                throw new InputException($"{adapter.Directory}: {name} is not trained in this run");
            stored.MustBeFinite(ParameterRanges.Value(name).Type);
            float[] values = Parts.Layout!.Tensor(name).Own(stored.ToFloats());
            ParameterRanges.Write(name, _split is null
                ? values : SplitWeights.Trained(Parts.Adapters, name, values));
        }
    }

    /// <summary>The trained tensors as they go into a file.</summary>
    public IEnumerable<TensorToSave> Trained()
    {
        foreach (TunedTensor tensor in ParameterRanges.List)
        {
            Tensor value = ParameterRanges.Value(tensor.Name);
            TensorToSave saved = Parts.Layout?.Tensor(tensor.Name) is { IsTurned: true } turned
                ? new(tensor.Name, DType.F32, turned.Shape, stream => stream.Write(
                    MemoryMarshal.AsBytes<float>(turned.Filed(Device.ReadFloats(value)))))
                : ToSave(tensor.Name, value);
            yield return _split is not null
                && Parts.Adapters.Owner(tensor.Name) is { } adapter
                ? _split.ToSave(saved, adapter, () => Device.ReadFloats(value)) : saved;
        }
    }

    // A run that goes on splits as it began to, whatever the processor.
    private static SplitWeights? Split(
        BaseModel source, TrainArguments arguments, string? resumeFrom, Action<string>? say)
    {
        TunedParts parts = source.Parts;
        if (parts.Config?.Start.Splits != true) return null;
        if (resumeFrom is null)
            return SplitWeights.Of(parts.Adapters, parts.Config.Start, source.Weights,
                source.Storage, (ulong)arguments.Seed, say);
        using AdapterFile saved = AdapterFile.Open(resumeFrom);
        MustBeOf(parts, saved);
        return SplitWeights.Read(parts.Adapters, saved.Match(source.Spec.Parameters));
    }

    private static void MustBeOf(TunedParts parts, AdapterFile adapter)
    {
        AdapterConfig its = adapter.Config;
        if (parts.Config?.AsSaved() is not { } config) return;
        if ((its.Rank, its.Alpha) != (config.Rank, config.Alpha))
            throw new InputException(FormattableString.Invariant(
                $"{adapter.Directory}: was made with lora_r {its.Rank} and lora_alpha {its.Alpha}, ")
                + FormattableString.Invariant($"this run has {config.Rank} and {config.Alpha}"));
        if ($"{its.Tokens}" != $"{config.Tokens}")
            throw new InputException($"{adapter.Directory}: was made with trainable_token_indices "
                + $"{its.Tokens}, this run has {config.Tokens}");
        // Patterns and rsLoRA may still differ.
        foreach (Adapter own in parts.Adapters.List)
            if ((its.RankOf(own.Module), its.ScaleOf(own.Module))
                != (config.RankOf(own.Module), config.ScaleOf(own.Module)))
                throw new InputException(FormattableString.Invariant(
                    $"{adapter.Directory}: was made with rank {its.RankOf(own.Module)} and scale ")
                    + FormattableString.Invariant($"{its.ScaleOf(own.Module)} on {own.Module}, ")
                    + FormattableString.Invariant($"this run has {config.RankOf(own.Module)} and ")
                    + FormattableString.Invariant($"{config.ScaleOf(own.Module)}"));
    }

    /// <summary>A tensor of this device as it goes into a file, in its own type.</summary>
    public TensorToSave ToSave(string name, Tensor tensor) =>
        new(name, tensor.Type, tensor.Shape, stream =>
        {
            // In pieces: an array cannot hold the largest tensors.
            const int Piece = 16 << 20;
            long all = tensor.Spec.Bytes;
            var bytes = new byte[Math.Min(Piece, all)];
            for (long done = 0; done < all; done += Piece)
            {
                int count = (int)Math.Min(Piece, all - done);
                Device.Read(
                    new Tensor(tensor.Data + (nint)done, new Spec(DType.U8, new Shape(count))),
                    bytes.AsSpan(0, count));
                stream.Write(bytes, 0, count);
            }
        });

    /// <inheritdoc cref="LoadedModel.Hidden"/>
    public Tensor Hidden(Batch batch, ITensorProbe? probe = null) => _loaded.Hidden(batch, probe);

    /// <inheritdoc cref="LoadedModel.Loss"/>
    public Tensor Loss(Batch batch, Span<Tensor> perRow = default) => _loaded.Loss(batch, perRow);

    public void Dispose()
    {
        if (!_owns) return;
        _loaded.Dispose();
        Base.Dispose();
    }
}
