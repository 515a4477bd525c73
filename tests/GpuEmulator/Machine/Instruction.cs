using MiniCpmNative.GpuEmulator.Memory;
using MiniCpmNative.GpuEmulator.Ptx;

// Handlers take scratch from the stack at every step; clearing it would cost more than their work.
[module: System.Runtime.CompilerServices.SkipLocalsInit]

namespace MiniCpmNative.GpuEmulator.Machine;

/// <summary>What the warp's loop does around an instruction.</summary>
internal enum Flow : byte
{
    /// <summary>Runs for the lanes that are here.</summary>
    Plain,

    /// <summary>Waits until every lane of the member mask is here.</summary>
    Sync,
    Branch,
    Exit,
    Barrier,

    /// <summary>Runs once for a warpgroup, when its four warps are here.</summary>
    Group,

    /// <summary>May find that what it waits for is not there, and then gives up the warp's
    /// turn.</summary>
    Poll,
}

/// <summary>
/// One assembled instruction: a handler and byte offsets of its operands' rows in the warp's
/// register file. Immutable after load but for <see cref="Nearby"/>, a cache that any thread may
/// overwrite.
/// </summary>
internal sealed unsafe class Instruction(PtxInstruction source)
{
    public delegate*<Warp, Instruction, void> Run;
    public Flow Flow;

    /// <summary>Row of the guard predicate, -1 without one; flipped for @!p.</summary>
    public int Guard = -1;
    public uint GuardFlip;

    /// <summary>Rows: results, then sources. Predicate rows hold one bit per lane.</summary>
    public int D = -1, D2 = -1, A = -1, B = -1, C = -1, E = -1;

    /// <summary>Rows of vector operands (v2, v4, mma fragments), in order of appearance.</summary>
    public int[] Rows = [];

    /// <summary>Bytes per lane of the rows D and A (4 or 8) where an instruction allows
    /// both.</summary>
    public int DWidth = 4, AWidth = 4;

    public Space Space;

    /// <summary>Bytes of one element and elements of a memory access.</summary>
    public int Size, Count = 1;
    public bool Signed, Volatile, NonCoherent, AddressIs64;
    public long Offset;

    /// <summary>Branch target, barrier number, immediate modes of an instruction.</summary>
    public int Target, Mode, Mode2;

    /// <summary>Flips of predicate sources written !p, in the order A, B, C.</summary>
    public uint FlipA, FlipB, FlipC;

    /// <summary>Floating-point operations of one lane, for counters.</summary>
    public int Flops;
    public bool TensorFlops;

    /// <summary>Reads what other blocks may write; stays where it is while it has to
    /// wait.</summary>
    public bool Looks, Holds;

    /// <summary>Orders the accesses before it; Looks stands for those behind.</summary>
    public bool Releases;

    /// <summary>The allocation the last access fell into: likely the next one's too.</summary>
    public Allocation? Nearby;

    /// <summary>A bulk copy's barrier is at row C plus this.</summary>
    public long BarrierOffset;
    public bool Barrier64;

    /// <summary>Registers of wgmma that it uses, null when none.</summary>
    public FragmentUse? Use;

    public PtxInstruction Source { get; } = source;
}
