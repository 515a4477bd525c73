namespace MiniCpmNative.Engine.Data.Images;

/// <summary>Patches of one view: rows and columns of its grid, the model's tgt_size.</summary>
public readonly record struct PatchGrid(int Rows, int Columns)
{
    public int Patches => Rows * Columns;
}

/// <summary>
/// A picture's views as the vision tower wants them: for each view, overview first, then the tiles
/// row by row, f32 [Rows * Columns, 3 * patch * patch], one patch a row, grid row-major, the
/// columns in the order (channel, y, x); normalised as ((byte / 255) - mean) / std, each step
/// rounded to float. Resizing, cutting and normalising are one pass over the rows; every resize
/// starts from the original. One object per worker; its buffers are reused.
/// </summary>
public sealed class PatchStrips
{
    private readonly Bicubic _resize;
    private readonly PixelNormaliser _normaliser;

    /// <param name="mean">One value per channel, of preprocessor_config.json.</param>
    /// <param name="std">One value per channel, not 0.</param>
    /// <param name="patch">Side of a patch in pixels.</param>
    /// <param name="narrow">Resizes as torchvision does, see <see cref="Bicubic"/>.</param>
    public PatchStrips(
        ReadOnlySpan<float> mean, ReadOnlySpan<float> std, int patch = 14, bool narrow = false)
    {
        (Patch, _resize) = (patch, new Bicubic { Narrow = narrow });
        _normaliser = new PixelNormaliser(mean, std, patch);
    }

    public int Patch { get; }

    /// <summary>Floats of one patch.</summary>
    public int PatchLength => 3 * Patch * Patch;

    /// <summary>Grid of a view: 0 is the overview, then the tiles.</summary>
    public PatchGrid Grid(SlicePlan plan, int view)
    {
        PictureSize size = plan.Size(view);
        return new(size.Height / Patch, size.Width / Patch);
    }

    /// <summary>Patches of all views.</summary>
    public long Patches(SlicePlan plan)
    {
        long patches = 0;
        for (int view = 0; view < plan.Views; view++) patches += Grid(plan, view).Patches;
        return patches;
    }

    /// <summary>Writes all views of a picture, Patches(plan) * PatchLength floats.</summary>
    /// <exception cref="ArgumentException">into is too short.</exception>
    public void Write(Picture picture, SlicePlan plan, Span<float> into)
    {
        if (into.Length < Patches(plan) * PatchLength)
            throw new ArgumentException(
                $"has room for {into.Length} floats, the picture's views need "
                + $"{Patches(plan) * PatchLength}", nameof(into));
        Views(picture, plan.Overview, 1, 1, [0], into);
        if (!plan.Sliced) return;
        // Where each tile of the table goes; those cut out of the picture itself have none.
        int[] starts = new int[plan.Views - 1];
        int at = Grid(plan, 0).Patches * PatchLength;
        for (int i = 0; i < starts.Length; i++)
        {
            int length = Grid(plan, i + 1).Patches * PatchLength;
            starts[i] = at;
            if (plan.Cells?[i] is { } cell)
            {
                using Picture part = picture.Cut(cell.Left, cell.Top, cell.From);
                Views(part, cell.To, 1, 1, [0], into.Slice(at, length));
                starts[i] = -1;
            }

            at += length;
        }

        if (starts.Max() >= 0) Views(picture, plan.Tile, plan.Columns, plan.Rows, starts, into);
    }

    // The picture as a table of views of one size.
    private void Views(Picture picture, PictureSize view, int columns, int rows,
        ReadOnlySpan<int> starts, Span<float> into)
    {
        int gridRow = view.Width / Patch * PatchLength;
        int rowBytes = view.Width * 3;
        _resize.Start(picture, new(view.Width * columns, view.Height * rows));
        for (int y = 0; y < view.Height * rows; y++)
        {
            var row = _resize.Row(y);
            var (tileRow, inTile) = Math.DivRem(y, view.Height);
            var (patchRow, inPatch) = Math.DivRem(inTile, Patch);
            int at = (patchRow * gridRow) + (inPatch * Patch);
            for (int c = 0; c < columns; c++)
                if (starts[(tileRow * columns) + c] is >= 0 and var start)
                    _normaliser.Write(row.Slice(c * rowBytes, rowBytes), into[(start + at)..]);
        }
    }
}
