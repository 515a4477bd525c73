using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Engine.Train;

/// <summary>Bytes of device memory by what they hold.</summary>
/// <param name="Trained">Values that are trained, and masters of those in 16 bits.</param>
/// <param name="Activations">The step's memory: activations, their gradients, scratch.</param>
/// <param name="Workspace">Inputs, tables, and what libraries work in.</param>
public sealed record MemoryParts(
    long Weights, long Trained, long Gradients, long Moments, long Activations, long Workspace)
{
    public long Total =>
        Weights + Trained + Gradients + Moments + Activations + Workspace;
}

/// <summary>What a dry run needs to know of a model.</summary>
/// <param name="StoredAs">The type in which a frozen tensor is kept, by its name.</param>
/// <param name="Kind">Makes frozen weights of linear layers; null keeps them dense.</param>
public sealed record PlannedModel(
    ModelSpec Spec, TunedParts Parts, Func<string, DType> StoredAs, IWeightKind? Kind = null);

/// <summary>
/// A training on a device that only counts: the same model, tape, optimizer and launches as on the
/// card, without a number in them.
/// </summary>
public sealed class DryRun : IDisposable
{
    private readonly CudaContext _context;
    private readonly CudaDevice _device;
    private readonly LoadedModel _model;
    private readonly Trainer _trainer;
    private readonly Tensor[] _perRow = new Tensor[2];
    private readonly MemoryParts _fixed;

    /// <param name="arguments">The run's configuration.</param>
    /// <param name="model">What is trained.</param>
    /// <param name="card">The card, or one like it.</param>
    /// <param name="together">Micro-batches that go through the layers together.</param>
    public DryRun(
        TrainArguments arguments, PlannedModel model, CardFigures card, int together = 1)
    {
        Arguments = arguments;
        TunedParts parts = model.Parts;
        _context = CountingCuda.Context(card);
        _device = CountingCuda.Device(
            _context, DeviceSource.ActivationsOf(arguments), card.Hopper);
        var trainables = new ParameterRanges(
            _device, parts.Tensors, TunedModel.OptimizerOf(arguments),
            offloads: arguments.OffloadParam == true);
        Recomputation = parts.NewRecomputation(model.Spec, arguments);
        long before = _context.HeldBytes;
        _model = LoadedModel.Plan(
            new OpenDevice(_device, card.Name, _context), model.Spec, model.StoredAs, new()
            {
                Trainables = trainables,
                Adapters = parts.Adapters,
                Recomputation = Recomputation,
                Kind = model.Kind,
                Streams = arguments.Streams,
                EmbeddingsInHost = arguments.EmbeddingsInHost,
            });
        long weights = _context.HeldBytes - before;
        _trainer = new Trainer(arguments, _model, trainables) { Together = together };
        long moments = trainables.StateBytes;
        long gradients = trainables.GradientBytes;
        _fixed = new(weights, trainables.Bytes - moments - gradients, gradients, moments, 0, 0);
    }

    /// <summary>What layers compute again in backward; may change between steps.</summary>
    public Recomputation Recomputation { get; }

    public TrainArguments Arguments { get; }

    /// <inheritdoc cref="CudaDevice.KeepsUnpacked"/>
    public bool KeepsUnpacked
    {
        get => _device.KeepsUnpacked;
        set => _device.KeepsUnpacked = value;
    }

    /// <inheritdoc cref="CudaDevice.UnpackedBytes"/>
    public long UnpackedBytes => _device.UnpackedBytes;

    /// <inheritdoc cref="CudaDevice.UnpackedRoom"/>
    public long UnpackedRoom => _device.UnpackedRoom;

    /// <inheritdoc cref="CudaDevice.UnpackedHeld"/>
    public long UnpackedHeld => _device.UnpackedHeld;

    /// <inheritdoc cref="CudaDevice.UnpackedWanted"/>
    public long UnpackedWanted => _device.UnpackedWanted;

    /// <inheritdoc cref="CudaDevice.HoldUnpacked"/>
    public void HoldUnpacked(long bytes) => _device.HoldUnpacked(bytes);

    /// <summary>Bytes of the machine's memory that kernels reach.</summary>
    public long HostBytes => _device.HostBytes;

    /// <summary>Bytes of weights that lie in host memory.</summary>
    public long StreamedBytes => _device.StreamedBytes;

    /// <summary>Bytes of blocks that steps brought over so far.</summary>
    public long StreamedSoFar => _device.StreamedSoFar;

    /// <summary>Bytes of gradients that steps took back so far.</summary>
    public long StreamedBack => _device.StreamedBack;

    /// <inheritdoc cref="Trainer.Together"/>
    public int Together => _trainer.Together;

    /// <summary>Sees what steps queue.</summary>
    public ILaunchWatch? Watch
    {
        get => _device.Watch;
        set => _device.Watch = value;
    }

    /// <summary>The operation in which the last step needed the most.</summary>
    public string Fullest => _device.Step.Fullest;

    /// <summary>Bytes of the step's memory that a training step on batches needs.</summary>
    public long Train(params ReadOnlySpan<Batch> batches)
    {
        _device.Step.ResetNeeded();
        _trainer.Step(0, batches, learningRate: 0);
        return _device.Step.Needed;
    }

    /// <summary>The same of an evaluation.</summary>
    public long Evaluate(Batch batch)
    {
        _device.Step.ResetNeeded();
        _model.Graph.Recording = false;
        _model.Loss(batch, _perRow);
        _model.Graph.EndStep();
        _model.Graph.Recording = true;
        return _device.Step.Needed;
    }

    /// <summary>All memory, with so many bytes for steps; inputs are those of the steps so
    /// far.</summary>
    public MemoryParts Parts(long stepBytes)
    {
        long held = _context.HeldBytes - _device.Step.Reserved, unpacked = _device.UnpackedRoom;
        return _fixed with
        {
            Weights = _fixed.Weights + unpacked,
            Activations = stepBytes,
            Workspace = held - _fixed.Total - unpacked,
        };
    }

    public void Dispose() => _model.Dispose();
}
