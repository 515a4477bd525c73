namespace MiniCpmNative.Engine.Model;

/// <summary>
/// <see cref="GridLayout"/> with places computed as the classes of transformers itself do: by a
/// division, not by steps.
/// </summary>
public sealed record QuotientLayout : PatchLayout
{
    public override int Rows(int patches, int longest) => patches;

    public override void Positions(int rows, int cols, int side, Span<int> ids)
    {
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < cols; c++)
                ids[(r * cols) + c] = (PositionBuckets.QuotientBucket(r, rows, side) * side)
                    + PositionBuckets.QuotientBucket(c, cols, side);
    }
}
