using MiniCpmNative.GpuEmulator.Machine;

namespace MiniCpmNative.GpuEmulator.Memory;

/// <summary>
/// What blocks of one launch hand to one another: a release at an address leaves there the blocks
/// whose writes are visible with it, the releasing one and those it has acquired itself; an acquire
/// of that address takes them over. A fence of the device makes the block's later relaxed, volatile
/// and atomic writes releases. Times within a block are not kept: a few races may be missed.
/// </summary>
internal sealed class Handovers
{
    private readonly Dictionary<ulong, HashSet<uint>> _left = [];
    private readonly Lock _gate = new();

    public void Release(Block block, ulong address)
    {
        lock (_gate)
        {
            if (!_left.TryGetValue(address, out var stamps)) _left[address] = stamps = [];
            stamps.Add(block.Stamp);
            stamps.UnionWith(block.Acquired);
        }
    }

    public void Acquire(Block block, ulong address)
    {
        lock (_gate)
            if (_left.TryGetValue(address, out var stamps)) block.Acquired.UnionWith(stamps);
    }
}
