namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// What a launch of attention on tensor cores must know of its kernel, as kernels.cu has it:
/// queries (backward, keys) of a block, its threads and its shared memory. Blocks are smaller where
/// they can have no more than 99 KiB of that.
/// </summary>
internal readonly record struct AttentionLaunch(int Rows, int Threads, int SharedBytes)
{
    /// <summary>Of attention_forward_; null for head dimensions that have none.</summary>
    public static AttentionLaunch? Forward(int headDim, bool small)
    {
        if (!Has(headDim)) return null;
        bool large = headDim > 128;
        int rows = large && small ? 64 : 128, keys = large && small ? 32 : 64;
        // The queries, two tiles of keys and one of values.
        return new(rows, large && !small ? 256 : 128, (rows + (3 * keys)) * RowBytes(headDim));
    }

    /// <summary>Of attention_backward_; null for head dimensions that have none.</summary>
    public static AttentionLaunch? Backward(int headDim, bool small)
    {
        if (!Has(headDim)) return null;
        int keys = (small ? 64 : 128) / (headDim > 128 ? 2 : 1);
        int step = (headDim > 128 ? 32 : small && headDim < 128 ? 128 : 64) / (small ? 2 : 1);
        // Keys and values, p and ds, two stages of q and dO and of two floats each, eight numbers.
        int bytes = (2 * keys * RowBytes(headDim)) + (4 * keys * step)
            + (4 * step * RowBytes(headDim)) + (16 * step) + 32;
        return new(keys, small ? 128 : 256, bytes);
    }

    /// <summary>A block per part of a row of the list of tiles, and of these per head.</summary>
    public Grid Grid(int tiles, int heads) =>
        new(checked(tiles * (KernelConstants.AttentionTileRows / Rows) * heads), Threads,
            SharedBytes);

    private static bool Has(int headDim) => headDim is 64 or 72 or 80 or 96 or 128 or 256;

    private static int RowBytes(int headDim) => (headDim + 15) / 16 * 32;
}
