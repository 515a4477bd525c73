using System.Numerics;
using MiniCpmNative.GpuEmulator.Machine;

namespace MiniCpmNative.GpuEmulator.Memory;

/// <summary>16 bytes of shared memory and the Bytes in global memory that they stand for, from
/// byte Skip on; what is not there is zero.</summary>
internal readonly record struct BulkPiece(ulong Shared, ulong Global, int Skip, int Bytes);

/// <summary>One bulk copy of a lane: to shared memory with a barrier that gets its bytes, or to
/// global memory in a group, there added to floats with Add.</summary>
internal sealed record BulkCopy(
    Warp Warp, Instruction Source, int Lane, BulkPiece[] Pieces, int Bytes,
    MemoryBarriers.Barrier? Barrier, bool Add)
{
    public int Group { get; init; }

    /// <summary>The bytes once they are read; the reading may be waited for later.</summary>
    public byte[]? Read { get; set; }
    public bool Waited { get; set; }
}

/// <summary>
/// cp.async.bulk of one warp. Copies happen as late as the rules allow, or with EarlyAsyncCopies
/// when they are issued: to shared memory when nobody can go on without them, from shared memory
/// read by wait_group.read and written by wait_group. Until then their shared bytes may not be
/// touched, or not be written.
/// </summary>
internal sealed unsafe class BulkCopies
{
    private readonly List<BulkCopy> _stores = [];
    private readonly int[] _groups = new int[32];

    public void Clear()
    {
        _stores.Clear();
        Array.Clear(_groups);
    }

