using MiniCpmNative.GpuEmulator.Machine;

namespace MiniCpmNative.GpuEmulator.Memory;

/// <summary>Bulk copies: their reads go on until they are waited for, their writes are ordered by
/// the barrier that hears of them.</summary>
internal sealed unsafe partial class SharedMemory
{
    private sealed class BulkReads(int rows)
    {
        public readonly uint[] Time = new uint[rows];
        public readonly byte[] Warp = new byte[rows];
        public readonly ushort[] Flying = new ushort[rows];
    }

    private BulkReads? _bulkReads;

    /// <summary>A bulk copy has written 16 bytes.</summary>
    public void EndBulkWrite(Warp w, byte* at)
    {
        long offset = at - Host;
        new Span<byte>(_state + offset, 16).Fill(Written);
        new Span<uint>(_writers + offset / 4, 4).Fill(Cell(w.Index, Bulk, AllBytes));
    }

    /// <summary>A bulk copy is going to read 16 bytes.</summary>
    public void BeginBulkRead(Warp w, byte* at, int lane)
    {
        long offset = at - Host;
        var states = new ReadOnlySpan<byte>(_state + offset, 16);
        if (states.ContainsAnyExcept(Written))
            throw Unreadable(w, lane, offset + states.IndexOfAnyExcept(Written));
        CheckProxy(w, offset, "a bulk copy");
        _bulkReads ??= new((Bytes + 15) / 16);
        _bulkReads.Time[offset / 16] = InFlight;
        _bulkReads.Flying[offset / 16]++;
        _bulkReads.Warp[offset / 16] = (byte)w.Index;
    }

    /// <summary>Its warp has waited for the reading.</summary>
    public void EndBulkRead(Warp w, ulong address)
    {
        long row = ((long)address - First) / 16;
        if (--_bulkReads!.Flying[row] == 0) _bulkReads.Time[row] = _time;
    }

    private void CheckBulkReads(Warp w, long offset, int bytes, int lane)
    {
        for (long row = offset / 16; row <= (offset + bytes - 1) / 16; row++)
        {
            uint time = _bulkReads!.Time[row];
            int warp = _bulkReads.Warp[row];
            if (time == 0 || (time != InFlight && (warp == w.Index
                || Knows(w.Index, warp, (int)time)))) continue;
            throw w.Fault(Check.SharedRaceBetweenWarps, lane & 31,
                $"shared byte {row * 16} is written, read by a bulk copy of warp {warp}" +
                (time == InFlight ? " that has not been waited for"
                    : ", and no barrier stands between"));
        }
    }
}
