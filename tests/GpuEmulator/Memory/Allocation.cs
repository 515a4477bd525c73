using System.Runtime.InteropServices;

namespace MiniCpmNative.GpuEmulator.Memory;

/// <summary>
/// One piece of device memory: a fake address range, the host bytes behind it, one state byte per
/// byte (0 never written, 255 written) and, per 4 bytes, the stamp of the block that wrote last.
/// State per byte instead of per bit: blocks on several threads may then write without locks.
/// </summary>
internal sealed unsafe class Allocation
{
    public Allocation(ulong start, long size, string what, bool readOnly = false)
    {
        (Start, Size, What, ReadOnly) = (start, size, what, readOnly);
        nuint padded = (nuint)((size + 63) / 64 * 64);
        Host = (byte*)NativeMemory.AlignedAlloc(padded, 64);
        State = (byte*)NativeMemory.AllocZeroed(padded);
        Writers = (uint*)NativeMemory.AllocZeroed(padded / 4, 4);
        new Span<byte>(Host, (int)Math.Min((long)padded, 1 << 20)).Fill(0xFF);
    }

    public ulong Start { get; }
    public long Size { get; }
    public string What { get; }
    public bool ReadOnly { get; }
    public ulong End => Start + (ulong)Size;
    public byte* Host { get; private set; }
    public byte* State { get; private set; }
    public uint* Writers { get; private set; }

    /// <summary>Two bytes per 32-byte sector: read, written in this launch; null when not
    /// counted.</summary>
    public byte* Touched { get; private set; }
    public bool Freed { get; private set; }

    public bool Holds(ulong address, long bytes) =>
        address >= Start && address - Start <= (ulong)(Size - bytes) && bytes <= Size;

    public void TrackSectors()
    {
        if (Touched == null) Touched = (byte*)NativeMemory.AllocZeroed((nuint)(Size / 32 + 2), 2);
    }

    public void Free()
    {
        Freed = true;
        NativeMemory.AlignedFree(Host);
        NativeMemory.Free(State);
        NativeMemory.Free(Writers);
        NativeMemory.Free(Touched);
        Host = State = null;
        Writers = null;
        Touched = null;
    }
}
