using System.Text.Json;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;

namespace MiniCpmNative.Tests;

/// <summary>
/// Slice plans for the text tests, worked out from the description of the official slicer.
/// </summary>
internal static class ReferenceSlices
{
    private const int Patch = 14, Side = 448;

    /// <summary>Plans of [width, height, ...] entries.</summary>
    public static SlicePlan Of(JsonElement size, int maxSlices) =>
        Of(size[0].GetInt32(), size[1].GetInt32(), maxSlices);

    public static SlicePlan Of(int width, int height, int maxSlices)
    {
        int multiple =
            Math.Min((int)Math.Ceiling((double)width * height / (Side * Side)), maxSlices);
        if (multiple <= 1) return new SlicePlan(Best(width, height, true), 0, 0, default);
        (int Columns, int Rows) best = (1, 1);
        double smallest = double.PositiveInfinity, ratio = Math.Log((double)width / height);
        foreach (int n in (int[])[multiple - 1, multiple, multiple + 1])
            for (int m = 1; n > 1 && n <= maxSlices && m <= n; m++)
            {
                double error = Math.Abs(ratio - Math.Log((double)m / ((double)n / m)));
                if (n % m != 0 || error >= smallest) continue;
                (best, smallest) = ((m, n / m), error);
            }
        var tile = Best((double)Divisible(width, best.Columns) / best.Columns,
            (double)Divisible(height, best.Rows) / best.Rows, true);
        return new SlicePlan(Best(width, height, false), best.Columns, best.Rows, tile);
    }

    private static int Divisible(double length, int by) =>
        Math.Max((int)Math.Round(length / by) * by, by);

    private static PictureSize Best(double width, double height, bool up)
    {
        if (up || width * height > Side * Side)
        {
            double r = width / height;
            height = Math.Truncate(Side / Math.Sqrt(r));
            width = Math.Truncate(height * r);
        }
        return new PictureSize(Divisible(width, Patch), Divisible(height, Patch));
    }
}
