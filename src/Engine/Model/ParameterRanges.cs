using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Updates;

namespace MiniCpmNative.Engine.Model;

/// <summary>Where a trained tensor stands in the model, by which it may lie in host
/// memory.</summary>
public enum TunedPlace
{
    /// <summary>Anywhere; it never does.</summary>
    Elsewhere,

    /// <summary>In a block that runs at once, which it passes through the device with.</summary>
    Block,

    /// <summary>Its rows are looked up, a few of many: kernels do so over the bus.</summary>
    LookedUp,
}

/// <summary>
/// A tensor that is trained: its name in the model (an official parameter, or a module's lora_A or
/// lora_B), shape, the type it is stored and saved in, whether weight decay applies to it; Rate
/// times the run's learning rate is its own, Decay its weight decay. IsEmbedding: PyTorch's class
/// of it is nn.Embedding, whose moments always have 32 bits.
/// </summary>
public sealed record TunedTensor(string Name, Shape Shape, DType Type, bool Decays,
    double Rate = 1, double Decay = 0, bool IsEmbedding = false,
    TunedPlace Place = TunedPlace.Elsewhere)
{
    /// <summary>What an optimizer keeps of it, by name.</summary>
    public IEnumerable<(string Name, Spec Spec)> StatesOf(OptimizerForm optimizer) =>
        optimizer.StatesOf(MomentsOf(optimizer), Shape);

    /// <summary>The type of its moments.</summary>
    public DType MomentsOf(OptimizerForm optimizer) => optimizer.MomentsOf(Shape, IsEmbedding);
}

/// <summary>
/// The trained tensors as flat ranges: values in their storage type, gradients in F32, what the
/// optimizer keeps, and an F32 master copy of values that are stored in 16 bits. F32 values on a
/// device that computes in 16 bits (adapters) have a rounded copy, which the optimizer writes, so
/// that no product casts them. Clipping, AdamW and sharding become loops over a few ranges. F32
/// tensors come first, then the 16-bit ones; within a type those that have a place in host memory
/// come last; then those that decay come first, then those of one rate, so that a range is few
/// runs.
///
/// All of them lie on the device, unless they are offloaded: then what only the optimizer reads
/// lies in host memory (<see cref="OptimizerForm.Paged"/>), and so do values and gradients of
/// blocks and of tables that are looked up. Kernels of the optimizer reach it over the bus. Order
/// and arithmetic are the same, to the bit.
/// </summary>
public sealed class ParameterRanges
{
    // A stretch is a matrix of such rows: one axis may not hold the number of elements. Every
    // tensor begins at a multiple, 64-byte aligned in each of the ranges.
    private const int Row = 32;

    private readonly Device _device;
    private readonly Run[] _runs;
    private readonly Tensor[] _gradients;
    private readonly Dictionary<string, (TunedTensor Tensor, long Offset)> _places = [];
    private readonly Dictionary<string, Run> _runOf = [];

