namespace MiniCpmNative.Tests;

/// <summary>
/// Blocks that one multiprocessor holds at a time, from NVIDIA's tables of compute capabilities:
/// the least of what registers, shared memory, threads and the number of blocks allow. Registers
/// are given to warps in units of 256 within each of four partitions, shared memory in units of 128
/// bytes with 1 KiB per block for the system.
/// </summary>
internal sealed record Occupancy(int SharedKib, int MaxBlocks, int MaxThreads)
{
    private const int Registers = 65536, Partitions = 4, Warp = 32;

    public static Occupancy Of(int architecture) => architecture switch
    {
        80 => new(164, 32, 2048),
        86 => new(100, 16, 1536),
        89 => new(100, 24, 1536),
        90 => new(228, 32, 2048),
        _ => throw new ArgumentOutOfRangeException(nameof(architecture)),
    };

    public int Blocks(int threads, int registers, int sharedBytes)
    {
        int warps = (threads + Warp - 1) / Warp;
        int perWarp = Up(Math.Max(registers, 1) * Warp, 256);
        int byRegisters = Partitions * (Registers / Partitions / perWarp) / warps;
        int byShared = SharedKib * 1024 / Up(sharedBytes + 1024, 128);
        int byThreads = MaxThreads / (Warp * warps);
        return Math.Min(Math.Min(byRegisters, byShared), Math.Min(byThreads, MaxBlocks));
    }

    /// <summary>Share of the multiprocessor's threads that these blocks are.</summary>
    public double Share(int threads, int blocks) => (double)threads * blocks / MaxThreads;

    private static int Up(int value, int unit) => (value + unit - 1) / unit * unit;
}
