using System.Runtime.InteropServices;
using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// Hands the model its tensors by official name while it is built: trained ones from the flat
/// ranges, as parameters of the tape, frozen ones copied from the files once, matrices packed in
/// the type they are stored in, so that no second copy exists. Frozen values are rounded to the
/// run's storage type as PyTorch's loader does; where that would
/// only widen them they stay as they are.
/// </summary>
public sealed class ModelWeights(
    Graph graph, Checkpoint checkpoint, Trainables trainables, Adapters adapters, DType storage)
{
    private readonly Device _device = graph.Device;

    /// <summary>
    /// A bias or a norm's weight; frozen ones are kept in F32, as kernels take them.
    /// </summary>
    public Tensor Vector(string name) => Vector(name, 0, checkpoint.Get(name).Shape[0]);

    /// <summary>Elements begin..begin+count of a vector.</summary>
    public unsafe Tensor Vector(string name, int begin, int count)
    {
        if (trainables.Contains(name)) return Parameter(name, begin, count);
        Tensor vector = _device.Allocate(
            new Spec(_device.Activations.Statistics(), new Shape(count)), name);
        using var stored = new StorageValues(checkpoint.Get(name), begin, count, storage);
        var values = new float[count];
        fixed (float* to = values) FloatBits.Widen(stored.Data, stored.Type, to, count);
        _device.WriteFloats(vector, values);
        return vector;
    }

    /// <summary>A weight of a matrix product.</summary>
    public Tensor Matrix(string name) => MatrixRows(name, 0, checkpoint.Get(name).Shape[0]);

    /// <summary>
    /// Whether a tensor is trained beside adapters: PEFT then trains a copy of its module, and
    /// whatever else uses the tensor keeps the original.
    /// </summary>
    public bool IsCopied(string name) => adapters.List.Count > 0 && trainables.Contains(name);

    /// <summary>The original of a matrix, whether or not it is trained.</summary>
    public Tensor Frozen(string name)
    {
        Shape shape = checkpoint.Get(name).Shape;
        return Packed(name, 0, shape[0], shape.Cols);
    }

    /// <summary>A weight stored with more axes, seen as [rows, cols].</summary>
    public Tensor Matrix(string name, int rows, int cols)
    {
        if (!trainables.Contains(name)) return Packed(name, 0, rows, cols);
        return graph.Parameter(
            trainables.Value(name).Reshape(rows, cols),
            trainables.Gradient(name).Reshape(rows, cols));
    }

    /// <summary>A matrix whose rows are looked up: row-major also when frozen.</summary>
    public unsafe Tensor Table(string name)
    {
        StoredTensor file = checkpoint.Get(name);
        if (trainables.Contains(name)) return Parameter(name, 0, file.Shape[0]);
        using var values = new StorageValues(file, 0, file.Count, storage);
        Tensor table = _device.Allocate(new Spec(values.Type, file.Shape), name);
        _device.Upload(table, values.Data);
        return table;
    }

    /// <summary>
    /// A linear layer, with its bias if it has one and its adapter if it was given one.
    /// </summary>
    public Projection Projection(string module)
    {
        Tensor weight = Matrix(module + ".weight");
        Tensor bias = checkpoint.Find(module + ".bias") is null
            ? Tensor.None
            : Vector(module + ".bias");
        if (adapters.Find(module) is not { } adapter) return new Projection(weight, bias);
        return new Projection(
            weight, bias, new LoraLinear(adapter.Index, adapter.Scale, adapters.Dropout),
            Parameter(Adapters.NameOfA(module), 0, adapter.Rank),
            Parameter(Adapters.NameOfB(module), 0, adapter.Outputs));
    }

    /// <summary>
    /// Rows of a fused projection (in_proj_weight, in_proj_bias) as a layer of its own.
    /// </summary>
    public Projection Projection(string module, int begin, int count) => new(
        MatrixRows(module + "_weight", begin, count), Vector(module + "_bias", begin, count));

    public Norm LayerNorm(string module, float epsilon) => new(
        new LayerNorm(epsilon), Vector(module + ".weight"), Vector(module + ".bias"));

    public Norm RmsNorm(string module, float epsilon) => new(
        new RmsNorm(epsilon), Vector(module + ".weight"), Tensor.None);

    private Tensor MatrixRows(string name, int begin, int count) => trainables.Contains(name)
        ? Parameter(name, begin, count)
        : Packed(name, begin, count, checkpoint.Get(name).Shape.Cols);

    private Tensor Parameter(string name, int begin, int count) => graph.Parameter(
        trainables.Value(name).Slice(begin, count), trainables.Gradient(name).Slice(begin, count));

    private unsafe Tensor Packed(string name, int begin, int rows, int cols)
    {
        using var values = new StorageValues(
            checkpoint.Get(name), (long)begin * cols, (long)rows * cols, storage);
        return _device.Pack(values.Type, rows, cols, values.Data, name);
    }

    /// <summary>
    /// Elements of a stored tensor in the run's storage type: the file's own memory when nothing
    /// needs rounding, else a rounded copy.
    /// </summary>
    private sealed unsafe class StorageValues : IDisposable
    {
        private readonly void* _copy;

        public StorageValues(StoredTensor file, long begin, long count, DType storage)
        {
            void* source = (byte*)file.Data + (begin * file.Type.Size());
            bool exact = file.Type == storage
                || (storage == DType.F32 && file.Type is DType.BF16 or DType.F16);
            Type = exact ? file.Type : storage;
            Data = source;
            if (exact) return;
            _copy = Data = NativeMemory.Alloc((nuint)(count * storage.Size()));
            var wide = storage == DType.F32
                ? (float*)_copy : (float*)NativeMemory.Alloc((nuint)count * 4);
            FloatBits.Widen(source, file.Type, wide, (nint)count);
            if (storage == DType.F32) return;
            FloatBits.Narrow(wide, _copy, storage, (nint)count);
            NativeMemory.Free(wide);
        }

        public DType Type { get; }

        public void* Data { get; }

        public void Dispose()
        {
            if (_copy is not null) NativeMemory.Free(_copy);
        }
    }
}
