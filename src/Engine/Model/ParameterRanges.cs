using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Updates;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// A tensor that is trained: its name in the model (an official parameter, or a module's lora_A or
/// lora_B), shape, the type it is stored and saved in, whether weight decay applies to it; Rate
/// times the run's learning rate is its own, Decay its weight decay. IsEmbedding: PyTorch's class
/// of it is nn.Embedding, whose moments always have 32 bits.
/// </summary>
public sealed record TunedTensor(string Name, Shape Shape, DType Type, bool Decays,
    double Rate = 1, double Decay = 0, bool IsEmbedding = false)
{
    /// <summary>What an optimizer keeps of it, by name.</summary>
    public IEnumerable<(string Name, Spec Spec)> StatesOf(OptimizerForm optimizer) =>
        optimizer.StatesOf(MomentsOf(optimizer), Shape);

    /// <summary>The type of its moments.</summary>
    public DType MomentsOf(OptimizerForm optimizer) => optimizer.MomentsOf(Shape, IsEmbedding);
}

/// <summary>
/// The trained tensors as flat ranges on the device: values in their storage type, gradients in
/// F32, what the optimizer keeps, and an F32 master copy of values that are stored in 16 bits.
/// F32 values on a device that computes in 16 bits (adapters) have a rounded copy, which the
/// optimizer writes, so that no product casts them. Clipping, AdamW and sharding become loops over
/// a few ranges. F32 tensors come first, then the 16-bit ones; within a type, those that decay come
/// first, then those of one rate, so that a range is few runs.
/// </summary>
public sealed class ParameterRanges
{
    // A stretch is a matrix of such rows: one axis may not hold the number of elements. Every
    // tensor begins at a multiple, 64-byte aligned in each of the ranges.
    private const int Row = 32;

    private readonly Device _device;
    private readonly Run[] _runs;
    private readonly Dictionary<string, (TunedTensor Tensor, long Offset)> _places = [];
    private readonly Dictionary<string, Run> _runOf = [];
    private readonly Dictionary<DType, (Tensor Values, long Begin, long Count)> _values = [];

    /// <param name="device">Holds the ranges.</param>
    /// <param name="tensors">What is trained.</param>
    /// <param name="optimizer">What is kept of them; AdamW in F32 when not given.</param>
    /// <param name="learns">False where values are only set and read: nothing else is kept.</param>
    public ParameterRanges(
        Device device, IEnumerable<TunedTensor> tensors, OptimizerForm? optimizer = null,
        bool learns = true)
    {
        (_device, Learns, Optimizer) = (device, learns, optimizer ?? new());
        int alignment = Optimizer.Alignment;
        List = [.. tensors.OrderBy(t => t.Type != DType.F32).ThenBy(t => !t.Decays)
            .ThenBy(t => t.Rate).ThenBy(t => t.Decay).ThenBy(t => t.MomentsOf(Optimizer))];
        long offset = 0;
        var runs = new List<Run>();
        foreach (var group in List.GroupBy(
            t => (t.Type, t.Decays, t.Rate, t.Decay, Moments: t.MomentsOf(Optimizer),
                Alone: Optimizer.IsPerTensor ? t.Name : "")))
        {
            long begin = offset;
            foreach (TunedTensor tensor in group)
            {
                _places.Add(tensor.Name, (tensor, offset));
                Count += tensor.Shape.Count;
                offset += (tensor.Shape.Count + alignment - 1) / alignment * alignment;
            }

            var run = new Run(
                group.Key.Type, group.Key.Rate, group.Key.Decay, begin, offset - begin,
                Optimizer.IsPerTensor ? group.Single().Shape : Rows(offset - begin));
            if (learns) run.States = [.. Optimizer.StatesOf(group.Key.Moments, run.Shape)
                .Select(state => Keep(state.Spec, state.Name))];
            foreach (TunedTensor tensor in group) _runOf.Add(tensor.Name, run);
            runs.Add(run);
        }

        _runs = [.. runs];
        if (learns) Gradients = Allocate(DType.F32, offset, "gradients");
        foreach (var type in runs.GroupBy(r => r.Type))
        {
            long begin = type.First().Begin, count = type.Sum(r => r.Count);
            _values.Add(type.Key, (Allocate(type.Key, count, "trained values"), begin, count));
            if (type.Key == DType.F32 && device.Activations == DType.BF16)
                Rounded = Allocate(DType.BF16, count, "rounded values");
            if (type.Key == DType.F32 || !learns) continue;
            (MasterBegin, Masters) = (begin, Allocate(DType.F32, count, "master weights"));
        }
    }

    /// <summary>In the order of the ranges.</summary>
    public IReadOnlyList<TunedTensor> List { get; }

