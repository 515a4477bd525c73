namespace MiniCpmNative.GpuEmulator.Machine;

internal enum WarpState : byte
{
    Ready, AtBarrier,

    /// <summary>Waits for the other warps of its warpgroup to come to the same wgmma.</summary>
    AtGroup,
    Done,
}

/// <summary>Why a group of lanes does not run: it needs others of its warp, or another
/// warp.</summary>
internal enum Hold : byte
{
    None, Blocked, Polled,
}
