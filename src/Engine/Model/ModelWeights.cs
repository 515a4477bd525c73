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
/// <param name="graph">The tape.</param>
/// <param name="checkpoint">The files.</param>
/// <param name="trainables">The trained ranges on the tape's device.</param>
/// <param name="adapters">Adapters that sit on linear layers.</param>
/// <param name="storage">The run's storage type.</param>
/// <param name="kind">Makes frozen weights of linear layers; null keeps them dense.</param>
public sealed class ModelWeights(
    Graph graph, Checkpoint checkpoint, Trainables trainables, Adapters adapters, DType storage,
    IWeightKind? kind = null)
    : ITensorSource
{
    private readonly Device _device = graph.Device;

    /// <summary>
    /// A bias or a norm's weight; frozen ones are kept in F32, as kernels take them.
    /// </summary>
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

    public Tensor Matrix(string name, int begin, int rows, int cols)
    {
        if (!trainables.Contains(name)) return Packed(name, begin, rows, cols);
        Tensor value = trainables.Value(name);
        int all = checked((int)(value.Shape.Count / cols));
        Tensor matrix = value.Reshape(all, cols).Slice(begin, rows);
        return !trainables.Learns ? matrix : graph.Parameter(
            matrix, trainables.Gradient(name).Reshape(all, cols).Slice(begin, rows));
    }

    // Row-major also when frozen.
    public unsafe Tensor Table(string name)
    {
        StoredTensor file = checkpoint.Get(name);
        if (trainables.Contains(name)) return Parameter(name, 0, file.Shape[0]);
        using var values = new StorageValues(file, 0, file.Count, storage);
        Tensor table = _device.Allocate(new Spec(values.Type, file.Shape), name);
        _device.Upload(table, values.Data);
        return table;
    }

    public Tensor Original(string name)
    {
        if (adapters.List.Count == 0 || !trainables.Contains(name)) return Tensor.None;
        Shape shape = checkpoint.Get(name).Shape;
        return Packed(name, 0, shape[0], shape.Cols);
    }

    public bool IsPacked(string weight) => kind is null && !trainables.Contains(weight);

    public void Together(int rows, int cols) =>
        _device.PackTogether((long)rows * cols * _device.Activations.Size());

    public Projection Projection(
        string? module, string weight, int begin, int rows, Tensor bias)
    {
        StoredTensor stored = checkpoint.Get(weight);
        Weight matrix = (trainables.Contains(weight) ? null : kind?.Load(_device, stored, begin, rows))
            ?? new DenseWeight(Matrix(weight, begin, rows, stored.Shape.Cols));
        if (module is null || adapters.Find(module) is not { } adapter)
            return new Projection(matrix, bias);
        return new Projection(
            matrix, bias, adapter, adapters.Dropout, Parameter(Adapters.NameOfA(module), 0, adapter.Rank),
            Parameter(Adapters.NameOfB(module), 0, adapter.Outputs));
    }

    private Tensor Parameter(string name, int begin, int count)
    {
        Tensor value = trainables.Operand(name).Slice(begin, count);
        return !trainables.Learns ? value
            : graph.Parameter(value, trainables.Gradient(name).Slice(begin, count));
    }

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
}
