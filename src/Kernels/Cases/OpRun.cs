using System.Runtime.InteropServices;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Cases;

/// <summary>
/// One operation on a device, with every tensor in memory of its own between canaries. Results
/// start as NaN, so that an element that was not written shows; inputs must not change.
/// </summary>
/// <remarks>Tensors are numbered: the inputs, the output, its gradient, the inputs' gradients. The
/// one numbered <c>shifted</c> starts one element behind an aligned address, as a tensor of a file
/// or a part of another may.</remarks>
public sealed unsafe class OpRun : IDisposable
{
    // What stands for NaN among integers: an index of nothing.
    private const int NoIndex = int.MaxValue;

    private readonly Device _device;
    private readonly Op _op;
    private readonly Value[] _values;
    private readonly int _shifted, _state;
    private readonly List<GuardedMemory> _memory = [];
    private readonly Tensor[] _inputs, _saved;
    private readonly GradientTarget[] _targets;
    private readonly Tensor _output, _outputGradient;

    public OpRun(Device device, Op op, Value[] values, int shifted = -1)
    {
        (_device, _op, _values, _shifted) = (device, op, values, shifted);
        _state = Array.FindIndex(values, v => v.Name == "state");
        DType type = device.Activations;
        Spec[] specs = Array.ConvertAll(values, v => v.Spec(type));
        Outputs outputs = op.Infer(specs, type);
        _inputs = [.. values.Select((v, i) =>
            v.Exists ? New(v.Spec(type), v.Data, i == shifted) : Tensor.None)];
        _output = New(outputs.Output, null, shifted == values.Length);
        _saved = new Tensor[outputs.SavedCount];
        for (int i = 0; i < _saved.Length; i++) _saved[i] = New(outputs.Saved(i), null);
        _outputGradient = New(outputs.Output, null, shifted == values.Length + 1);
        _targets = new GradientTarget[values.Length];
    }

    /// <summary>The result: the output, or what the operation changed in place.</summary>
    public double[] Output => Read(_op.Writes is int input ? _inputs[input] : _output);

    /// <summary>What a step of generation leaves for the next one, if it does; it has no
    /// backward then.</summary>
    public double[]? State => _state < 0 ? null : Input(_state);

    /// <summary>An input as it is now: one may be changed in place.</summary>
    public double[] Input(int index) => Read(_inputs[index]);

    /// <summary>Elements of the output.</summary>
    public int Count => (int)_output.Shape.Count;

    public double[] Saved(int index) => Read(_saved[index]);

    public double[] Gradient(int input) => Read(_targets[input].Buffer);

    public bool HasGradient(int input) =>
        _state < 0 && _values[input].Exists && !_values[input].IsInteger
        && _op.Differentiates(input);

    /// <param name="recorded">Whether a backward is to follow; null where there may.</param>
    public void Forward(bool? recorded = null)
    {
        _device.Forward(_op, new OpCall(_inputs, _output, _saved, recorded ?? _state < 0));
        CheckMemory();
    }

    /// <summary>What an accumulating gradient adds to: another number in each place.</summary>
    public static double[] Start(int input, long count) => Fill.Normal(91 + input, count, 3);

    /// <summary>
    /// Chooses the gradients, and which of them add to <see cref="Start"/>. Those of activations
    /// have the device's type, those of parameters are F32, as they are in training; or all have
    /// another.
    /// </summary>
    public void Want(
        Predicate<int> wanted, Predicate<int>? accumulate = null, DType? other = null)
    {
        DType type = _device.Activations, parameters = type.Statistics();
        for (int i = 0; i < _values.Length; i++)
        {
            _targets[i] = GradientTarget.None;
            if (!HasGradient(i) || !wanted(i)) continue;
            DType kind = other ?? (_values[i].IsParameter ? parameters : type);
            var spec = new Spec(kind, _inputs[i].Shape);
            bool adds = accumulate?.Invoke(i) ?? false;
            _targets[i] = new GradientTarget(New(spec, adds ? Start(i, spec.Shape.Count) : null,
                _shifted == _values.Length + 2 + i), adds);
        }
    }

    public void Backward(double[] outputGradient)
    {
        Write(_outputGradient, outputGradient);
        BackwardAgain();
        CheckMemory();
    }

    /// <summary>Backward with the output gradient of before, and no other work.</summary>
    public void BackwardAgain()
    {
        if (_state < 0)
            _device.Backward(
                _op, new OpCall(_inputs, _output, _saved, true, _outputGradient, _targets));
    }

    /// <summary>Forward with no other work.</summary>
    public void ForwardAgain() =>
        _device.Forward(_op, new OpCall(_inputs, _output, _saved, recorded: _state < 0));

    /// <summary>Rounds the output and what was saved to a storage type, where a device of that type
    /// keeps them in it.</summary>
    public void RoundResults(DType storage)
    {
        Outputs kept = _op.Infer(Array.ConvertAll(_values, v => v.Spec(storage)), storage);
        Round(_output, kept.Output);
        for (int i = 0; i < _saved.Length; i++) Round(_saved[i], kept.Saved(i));

        void Round(in Tensor tensor, Spec spec)
        {
            if (spec.Type == storage) Write(tensor, Storage.Round(Read(tensor), storage));
        }
    }

