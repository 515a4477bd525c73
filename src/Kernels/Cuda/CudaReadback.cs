namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// Copies into page-locked memory behind the work on the stream, and an event behind them.
/// </summary>
internal sealed unsafe class CudaReadback(CudaDevice device, int bytes) : Readback, IDisposable
{
    private readonly PinnedMemory _memory = new(device.Context, bytes + device.Faults.Spec.Bytes);
    private readonly CudaEvent _there = new(device.Context);
    private int _count;

    public override bool IsReady => _there.IsReached();

    public override void Start(params ReadOnlySpan<Tensor> tensors)
    {
        _count = 0;
        foreach (ref readonly Tensor tensor in tensors) Copy(tensor, bytes);
        Copy(device.Faults, bytes + (int)device.Faults.Spec.Bytes);
        _there.Record(device.Stream);
    }

    public override ReadOnlySpan<byte> Wait()
    {
        _there.Synchronise();
        int results = _count - (int)device.Faults.Spec.Bytes;
        device.ThrowIfFaulty(new ReadOnlySpan<int>((byte*)_memory.Pointer + results, 4));
        return new ReadOnlySpan<byte>(_memory.Pointer, results);
    }

    public void Dispose()
    {
        _memory.Dispose();
        _there.Dispose();
    }

    private void Copy(in Tensor tensor, int limit)
    {
        int length = (int)tensor.Spec.Bytes;
        if (_count + length > limit) throw new ArgumentException($"no room for {tensor.Spec}");
        device.Stream.Download((byte*)_memory.Pointer + _count, (ulong)tensor.Data, length);
        _count += length;
    }
}