    /// <param name="device">Computes with them.</param>
    /// <param name="tensors">What is trained.</param>
    /// <param name="optimizer">What is kept of them; AdamW in F32 when not given.</param>
    /// <param name="learns">False where values are only set and read: nothing else is kept.</param>
    /// <param name="offloads">Whether values and gradients that have a place in host memory lie
    /// there.</param>
    public ParameterRanges(
        Device device, IEnumerable<TunedTensor> tensors, OptimizerForm? optimizer = null,
        bool learns = true, bool offloads = false)
    {
        (_device, Learns, Offloads, Optimizer) = (device, learns, offloads, optimizer ?? new());
        int alignment = Optimizer.Alignment;
        List = [.. tensors.OrderBy(t => t.Type != DType.F32)
            .ThenBy(t => t.Place != TunedPlace.Elsewhere).ThenBy(t => !t.Decays)
            .ThenBy(t => t.Rate).ThenBy(t => t.Decay).ThenBy(t => t.MomentsOf(Optimizer))];
        long offset = 0;
        var runs = new List<Run>();
        var gradients = new List<Tensor>();
        foreach (var stretch in List.GroupBy(
            t => (t.Type, HasHome: t.Place != TunedPlace.Elsewhere)))
        {
            int first = runs.Count;
            long start = offset;
            foreach (var group in stretch.GroupBy(t => (t.Decays, t.Rate, t.Decay,
                Moments: t.MomentsOf(Optimizer), Alone: Optimizer.IsPerTensor ? t.Name : "")))
            {
                long begin = offset;
                foreach (TunedTensor tensor in group)
                {
                    _places.Add(tensor.Name, (tensor, offset));
                    Count += tensor.Shape.Count;
                    offset += (tensor.Shape.Count + alignment - 1) / alignment * alignment;
                }

                var run = new Run(
                    stretch.Key.Type, group.Key.Rate, group.Key.Decay, begin, offset - begin,
                    Optimizer.IsPerTensor ? group.Single().Shape : Rows(offset - begin));
                if (learns) run.States = [.. Optimizer.StatesOf(group.Key.Moments, run.Shape)
                    .Select(s => Allocate(s.Spec, s.Name, Optimizer.Paged, Held.Moments))];
                foreach (TunedTensor tensor in group) _runOf.Add(tensor.Name, run);
                runs.Add(run);
            }

            Range range = NewRange(
                start, Rows(offset - start), stretch.Key.Type, offloads && stretch.Key.HasHome);
            foreach (Run run in runs[first..]) run.Range = range;
            if (learns) gradients.Add(range.Gradients);
        }

        _runs = [.. runs];
        _gradients = [.. gradients];
    }

    /// <summary>In the order of the ranges.</summary>
    public IReadOnlyList<TunedTensor> List { get; }

    /// <summary>Stretches of equal treatment.</summary>
    public ReadOnlySpan<Run> Runs => _runs;

    /// <summary>Trained numbers, padding not counted.</summary>
    public long Count { get; }

    /// <summary>Bytes of all ranges on the device.</summary>
    public long Bytes { get; private set; }

    /// <summary>Of these, what the optimizer keeps but masters.</summary>
    public long StateBytes { get; private set; }

    /// <summary>Of these, gradients.</summary>
    public long GradientBytes { get; private set; }

    /// <summary>Bytes in the host's memory.</summary>
    public long HostBytes { get; private set; }

    /// <summary>What is kept of each tensor.</summary>
    public OptimizerForm Optimizer { get; }

    /// <summary>All gradients, F32, in the order of the list.</summary>
    public ReadOnlySpan<Tensor> Gradients => _gradients;

    /// <summary>Whether they have gradients and an optimizer's state.</summary>
    public bool Learns { get; }

    /// <summary>Whether values and gradients that have a place in host memory lie there.</summary>
    public bool Offloads { get; }

    public bool Contains(string name) => _places.ContainsKey(name);

    /// <summary>The stored values of a tensor.</summary>
    public Tensor Value(string name) => Part(_runOf[name].Range.Values, name);

    /// <summary>What operations take: the stored values, or their rounded copy.</summary>
    public Tensor Operand(string name) =>
        Part(_runOf[name].Range is { Rounded.Exists: true } range
            ? range.Rounded : _runOf[name].Range.Values, name);

    public Tensor Gradient(string name) => Part(_runOf[name].Range.Gradients, name);

    /// <summary>What the optimizer keeps of a tensor, by name.</summary>
    public IEnumerable<(string Name, Tensor Tensor)> States(string name)
    {
        (TunedTensor tensor, long offset) = _places[name];
        Run run = _runOf[name];
        // Scales are fewer than elements, by the number that share one.
        return tensor.StatesOf(Optimizer).Zip(run.States, (state, all) => (state.Name, Part(
            all, (offset - run.Begin) * all.Shape.Count / run.Count, state.Spec.Shape)));
    }

