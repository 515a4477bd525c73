using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Engine.Generate;

/// <summary>
/// Sees to it that a GPU's memory for steps is what the steps of answers need, and no more: before
/// one of a new size runs, it runs on a device that only counts, through a model of the same
/// modules without weights. So a chat leaves the rest of the card to others.
/// </summary>
public sealed class StepCounter : IDisposable
{
    private readonly CudaDevice _device, _counted;
    private readonly LoadedModel _model;
    private readonly HashSet<(int, int, int, int, int)> _known = [];
    private KeyValueCache? _cache;

    /// <param name="device">Whose memory it sees to.</param>
    /// <param name="spec">The model.</param>
    /// <param name="storedAs">The type in which a frozen tensor is kept, by its name.</param>
    /// <param name="options">How the model was loaded.</param>
    public StepCounter(
        CudaDevice device, ModelSpec spec, Func<string, DType> storedAs, LoadOptions options)
    {
        _device = device;
        CudaContext context = CountingCuda.Context(device.Card);
        _counted = CountingCuda.Device(context, device.Activations, device.Kernels.Hopper);
        _model = LoadedModel.Plan(
            new OpenDevice(_counted, "counted", context), spec, storedAs, options with
            {
                Trainables = new ParameterRanges(
                    _counted, options.Trainables?.List ?? [], learns: false),
            });
        _model.Graph.Recording = false;
    }

    /// <summary>Takes what the next step over a cache needs.</summary>
    /// <exception cref="DeviceMemoryException">The device has not that much left.</exception>
    public void Reserve(Batch batch, KeyValueCache cache)
    {
        int sequences = cache.Lengths.Length;
        if (!_known.Add((batch.Tokens.Count, batch.LabelRows.Count, Shown(batch), sequences,
            cache.Room))) return;
        if (_cache?.Lengths.Length != sequences || _cache.Room != cache.Room)
            _cache = new KeyValueCache(_counted, _model.Spec.Decoder, sequences, cache.Room);
        _cache.Clear();
        _counted.Step.ResetNeeded();
        _model.Model.LabelLogits(_model.Graph, _model.Hidden(batch, cache: _cache));
        _model.Graph.EndStep();
        _device.ReserveStep(_counted.Step.Needed);
    }

    /// <summary>Takes what moving a cache's rows needs.</summary>
    public void ReserveMoves(KeyValueCache cache) => _device.ReserveStep(cache.MoveBytes);

    public void Dispose() => _model.Dispose();

    // The sizes of pictures and sounds, and which frames go together.
    private static int Shown(Batch batch)
    {
        var sizes = new HashCode();
        foreach (int size in batch.Grids.Span) sizes.Add(size);
        foreach (ViewTime time in batch.Times.Span) sizes.Add(time.Joined);
        for (int clip = 0; clip < batch.Clips; clip++) sizes.Add(batch.ClipFrames(clip));
        return sizes.ToHashCode();
    }
}
