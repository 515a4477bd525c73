using System.Runtime.Intrinsics;
using MiniCpmNative.GpuEmulator.Machine;

namespace MiniCpmNative.GpuEmulator.Memory;

/// <summary>Who has met whom by way of memory barriers and bar.arrive, and reads of whole
/// warpgroups.</summary>
internal sealed unsafe partial class SharedMemory
{
    // What the warps that called bar.arrive had to hand on, per numbered barrier.
    private readonly int[][] _arrivals = new int[16][];

    // Per warp: the last times of the others whose writes are ordered before its present for the
    // asynchronous proxy too, by a fence.proxy.async on the way.
    private readonly int[] _proxied;
    private bool _hasProxies;

    /// <summary>The present time of the block; a new epoch begins when times start anew.</summary>
    public int Time => (int)_time;
    public int Epoch { get; private set; }
    public int ClockSize => _warps * 2;

    /// <summary>bar.arrive: whoever waits at the barrier will know what this warp knows.</summary>
    public void Arrive(int warp, int barrier) => Publish(warp, _arrivals[barrier]);

    /// <summary>Adds what a warp knows, and all it has done, to a clock.</summary>
    public void Publish(int warp, int[] clock)
    {
        for (int other = 0; other < _warps; other++)
        {
            clock[other] = Math.Max(clock[other], _known[warp * _warps + other]);
            clock[_warps + other] =
                Math.Max(clock[_warps + other], _proxied[warp * _warps + other]);
        }
        clock[warp] = (int)_time;
        Tick();
    }

    /// <summary>The warp knows from now on what the clock holds.</summary>
    public void Acquire(int warp, int[] clock)
    {
        for (int other = 0; other < _warps; other++)
        {
            int at = warp * _warps + other;
            _known[at] = Math.Max(_known[at], clock[other]);
            _proxied[at] = Math.Max(_proxied[at], clock[_warps + other]);
        }
    }

    /// <summary>fence.proxy.async: what is ordered before the warp's present, and its own writes,
    /// are so for wgmma and bulk copies.</summary>
    public void FenceProxies(int warp)
    {
        _hasProxies = true;
        for (int other = 0; other < _warps; other++)
            _proxied[warp * _warps + other] = Math.Max(_known[warp * _warps + other],
                (int)(_floor >> 15));
        _proxied[warp * _warps + warp] = (int)_time;
        Tick();
    }

    // Warps that meet at a barrier learn of one another's fences.
    private void MeetProxies(Warp[] warps, int barrier)
    {
        if (!_hasProxies) return;
        for (int other = 0; other < _warps; other++)
        {
            int latest = _arrivals[barrier][_warps + other];
            foreach (var w in warps)
                if (Meets(w, barrier))
                    latest = Math.Max(latest, _proxied[w.Index * _warps + other]);
            foreach (var w in warps)
                if (Meets(w, barrier)) _proxied[w.Index * _warps + other] = latest;
        }
    }

    private static bool Meets(Warp w, int barrier) =>
        w.State == WarpState.AtBarrier && w.BarrierId == barrier;

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
}