    /// <summary>
    /// The F32 values that the optimizer changes: the masters, or the values themselves.
    /// </summary>
    public Tensor Master(string name) => _places[name].Tensor.Type == DType.F32
        ? Value(name) : Part(_runOf[name].Range.Masters, name);

    /// <summary>Whether a tensor passes through the device with its block.</summary>
    public bool Visits(string name) => Offloads && _places[name].Tensor.Place == TunedPlace.Block;

    /// <summary>Sets a tensor: its F32 value and, rounded, the one that is stored.</summary>
    public void Write(string name, ReadOnlySpan<float> values)
    {
        Tensor master = Learns || _places[name].Tensor.Type == DType.F32
            ? Master(name) : Value(name);
        Tensor operand = Operand(name);
        _device.WriteFloats(operand, values);
        if (operand != master) _device.WriteFloats(master, values);
        _device.ForgetVisiting();
    }

    /// <summary>
    /// A stretch of what operations take, and of its masters: none where that is F32 itself.
    /// </summary>
    public static (Tensor Weights, Tensor Masters) Updated(Run run)
    {
        Tensor stored = Part(run.Range.Values, run);
        if (run.Type != DType.F32) return (stored, Part(run.Range.Masters, run));
        return run.Range.Rounded.Exists
            ? (Part(run.Range.Rounded, run), stored) : (stored, Tensor.None);
    }

    /// <summary>The gradients of a stretch.</summary>
    public static Tensor GradientsOf(Run run) => Part(run.Range.Gradients, run);

    private static Shape Rows(long count) => new(checked((int)(count / Row)), Row);

    private static Tensor Part(Tensor range, long offset, Shape shape) =>
        new(range.Data + (nint)(offset * range.Type.Size()), new Spec(range.Type, shape));

    private static Tensor Part(Tensor range, Run run) =>
        Part(range, run.Begin - run.Range.Begin, run.Shape);

    private Tensor Part(Tensor range, string name)
    {
        (TunedTensor tensor, long offset) = _places[name];
        return Part(range, offset - _runOf[name].Range.Begin, tensor.Shape);
    }

    private Range NewRange(long begin, Shape shape, DType type, bool inHost)
    {
        bool isWide = type == DType.F32;
        return new(begin,
            Allocate(new(type, shape), "trained values", inHost, Held.Values),
            isWide && _device.Activations == DType.BF16
                ? Allocate(new(DType.BF16, shape), "rounded values", inHost, Held.Values)
                : Tensor.None,
            Learns ? Allocate(new(DType.F32, shape), "gradients", inHost, Held.Gradients)
                : Tensor.None,
            Learns && !isWide
                ? Allocate(new(DType.F32, shape), "master weights", Optimizer.Paged, Held.Values)
                : Tensor.None);
    }

    private Tensor Allocate(Spec spec, string name, bool inHost, Held held)
    {
        if (inHost && _device.HostTensor(spec, name) is { Exists: true } tensor)
        {
            HostBytes += spec.Bytes;
            return tensor;
        }

        Bytes += spec.Bytes;
        if (held == Held.Gradients) GradientBytes += spec.Bytes;
        if (held == Held.Moments) StateBytes += spec.Bytes;
        return _device.Allocate(spec, name);
    }

    private enum Held { Values, Gradients, Moments }

    /// <summary>
    /// Neighbouring tensors of one type, rate, decay and type of moments, as elements of the
    /// ranges, seen in a shape: the tensor's own where the optimizer takes them one by one. States
    /// is what it keeps of them.
    /// </summary>
    public sealed record Run(
        DType Type, double Rate, double Decay, long Begin, long Count, Shape Shape)
    {
        public Tensor[] States { get; set; } = [];

        internal Range Range { get; set; } = null!;
    }

    /// <summary>Runs of one type in one place, from an element on.</summary>
    internal sealed record Range(
        long Begin, Tensor Values, Tensor Rounded, Tensor Gradients, Tensor Masters);
}
