using MiniCpmNative.Engine.Data.Images;

namespace MiniCpmNative.Engine.Data;

/// <summary>Which pictures, and which tiles of one, are enlarged when they are small.</summary>
public enum SmallPictures
{
    /// <summary>All: views have about the resolution's pixels.</summary>
    Always,

    /// <summary>No picture that is not cut.</summary>
    Never,

    /// <summary>
    /// Those with small dense text (<see cref="GlyphFigures"/>); tiles become smaller ones too,
    /// each of its own size.
    /// </summary>
    Adaptive,
}

/// <summary>How pictures are cut under a <see cref="SlicingSpec"/>.</summary>
public static class PicturePlanner
{
    /// <summary>The plan by size alone, as frames of videos are cut.</summary>
    public static SlicePlan Plan(this SlicingSpec slicing, PictureSize size) => Slicer.Plan(
        size, slicing.MaxSliceNums, slicing.ScaleResolution, slicing.Multiple);

    /// <summary>The plan of a picture.</summary>
    /// <param name="slicing">The rules.</param>
    /// <param name="size">The picture's.</param>
    /// <param name="decode">Its pixels, which are looked at only where they decide.</param>
    public static SlicePlan Plan(this SlicingSpec slicing, PictureSize size, Func<Picture> decode)
    {
        SlicePlan plan = slicing.Plan(size);
        if (slicing.Small == SmallPictures.Always
            || (slicing.Small == SmallPictures.Never && plan.Sliced)) return plan;
        if (slicing.Small == SmallPictures.Never)
            return plan with { Overview = Resized(slicing, size, null) };
        using Picture picture = decode();
        return plan.Sliced ? plan with { Cells = Cells(slicing, plan, picture) }
            : plan with { Overview = Resized(slicing, size, Resolution(slicing, picture)) };
    }

    private static int? Resolution(SlicingSpec slicing, Picture picture) =>
        GlyphFigures.Of(picture).Resolution(slicing.ScaleResolution);

    private static PictureSize Resized(SlicingSpec slicing, PictureSize size, int? resolution) =>
        Slicer.Best(size.Width, size.Height, resolution ?? slicing.ScaleResolution,
            slicing.Multiple, enlarge: resolution is not null);

    // Of each tile: where it is cut out of the picture itself, if it is.
    private static PictureCell?[] Cells(SlicingSpec slicing, SlicePlan plan, Picture picture)
    {
        var cells = new PictureCell?[plan.Columns * plan.Rows];
        for (int i = 0; i < cells.Length; i++)
        {
            var (row, column) = Math.DivRem(i, plan.Columns);
            int left = Edge(picture.Width, column, plan.Columns);
            int top = Edge(picture.Height, row, plan.Rows);
            var size = new PictureSize(Edge(picture.Width, column + 1, plan.Columns) - left,
                Edge(picture.Height, row + 1, plan.Rows) - top);
            if ((long)size.Width * size.Height
                > (long)slicing.ScaleResolution * slicing.ScaleResolution) continue;
            using Picture cell = picture.Cut(left, top, size);
            int? resolution = Resolution(slicing, cell);
            if (resolution == slicing.ScaleResolution) continue;
            PictureSize to = Resized(slicing, size, resolution);
            if ((long)to.Width * to.Height < (long)plan.Tile.Width * plan.Tile.Height)
                cells[i] = new PictureCell(left, top, size, to);
        }

        return cells;
    }

    private static int Edge(int length, int part, int parts) =>
        (int)Math.Round((double)length * part / parts, MidpointRounding.ToEven);
}
