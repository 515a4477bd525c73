namespace MiniCpmNative.GpuEmulator.Alu;

/// <summary>
/// add, mul and fma of f32 with .rz, .rm, .rp: the exact result as a double and its error term tell
/// on which side of the float neighbours it lies.
/// </summary>
internal static class Directed
{
    public static float Round<TMode>(double sum, double error) where TMode : IRounding
    {
        float nearest = (float)sum;
        if (float.IsInfinity(nearest) && double.IsFinite(sum))
            // Too large for a float, yet finite: what is rounded toward zero stays finite.
            return TMode.Direction(sum) == Math.Sign(sum) ? nearest
                : MathF.CopySign(float.MaxValue, nearest);
        if (!float.IsFinite(nearest) || double.IsNaN(error)) return nearest;
        // Sign of exact - nearest.
        double side = sum - nearest;
        int above = side != 0 ? Math.Sign(side) : Math.Sign(error);
        int wanted = TMode.Direction(sum);
        if (above > 0 && wanted > 0) return MathF.BitIncrement(nearest);
        if (above < 0 && wanted < 0) return MathF.BitDecrement(nearest);
        return nearest;
    }

    /// <summary>a * b + c exactly, as sum + error (the product of two floats is exact in
    /// double).</summary>
    public static (double Sum, double Error) Fma(float a, float b, float c)
    {
        double product = (double)a * b, sum = product + c;
        double bb = sum - product;
        return (sum, (product - (sum - bb)) + (c - bb));
    }
}

/// <summary>Direction of rounding: -1 down, 1 up.</summary>
internal interface IRounding
{
    static abstract int Direction(double value);
}

internal readonly struct TowardZero : IRounding
{
    public static int Direction(double value) => value > 0 ? -1 : 1;
}

internal readonly struct Down : IRounding
{
    public static int Direction(double value) => -1;
}

internal readonly struct Up : IRounding
{
    public static int Direction(double value) => 1;
}

internal readonly struct DirectedFma<TMode> : IScalar<float, float, float, float> where TMode
    : IRounding
{
    public static float Run(float a, float b, float c)
    {
        var (sum, error) = Directed.Fma(a, b, c);
        // What cancels exactly is -0 when rounded down (IEEE 754, 6.3).
        if (sum == 0 && error == 0 && typeof(TMode) == typeof(Down)
            && (double.IsNegative(c) || double.IsNegative((double)a * b))) return -0f;
        return Directed.Round<TMode>(sum, error);
    }
}

internal readonly struct DirectedAdd<TMode> : IScalar<float, float, float> where TMode : IRounding
{
    public static float Run(float a, float b) => DirectedFma<TMode>.Run(a, 1, b);
}

internal readonly struct DirectedSub<TMode> : IScalar<float, float, float> where TMode : IRounding
{
    public static float Run(float a, float b) => DirectedFma<TMode>.Run(a, 1, -b);
}

internal readonly struct DirectedMul<TMode> : IScalar<float, float, float> where TMode : IRounding
{
    public static float Run(float a, float b) => Directed.Round<TMode>((double)a * b, 0);
}
