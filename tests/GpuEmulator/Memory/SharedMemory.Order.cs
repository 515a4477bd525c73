using System.Runtime.Intrinsics;
using MiniCpmNative.GpuEmulator.Machine;

namespace MiniCpmNative.GpuEmulator.Memory;

/// <summary>Who has met whom by way of memory barriers and bar.arrive, and reads of whole
/// warpgroups.</summary>
internal sealed unsafe partial class SharedMemory
{
    // What the warps that called bar.arrive had to hand on, per numbered barrier.
    private readonly int[][] _arrivals = new int[16][];

    // Time of the last read by wgmma, per warpgroup and 16 bytes; empty without wgmma.
    private uint[][] _groupReads = [];

    /// <summary>The present time of the block; a new epoch begins when times start anew.</summary>
    public int Time => (int)_time;
    public int Epoch { get; private set; }
    public int ClockSize => _warps;

    /// <summary>bar.arrive: whoever waits at the barrier will know what this warp knows.</summary>
    public void Arrive(int warp, int barrier) => Publish(warp, _arrivals[barrier]);

    /// <summary>Adds what a warp knows, and all it has done, to a clock.</summary>
    public void Publish(int warp, int[] clock)
    {
        for (int other = 0; other < _warps; other++)
            clock[other] = Math.Max(clock[other], _known[warp * _warps + other]);
        clock[warp] = (int)_time;
        Tick();
    }

    /// <summary>The warp knows from now on what the clock holds.</summary>
    public void Acquire(int warp, int[] clock)
    {
        for (int other = 0; other < _warps; other++)
            _known[warp * _warps + other] = Math.Max(_known[warp * _warps + other], clock[other]);
    }

    public bool Knows(int warp, int other, int time) =>
        Math.Max(_known[warp * _warps + other], (int)(_floor >> 15)) >= time;

    /// <summary>Eight bytes become an mbarrier object, or are one no longer.</summary>
    public void SetBarrier(int offset, bool isBarrier) =>
        new Span<byte>(_state + offset, 8).Fill(isBarrier ? Barrier : (byte)0);

    private static FaultException TouchesBarrier(Warp w, int lane, long at, string what) =>
        w.Fault(Check.MemoryBarrier, lane, $"shared byte {at} of an mbarrier object is {what}");

    private FaultException Unreadable(Warp w, int lane, long at) => _state[at] switch
    {
        Barrier => TouchesBarrier(w, lane, at, "read"),
        Pending => w.Fault(Check.AsyncCopyNotWaitedFor, lane,
            $"shared byte {at} is read while an asynchronous copy may still write it"),
        _ => w.Fault(Check.Uninitialised, lane, $"shared byte {at} was never written"),
    };

    /// <summary>16 bytes of a matrix, read by the four warps of w's warpgroup together.</summary>
    public void ReadByGroup(Warp w, byte* at)
    {
        long offset = at - Host;
        if (Vector128.Load(_state + offset) != Vector128.Create(Written))
        {
            var states = new ReadOnlySpan<byte>(_state + offset, 16);
            throw Unreadable(w, 0, offset + states.IndexOfAnyExcept(Written));
        }
        var writers = Vector128.Load(_writers + offset / 4);
        if (Vector128.GreaterThanAny(writers, Vector128.Create(_floor)))
        {
            // Mostly one warp wrote all of it at one time: one look then.
            var apart = (writers ^ Vector128.Create(writers[0])) & Vector128.Create(~0x3F0u);
            int words = apart == Vector128<uint>.Zero ? 1 : 4;
            for (int n = 0; n < words; n++)
                if (writers[n] > _floor)
                    CheckAgainst(w, writers[n], AllBytes, SeveralLanes, offset / 4 + n,
                        "is read by wgmma, written by");
        }
        if (_groupReads.Length == 0)
        {
            _groupReads = new uint[(_warps + 3) / 4][];
            for (int g = 0; g < _groupReads.Length; g++)
                _groupReads[g] = new uint[(Bytes + 15) / 16 + 1];
        }
        _groupReads[w.Index / 4][offset / 16] = _time;
    }

    // A warpgroup's reads are over for all when they are for one of its warps: ordered is who has
    // met any of the four.
    private void CheckGroupReads(Warp w, long offset, int bytes, int lane)
    {
        for (long row = offset / 16; row <= (offset + bytes - 1) / 16; row++)
            for (int g = 0; g < _groupReads.Length; g++)
            {
                uint time = _groupReads[g][row];
                if (time > _floor >> 15 && !GroupIsKnown(w, g, time))
                    throw w.Fault(Check.SharedRaceBetweenWarps, lane & 31,
                        $"shared byte {row * 16} is written, read by wgmma of warps {g * 4} to " +
                        $"{g * 4 + 3}, and no barrier stands between");
            }
    }

    private bool GroupIsKnown(Warp w, int group, uint time)
    {
        for (int warp = group * 4; warp < Math.Min(group * 4 + 4, _warps); warp++)
            if (time <= (uint)_known[w.Index * _warps + warp]) return true;
        return false;
    }
}
