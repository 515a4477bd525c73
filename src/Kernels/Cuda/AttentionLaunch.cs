namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// What a launch of attention on tensor cores must know of its kernel's tiles, as kernels.cu has
/// them: smaller where a block can have no more than 99 KiB of shared memory.
/// </summary>
internal readonly record struct AttentionLaunch(int Keys, int Threads, int SharedBytes)
{
    /// <summary>Of attention_backward_; null for head dimensions that have none.</summary>
    public static AttentionLaunch? Backward(int headDim, bool small)
    {
        if (headDim is not (64 or 72 or 80 or 96 or 128 or 256)) return null;
        int keys = (small ? 64 : 128) / (headDim > 128 ? 2 : 1);
        int step = (headDim > 128 ? 32 : small && headDim < 128 ? 128 : 64) / (small ? 2 : 1);
        int row = (headDim + 15) / 16 * 32;
        // Keys and values, ds, two stages of q and dO and of two floats each, the block's number.
        int bytes = (2 * keys * row) + (2 * keys * step) + (4 * step * row) + (16 * step) + 16;
        return new(keys, small ? 128 : 256, bytes);
    }
}
