namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// What MiniCPM-OCR looks at to decide whether a small picture is enlarged: how high its glyphs are
/// and how many there are. Glyphs are the connected parts, corners included, of the darker pixels,
/// or of the lighter ones where more than half are dark, without specks and what spans the
/// picture.
/// </summary>
/// <param name="Threshold">The lightest dark grey, by Otsu's rule.</param>
/// <param name="Dark">Dark pixels.</param>
/// <param name="Flipped">Whether the lighter ones are looked at.</param>
/// <param name="Components">Connected parts.</param>
/// <param name="Glyphs">Those that count.</param>
/// <param name="Median">Their median height, 0 without any.</param>
/// <param name="Pixels">Pixels of the picture.</param>
internal sealed record GlyphFigures(
    int Threshold, int Dark, bool Flipped, int Components, int Glyphs, double Median, int Pixels)
{
    // Of the released code: what its checkpoint was trained with.
    private const double HighestSmall = 12, LeastDensity = 2;
    private const int FewPixels = 112 * 56, FewResolution = 84;

    /// <summary>Glyphs per thousand pixels.</summary>
    public double Density => 1000.0 * Glyphs / Pixels;

    /// <summary>
    /// The resolution that the picture is enlarged to: the full one where text is small and dense,
    /// a small one where there are hardly any pixels; null where it stays as it is.
    /// </summary>
    public int? Resolution(int full) => Median is > 0 and <= HighestSmall && Density >= LeastDensity
        ? full : Pixels < FewPixels ? FewResolution : null;

    public static GlyphFigures Of(Picture picture)
    {
        ReadOnlySpan<byte> rgb = picture.Rgb;
        byte[] grey = new byte[rgb.Length / 3];
        for (int i = 0; i < grey.Length; i++)
            grey[i] = Grey(rgb[3 * i], rgb[(3 * i) + 1], rgb[(3 * i) + 2]);
        var histogram = new int[256];
        foreach (byte value in grey) histogram[value]++;
        int threshold = Otsu(histogram), dark = 0;
        for (int i = 0; i <= threshold; i++) dark += histogram[i];
        bool flipped = 2L * dark > grey.Length;
        for (int i = 0; i < grey.Length; i++)
            grey[i] = (byte)(grey[i] <= threshold != flipped ? 1 : 0);
        var heights = new List<int>();
        int components = 0;
        foreach (var (width, height, count) in Parts(grey, picture.Width))
        {
            components++;
            if (count >= 3 && height >= 2 && 10L * width < 9L * picture.Width
                && 10L * height < 9L * picture.Height) heights.Add(height);
        }

        heights.Sort();
        int middle = heights.Count / 2;
        double median = heights.Count == 0 ? 0 : heights.Count % 2 == 1
            ? heights[middle] : (heights[middle - 1] + heights[middle]) / 2.0;
        return new GlyphFigures(
            threshold, dark, flipped, components, heights.Count, median, grey.Length);
    }

    /// <summary>Grey as Pillow converts to it.</summary>
    public static byte Grey(int red, int green, int blue) =>
        (byte)(((19595 * red) + (38470 * green) + (7471 * blue) + 32768) >> 16);

    /// <summary>
    /// The threshold that separates two classes best, as OpenCV's plain code computes it, in its
    /// order of operations.
    /// </summary>
    public static int Otsu(ReadOnlySpan<int> histogram)
    {
        const double Least = 1.0 / (1 << 23);
        long pixels = 0;
        double mean = 0, weight = 0, lower = 0, best = 0;
        for (int i = 0; i < histogram.Length; i++)
        {
            pixels += histogram[i];
            mean += (double)i * histogram[i];
        }

        double scale = 1.0 / pixels;
        mean *= scale;
        int threshold = 0;
        for (int i = 0; i < histogram.Length; i++)
        {
            double share = histogram[i] * scale;
            lower *= weight;
            weight += share;
            double rest = 1 - weight;
            if (Math.Min(weight, rest) < Least || Math.Max(weight, rest) > 1 - Least) continue;
            lower = (lower + (i * share)) / weight;
            double upper = (mean - (weight * lower)) / rest;
            double between = weight * rest * (lower - upper) * (lower - upper);
            if (between > best) (best, threshold) = (between, i);
        }

        return threshold;
    }

    /// <summary>
    /// The parts of a mask that are connected, by sides or corners; the mask is used up.
    /// </summary>
    public static List<(int Width, int Height, int Pixels)> Parts(Span<byte> mask, int width)
    {
        var parts = new List<(int, int, int)>();
        var open = new Stack<int>();
        for (int first = 0; first < mask.Length; first++)
        {
            if (mask[first] == 0) continue;
            int left = width, right = 0, top = first / width, bottom = top, count = 0;
            mask[first] = 0;
            open.Push(first);
            while (open.TryPop(out int at))
            {
                var (y, x) = Math.DivRem(at, width);
                count++;
                (left, right) = (Math.Min(left, x), Math.Max(right, x));
                bottom = Math.Max(bottom, y);
                int from = x > 0 ? -1 : 0, to = x < width - 1 ? 1 : 0;
                for (int row = -1; row <= 1; row++)
                    for (int column = from; column <= to; column++)
                    {
                        int next = at + (row * width) + column;
                        if (next < 0 || next >= mask.Length || mask[next] == 0) continue;
                        mask[next] = 0;
                        open.Push(next);
                    }
            }

            parts.Add((right - left + 1, bottom - top + 1, count));
        }

        return parts;
    }
}
