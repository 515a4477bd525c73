using MiniCpmNative.GpuEmulator.Ptx;

namespace MiniCpmNative.GpuEmulator.Machine;

/// <summary>
/// A kernel ready to run. The register file of a warp is Bytes long: predicate words first, then
/// one row of 32 lanes per register, constant and special register. Initial holds its starting
/// bytes: constants where they belong, all ones (NaN, a wild address) in registers nobody has
/// written.
/// </summary>
internal sealed class Program(PtxKernel kernel)
{
    public PtxKernel Kernel { get; } = kernel;
    public Instruction[] Code { get; set; } = [];
    public byte[] Initial { get; set; } = [];

    /// <summary>Special registers used, with their rows.</summary>
    public (string Name, int Row)[] Specials { get; set; } = [];
    public int StaticShared { get; set; }
    public int LocalBytes { get; set; }

    /// <summary>Registers that wgmma uses; 0 without one.</summary>
    public int FragmentRegisters { get; set; }

    /// <summary>Set by cuFuncSetAttribute(MAX_DYNAMIC_SHARED_SIZE_BYTES).</summary>
    public int MaxDynamicShared { get; set; } = 48 << 10;

    public int MaxThreads => Kernel.RequiredThreads.Length > 0
        ? Volume(Kernel.RequiredThreads)
        : Kernel.MaxThreads.Length > 0 ? Volume(Kernel.MaxThreads) : 1024;

    private static int Volume(int[] sizes) => sizes.Aggregate(1, (a, b) => a * Math.Max(b, 1));
}
