namespace MiniCpmNative.Kernels.Cuda;

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
