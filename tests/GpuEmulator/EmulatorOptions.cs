namespace MiniCpmNative.GpuEmulator;

/// <summary>
/// How the emulated device behaves where hardware is free to choose. Results that depend on one of
/// these are wrong on some GPU: tests run in several settings and must hold in all.
/// </summary>
public sealed record EmulatorOptions
{
    /// <summary>0 runs warps, blocks and streams in order; else their order is shuffled from
    /// this.</summary>
    public int Seed { get; init; }

    /// <summary>Copies of cp.async arrive when issued (true) or at the latest moment
    /// allowed.</summary>
    public bool EarlyAsyncCopies { get; init; }

    /// <summary>Largest change, in units in the last place, made to approximate
    /// functions.</summary>
    public int ApproximateUlps { get; init; }

    /// <summary>mma adds its products from the highest k down instead of from the lowest
    /// up.</summary>
    public bool ReverseMma { get; init; }

    /// <summary>Marks which sectors a launch touches, for <see
    /// cref="LaunchCounters.DramBytes"/>.</summary>
    public bool Footprint { get; init; }

    /// <summary>Worker threads over blocks; 0 takes all cores.</summary>
    public int Threads { get; init; }

    /// <summary>Branches and synchronisations one warp may do before it counts as
    /// endless.</summary>
    public long WarpSteps { get; init; } = 1L << 28;

    /// <summary>Compute capability, as 10 * major + minor.</summary>
    public int Architecture { get; init; } = 80;

    /// <summary>Bytes of device memory.</summary>
    public long MemoryBytes { get; init; } = 8L << 30;
}
