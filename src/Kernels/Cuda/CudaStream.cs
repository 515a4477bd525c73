namespace MiniCpmNative.Kernels.Cuda;

/// <summary>A queue of device work. Copies and fills run in its order, later than the call
/// returns.</summary>
public sealed unsafe class CudaStream : IDisposable
{
    private readonly CudaDriverApi _driver;

    public CudaStream(CudaContext context)
    {
        _driver = context.Api.Driver;
        nint handle = 0;
        _driver.Check(_driver.StreamCreate(&handle, 1), "cuStreamCreate"); // CU_STREAM_NON_BLOCKING
        Handle = handle;
    }

    public nint Handle { get; }

    /// <summary>Waits until the queue is empty; errors of queued work come out here.</summary>
    public void Synchronise() =>
        _driver.Check(_driver.StreamSynchronize(Handle), "cuStreamSynchronize");

    /// <summary>Work queued after this runs only when the event's latest record has.</summary>
    public void Wait(CudaEvent e) =>
        _driver.Check(_driver.StreamWaitEvent(Handle, e.Handle, 0), "cuStreamWaitEvent");

    /// <summary>Host to device. The host bytes must stay as they are until the copy has
    /// run.</summary>
    public void Upload(ulong to, void* from, long bytes) => _driver.Check(
        _driver.MemcpyHtoDAsync(to, from, (nuint)bytes, Handle), "cuMemcpyHtoDAsync");

    /// <summary>Device to host; the bytes are there once the stream has been waited for.</summary>
    public void Download(void* to, ulong from, long bytes) => _driver.Check(
        _driver.MemcpyDtoHAsync(to, from, (nuint)bytes, Handle), "cuMemcpyDtoHAsync");

    public void Copy(ulong to, ulong from, long bytes) => _driver.Check(
        _driver.MemcpyDtoDAsync(to, from, (nuint)bytes, Handle), "cuMemcpyDtoDAsync");

    public void Fill(ulong to, byte value, long bytes) => _driver.Check(
        _driver.MemsetD8Async(to, value, (nuint)bytes, Handle), "cuMemsetD8Async");

    /// <summary>Sets count words of 4 bytes; the address is a multiple of 4.</summary>
    public void FillWords(ulong to, uint value, long count) => _driver.Check(
        _driver.MemsetD32Async(to, value, (nuint)count, Handle), "cuMemsetD32Async");

    public void Dispose() => _driver.StreamDestroy(Handle);
}

/// <summary>A point in a stream that others can wait for; with timing, also a clock.</summary>
public sealed unsafe class CudaEvent : IDisposable
{
    private const int NotReady = 600;
    private readonly CudaDriverApi _driver;

    public CudaEvent(CudaContext context, bool timing = false)
    {
        _driver = context.Api.Driver;
        nint handle = 0;
        _driver.Check(_driver.EventCreate(&handle, timing ? 0u : 2u),
            "cuEventCreate"); // DISABLE_TIMING
        Handle = handle;
    }

    public nint Handle { get; }

    public void Record(CudaStream stream) =>
        _driver.Check(_driver.EventRecord(Handle, stream.Handle), "cuEventRecord");

    /// <summary>The host waits for the latest record.</summary>
    public void Synchronise() =>
        _driver.Check(_driver.EventSynchronize(Handle), "cuEventSynchronize");

    /// <summary>Whether the latest record has run; does not wait.</summary>
    public bool IsReached()
    {
        int result = _driver.EventQuery(Handle);
        if (result == NotReady) return false;
        _driver.Check(result, "cuEventQuery");
        return true;
    }

    /// <summary>Milliseconds from an earlier event to this one; both made with timing and
    /// reached.</summary>
    public float MillisecondsSince(CudaEvent start)
    {
        float milliseconds = 0;
        _driver.Check(_driver.EventElapsedTime(&milliseconds, start.Handle, Handle),
            "cuEventElapsedTime");
        return milliseconds;
    }

    public void Dispose() => _driver.EventDestroy(Handle);
}
