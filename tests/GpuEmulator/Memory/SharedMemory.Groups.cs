using System.Runtime.Intrinsics;
using MiniCpmNative.GpuEmulator.Machine;

namespace MiniCpmNative.GpuEmulator.Memory;

/// <summary>
/// Reads of whole warpgroups by wgmma, 16 bytes at a time: they go on until a warp of the group has
/// waited for them; the time of that is kept per group, and a write must come after it.
/// </summary>
internal sealed unsafe partial class SharedMemory
{
    private const uint InFlight = uint.MaxValue;

    private sealed class GroupReads(int rows)
    {
        public readonly uint[] Time = new uint[rows];
        public readonly ushort[] Flying = new ushort[rows];
        public readonly Queue<(int Group, List<int> Rows)> Products = new();
    }

    // Per warpgroup; empty without wgmma.
    private GroupReads[] _groupReads = [];
    private List<int> _reading = [];
    private readonly Stack<List<int>> _lists = new();

    private void ForgetGroups(bool all)
    {
        foreach (var group in _groupReads)
        {
            for (int row = 0; row < group.Time.Length && !all; row++)
                if (group.Time[row] != InFlight) group.Time[row] = 0;
            if (!all) continue;
            Array.Clear(group.Time);
            Array.Clear(group.Flying);
            group.Products.Clear();
        }
    }

    /// <summary>What is read from now on belongs to a product of that wgmma group.</summary>
    public void BeginGroupReads(Warp w, int group)
    {
        if (_groupReads.Length == 0)
        {
            _groupReads = new GroupReads[(_warps + 3) / 4];
            for (int g = 0; g < _groupReads.Length; g++) _groupReads[g] = new((Bytes + 15) / 16);
        }
        _reading = _lists.TryPop(out var list) ? list : [];
        _groupReads[w.Index / 4].Products.Enqueue((group, _reading));
    }

    /// <summary>Products up to that group are complete: one of the warps has waited.</summary>
    public void EndGroupReads(Warp w, int complete)
    {
        if (_groupReads.Length == 0) return;
        var reads = _groupReads[w.Index / 4];
        while (reads.Products.TryPeek(out var product) && product.Group <= complete)
        {
            reads.Products.Dequeue();
            foreach (int row in product.Rows)
                if (--reads.Flying[row] == 0) reads.Time[row] = _time;
            product.Rows.Clear();
            _lists.Push(product.Rows);
        }
    }

    /// <summary>16 bytes of a matrix, read by the four warps of w's warpgroup together.</summary>
    public void ReadByGroup(Warp w, byte* at)
    {
        long offset = at - Host;
        if (Vector128.Load(_state + offset) != Vector128.Create(Written))
        {
            var states = new ReadOnlySpan<byte>(_state + offset, 16);
            throw Unreadable(w, 0, offset + states.IndexOfAnyExcept(Written));
        }
        CheckProxy(w, offset, "wgmma");
        var reads = _groupReads[w.Index / 4];
        int row = (int)(offset / 16);
        reads.Time[row] = InFlight;
        reads.Flying[row]++;
        _reading.Add(row);
    }

    // 16 bytes are read in the asynchronous proxy: ordered behind their writes, and fenced.
    private void CheckProxy(Warp w, long offset, string reader)
    {
        var writers = Vector128.Load(_writers + offset / 4);
        // Mostly one warp wrote all of it at one time: one look then.
        var apart = (writers ^ Vector128.Create(writers[0])) & Vector128.Create(~0x3F0u);
        int words = apart == Vector128<uint>.Zero ? 1 : 4;
        for (int n = 0; n < words; n++)
        {
            uint writer = writers[n];
            if (writer == 0) continue; // an asynchronous copy, or history that was dropped
            if (writer > _floor)
                CheckAgainst(w, writer, AllBytes, SeveralLanes, offset / 4 + n,
                    $"is read by {reader}, written by");
            int warp = (int)((writer >> 10) & 31);
            if (writer >> 15 > (uint)_proxied[w.Index * _warps + warp])
                throw w.Fault(Check.ProxyFenceMissing, 0,
                    $"shared word {offset + n * 4} is read by {reader}; warp {warp} has written " +
                    "it, and no fence.proxy.async stands between");
        }
    }

    private void CheckGroupReads(Warp w, long offset, int bytes, int lane)
    {
        for (long row = offset / 16; row <= (offset + bytes - 1) / 16; row++)
            for (int g = 0; g < _groupReads.Length; g++)
            {
                uint time = _groupReads[g].Time[row];
                if (time > _floor >> 15 && !GroupIsKnown(w, g, time))
                    throw w.Fault(Check.SharedRaceBetweenWarps, lane & 31,
                        $"shared byte {row * 16} is written, read by wgmma of warps {g * 4} to " +
                        (time == InFlight ? $"{g * 4 + 3} that has not been waited for"
                            : $"{g * 4 + 3}, and no barrier stands between"));
            }
    }

    // A product is over for all when it is for one of the four warps.
    private bool GroupIsKnown(Warp w, int group, uint time)
    {
        for (int warp = group * 4; warp < Math.Min(group * 4 + 4, _warps); warp++)
            if (time <= (uint)_known[w.Index * _warps + warp]
                || (warp == w.Index && time != InFlight)) return true;
        return false;
    }
}
