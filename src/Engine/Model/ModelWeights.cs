using System.Runtime.InteropServices;
using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// Hands the model its tensors by official name while it is built: trained ones from the flat
/// ranges, as parameters of the tape; where frozen ones come from is said by who derives from it.
/// </summary>
/// <param name="graph">The tape.</param>
/// <param name="options">What is trained, and how the rest is kept.</param>
public abstract class ModelTensors(Graph graph, LoadOptions options) : ITensorSource
{
    private readonly ParameterRanges _trainables =
        options.Trainables ?? new ParameterRanges(graph.Device, []);

    private readonly Adapters _adapters = options.Adapters;

    protected Device Device { get; } = graph.Device;

    /// <summary>Makes frozen weights of linear layers; null keeps them dense.</summary>
    protected IWeightKind? Kind { get; } = options.Kind;

    public StreamedBlock? BeginBlock(ModelPart part) =>
        options.Streams ? Device.BeginStreamed((int)part, HasContent) : null;

    /// <summary>
    /// A bias or a norm's weight; frozen ones are kept in F32, as kernels take them.
    /// </summary>
    public Tensor Vector(string name, int begin, int count) => _trainables.Contains(name)
        ? Parameter(name, begin, count) : FrozenVector(name, begin, count);

    public Tensor Small(string name) => _trainables.Contains(name)
        ? Parameter(name, 0, ShapeOf(name)[0])
        : FrozenVector(name, 0, checked((int)ShapeOf(name).Count));

    public Tensor Matrix(string name, int begin, int rows, int cols)
    {
        if (!_trainables.Contains(name)) return FrozenMatrix(name, begin, rows, cols);
        Tensor value = _trainables.Value(name);
        int all = checked((int)(value.Shape.Count / cols));
        Tensor matrix = value.Reshape(all, cols).Slice(begin, rows);
        return !_trainables.Learns ? matrix : Parameter(
            name, matrix, _trainables.Gradient(name).Reshape(all, cols).Slice(begin, rows));
    }

    // Row-major also when frozen.
    public Tensor Table(string name, bool isLookedUp) => _trainables.Contains(name)
        ? Parameter(name, 0, ShapeOf(name)[0])
        : FrozenTable(name, isLookedUp && options.EmbeddingsInHost);

    public Tensor Original(string name)
    {
        if (_adapters.List.Count == 0 || !_trainables.Contains(name)) return Tensor.None;
        Shape shape = ShapeOf(name);
        return FrozenMatrix(name, 0, shape[0], shape.Cols);
    }

    public bool IsPacked(string weight) =>
        Kind?.Takes(weight) != true && !_trainables.Contains(weight);

    public void Together(string first, int rows, int cols)
    {
        long bytes = (long)rows * cols * Device.Activations.Size();
        if (IsPacked(first)) Device.PackTogether(bytes);
        else if (_trainables.Contains(first) && _trainables.Visits(first))
            Device.VisitTogether(bytes);
    }

    public Projection Projection(
        string module, string weight, int begin, int rows, Tensor bias)
    {
        Weight matrix = (_trainables.Contains(weight) ? null : OtherKind(weight, begin, rows))
            ?? new DenseWeight(Matrix(weight, begin, rows, ShapeOf(weight).Cols));
        if (_adapters.Find(module) is not { } adapter) return new Projection(matrix, bias);
        Tensor a = Parameter(adapter.NameOfA, 0, adapter.Rank);
        Tensor b = Parameter(adapter.NameOfB, begin, rows);
        if (!adapter.IsDora)
            return new Projection(matrix, bias, adapter, _adapters.Dropout, a, b,
                adapter.HasBias ? Parameter(adapter.NameOfBias, begin, rows) : Tensor.None);
        // In F32 on every device: its changes are small.
        string magnitude = Adapters.NameOfMagnitude(module);
        Tensor m = _trainables.Value(magnitude);
        if (_trainables.Learns) m = Parameter(magnitude, m, _trainables.Gradient(magnitude));
        return new Projection(matrix, bias, adapter, _adapters.Dropout, a, b, m,
            FrozenSquares(weight, begin, rows));
    }

