namespace MiniCpmNative.Kernels.Cuda;

/// <summary>Host memory the device copies from and to without a detour; page-locked.</summary>
public sealed unsafe class PinnedMemory : IDisposable
{
    private readonly CudaDriverApi _driver;

    public PinnedMemory(CudaContext context, long bytes)
    {
        _driver = context.Api.Driver;
        void* pointer = null;
        _driver.Check(_driver.MemHostAlloc(&pointer, (nuint)bytes, 0), "cuMemHostAlloc",
            $"{bytes:N0} bytes");
        Pointer = pointer;
        Bytes = bytes;
    }

    public void* Pointer { get; private set; }
    public long Bytes { get; }

    public Span<T> Span<T>() where T : unmanaged => new(Pointer, checked((int)(Bytes / sizeof(T))));

    public void Dispose()
    {
        if (Pointer != null) _driver.MemFreeHost(Pointer);
        Pointer = null;
    }
}
