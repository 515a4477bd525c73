namespace MiniCpmNative.Engine.Model;

/// <summary>
/// Positions of times (V-4_5): PE(t) = [sin(t w), cos(t w)] with w_k = 10000^(-k / (width / 2)),
/// k = 0 .. width/2 - 1. As the official table has them, in float: times are large, and a table of
/// doubles is another by 4e-3 near the table's end.
/// </summary>
public static class SinCos1D
{
    /// <summary>The position of a time, of as many numbers as the row has.</summary>
    public static void Write(int time, Span<float> row)
    {
        int half = row.Length / 2;
        for (int k = 0; k < half; k++)
        {
            float frequency = 1f / (float)Math.Pow(10000.0, (double)((float)k / half));
            float angle = time * frequency;
            row[k] = (float)Math.Sin(angle);
            row[half + k] = (float)Math.Cos(angle);
        }
    }
}