    public LowRankPart? Low(string module) => _adapters.Find(module) is not { } adapter ? null
        : new(adapter, _adapters.Dropout,
            Parameter(adapter.NameOfA, 0, adapter.RowsOfA),
            Parameter(adapter.NameOfB, 0, adapter.RowsOfB));

    public TokenRows? Rows(string module, string weight)
    {
        if (_adapters.Tokens.FirstOrDefault(t => t.Module.Name == module) is not { } tokens)
            return null;
        Tensor original = Device.Allocate(new Spec(
            Device.Activations, new Shape(tokens.Ids.Count, tokens.Cols)), tokens.Name);
        if (HasContent) Device.WriteFloats(original, FrozenRows(weight, tokens.Ids));
        return new(tokens.Ids, Parameter(tokens.Name, 0, tokens.Ids.Count), original);
    }

    public Tensor Places(IReadOnlyList<int> ids, int rows)
    {
        Tensor places =
            Device.Allocate(new Spec(Device.Activations, new Shape(rows, ids.Count)), "places");
        if (!HasContent) return places;
        var ones = new float[checked(rows * ids.Count)];
        for (int i = 0; i < ids.Count; i++) ones[(ids[i] * ids.Count) + i] = 1;
        Device.WriteFloats(places, ones);
        return places;
    }

    /// <summary>Whether tensors are more than their places.</summary>
    protected virtual bool HasContent => true;

    protected abstract Shape ShapeOf(string name);

    protected abstract Tensor FrozenVector(string name, int begin, int count);

    /// <summary>The squared norms of rows of a matrix, in F32.</summary>
    protected abstract Tensor FrozenSquares(string name, int begin, int rows);

    /// <summary>The values of rows of a matrix.</summary>
    protected virtual float[] FrozenRows(string name, IReadOnlyList<int> rows) => [];

    /// <summary>In the device's packed form.</summary>
    protected abstract Tensor FrozenMatrix(string name, int begin, int rows, int cols);

    /// <param name="name">The parameter.</param>
    /// <param name="inHost">Whether it may lie in host memory.</param>
    protected abstract Tensor FrozenTable(string name, bool inHost);

    /// <summary>A frozen weight that is not dense, or null.</summary>
    protected abstract Weight? OtherKind(string weight, int begin, int rows);

    private Tensor Parameter(string name, int begin, int count)
    {
        Tensor value = _trainables.Operand(name).Slice(begin, count);
        return !_trainables.Learns ? value
            : Parameter(name, value, _trainables.Gradient(name).Slice(begin, count));
    }

    // Of a block that is streamed, with the block.
    private Tensor Parameter(string name, Tensor value, Tensor gradient) =>
        !_trainables.Visits(name) ? graph.Parameter(value, gradient)
        : graph.Parameter(Device.Visiting(value, isGradient: false),
            Device.Visiting(gradient, isGradient: true), home: gradient);
}

