using System.Runtime.InteropServices;

namespace MiniCpmNative.GpuEmulator.Memory;

/// <summary>
/// The device's address space. Addresses are not canonical on x86 (a host that follows one faults
/// at once), 256-byte aligned, with guard gaps, and never given twice: a freed range stays known.
/// Shared and local memory have windows for generic addresses.
/// </summary>
internal sealed unsafe class DeviceMemory(long capacity)
{
    public const ulong First = 0x00CD_0000_0000_0000;
    public const ulong SharedWindow = 0x00CE_0000_0000_0000;
    public const ulong LocalWindow = 0x00CF_0000_0000_0000;
    public const ulong ParamWindow = 0x00D0_0000_0000_0000;
    public const ulong WindowBytes = 1ul << 32;
    private const ulong Gap = 1 << 20;

    // Sorted by address because addresses only grow; replaced as a whole, so readers need no lock.
    private Allocation[] _all = [];
    private ulong _next = First + Gap;

    /// <summary>Stamps of blocks that wrote: a launch takes the range from LaunchStamp
    /// on.</summary>
    public uint NextStamp { get; set; } = 1;
    public uint LaunchStamp { get; set; } = 1;
    public long Capacity { get; } = capacity;
    public long Used { get; private set; }
    public IEnumerable<Allocation> Live => _all.Where(a => !a.Freed);

    /// <summary>A new range; null when the device is full.</summary>
    public Allocation? Allocate(long size, string what, bool readOnly = false)
    {
        if (size <= 0 || size > Capacity - Used) return null;
        var allocation = new Allocation(_next, size, what, readOnly);
        _next = (_next + (ulong)size + Gap + 255) & ~255ul;
        Used += size;
        _all = [.. _all, allocation];
        return allocation;
    }

    public bool Free(ulong address)
    {
        var allocation = Find(address);
        if (allocation == null || allocation.Start != address || allocation.Freed) return false;
        Used -= allocation.Size;
        allocation.Free();
        return true;
    }

    /// <summary>Frees everything, to end a device's life.</summary>
    public void Clear()
    {
        foreach (var allocation in Live) allocation.Free();
        _all = [];
        Used = 0;
    }

    /// <summary>The allocation (also a freed one) at or nearest below the address.</summary>
    public Allocation? Find(ulong address)
    {
        var all = _all;
        int low = 0, high = all.Length - 1;
        while (low <= high)
        {
            int middle = (low + high) >> 1;
            if (all[middle].Start <= address) low = middle + 1;
            else high = middle - 1;
        }
        return high >= 0 ? all[high] : null;
    }

    /// <summary>Why an access is not allowed, or null when it is.</summary>
    public (Check Check, string Detail)? Refusal(ulong address, long bytes)
    {
        var near = Find(address);
        if (near != null && near.Holds(address, bytes))
            return near.Freed
                ? (Check.UseAfterFree,
                $"0x{address:x} is {address - near.Start} bytes into freed {near.What}")
                : null;
        if (near != null && address < near.End + Gap)
            return near.Freed
                ? (Check.UseAfterFree, $"0x{address:x} is behind freed {near.What}")
                : (Check.OutOfBounds,
                   $"{bytes} bytes at 0x{address:x}, {(long)(address - near.Start)} bytes into " +
                   $"{near.What} of {near.Size}");
        var above = Find(address + Gap);
        if (above != null && above.Start > address && address + Gap >= above.Start)
            return (Check.OutOfBounds,
                $"{bytes} bytes at 0x{address:x}, {above.Start - address} bytes before {above.What}");
        return (Check.ForeignPointer, $"0x{address:x} is no device address");
    }

    /// <summary>Begins a launch of so many blocks: their stamps are not those of any earlier
    /// one.</summary>
    public void BeginLaunch(long blocks)
    {
        if (NextStamp + blocks >= uint.MaxValue)
        {
            foreach (var allocation in Live)
                NativeMemory.Clear(allocation.Writers, (nuint)allocation.Size);
            NextStamp = 1;
        }
        LaunchStamp = NextStamp;
        NextStamp += (uint)blocks;
    }
}
