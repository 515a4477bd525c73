namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// Page-locked host memory through which bytes go to a device and back. Uploads are copied into one
/// of two halves and queued; a half is filled again only when the device has taken what was in it,
/// so the caller's memory is free at once and the host seldom waits.
/// </summary>
internal sealed unsafe class Staging : IDisposable
{
    private const long HalfBytes = 8L << 20;

    private readonly CudaStream _stream;
    private readonly PinnedMemory _memory;
    private readonly CudaEvent[] _taken;
    private readonly bool[] _queued = new bool[2];
    private int _half;
    private long _used;

    public Staging(CudaContext context, CudaStream stream)
    {
        _stream = stream;
        _memory = new(context, 2 * HalfBytes);
        _taken = [new(context), new(context)];
    }

    /// <summary>Queues a copy of host bytes, which may change once this returns.</summary>
    public void Upload(nint to, void* from, long bytes)
    {
        for (long done = 0; done < bytes;)
        {
            if (_used == HalfBytes) Turn();
            long piece = Math.Min(bytes - done, HalfBytes - _used);
            byte* at = (byte*)_memory.Pointer + (_half * HalfBytes) + _used;
            Buffer.MemoryCopy((byte*)from + done, at, piece, piece);
            _stream.Upload((ulong)to + (ulong)done, at, piece);
            _used = Math.Min(HalfBytes, _used + ((piece + 255) / 256 * 256));
            done += piece;
        }
    }

    /// <summary>Waits for the stream and copies device bytes out.</summary>
    public void Download(void* to, nint from, long bytes)
    {
        // What was uploaded before has left both halves when the stream has been waited for.
        _stream.Synchronise();
        _queued[0] = _queued[1] = false;
        for (long done = 0; done < bytes;)
        {
            long piece = Math.Min(bytes - done, 2 * HalfBytes);
            _stream.Download(_memory.Pointer, (ulong)from + (ulong)done, piece);
            _stream.Synchronise();
            Buffer.MemoryCopy(_memory.Pointer, (byte*)to + done, piece, piece);
            done += piece;
        }
    }

    public void Dispose()
    {
        foreach (CudaEvent e in _taken) e.Dispose();
        _memory.Dispose();
    }

    private void Turn()
    {
        _taken[_half].Record(_stream);
        _queued[_half] = true;
        _half ^= 1;
        _used = 0;
        if (_queued[_half]) _taken[_half].Synchronise();
    }
}
