namespace MiniCpmNative.Kernels.Cuda;

/// <summary>One piece of device memory, 256-byte aligned, cut up by whoever owns it.</summary>
public sealed unsafe class DeviceSlab : IDisposable
{
    private const int OutOfMemory = 2;
    private readonly CudaContext _context;
    private readonly CudaDriverApi _driver;

    /// <exception cref="DeviceMemoryException">The device has not that much left.</exception>
    public DeviceSlab(CudaContext context, long bytes)
    {
        (_context, _driver) = (context, context.Api.Driver);
        ulong address = 0;
        int result = _driver.MemAlloc(&address, (nuint)bytes);
        if (result == OutOfMemory)
            throw new DeviceMemoryException(
                $"cuda: {bytes:N0} bytes are needed on {context.Name}, {context.Memory().Free:N0} "
                    + "are free");
        _driver.Check(result, "cuMemAlloc", $"{bytes:N0} bytes");
        (Address, Bytes) = (address, bytes);
        context.HeldBytes += bytes;
    }

    public ulong Address { get; private set; }
    public long Bytes { get; }

    public void Dispose()
    {
        if (Address == 0) return;
        _driver.MemFree(Address);
        _context.HeldBytes -= Bytes;
        Address = 0;
    }
}