    /// <summary>Stretches of equal treatment.</summary>
    public ReadOnlySpan<Run> Runs => _runs;

    /// <summary>Trained numbers, padding not counted.</summary>
    public long Count { get; }

    /// <summary>Bytes of all ranges on the device.</summary>
    public long Bytes { get; private set; }

    /// <summary>Of these, what the optimizer keeps.</summary>
    public long StateBytes { get; private set; }

    /// <summary>Bytes that the optimizer keeps in the host's memory.</summary>
    public long HostBytes { get; private set; }

    /// <summary>What is kept of each tensor.</summary>
    public OptimizerForm Optimizer { get; }

    public Tensor Gradients { get; }

    /// <summary>F32 copies of the values that are stored in 16 bits; absent without such.</summary>
    public Tensor Masters { get; }

    /// <summary>Where the masters begin in the order of the ranges.</summary>
    public long MasterBegin { get; }

    /// <summary>
    /// Copies of the F32 values, which are the first, in the type that the device computes in;
    /// absent where that is F32 too.
    /// </summary>
    public Tensor Rounded { get; }

    /// <summary>Whether they have gradients and an optimizer's state.</summary>
    public bool Learns { get; }

    public bool Contains(string name) => _places.ContainsKey(name);

    /// <summary>The stored values of a tensor.</summary>
    public Tensor Value(string name)
    {
        (TunedTensor tensor, long offset) = _places[name];
        (Tensor values, long begin, _) = _values[tensor.Type];
        return Part(values, offset - begin, tensor.Shape);
    }

    /// <summary>What operations take: the stored values, or their rounded copy.</summary>
    public Tensor Operand(string name) => Rounded.Exists && _places[name].Tensor.Type == DType.F32
        ? Part(Rounded, name)
        : Value(name);

    public Tensor Gradient(string name) => Part(Gradients, name);

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
    public Tensor Master(string name)
    {
        (TunedTensor tensor, long offset) = _places[name];
        return tensor.Type == DType.F32
            ? Value(name)
            : Part(Masters, offset - MasterBegin, tensor.Shape);
    }

    /// <summary>Sets a tensor: its F32 value and, rounded, the one that is stored.</summary>
    public void Write(string name, ReadOnlySpan<float> values)
    {
        Tensor master = Masters.Exists || _places[name].Tensor.Type == DType.F32
            ? Master(name) : Value(name);
        Tensor operand = Operand(name);
        _device.WriteFloats(operand, values);
        if (operand != master) _device.WriteFloats(master, values);
    }

    /// <summary>
    /// A stretch of what operations take, and of its masters: none where that is F32 itself.
    /// </summary>
    public (Tensor Weights, Tensor Masters) Updated(Run run)
    {
        (Tensor values, long begin, _) = _values[run.Type];
        Tensor stored = Part(values, run.Begin - begin, run.Shape);
        if (run.Type != DType.F32)
            return (stored, Part(Masters, run.Begin - MasterBegin, run.Shape));
        return Rounded.Exists ? (Stretch(Rounded, run), stored) : (stored, Tensor.None);
    }

    /// <summary>A stretch of one of the ranges that cover all types, as a run has it.</summary>
    public static Tensor Stretch(Tensor range, Run run) => Part(range, run.Begin, run.Shape);

    private static Shape Rows(long count) => new(checked((int)(count / Row)), Row);

    private static Tensor Part(Tensor range, long offset, Shape shape) =>
        new(range.Data + (nint)(offset * range.Type.Size()), new Spec(range.Type, shape));

    private Tensor Part(Tensor range, string name)
    {
        (TunedTensor tensor, long offset) = _places[name];
        return Part(range, offset, tensor.Shape);
    }

    private Tensor Allocate(DType type, long count, string name)
    {
        var spec = new Spec(type, Rows(count));
        Bytes += spec.Bytes;
        return _device.Allocate(spec, name);
    }

    private Tensor Keep(Spec spec, string name)
    {
        if (Optimizer.Paged && _device.HostTensor(spec, name) is { Exists: true } tensor)
        {
            HostBytes += spec.Bytes;
            return tensor;
        }

        (Bytes, StateBytes) = (Bytes + spec.Bytes, StateBytes + spec.Bytes);
        return _device.Allocate(spec, name);
    }

    /// <summary>
    /// Neighbouring tensors of one type, rate, decay and type of moments, as elements of the ranges,
    /// seen in a shape: the tensor's own where the optimizer takes them one by one. States is what
    /// it keeps of them.
    /// </summary>
    public sealed record Run(
        DType Type, double Rate, double Decay, long Begin, long Count, Shape Shape)
    {
        public Tensor[] States { get; set; } = [];
    }
}
