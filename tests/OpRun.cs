using System.Runtime.InteropServices;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;

namespace MiniCpmNative.Tests;

/// <summary>
/// One operation on a device, with every tensor in memory of its own between canaries. Results start as
/// NaN, so that an element that was not written shows; inputs must not change.
/// </summary>
internal sealed unsafe class OpRun : IDisposable
{
    private readonly CpuDevice _device;
    private readonly Op _op;
    private readonly Value[] _values;
    private readonly List<Guarded> _memory = [];
    private readonly Tensor[] _inputs, _saved;
    private readonly GradientTarget[] _targets;
    private readonly Tensor _output, _outputGradient;

    public OpRun(CpuDevice device, Op op, Value[] values)
    {
        (_device, _op, _values) = (device, op, values);
        DType type = device.Activations;
        Spec[] specs = Array.ConvertAll(values, v => v.Spec(type));
        Outputs outputs = op.Infer(specs, type);
        _inputs = Array.ConvertAll(values, v => v.Exists ? New(v.Spec(type), v.Data) : Tensor.None);
        _output = New(outputs.Output, null);
        _saved = new Tensor[outputs.SavedCount];
        for (int i = 0; i < _saved.Length; i++) _saved[i] = New(outputs.Saved(i), null);
        _outputGradient = New(outputs.Output, null);
        _targets = new GradientTarget[values.Length];
    }

    public double[] Output => Read(_output);

    /// <summary>Elements of the output.</summary>
    public int Count => (int)_output.Shape.Count;

    public double[] Saved(int index) => Read(_saved[index]);

    public double[] Gradient(int input) => Read(_targets[input].Buffer);

    public bool HasGradient(int input) =>
        _values[input].Exists && !_values[input].IsInteger && _op.Differentiates(input);

    public void Forward(bool recorded = true)
    {
        _device.Forward(_op, new OpCall(_inputs, _output, _saved, recorded));
        CheckMemory();
    }

    /// <summary>Chooses the gradients; start is what an accumulating one adds to.</summary>
    public void Want(Predicate<int> wanted, bool accumulate = false, double start = double.NaN)
    {
        for (int i = 0; i < _values.Length; i++)
        {
            _targets[i] = GradientTarget.None;
            if (!HasGradient(i) || !wanted(i)) continue;
            var spec = new Spec(_device.Activations, _inputs[i].Shape);
            var data = new double[spec.Shape.Count];
            Array.Fill(data, start);
            _targets[i] = new GradientTarget(New(spec, data), accumulate);
        }
    }

    public void Backward(double[] outputGradient)
    {
        Write(_outputGradient, outputGradient);
        BackwardAgain();
        CheckMemory();
    }

    /// <summary>Backward with the output gradient of before, and no other work.</summary>
    public void BackwardAgain() => _device.Backward(
        _op, new OpCall(_inputs, _output, _saved, true, _outputGradient, _targets));

    /// <summary>Forward with no other work.</summary>
    public void ForwardAgain() =>
        _device.Forward(_op, new OpCall(_inputs, _output, _saved, recorded: true));

    public void Set(int input, int index, double value)
    {
        _values[input].Data[index] = value;
        Write(_inputs[input], _values[input].Data);
    }

    public void Dispose()
    {
        foreach (var memory in _memory) memory.Dispose();
    }

    private Tensor New(Spec spec, double[]? data)
    {
        var memory = new Guarded(spec.Bytes);
        _memory.Add(memory);
        var tensor = new Tensor((nint)memory.Data, spec);
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
            _device.Write<int>(tensor, Array.ConvertAll(data, v => (int)v));
        else
            fixed (float* floats = Array.ConvertAll(data, v => (float)v))
                FloatBits.Narrow(floats, (void*)tensor.Data, tensor.Type, data.Length);
    }

    private double[] Read(in Tensor tensor)
    {
        var values = new double[tensor.Shape.Count];
        if (tensor.Type == DType.F64)
        {
            _device.Read<double>(tensor, values);
            return values;
        }

        var floats = new float[values.Length];
        _device.Read<float>(tensor, floats);
        return Array.ConvertAll(floats, v => (double)v);
    }

    private void CheckMemory()
    {
        foreach (var memory in _memory)
            if (!memory.IsIntact)
                throw new InvalidOperationException($"{_op}: memory outside a tensor was written");
        if (!_device.Step.IsEmpty)
            throw new InvalidOperationException($"{_op}: scratch was left in the arena");
    }

    private sealed class Guarded : IDisposable
    {
        private const int Guard = 256;
        private const byte Canary = 0xA5;
        private readonly byte* _start;
        private readonly long _bytes;

        public Guarded(long bytes)
        {
            _bytes = bytes;
            _start = (byte*)NativeMemory.AlignedAlloc((nuint)bytes + (2 * Guard), Guard);
            new Span<byte>(_start, checked((int)bytes + (2 * Guard))).Fill(Canary);
        }

        public byte* Data => _start + Guard;

        public bool IsIntact =>
            !new Span<byte>(_start, Guard).ContainsAnyExcept(Canary)
            && !new Span<byte>(Data + _bytes, Guard).ContainsAnyExcept(Canary);

        public void Dispose() => NativeMemory.AlignedFree(_start);
    }
}
