namespace MiniCpmNative.GpuEmulator;

/// <summary>
/// What one launch did, counted exactly. Sectors are the 32-byte pieces a request touches;
/// wavefronts are the passes a shared-memory request takes, so conflicts = wavefronts - requests'
/// minimum.
/// </summary>
public sealed record LaunchCounters(string Kernel)
{
    public long Instructions { get; set; }
    public long LaneInstructions { get; set; }
    public long Flops { get; set; }
    public long TensorFlops { get; set; }
    public long GlobalReadBytes { get; set; }
    public long GlobalWriteBytes { get; set; }
    public long GlobalReadRequests { get; set; }
    public long GlobalWriteRequests { get; set; }
    public long GlobalReadSectors { get; set; }
    public long GlobalWriteSectors { get; set; }
    public long SharedRequests { get; set; }
    public long BankConflicts { get; set; }
    public long MatrixLoadConflicts { get; set; }
    public long LocalBytes { get; set; }
    public long AtomicLanes { get; set; }

    /// <summary>Bytes of distinct sectors read, and written; 0 unless
    /// EmulatorOptions.Footprint.</summary>
    public long DramReadBytes { get; set; }
    public long DramWriteBytes { get; set; }
    public long DramBytes => DramReadBytes + DramWriteBytes;

    /// <summary>Branches taken by a part of a warp only.</summary>
    public long DivergentBranches { get; set; }

    /// <summary>Share of lanes that were active over all instructions.</summary>
    public double ActiveLanes => Instructions == 0 ? 1 : LaneInstructions / (32.0 * Instructions);

    /// <summary>Warp instructions executed per opcode stem.</summary>
    public Dictionary<string, long> Mix { get; } = [];

    internal void Add(LaunchCounters other)
    {
        Instructions += other.Instructions;
        LaneInstructions += other.LaneInstructions;
        Flops += other.Flops;
        TensorFlops += other.TensorFlops;
        GlobalReadBytes += other.GlobalReadBytes;
        GlobalWriteBytes += other.GlobalWriteBytes;
        GlobalReadRequests += other.GlobalReadRequests;
        GlobalWriteRequests += other.GlobalWriteRequests;
        GlobalReadSectors += other.GlobalReadSectors;
        GlobalWriteSectors += other.GlobalWriteSectors;
        SharedRequests += other.SharedRequests;
        BankConflicts += other.BankConflicts;
        MatrixLoadConflicts += other.MatrixLoadConflicts;
        LocalBytes += other.LocalBytes;
        AtomicLanes += other.AtomicLanes;
        DivergentBranches += other.DivergentBranches;
        foreach (var (stem, count) in other.Mix) Mix[stem] = Mix.GetValueOrDefault(stem) + count;
    }
}
