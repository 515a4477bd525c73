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
