using System.Text.Json;

namespace MiniCpmNative.Tests;

/// <summary>
/// What the reference keeps of a tensor that is too large to keep whole: norm, sum, largest
/// magnitude and eight projections p_k = sum_i v_i s_ki / sqrt(n) on signs s_ki from splitmix64.
/// For a difference e of two tensors the projections differ by e's, and the mean of their squares
/// over random signs is |e|^2 / n: eight of them tell the size of a
/// difference that the two norms alone would hide.
/// </summary>
internal sealed record Fingerprint(
    int[] Shape, double Norm, double Sum, double Max, double[] Projections)
{
    private long Count => Shape.Aggregate(1L, (product, size) => product * size);

    public static Fingerprint Read(JsonElement json) => new(
        ReferenceText.Ints(json.GetProperty("shape")), json.GetProperty("norm").GetDouble(),
        json.GetProperty("sum").GetDouble(), json.GetProperty("max").GetDouble(),
        [.. json.GetProperty("projections").EnumerateArray().Select(p => p.GetDouble())]);

    public static Fingerprint Of(ReadOnlySpan<float> values, params int[] shape)
    {
        double squares = 0, sum = 0, max = 0;
        var projections = new double[8];
        for (int i = 0; i < values.Length; i++)
        {
            double v = values[i];
            (squares, sum, max) = (squares + (v * v), sum + v, Math.Max(max, Math.Abs(v)));
            ulong z = 7 + (ulong)i + 0x9E3779B97F4A7C15;
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
            z ^= z >> 31;
            for (int k = 0; k < projections.Length; k++)
                projections[k] += ((z >> k) & 1) != 0 ? v : -v;
        }

        double root = Math.Sqrt(values.Length);
        return new Fingerprint(
            shape, Math.Sqrt(squares), sum, max, Array.ConvertAll(projections, p => p / root));
    }

    /// <summary>Norm of the difference to another tensor as the projections tell it.</summary>
    public double Distance(Fingerprint other)
    {
        double squares = 0;
        for (int k = 0; k < Projections.Length; k++)
            squares += Math.Pow(Projections[k] - other.Projections[k], 2);
        return Math.Sqrt(squares / Projections.Length * Count);
    }

    /// <summary>Largest difference of norm, sum and projections, as parts of the norm.</summary>
    public double NormError(Fingerprint expected)
    {
        double sum = Math.Abs(Sum - expected.Sum) / Math.Sqrt(Count);
        double norm = Math.Abs(Norm - expected.Norm);
        return Math.Max(Distance(expected), Math.Max(sum, norm)) / expected.Norm;
    }

    /// <summary>
    /// Root mean square and largest element's difference, as parts of a magnitude.
    /// </summary>
    public double ElementError(Fingerprint expected, double magnitude) =>
        Math.Max(Distance(expected) / Math.Sqrt(Count), Math.Abs(Max - expected.Max)) / magnitude;
}
