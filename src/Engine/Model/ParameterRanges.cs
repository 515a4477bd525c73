using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// A tensor that is trained: its name in the model (an official parameter, or a module's lora_A or
/// lora_B), shape, the type it is stored and saved in, whether weight decay applies to it; Rate
/// times the run's learning rate is its own, Decay its weight decay.
/// </summary>
public sealed record TunedTensor(string Name, Shape Shape, DType Type, bool Decays,
    double Rate = 1, double Decay = 0);

/// <summary>
/// The trained tensors as flat ranges on the device: values in their storage type, gradients in
/// F32, both moments in F32 or BF16, and an F32 master copy of values that are stored in 16 bits.
/// F32 values on a device that computes in 16 bits (adapters) have a rounded copy, which the
/// optimizer writes, so that no product casts them. Clipping, AdamW and sharding become loops over
/// a few ranges. F32 tensors come first, then the 16-bit ones; within a type, those that decay come
/// first, then those of one rate, so that a range is few runs.
/// </summary>
public sealed class ParameterRanges
{
    // Elements: a multiple of this keeps every tensor 64-byte aligned in each of the ranges.
    private const int Alignment = 32;

    private readonly Device _device;
    private readonly Run[] _runs;
    private readonly Dictionary<string, (TunedTensor Tensor, long Offset)> _places = [];
    private readonly Dictionary<DType, (Tensor Values, long Begin, long Count)> _values = [];

    /// <param name="device">Holds the ranges.</param>
    /// <param name="tensors">What is trained.</param>
    /// <param name="moments">Type of both moments, F32 or BF16.</param>
    /// <param name="learns">False where values are only set and read: nothing else is kept.</param>
    public ParameterRanges(
        Device device, IEnumerable<TunedTensor> tensors, DType moments = DType.F32,
        bool learns = true)
    {
        (_device, Learns) = (device, learns);
        List = [.. tensors.OrderBy(t => t.Type != DType.F32).ThenBy(t => !t.Decays)
            .ThenBy(t => t.Rate).ThenBy(t => t.Decay)];
        long offset = 0;
        var runs = new List<Run>();
        foreach (var group in List.GroupBy(t => (t.Type, t.Decays, t.Rate, t.Decay)))
        {
            long begin = offset;
            foreach (TunedTensor tensor in group)
            {
                _places.Add(tensor.Name, (tensor, offset));
                Count += tensor.Shape.Count;
                offset += (tensor.Shape.Count + Alignment - 1) / Alignment * Alignment;
            }

            runs.Add(new Run(
                group.Key.Type, group.Key.Rate, group.Key.Decay, begin, offset - begin));
        }

        _runs = [.. runs];
        if (learns)
        {
            Gradients = Allocate(DType.F32, offset, "gradients");
            FirstMoments = Allocate(moments, offset, "first moments");
            SecondMoments = Allocate(moments, offset, "second moments");
        }

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

    /// <summary>Bytes of all ranges.</summary>
    public long Bytes { get; private set; }

    public Tensor Gradients { get; }

    public Tensor FirstMoments { get; }

    public Tensor SecondMoments { get; }

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

    public Tensor FirstMoment(string name) => Part(FirstMoments, name);

    public Tensor SecondMoment(string name) => Part(SecondMoments, name);

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
        Tensor stored = Stretch(values, run.Begin - begin, run.Count);
        if (run.Type != DType.F32)
            return (stored, Stretch(Masters, run.Begin - MasterBegin, run.Count));
        return Rounded.Exists ? (Stretch(Rounded, run), stored) : (stored, Tensor.None);
    }

    /// <summary>A stretch of one of the ranges that cover all types, as a run has it.</summary>
    public static Tensor Stretch(Tensor range, Run run) => Stretch(range, run.Begin, run.Count);

    // One axis may not hold the number of elements, so a stretch is a matrix of aligned rows.
    private static Tensor Stretch(Tensor range, long begin, long count) =>
        Part(range, begin, new Shape(checked((int)(count / Alignment)), Alignment));

    private static Tensor Part(Tensor range, long offset, Shape shape) =>
        new(range.Data + (nint)(offset * range.Type.Size()), new Spec(range.Type, shape));

    private Tensor Part(Tensor range, string name)
    {
        (TunedTensor tensor, long offset) = _places[name];
        return Part(range, offset, tensor.Shape);
    }

    private Tensor Allocate(DType type, long count, string name)
    {
        var spec = new Spec(type, new Shape(checked((int)(count / Alignment)), Alignment));
        Bytes += spec.Bytes;
        return _device.Allocate(spec, name);
    }

    /// <summary>
    /// Neighbouring tensors of one type, rate and decay, as elements of the ranges.
    /// </summary>
    public sealed record Run(DType Type, double Rate, double Decay, long Begin, long Count);
}
