using MiniCpmNative.GpuEmulator.Ptx;

namespace MiniCpmNative.GpuEmulator;

/// <summary>What a fault report is about; tests name the one they expect.</summary>
public enum Check : byte
{
    OutOfBounds, Misaligned, Uninitialised, UseAfterFree, ForeignPointer, ConstantWrite,
    SharedRaceBetweenWarps, SharedRaceWithinWarp, GlobalRace, NonCoherentRead,
    BarrierDivergence, Deadlock, LaneMissing, Endless, Trap,
    AsyncCopyNotWaitedFor, AsyncCopyShape,
    MemoryBarrier, Descriptor,
    /// <summary>wgmma without the fence or the wait that its registers need.</summary>
    WarpgroupOrder,
    /// <summary>Shared memory written by threads, read by wgmma or a bulk copy without
    /// fence.proxy.async.</summary>
    ProxyFenceMissing, RegisterCount,
    /// <summary>The emulator itself failed; the detail is its exception.</summary>
    Internal,
}

/// <summary>
/// One finding, in one line: which check, kernel, kernels.cu line, block, warp, lane and
/// instruction. Warp and lane are -1 where the finding is about a launch or a library call.
/// </summary>
public sealed record Fault(
    Check Check, string Detail, string Kernel, SourceLine Source = default,
    (int X, int Y, int Z) Block = default, int Warp = -1, int Lane = -1, string Instruction = "")
{
    public override string ToString() => Warp < 0
        ? $"{Check}: {Detail} in {Kernel}"
        : $"{Check}: {Detail} in {Kernel} at {Source}, block ({Block.X}, {Block.Y}, {Block.Z}), " +
          $"warp {Warp}, lane {Lane}: {Instruction}";
}

/// <summary>Carries a <see cref="Fault"/> out of an executing kernel.</summary>
public sealed class FaultException(Fault fault) : Exception(fault.ToString())
{
    public Fault Fault { get; } = fault;
}
