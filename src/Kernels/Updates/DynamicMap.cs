namespace MiniCpmNative.Kernels.Updates;

/// <summary>
/// Moments in 8 bits, Dettmers et al. 2022, with the numbers of bitsandbytes: 256 neighbours share
/// the largest magnitude among them, and a code is the entry nearest to value / scale of a table
/// whose steps are fine near 0: seven decades, 2^i equal steps of each (2^(i + 1) without a sign).
/// Kernel `update_8bit` makes the same tables.
/// </summary>
public static class DynamicMap
{
    /// <summary>Elements that share a scale.</summary>
    public const int Block = 256;

    /// <summary>Ascending; entry 127 is 0.</summary>
    public static float[] Signed { get; } = Make(isSigned: true);

    /// <summary>Ascending from 0.</summary>
    public static float[] Unsigned { get; } = Make(isSigned: false);

    public static int Blocks(long count) => checked((int)((count + Block - 1) / Block));

    /// <summary>
    /// The entry nearest to x; with a sign, a negative x gets a negative entry, and 0 or more none.
    /// </summary>
    public static byte Code(float[] table, float x)
    {
        int code = 0;
        for (int step = 128; step > 0; step /= 2)
            if (table[code + step] <= x) code += step;
        if (code < 255 && x > (table[code] + table[code + 1]) * 0.5f) code++;
        if (table[0] < 0 && float.IsNegative(table[code]) != float.IsNegative(x))
            code += x > 0 ? 1 : -1;
        return (byte)code;
    }

    // In the float32 arithmetic of torch.linspace, which counts from both ends with fused
    // multiply-adds: the last bit of an entry depends on it.
    private static float[] Make(bool isSigned)
    {
        List<float> entries = [0, 1];
        ReadOnlySpan<float> decades = [1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1f];
        for (int decade = 0; decade < decades.Length; decade++)
        {
            int steps = 1 << (isSigned ? decade : decade + 1);
            for (int i = 0; i < steps; i++)
            {
                float entry = decades[decade] * ((Bound(i, steps) + Bound(i + 1, steps)) / 2);
                entries.Add(entry);
                if (isSigned) entries.Add(-entry);
            }
        }

        entries.Sort();
        return [.. entries];

        static float Bound(int i, int steps)
        {
            float step = (1 - 0.1f) / steps;
            return i < (steps + 1) / 2 ? MathF.FusedMultiplyAdd(step, i, 0.1f)
                : MathF.FusedMultiplyAdd(-step, steps - i, 1);
        }
    }
}
