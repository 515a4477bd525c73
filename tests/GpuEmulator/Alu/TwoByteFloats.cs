namespace MiniCpmNative.GpuEmulator.Alu;

/// <summary>A function of two-byte floats on both halves of a word.</summary>
internal readonly struct Halves<TOp> : IScalar<uint, uint, uint>
    where TOp : IScalar<ushort, ushort, ushort>
{
    public static uint Run(uint a, uint b) =>
        (uint)TOp.Run((ushort)(a >> 16), (ushort)(b >> 16)) << 16
        | TOp.Run((ushort)a, (ushort)b);
}

/// <summary>The smaller or larger of two-byte floats; a number wins over NaN.</summary>
internal readonly struct Min2<TTo, TFrom> : IScalar<ushort, ushort, ushort>
    where TTo : IScalar<ushort, float> where TFrom : IScalar<float, ushort>
{
    public static ushort Run(ushort a, ushort b) =>
        TTo.Run(float.MinNumber(TFrom.Run(a), TFrom.Run(b)));
}

internal readonly struct Max2<TTo, TFrom> : IScalar<ushort, ushort, ushort>
    where TTo : IScalar<ushort, float> where TFrom : IScalar<float, ushort>
{
    public static ushort Run(ushort a, ushort b) =>
        TTo.Run(float.MaxNumber(TFrom.Run(a), TFrom.Run(b)));
}

/// <summary>.NaN variants: a NaN on either side wins.</summary>
internal readonly struct MinNaN2<TTo, TFrom> : IScalar<ushort, ushort, ushort>
    where TTo : IScalar<ushort, float> where TFrom : IScalar<float, ushort>
{
    public static ushort Run(ushort a, ushort b) =>
        TTo.Run(MathF.Min(TFrom.Run(a), TFrom.Run(b)));
}

internal readonly struct MaxNaN2<TTo, TFrom> : IScalar<ushort, ushort, ushort>
    where TTo : IScalar<ushort, float> where TFrom : IScalar<float, ushort>
{
    public static ushort Run(ushort a, ushort b) =>
        TTo.Run(MathF.Max(TFrom.Run(a), TFrom.Run(b)));
}

internal readonly struct Add2<TTo, TFrom> : IScalar<ushort, ushort, ushort>
    where TTo : IScalar<ushort, float> where TFrom : IScalar<float, ushort>
{
    public static ushort Run(ushort a, ushort b) => Fma16<TTo, TFrom>.Run(a, TTo.Run(1), b);
}

internal readonly struct Sub2<TTo, TFrom> : IScalar<ushort, ushort, ushort>
    where TTo : IScalar<ushort, float> where TFrom : IScalar<float, ushort>
{
    public static ushort Run(ushort a, ushort b) => Fma16<TTo, TFrom>.Run(b, TTo.Run(-1), a);
}

internal readonly struct Mul2<TTo, TFrom> : IScalar<ushort, ushort, ushort>
    where TTo : IScalar<ushort, float> where TFrom : IScalar<float, ushort>
{
    // Minus zero changes no sign of a product that is zero.
    public static ushort Run(ushort a, ushort b) => Fma16<TTo, TFrom>.Run(a, b, TTo.Run(-0f));
}
