using System.Runtime.Intrinsics;
using MiniCpmNative.GpuEmulator.Machine;

namespace MiniCpmNative.GpuEmulator.Memory;

/// <summary>
/// Reads of whole warpgroups by wgmma, 16 bytes at a time. They go on until they are waited for,
/// and are over for all four warps when they are for one: a write must come after the wait of any
/// of them, by way of that warp.
/// </summary>
internal sealed unsafe partial class SharedMemory
{
    private const uint InFlight = uint.MaxValue;

    private sealed class Product
    {
        public int Group;
        public uint Waited;
        public readonly List<int> Rows = [];
    }

    // Per 16 bytes and warp of the group: when it waited for the last read, reads it has to wait
    // for.
    private sealed class GroupReads(int rows)
    {
        public readonly uint[] Time = new uint[rows * 4];
        public readonly ushort[] Flying = new ushort[rows * 4];
        public readonly List<Product> Products = [];
    }

    // Per warpgroup; empty without wgmma.
    private GroupReads[] _groupReads = [];
    private Product _product = new();
    private readonly Stack<Product> _products = new();

    private void ForgetGroups(bool all)
    {
        if (all) _bulkReads = null;
        foreach (var group in _groupReads)
        {
            for (int at = 0; at < group.Time.Length && !all; at++)
                if (group.Time[at] != InFlight) group.Time[at] = 0;
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
        _product = _products.TryPop(out var product) ? product : new();
        (_product.Group, _product.Waited) = (group, 0);
        _groupReads[w.Index / 4].Products.Add(_product);
    }

    /// <summary>The warp has waited for the products up to that group.</summary>
    public void EndGroupReads(Warp w, int complete)
    {
        if (_groupReads.Length == 0) return;
        var reads = _groupReads[w.Index / 4];
        int lane = w.Index & 3;
        foreach (var product in reads.Products)
        {
            if (product.Group > complete || (product.Waited >> lane & 1) != 0) continue;
            product.Waited |= 1u << lane;
            foreach (int row in product.Rows)
                if (--reads.Flying[row * 4 + lane] == 0) reads.Time[row * 4 + lane] = _time;
            if (product.Waited != 15) continue;
            product.Rows.Clear();
            _products.Push(product);
        }
        reads.Products.RemoveAll(p => p.Waited == 15);
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
        reads.Time.AsSpan(row * 4, 4).Fill(InFlight);
        for (int warp = 0; warp < 4; warp++) reads.Flying[row * 4 + warp]++;
        _product.Rows.Add(row);
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
            if (writer == 0) continue; // history that was dropped
            if (writer > _floor)
                CheckAgainst(w, writer, AllBytes, SeveralLanes, offset / 4 + n,
                    $"is read by {reader}, written by");
            int warp = (int)((writer >> 10) & 31);
            if ((writer >> 4 & 63) != Bulk && writer >> 15 > (uint)_proxied[w.Index * _warps + warp])
                throw w.Fault(Check.ProxyFenceMissing, 0,
                    $"shared word {offset + n * 4} is read by {reader}; warp {warp} has written " +
                    "it, and no fence.proxy.async stands between");
        }
    }

    private void CheckGroupReads(Warp w, long offset, int bytes, int lane)
    {
        for (long row = offset / 16; row <= (offset + bytes - 1) / 16; row++)
            for (int g = 0; g < _groupReads.Length; g++)
                if (!IsKnown(w, g, _groupReads[g].Time.AsSpan((int)row * 4, 4), out bool waited))
                    throw w.Fault(Check.SharedRaceBetweenWarps, lane & 31,
                        $"shared byte {row * 16} is written, read by wgmma of warps {g * 4} to " +
                        (waited ? $"{g * 4 + 3}, and no barrier stands between"
                            : $"{g * 4 + 3} that has not been waited for"));
    }

    private bool IsKnown(Warp w, int group, ReadOnlySpan<uint> times, out bool waited)
    {
        waited = false;
        for (int n = 0; n < 4; n++)
        {
            uint time = times[n];
            if (time <= _floor >> 15) return true;
            if (time == InFlight) continue;
            int warp = group * 4 + n;
            if (warp == w.Index || time <= (uint)_known[w.Index * _warps + warp]) return true;
            waited = true;
        }
        return false;
    }
}