    /// <summary>B bytes from shared [D] to global [A] (Mode 0), added there (1), or from global [A]
    /// to shared [D] with the barrier at row C, offset E (2).</summary>
    public static void Issue(Warp w, Instruction i)
    {
        Address.Fill(w, i.D, i.DWidth == 8, i.Mode2);
        var shared = new ulong[32];
        new ReadOnlySpan<ulong>(w.Addresses, 32).CopyTo(shared);
        Address.Fill(w, i.A, i.AddressIs64, i.Offset);
        var global = new ulong[32];
        new ReadOnlySpan<ulong>(w.Addresses, 32).CopyTo(global);
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest), bytes = ((int*)(w.R + i.B))[lane];
            ulong at = Address.ToShared(shared[lane]);
            if (bytes <= 0 || bytes % 16 != 0)
                throw w.Fault(Check.AsyncCopyShape, lane, $"{bytes} bytes: multiples of 16");
            if (at % 16 != 0 || global[lane] % 16 != 0)
                throw w.Fault(Check.Misaligned, lane,
                    $"shared 0x{at:x}, global 0x{global[lane]:x}: bulk copies need 16 bytes");
            var pieces = new BulkPiece[bytes / 16];
            for (int n = 0; n < pieces.Length; n++)
                pieces[n] = new(at + (uint)n * 16, global[lane] + (uint)n * 16, 0, 16);
            Begin(w, i, lane, pieces, toShared: i.Mode == 2, i.Mode == 1);
        }
    }

    /// <summary>Starts a copy of pieces, of Bytes each that are 16 in shared memory.</summary>
    public static void Begin(Warp w, Instruction i, int lane, BulkPiece[] pieces, bool toShared,
        bool add)
    {
        var memory = w.Block.Shared;
        bool early = w.Block.Options.EarlyAsyncCopies;
        if (!toShared)
        {
            var store = new BulkCopy(w, i, lane, pieces, pieces.Length * 16, null, add)
            {
                Group = w.Bulks._groups[lane],
            };
            foreach (var piece in pieces)
                memory.BeginBulkRead(w, memory.Resolve(w, piece.Shared, 16, lane), lane);
            w.Bulks._stores.Add(store);
            if (early) ReadShared(store);
            return;
        }
        ulong at = Address.ToShared(i.Barrier64 ? ((ulong*)(w.R + i.C))[lane]
            : ((uint*)(w.R + i.C))[lane]) + (ulong)i.BarrierOffset;
        var barrier = w.Block.Barriers.Find(w, at, lane);
        foreach (var piece in pieces)
        {
            memory.BeginCopy(w, memory.Resolve(w, piece.Shared, 16, lane), 16, lane);
            if (piece.Bytes > 0) GlobalAccess.Check(w, i, piece.Global, piece.Bytes, lane);
        }
        var copy = new BulkCopy(w, i, lane, pieces, pieces.Length * 16, barrier, false);
        if (early) Deliver(copy);
        else w.Block.Flying.Add(copy);
    }

    /// <summary>A copy to shared memory arrives, and its barrier hears of it.</summary>
    public static void Deliver(BulkCopy copy)
    {
        var w = copy.Warp;
        var memory = w.Block.Shared;
        w.Counters.GlobalReadBytes += copy.Bytes;
        foreach (var piece in copy.Pieces)
        {
            byte* to = memory.Resolve(w, piece.Shared, 16, copy.Lane);
            var target = new Span<byte>(to, 16);
            target.Clear();
            if (piece.Bytes > 0)
                new ReadOnlySpan<byte>(GlobalAccess.Check(w, copy.Source, piece.Global, piece.Bytes,
                    copy.Lane), piece.Bytes).CopyTo(target[piece.Skip..]);
            memory.EndBulkWrite(w, to);
        }
        w.Block.Barriers.Transferred(w, copy.Lane, copy.Barrier!, copy.Bytes);
    }

    public static void Commit(Warp w, Instruction i)
    {
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
            w.Bulks._groups[BitOperations.TrailingZeroCount(rest)]++;
    }

    /// <summary>All but the latest B groups of these lanes: done, or with Mode 1 only
    /// read.</summary>
    public static void WaitFor(Warp w, Instruction i)
    {
        var bulks = w.Bulks;
        foreach (var copy in bulks._stores)
        {
            if (!Waits(copy)) continue;
            ReadShared(copy);
            EndRead(copy);
            if (i.Mode == 0) Write(copy);
        }
        if (i.Mode == 0) bulks._stores.RemoveAll(Waits);

        bool Waits(BulkCopy copy) => (w.Exec >> copy.Lane & 1) != 0
            && copy.Group < bulks._groups[copy.Lane] - i.Count;
    }

    /// <summary>The warp has returned: what was read is written in the end; what was not may be
    /// read when the shared memory is another block's.</summary>
    public void End(Warp w)
    {
        foreach (var copy in _stores)
        {
            if (!copy.Waited)
                throw w.Fault(Check.AsyncCopyNotWaitedFor, copy.Lane,
                    $"the warp returns while bulk copies read its shared memory: {copy.Source.Source.Text}");
            Write(copy);
        }
        _stores.Clear();
    }

    private static void ReadShared(BulkCopy copy)
    {
        if (copy.Read != null) return;
        var memory = copy.Warp.Block.Shared;
        copy.Read = new byte[copy.Bytes];
        for (int n = 0; n < copy.Pieces.Length; n++)
        {
            byte* from = memory.Resolve(copy.Warp, copy.Pieces[n].Shared, 16, copy.Lane);
            new ReadOnlySpan<byte>(from, 16).CopyTo(copy.Read.AsSpan(n * 16));
        }
    }

    private static void EndRead(BulkCopy copy)
    {
        if (copy.Waited) return;
        copy.Waited = true;
        foreach (var piece in copy.Pieces)
            copy.Warp.Block.Shared.EndBulkRead(copy.Warp, piece.Shared);
    }

    private static void Write(BulkCopy copy)
    {
        var (w, i) = (copy.Warp, copy.Source);
        fixed (byte* read = copy.Read)
            for (int n = 0; n < copy.Pieces.Length; n++)
            {
                var piece = copy.Pieces[n];
                if (piece.Bytes == 0) continue;
                w.Counters.GlobalWriteBytes += piece.Bytes;
                byte* from = read + n * 16 + piece.Skip;
                byte* to = copy.Add
                    ? GlobalAccess.Check(w, i, piece.Global, piece.Bytes, copy.Lane)
                    : GlobalAccess.CheckWrite(w, i, piece.Global, from, piece.Bytes, copy.Lane);
                if (copy.Add)
                    for (int f = 0; f < piece.Bytes / 4; f++) ((float*)to)[f] += ((float*)from)[f];
                else new ReadOnlySpan<byte>(from, piece.Bytes).CopyTo(new(to, piece.Bytes));
                GlobalAccess.MarkWritten(w, i, piece.Global, to, piece.Bytes);
            }
    }
}
