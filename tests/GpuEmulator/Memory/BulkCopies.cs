using System.Numerics;
using System.Runtime.CompilerServices;
using MiniCpmNative.GpuEmulator.Machine;

namespace MiniCpmNative.GpuEmulator.Memory;

/// <summary>
/// cp.async.bulk and cp.reduce.async.bulk .add.f32 of one warp, from shared to global memory. They
/// happen as late as the rules allow: shared memory is read by wait_group.read, global memory
/// written by wait_group, so that who waits for too little gets other values, and who does not wait
/// at all gets nothing.
/// </summary>
internal sealed unsafe class BulkCopies
{
    private sealed record Copy(int Lane, ulong To, ulong From, int Bytes, bool Add)
    {
        public bool Committed { get; set; }
        public byte[]? Read { get; set; }
    }

    private readonly List<Copy> _flying = [];

    public void Clear() => _flying.Clear();

    /// <summary>B bytes from shared [D] to global [A], added there where Mode is 1.</summary>
    public static void Issue(Warp w, Instruction i)
    {
        Address.Fill(w, i.D, i.DWidth == 8, i.Mode2);
        var from = new ulong[32];
        new ReadOnlySpan<ulong>(w.Addresses, 32).CopyTo(from);
        Address.Fill(w, i.A, i.AddressIs64, i.Offset);
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest), bytes = ((int*)(w.R + i.B))[lane];
            ulong shared = Address.ToShared(from[lane]), to = w.Addresses[lane];
            if (bytes <= 0 || bytes % 16 != 0 || to % 16 != 0 || shared % 16 != 0)
                throw w.Fault(Check.AsyncCopyShape, lane,
                    $"{bytes} bytes from shared 0x{shared:x} to 0x{to:x}, expected multiples of 16");
            w.Bulks._flying.Add(new(lane, to, shared, bytes, i.Mode == 1));
        }
    }

    public static void Commit(Warp w, Instruction i)
    {
        foreach (Copy copy in w.Bulks._flying) copy.Committed |= (w.Exec >> copy.Lane & 1) != 0;
    }

    /// <summary>All groups of these lanes: done, or with Mode 1 only read.</summary>
    public static void WaitFor(Warp w, Instruction i)
    {
        foreach (Copy copy in w.Bulks._flying)
        {
            if (!copy.Committed || (w.Exec >> copy.Lane & 1) == 0) continue;
            copy.Read ??= ReadShared(w, copy);
            if (i.Mode == 0) Write(w, i, copy);
        }
        if (i.Mode == 0)
            w.Bulks._flying.RemoveAll(c => c.Committed && (w.Exec >> c.Lane & 1) != 0);
    }

    private static byte[] ReadShared(Warp w, Copy copy)
    {
        var read = new byte[copy.Bytes];
        for (int at = 0; at < copy.Bytes; at += 16)
        {
            byte* from = w.Block.Shared.Resolve(w, copy.From + (ulong)at, 16, copy.Lane);
            w.Block.Shared.Read(w, from, 16, copy.Lane);
            new ReadOnlySpan<byte>(from, 16).CopyTo(read.AsSpan(at));
        }
        return read;
    }

    private static void Write(Warp w, Instruction i, Copy copy)
    {
        w.Counters.GlobalWriteBytes += copy.Bytes;
        byte* to = copy.Add
            ? GlobalAccess.Check(w, i, copy.To, copy.Bytes, copy.Lane)
            : GlobalAccess.Resolve(w, i, copy.To, copy.Bytes, copy.Lane, out _);
        fixed (byte* read = copy.Read)
        {
            if (!copy.Add) Unsafe.CopyBlock(to, read, (uint)copy.Bytes);
            else
                for (int n = 0; n < copy.Bytes / 4; n++)
                    ((float*)to)[n] += ((float*)read)[n];
        }
        GlobalAccess.MarkWritten(w, i, i.Nearby!, to, copy.Bytes);
    }
}
