namespace MiniCpmNative.Kernels.Cpu;

/// <summary>The processor's input is written where it is read: in the step arena.</summary>
internal sealed class CpuInput(CpuDevice device) : InputMemory
{
    public override void Begin(long bytes)
    {
    }

    public override Tensor Push(Spec spec, string name, out nint host)
    {
        Tensor tensor = device.Step.Push(spec, name);
        host = tensor.Data;
        return tensor;
    }

    public override void Send()
    {
    }
}

/// <summary>The processor has its results when a call returns.</summary>
internal sealed class CpuReadback(CpuDevice device, int bytes) : Readback
{
    private readonly byte[] _bytes = new byte[bytes];
    private int _count;

    public override bool IsReady => true;

    public override void Start(params ReadOnlySpan<Tensor> tensors)
    {
        _count = 0;
        foreach (ref readonly Tensor tensor in tensors)
        {
            int length = (int)tensor.Spec.Bytes;
            device.Read(tensor, _bytes.AsSpan(_count, length));
            _count += length;
        }
    }

    public override ReadOnlySpan<byte> Wait() => _bytes.AsSpan(0, _count);
}
