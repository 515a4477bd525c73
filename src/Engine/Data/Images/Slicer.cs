namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// How MiniCPM-V cuts a picture: an overview of about scaleResolution squared pixels, and for
/// larger pictures a grid of up to maxSlices tiles of about that size, in the grid whose shape is
/// nearest to the picture's. Official slice_image, to the bit: doubles, halves rounded to even, the
/// truncated height decides the width.
/// </summary>
public static class Slicer
{
    /// <summary>The plan of a picture; tiles only where more than one slice is wanted and
    /// allowed.</summary>
    public static SlicePlan Plan(PictureSize picture, int maxSlices, int scaleResolution = 448,
        int patch = 14)
    {
        double ratio = (double)picture.Width * picture.Height
            / ((double)scaleResolution * scaleResolution);
        int multiple = (int)Math.Min(Math.Ceiling(ratio), maxSlices);
        if (multiple <= 1)
            return new(Best(picture.Width, picture.Height, scaleResolution, patch, true), 0, 0,
                default);

        var overview = Best(picture.Width, picture.Height, scaleResolution, patch, false);
        var (columns, rows) = Grid(picture, multiple, maxSlices);
        double width = (double)Divisible(picture.Width, columns) / columns;
        double height = (double)Divisible(picture.Height, rows) / rows;
        return new(overview, columns, rows, Best(width, height, scaleResolution, patch, true));
    }

    private static (int Columns, int Rows) Grid(PictureSize picture, int multiple, int maxSlices)
    {
        double shape = Math.Log((double)picture.Width / picture.Height);
        double least = double.PositiveInfinity;
        var best = (1, 1);
        for (int count = multiple - 1; count <= multiple + 1; count++)
        {
            if (count == 1 || count > maxSlices) continue;
            for (int columns = 1; columns <= count; columns++)
            {
                if (count % columns != 0) continue;
                int rows = count / columns;
                double error = Math.Abs(shape - Math.Log((double)columns / rows));
                if (error >= least) continue;
                (least, best) = (error, (columns, rows));
            }
        }

        return best;
    }

    internal static PictureSize Best(double width, double height, int scale, int patch,
        bool enlarge)
    {
        if (enlarge || width * height > (double)scale * scale)
        {
            double ratio = width / height;
            height = Math.Truncate(scale / Math.Sqrt(ratio));
            width = Math.Truncate(height * ratio);
        }

        return new(Divisible(width, patch), Divisible(height, patch));
    }

    private static int Divisible(double length, int by) =>
        Math.Max((int)Math.Round(length / by, MidpointRounding.ToEven) * by, by);
}