    /// <summary>
    /// Puts an output and what is saved with it in the place of those of a forward.
    /// </summary>
    public void SetResults(double[] output, params double[][] saved)
    {
        Write(_output, output);
        for (int i = 0; i < saved.Length; i++) Write(_saved[i], saved[i]);
    }

    public void Set(int input, int index, double value)
    {
        _values[input].Data[index] = value;
        Write(_inputs[input], _values[input].Data);
    }

    public void Dispose()
    {
        foreach (var memory in _memory) memory.Dispose();
    }

    private Tensor New(Spec spec, double[]? data, bool isShifted = false)
    {
        int shift = isShifted ? (int)new Spec(spec.Type, new Shape(1)).Bytes : 0;
        GuardedMemory memory = _device is CudaDevice cuda
            ? new DeviceMemory(cuda, spec.Bytes, shift)
            : new HostMemory(spec.Bytes, shift);
        _memory.Add(memory);
        var tensor = new Tensor(memory.Data, spec);
        var nan = new double[spec.Shape.Count];
        Array.Fill(nan, double.NaN);
        Write(tensor, data ?? nan);
        return tensor;
    }

    private void Write(in Tensor tensor, double[] data)
    {
        if (data.Length != tensor.Shape.Count)
            throw new ArgumentException($"{data.Length} numbers for {tensor.Spec}");
        if (tensor.Type is DType.F64) _device.Write<double>(tensor, data);
        else if (tensor.Type is DType.I32)
            _device.Write<int>(
                tensor, Array.ConvertAll(data, v => double.IsNaN(v) ? NoIndex : (int)v));
        else
            _device.WriteFloats(tensor, Array.ConvertAll(data, v => (float)v));
    }

    private double[] Read(in Tensor tensor)
    {
        if (tensor.Type == DType.I32)
        {
            var ints = new int[tensor.Shape.Count];
            _device.Read<int>(tensor, ints);
            return Array.ConvertAll(ints, v => (double)v);
        }

        if (tensor.Type != DType.F64)
            return Array.ConvertAll(_device.ReadFloats(tensor), v => (double)v);
        var values = new double[tensor.Shape.Count];
        _device.Read<double>(tensor, values);
        return values;
    }

    private void CheckMemory()
    {
        foreach (var memory in _memory)
            if (!memory.IsIntact)
                throw new InvalidOperationException($"{_op}: memory outside a tensor was written");
        if (!_device.Step.IsEmpty)
            throw new InvalidOperationException($"{_op}: scratch was left in the arena");
    }

    /// <summary>Memory of a tensor between canaries.</summary>
    private abstract class GuardedMemory : IDisposable
    {
        protected const int Guard = 256;
        protected const byte Canary = 0xA5;

        public abstract nint Data { get; }

        public abstract bool IsIntact { get; }

        public abstract void Dispose();
    }

    private sealed class HostMemory : GuardedMemory
    {
        private readonly byte* _start;
        private readonly int _before, _bytes;

        public HostMemory(long bytes, int shift)
        {
            (_before, _bytes) = (Guard + shift, checked((int)bytes));
            _start = (byte*)NativeMemory.AlignedAlloc((nuint)(_before + _bytes + Guard), Guard);
            new Span<byte>(_start, _before + _bytes + Guard).Fill(Canary);
        }

        public override nint Data => (nint)(_start + _before);

        public override bool IsIntact =>
            !new Span<byte>(_start, _before).ContainsAnyExcept(Canary)
            && !new Span<byte>(_start + _before + _bytes, Guard).ContainsAnyExcept(Canary);

        public override void Dispose() => NativeMemory.AlignedFree(_start);
    }

    // The emulator itself watches the ends of an allocation, to the byte.
    private sealed class DeviceMemory(CudaDevice device, long bytes, int shift) : GuardedMemory
    {
        private readonly DeviceSlab _slab = new(device.Context, Math.Max(1, bytes + shift));

        public override nint Data => (nint)_slab.Address + shift;

        public override bool IsIntact => true;

        public override void Dispose() => _slab.Dispose();
    }
}

/// <summary>Numbers as a storage type holds them.</summary>
public static unsafe class Storage
{
    public static double[] Round(double[] values, DType type)
    {
        float[] floats = Array.ConvertAll(values, v => (float)v);
        if (type is DType.F32) return Array.ConvertAll(floats, v => (double)v);
        var bits = new ushort[floats.Length];
        fixed (float* wide = floats)
        fixed (ushort* narrow = bits)
        {
            FloatBits.Narrow(wide, narrow, type, floats.Length);
            FloatBits.Widen(narrow, type, wide, floats.Length);
        }

        return Array.ConvertAll(floats, v => (double)v);
    }
}
