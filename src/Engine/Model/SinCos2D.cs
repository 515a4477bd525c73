namespace MiniCpmNative.Engine.Model;

/// <summary>
/// Positions of the resampler's keys: PE(y, x) = [sin(x w), cos(x w), sin(y w), cos(y w)] with
/// w_k = 10000^(-k / (width / 4)), k = 0 .. width/4 - 1; the column comes first. Both halves are
/// rows of one table over a single coordinate.
/// </summary>
public static class SinCos2D
{
    /// <summary>[count, width / 2]: row i is [sin(i w), cos(i w)].</summary>
    public static float[] Coordinates(int count, int width)
    {
        int quarter = width / 4;
        var table = new float[checked(count * 2 * quarter)];
        for (int k = 0; k < quarter; k++)
        {
            double frequency = Math.Pow(10000, -(double)k / quarter);
            for (int i = 0; i < count; i++)
            {
                table[(i * 2 * quarter) + k] = (float)Math.Sin(i * frequency);
                table[(((i * 2) + 1) * quarter) + k] = (float)Math.Cos(i * frequency);
            }
        }

        return table;
    }
}
