using System.Runtime.InteropServices;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// Zeroed memory outside the managed heap, 2 MiB aligned and advised for transparent huge pages:
/// with nested paging a GEMM over 4 KiB pages spends up to two thirds of its time on TLB misses. On
/// Linux only the address range is taken at first and pages come when touched, so a range may be
/// far larger than what is used; elsewhere the system decides.
/// </summary>
public sealed unsafe class HugeMemory : IDisposable
{
    private const nuint Alignment = 2 << 20;
    private const int ReadWrite = 3, PrivateAnonymousNoReserve = 0x4022, AdviseHugePage = 14;

    private readonly byte* _mapping;
    private readonly nuint _mapped;

    public HugeMemory(long bytes)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(bytes);
        Bytes = bytes;
        _mapped = (Math.Max(1, (nuint)bytes) + (2 * Alignment) - 1) / Alignment * Alignment;
        if (OperatingSystem.IsLinux())
        {
            _mapping = (byte*)Map(null, _mapped, ReadWrite, PrivateAnonymousNoReserve, -1, 0);
            if ((nint)_mapping == -1) throw Failed(bytes);
            Data = (byte*)(((nuint)_mapping + Alignment - 1) / Alignment * Alignment);
            _ = Advise(Data, _mapped - (nuint)(Data - _mapping), AdviseHugePage);
            return;
        }

        try
        {
            Data = _mapping = (byte*)NativeMemory.AlignedAlloc(_mapped, Alignment);
        }
        catch (OutOfMemoryException)
        {
            throw Failed(bytes);
        }

        NativeMemory.Clear(Data, _mapped);
    }

    public byte* Data { get; private set; }

    public long Bytes { get; }

    public void Dispose()
    {
        if (Data is null) return;
        if (OperatingSystem.IsLinux()) _ = Unmap(_mapping, _mapped);
        else NativeMemory.AlignedFree(_mapping);
        Data = null;
    }

    private static DeviceMemoryException Failed(long bytes) =>
        new($"out of memory: {bytes / 1048576.0:F1} MiB asked for in one piece on the CPU");

    [DllImport("libc", EntryPoint = "mmap")]
    private static extern void* Map(
        void* address, nuint length, int protection, int flags, int file, nint offset);

    [DllImport("libc", EntryPoint = "munmap")]
    private static extern int Unmap(void* address, nuint length);

    [DllImport("libc", EntryPoint = "madvise")]
    private static extern int Advise(void* address, nuint length, int advice);
}
