using MiniCpmNative.Engine.Generate;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Tests;

/// <summary>
/// A model of BF16 without weights that is asked on a device that only counts, its steps' memory
/// seen to as on a GPU.
/// </summary>
internal sealed class CountedModel : IDisposable
{
    private readonly CudaContext _context;

    /// <param name="spec">The model.</param>
    /// <param name="adapted">Its adapter's parts; null for none.</param>
    /// <param name="kind">How weights of linear layers are kept; null keeps them dense.</param>
    public CountedModel(ModelSpec spec, TunedParts? adapted = null, IWeightKind? kind = null)
    {
        _context = CountingCuda.Context(RealModel.Card);
        Device = CountingCuda.Device(_context, DType.BF16, RealModel.Card.Hopper);
        var values = new ParameterRanges(Device, adapted?.Tensors ?? [], learns: false);
        Trained = values.Bytes;
        var options = new LoadOptions
        {
            Trainables = values,
            Adapters = adapted?.Adapters ?? Adapters.None,
            Kind = kind,
        };
        Model = LoadedModel.Plan(
            new OpenDevice(Device, "counted", _context), spec, _ => DType.BF16, options);
        Counter = new StepCounter(Device, spec, _ => DType.BF16, options);
    }

    public CudaDevice Device { get; }

    public LoadedModel Model { get; }

    public StepCounter Counter { get; }

    /// <summary>Bytes of what was trained.</summary>
    public long Trained { get; }

    /// <summary>Bytes of the device that are taken.</summary>
    public long Held => _context.HeldBytes;

    public void Dispose()
    {
        Counter.Dispose();
        Model.Dispose();
    }
}
