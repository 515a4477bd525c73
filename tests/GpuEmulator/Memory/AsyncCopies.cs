using MiniCpmNative.GpuEmulator.Machine;

namespace MiniCpmNative.GpuEmulator.Memory;

/// <summary>
/// cp.async of one warp. Copies belong to lanes: commit_group closes a lane's group, wait_group N
/// completes all but its N latest. Late copies read their source only then; early ones at issue.
/// </summary>
internal sealed unsafe class AsyncCopies
{
    private readonly record struct Copy(uint Mask, int Group, int Bytes, ulong[] Source,
        nint[] Target, byte[] Used);

    private readonly List<Copy> _flying = [];
    private readonly int[] _groups = new int[32];

    public void Clear()
    {
        _flying.Clear();
        Array.Clear(_groups);
    }

    /// <summary>cp.async [D], [A], Mode bytes of which the row B (when there) says how many are
    /// read.</summary>
    public static void Issue(Warp w, Instruction i)
    {
        int bytes = i.Mode;
        Address.Fill(w, i.A, i.AddressIs64, i.Offset);
        var copies = w.Copies;
        var source = new ulong[32];
        new ReadOnlySpan<ulong>(w.Addresses, 32).CopyTo(source);
        Address.Fill(w, i.D, i.DWidth == 8, i.Mode2);
        var target = new nint[32];
        var used = new byte[32];
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
        {
            int lane = System.Numerics.BitOperations.TrailingZeroCount(rest);
            uint wanted = i.B >= 0 ? ((uint*)(w.R + i.B))[lane] : (uint)bytes;
            if (wanted > bytes)
                throw w.Fault(Check.AsyncCopyShape, lane, $"source size {wanted} is above {bytes}");
            used[lane] = (byte)wanted;
            target[lane] =
                (nint)w.Block.Shared.Resolve(w, Address.ToShared(w.Addresses[lane]), bytes, lane);
            w.Block.Shared.BeginCopy(w, (byte*)target[lane], bytes, lane);
            if (source[lane] % (ulong)bytes != 0)
                throw w.Fault(Check.Misaligned, lane,
                    $"{bytes} bytes copied from 0x{source[lane]:x}");
            if (wanted > 0) GlobalAccess.Check(w, i, source[lane], (int)wanted, lane);
            if (w.Block.Options.EarlyAsyncCopies)
                Transfer(w, i, source[lane], target[lane], bytes, wanted, lane);
        }
        w.Counters.GlobalReadRequests++;
        CountRead(w, i, source, used);
        // Lanes that have committed the same number of groups go as one record.
        for (uint rest = w.Exec; rest != 0;)
        {
            int group = copies._groups[System.Numerics.BitOperations.TrailingZeroCount(rest)];
            uint mask = 0;
            for (uint left = rest; left != 0; left &= left - 1)
            {
                int lane = System.Numerics.BitOperations.TrailingZeroCount(left);
                if (copies._groups[lane] == group) mask |= 1u << lane;
            }
            copies._flying.Add(new(mask, group, bytes, source, target, used));
            rest &= ~mask;
        }
    }

    private static void CountRead(Warp w, Instruction i, ulong[] source, byte[] used)
    {
        uint reading = 0;
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
        {
            int lane = System.Numerics.BitOperations.TrailingZeroCount(rest);
            w.Addresses[lane] = source[lane];
            if (used[lane] == 0) continue;
            reading |= 1u << lane;
            w.Counters.GlobalReadBytes += used[lane];
        }
        w.Counters.GlobalReadSectors += GlobalAccess.CountSectors(w, i, reading, i.Mode,
            write: false);
    }

    public static void Commit(Warp w, Instruction i)
    {
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
            w.Copies._groups[System.Numerics.BitOperations.TrailingZeroCount(rest)]++;
    }

    /// <summary>wait_group Mode, or all of them (Mode -1, which also takes what was not
    /// committed).</summary>
    public static void WaitFor(Warp w, Instruction i) => WaitFor(w, i, i.Mode);

    private static void WaitFor(Warp w, Instruction i, int most)
    {
        var flying = w.Copies._flying;
        for (int c = 0; c < flying.Count; c++)
        {
            var copy = flying[c];
            uint done = 0;
            for (uint rest = copy.Mask & w.Exec; rest != 0; rest &= rest - 1)
            {
                int lane = System.Numerics.BitOperations.TrailingZeroCount(rest);
                if (most >= 0 && copy.Group >= w.Copies._groups[lane] - most) continue;
                done |= 1u << lane;
                if (!w.Block.Options.EarlyAsyncCopies)
                    Transfer(w, i, copy.Source[lane], copy.Target[lane], copy.Bytes,
                        copy.Used[lane], lane);
                w.Block.Shared.EndCopy(w, (byte*)copy.Target[lane], copy.Bytes, lane);
            }
            flying[c] = copy with { Mask = copy.Mask & ~done };
        }
        flying.RemoveAll(copy => copy.Mask == 0);
    }

    /// <summary>cp.async.mbarrier.arrive [A]: an arrival once the lane's copies so far are done,
    /// which is at once here; without .noinc (Mode 0) it was not counted when the barrier was
    /// made.</summary>
    public static void ArriveWhenDone(Warp w, Instruction i)
    {
        WaitFor(w, i, -1);
        Address.Fill(w, i.A, i.AddressIs64, i.Offset);
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
        {
            int lane = System.Numerics.BitOperations.TrailingZeroCount(rest);
            var barrier = w.Block.Barriers.Find(w, Address.ToShared(w.Addresses[lane]), lane);
            if (i.Mode == 0) barrier.Pending++;
            w.Block.Barriers.Arrive(w, lane, barrier, 1);
        }
    }

    private static void Transfer(Warp w, Instruction i, ulong source, nint target, int bytes,
        uint used, int lane)
    {
        var to = new Span<byte>((byte*)target, bytes);
        to.Clear();
        if (used > 0)
            new ReadOnlySpan<byte>(GlobalAccess.Check(w, i, source, (int)used, lane), (int)used)
                .CopyTo(to);
    }
}
