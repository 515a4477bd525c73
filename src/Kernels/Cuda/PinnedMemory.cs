namespace MiniCpmNative.Kernels.Cuda;

/// <summary>Host memory the device copies from and to without a detour; page-locked.</summary>
public sealed unsafe class PinnedMemory : IDisposable
{
    /// <summary>CU_MEMHOSTALLOC_DEVICEMAP.</summary>
    public const uint DeviceMap = 2;

    private const int OutOfMemory = 2;
    private readonly CudaDriverApi _driver;

    /// <param name="context">Of the device.</param>
    /// <param name="bytes">How many.</param>
    /// <param name="forKernels">Whether kernels use it, under the host's own address.</param>
    /// <exception cref="DeviceMemoryException">The host has not that much left.</exception>
    public PinnedMemory(CudaContext context, long bytes, bool forKernels = false)
    {
        _driver = context.Api.Driver;
        void* pointer = null;
        int result =
            _driver.MemHostAlloc(&pointer, (nuint)bytes, forKernels ? DeviceMap : 0);
        if (result == OutOfMemory)
            throw new DeviceMemoryException(
                $"cuda: {bytes:N0} bytes of the machine's memory cannot be locked for the GPU");
        _driver.Check(result, "cuMemHostAlloc", $"{bytes:N0} bytes");
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
