using System.Numerics;
using System.Runtime.CompilerServices;
using MiniCpmNative.GpuEmulator.Machine;

namespace MiniCpmNative.GpuEmulator.Memory;

/// <summary>
/// Loads and stores of global memory with every check: bounds, freed, foreign, aligned, written
/// before, not written by another block of the launch, and ld.global.nc of nothing written in it.
/// </summary>
internal static unsafe class GlobalAccess
{
    public static void Load(Warp w, Instruction i)
    {
        Address.Fill(w, i.A, i.AddressIs64, i.Offset);
        LoadAt(w, i, w.Exec);
    }

    public static void Store(Warp w, Instruction i)
    {
        Address.Fill(w, i.A, i.AddressIs64, i.Offset);
        StoreAt(w, i, w.Exec);
    }

    /// <summary>ld.const: checked like global memory, but no DRAM traffic.</summary>
    public static void LoadConstant(Warp w, Instruction i)
    {
        Address.Fill(w, i.A, i.AddressIs64, i.Offset);
        int bytes = i.Size * i.Count;
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            ulong address = w.Addresses[lane];
            if (address % (ulong)bytes != 0)
                throw w.Fault(GpuEmulator.Check.Misaligned, lane,
                    $"{bytes} bytes at constant 0x{address:x}");
            Unsafe.CopyBlock(w.Staging + lane * bytes, Check(w, i, address, bytes, lane),
                (uint)bytes);
        }
        Lanes.ToRegisters(w, i, w.Staging, w.Exec);
    }

    /// <summary>Loads from w.Addresses for those lanes.</summary>
    public static void LoadAt(Warp w, Instruction i, uint exec)
    {
        int bytes = i.Size * i.Count;
        ulong* address = w.Addresses;
        w.Counters.GlobalReadRequests++;
        w.Counters.GlobalReadBytes += bytes * BitOperations.PopCount(exec);
        w.Counters.GlobalReadSectors += CountSectors(w, i, exec, bytes, write: false);
        if (i.Looks) Acquire(w, exec);
        if (exec == uint.MaxValue && address[0] % (ulong)bytes == 0
            && Address.IsRow(address, bytes))
        {
            byte* row = TryRow(w, i, address[0], bytes * 32, out var allocation);
            if (row != null && IsWritten(allocation!, row, bytes * 32)
                && !IsContested(w, i, allocation!, row, bytes * 32))
            {
                Lanes.ToRegisters(w, i, row, exec);
                return;
            }
        }
        for (uint rest = exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            if (address[lane] % (ulong)bytes != 0)
                throw w.Fault(GpuEmulator.Check.Misaligned, lane,
                    $"{bytes} bytes at global address 0x{address[lane]:x}");
            Unsafe.CopyBlock(w.Staging + lane * bytes, Check(w, i, address[lane], bytes, lane),
                (uint)bytes);
        }
        Lanes.ToRegisters(w, i, w.Staging, exec);
    }

    public static void StoreAt(Warp w, Instruction i, uint exec)
    {
        int bytes = i.Size * i.Count;
        ulong* address = w.Addresses;
        w.Counters.GlobalWriteRequests++;
        w.Counters.GlobalWriteBytes += bytes * BitOperations.PopCount(exec);
        w.Counters.GlobalWriteSectors += CountSectors(w, i, exec, bytes, write: true);
        if (i.Volatile)
        {
            w.Block.Changed();
            if (i.Releases || w.Block.Fenced) Release(w, exec);
        }
        Lanes.FromRegisters(w, i, w.Staging, exec);
        if (exec == uint.MaxValue && address[0] % (ulong)bytes == 0
            && Address.IsRow(address, bytes))
        {
            byte* row = TryRow(w, i, address[0], bytes * 32, out var allocation);
            if (row != null && !allocation!.ReadOnly
                && !IsContested(w, i, allocation, row, bytes * 32))
            {
                Unsafe.CopyBlock(row, w.Staging, (uint)(bytes * 32));
                MarkWritten(w, i, allocation, row, bytes * 32);
                return;
            }
        }
        for (uint rest = exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            if (address[lane] % (ulong)bytes != 0)
                throw w.Fault(GpuEmulator.Check.Misaligned, lane,
                    $"{bytes} bytes at global address 0x{address[lane]:x}");
            byte* value = w.Staging + lane * bytes;
            byte* to = CheckWrite(w, i, address[lane], value, bytes, lane);
            Unsafe.CopyBlock(to, value, (uint)bytes);
            MarkWritten(w, i, address[lane], to, bytes);
        }
    }

    /// <summary>Host bytes of one lane's write of that value, checked; alignment is the
    /// caller's.</summary>
    public static byte* CheckWrite(Warp w, Instruction i, ulong address, byte* value, int bytes,
        int lane)
    {
        byte* to = Resolve(w, i, address, bytes, lane, out var allocation);
        if (!i.Volatile && IsContested(w, i, allocation, to, bytes)
            && !new Span<byte>(to, bytes).SequenceEqual(new Span<byte>(value, bytes)))
            throw w.Fault(GpuEmulator.Check.GlobalRace, lane,
                $"{Where(allocation, address)} is written, and so it was by block " +
                $"{Writer(w, allocation, to)} of this launch");
        return to;
    }

    /// <summary>What was left at the lanes' addresses is visible from now on.</summary>
    public static void Acquire(Warp w, uint exec)
    {
        for (uint rest = exec; rest != 0; rest &= rest - 1)
            w.Block.Launch.Handovers.Acquire(w.Block,
                w.Addresses[BitOperations.TrailingZeroCount(rest)]);
    }

    public static void Release(Warp w, uint exec)
    {
        for (uint rest = exec; rest != 0; rest &= rest - 1)
            w.Block.Launch.Handovers.Release(w.Block,
                w.Addresses[BitOperations.TrailingZeroCount(rest)]);
    }

    /// <summary>Host bytes of one lane's read, checked; alignment is the caller's.</summary>
    public static byte* Check(Warp w, Instruction i, ulong address, int bytes, int lane)
    {
        byte* from = Resolve(w, i, address, bytes, lane, out var allocation);
        if (!IsWritten(allocation, from, bytes))
            throw w.Fault(GpuEmulator.Check.Uninitialised, lane,
                $"{bytes} bytes at {Where(allocation, address)} were never written");
        if (!i.Volatile && IsContested(w, i, allocation, from, bytes))
            throw w.Fault(i.NonCoherent ? GpuEmulator.Check.NonCoherentRead
                : GpuEmulator.Check.GlobalRace, lane,
                $"{Where(allocation, address)} is read, and block {Writer(w, allocation, from)} of this " +
                "launch has written it");
        return from;
    }

    /// <summary>Host bytes of one lane's access that may write.</summary>
    public static byte* Resolve(
        Warp w, Instruction i, ulong address, int bytes, int lane, out Allocation allocation)
    {
        var near = i.Nearby;
        if (near == null || near.Freed || !near.Holds(address, bytes))
        {
            if (w.Block.Memory.Refusal(address, bytes) is { } refusal)
                throw w.Fault(refusal.Check, lane, refusal.Detail);
            i.Nearby = near = w.Block.Memory.Find(address)!;
        }
        if (near.ReadOnly && (i.Source.Opcode[0] is 's' or 'a' or 'r'))
            throw w.Fault(GpuEmulator.Check.ConstantWrite, lane, $"{near.What} is constant");
        allocation = near;
        return near.Host + (address - near.Start);
    }

    /// <summary>Marks bytes as written by the warp's block.</summary>
    public static void MarkWritten(Warp w, Instruction i, ulong address, byte* at, int bytes)
    {
        // The instruction's cache is all threads': another may have put its own there meanwhile.
        Allocation? near = i.Nearby;
        if (near is null || near.Freed || !near.Holds(address, bytes))
            near = w.Block.Memory.Find(address)!;
        MarkWritten(w, i, near, at, bytes);
    }

    private static void MarkWritten(Warp w, Instruction i, Allocation allocation, byte* at,
        int bytes)
    {
        long offset = at - allocation.Host;
        new Span<byte>(allocation.State + offset, bytes).Fill(255);
        // Volatile stores are meant for other blocks: they leave no mark that a reader stumbles
        // over.
        uint stamp = i.Volatile ? 0 : w.Block.Stamp;
        // A word written in part may be another block's in the other part: it has no owner.
        long first = (offset + 3) / 4, end = (offset + bytes) / 4;
        if (end > first) new Span<uint>(allocation.Writers + first, (int)(end - first)).Fill(stamp);
        if (offset % 4 != 0) allocation.Writers[offset / 4] = 0;
        if ((offset + bytes) % 4 != 0) allocation.Writers[(offset + bytes) / 4] = 0;
    }

    private static byte* TryRow(Warp w, Instruction i, ulong address, int bytes,
        out Allocation? allocation)
    {
        var near = i.Nearby;
        if (near == null || !near.Holds(address, bytes) || near.Freed)
        {
            near = w.Block.Memory.Find(address);
            if (near == null || near.Freed || !near.Holds(address, bytes))
            {
                allocation = null;
                return null;
            }
            i.Nearby = near;
        }
        allocation = near;
        return near.Host + (address - near.Start);
    }

    private static bool IsWritten(Allocation allocation, byte* at, int bytes) =>
        !new ReadOnlySpan<byte>(allocation.State + (at - allocation.Host), bytes)
            .ContainsAnyExcept((byte)255);

    // Some word was written in this launch by another block; for .nc reads, by any block.
    private static bool IsContested(Warp w, Instruction i, Allocation allocation, byte* at,
        int bytes)
    {
        uint* writers = allocation.Writers + (at - allocation.Host) / 4;
        uint first = w.Block.Memory.LaunchStamp, mine = i.NonCoherent ? 0 : w.Block.Stamp;
        int words = (bytes + 3) / 4;
        for (int n = 0; n < words; n++)
            if (writers[n] >= first && writers[n] != mine
                && (i.NonCoherent || !w.Block.Acquired.Contains(writers[n])))
                return true;
        return false;
    }

    private static long Writer(Warp w, Allocation allocation, byte* at)
    {
        uint stamp = allocation.Writers[(at - allocation.Host) / 4];
        return (long)stamp - w.Block.Memory.LaunchStamp;
    }

    private static string Where(Allocation allocation, ulong address) =>
        $"byte {address - allocation.Start} of {allocation.What}";

    /// <summary>Distinct 32-byte sectors of those lanes' accesses; marks them when footprints are
    /// on.</summary>
    public static int CountSectors(Warp w, Instruction i, uint exec, int bytes, bool write)
    {
        ulong* address = w.Addresses;
        Span<ulong> seen = stackalloc ulong[32];
        int count = 0;
        ulong last = ulong.MaxValue;
        for (uint rest = exec; rest != 0; rest &= rest - 1)
        {
            ulong sector = address[BitOperations.TrailingZeroCount(rest)] >> 5;
            if (sector == last) continue;
            last = sector;
            if (count > 0 && sector < seen[count - 1] && seen[..count].Contains(sector)) continue;
            seen[count++] = sector;
        }
        if (w.Block.Options.Footprint) Mark(w, i, seen[..count], write);
        return count;
    }

    private static void Mark(Warp w, Instruction i, ReadOnlySpan<ulong> sectors, bool write)
    {
        foreach (ulong sector in sectors)
        {
            var allocation = i.Nearby is { } near && near.Holds(sector << 5, 1)
                ? near
                : w.Block.Memory.Find((sector << 5) + 31);
            if (allocation?.Touched == null) continue;
            // A byte each for reads and writes: blocks on several threads may set them without
            // locks.
            allocation.Touched[(sector - (allocation.Start >> 5)) * 2 + (write ? 1u : 0u)] = 1;
        }
    }
}
