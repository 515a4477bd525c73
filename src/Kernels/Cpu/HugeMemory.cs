using System.Runtime.InteropServices;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// Zeroed memory outside the managed heap, 2 MiB aligned and advised for transparent huge pages: with
/// nested paging a GEMM over 4 KiB pages spends up to two thirds of its time on TLB misses.
/// </summary>
public sealed unsafe class HugeMemory : IDisposable
{
    private const nuint Alignment = 2 << 20;
    private const int AdviseHugePage = 14;

    public HugeMemory(long bytes)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(bytes);
        Bytes = bytes;
        nuint size = ((nuint)bytes + Alignment - 1) / Alignment * Alignment;
        if (size == 0) size = Alignment;
        try
        {
            Data = (byte*)NativeMemory.AlignedAlloc(size, Alignment);
        }
        catch (OutOfMemoryException)
        {
            throw new DeviceMemoryException(
                $"out of memory: {bytes:N0} bytes asked for in one piece on the CPU");
        }

        if (OperatingSystem.IsLinux()) _ = Advise(Data, size, AdviseHugePage);
        // Large blocks come from the system zeroed and untouched; clearing them would touch all pages,
        // but a recycled block is not zero, so it has to be done.
        NativeMemory.Clear(Data, size);
    }

    public byte* Data { get; private set; }

    public long Bytes { get; }

    public void Dispose()
    {
        if (Data is null) return;
        NativeMemory.AlignedFree(Data);
        Data = null;
    }

    [DllImport("libc", EntryPoint = "madvise")]
    private static extern int Advise(void* address, nuint length, int advice);
}