/// <summary>
/// Frozen tensors copied from the files once, matrices packed in the type they are stored in, so
/// that no second copy exists. They are rounded to the run's storage type as PyTorch's loader does;
/// where that would only widen them they stay as they are.
/// </summary>
/// <param name="graph">The tape.</param>
/// <param name="checkpoint">The files.</param>
/// <param name="storage">The run's storage type.</param>
/// <param name="options">What is trained, and how the rest is kept.</param>
public sealed class ModelWeights(
    Graph graph, Checkpoint checkpoint, DType storage, LoadOptions options)
    : ModelTensors(graph, options)
{
    private readonly FrozenNorms _norms = options.Norms ?? new(checkpoint, storage, options.Kind);
    private readonly SplitWeights? _split = options.Split;

    protected override Shape ShapeOf(string name) => checkpoint.Get(name).Shape;

    protected override unsafe Tensor FrozenVector(string name, int begin, int count)
    {
        Tensor vector = Device.Allocate(
            new Spec(Device.Activations.Statistics(), new Shape(count)), name);
        using var stored = new StorageValues(checkpoint.Get(name), begin, count, storage);
        var values = new float[count];
        fixed (float* to = values) FloatBits.Widen(stored.Data, stored.Type, to, count);
        Device.WriteFloats(vector, values);
        return vector;
    }

    protected override float[] FrozenRows(string name, IReadOnlyList<int> rows) =>
        checkpoint.Get(name).RowsToFloats(rows);

    protected override Tensor FrozenSquares(string name, int begin, int rows)
    {
        Tensor squares = Device.Allocate(
            new Spec(Device.Activations.Statistics(), new Shape(rows)), name);
        Device.WriteFloats(squares, [.. _norms.Of(name)
            .Skip(begin).Take(rows).Select(norm => (float)(norm * norm))]);
        return squares;
    }

    protected override unsafe Tensor FrozenMatrix(string name, int begin, int rows, int cols)
    {
        if (_split?.Contains(name) == true) return Rest(name, rows, cols);
        using var values = new StorageValues(
            checkpoint.Get(name), (long)begin * cols, (long)rows * cols, storage);
        return Device.Pack(values.Type, rows, cols, values.Data, name);
    }

    // Of linear layers, which are whole matrices.
    private unsafe Tensor Rest(string name, int rows, int cols)
    {
        nuint count = (nuint)rows * (nuint)cols;
        var wide = (float*)NativeMemory.AlignedAlloc(count * sizeof(float), 64);
        try
        {
            using (var values = new StorageValues(checkpoint.Get(name), 0, (long)count, storage))
                FloatBits.Widen(values.Data, values.Type, wide, (nint)count);
            _split!.Leave(name, wide, rows);
            // In place: narrower values never reach those that are still to be read.
            FloatBits.Narrow(wide, wide, storage, (nint)count);
            return Device.Pack(storage, rows, cols, wide, name);
        }
        finally
        {
            NativeMemory.AlignedFree(wide);
        }
    }

    protected override unsafe Tensor FrozenTable(string name, bool inHost)
    {
        StoredTensor file = checkpoint.Get(name);
        using var values = new StorageValues(file, 0, file.Count, storage);
        Tensor table = Device.AllocateIn(inHost, new Spec(values.Type, file.Shape), name);
        Device.Upload(table, values.Data);
        return table;
    }

    /// <summary>The type in which a run of a storage type keeps a frozen tensor.</summary>
    internal static DType StoredAs(DType file, DType storage) =>
        storage == DType.F32 && file is DType.BF16 or DType.F16 ? file : storage;

    protected override Weight? OtherKind(string weight, int begin, int rows) =>
        Kind?.Load(Device, checkpoint.Get(weight), begin, rows);
}

/// <summary>
/// A kind of frozen weight besides the dense one: how it is made of a stored matrix. A new kind is
/// a <see cref="Weight"/> and one of these; no module, no operation learns of it.
/// </summary>
public interface IWeightKind
{
    /// <summary>
    /// Rows begin..begin+rows of a matrix as a weight on the device; null leaves it dense.
    /// </summary>
    Weight? Load(Device device, StoredTensor matrix, int begin, int rows);

    /// <summary>The same without content, by the matrix's name.</summary>
    Weight? Plan(Device device, string weight, int begin, int rows) => null;

    /// <summary>Whether it makes a weight of this matrix.</summary>
    bool Takes(string weight) => true;

    /// <summary>
    /// Writes elements of a matrix, from one on, as the weight that it makes of it has them; null
    /// where these are the file's.
    /// </summary>
    RowReader? Reader(StoredTensor matrix) => null;
}

/// <summary>Writes elements from..from + to.Length.</summary>
public delegate void RowReader(long from, Span<float> to);
