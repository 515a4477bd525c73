using System.Numerics;
using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;

namespace MiniCpmNative.GpuEmulator.Alu;

/// <summary>Rounding of a value to a whole number before it becomes an integer.</summary>
internal interface IWhole
{
    static abstract double Run(double a);
}

internal readonly struct Nearest : IWhole
{
    public static double Run(double a) => Math.Round(a, MidpointRounding.ToEven);
}

internal readonly struct Truncate : IWhole
{
    public static double Run(double a) => Math.Truncate(a);
}

internal readonly struct Floor : IWhole
{
    public static double Run(double a) => Math.Floor(a);
}

internal readonly struct Ceiling : IWhole
{
    public static double Run(double a) => Math.Ceiling(a);
}

/// <summary>Float to integer: rounds, saturates; NaN is 0, from f64 or to 64 bits the highest
/// bit.</summary>
internal readonly struct ToInteger<TRound, TD, TA> : IScalar<TD, TA>
    where TRound : IWhole where TD : IBinaryInteger<TD>, IMinMaxValue<TD> where TA
        : IFloatingPoint<TA>
{
    public static TD Run(TA a)
    {
        if (TA.IsNaN(a))
            return Unsafe.SizeOf<TD>() == 8 || typeof(TA) == typeof(double)
                ? TD.One << (Unsafe.SizeOf<TD>() * 8 - 1)
                : TD.Zero;
        return TD.CreateSaturating(TRound.Run(double.CreateChecked(a)));
    }
}

/// <summary>Float to float of whole value, the sign of zero kept.</summary>
internal readonly struct ToWhole<TRound> : IScalar<float, float> where TRound : IWhole
{
    public static float Run(float a) => (float)TRound.Run(a);
}

internal readonly struct ToWholeD<TRound> : IScalar<double, double> where TRound : IWhole
{
    public static double Run(double a) => TRound.Run(a);
}

/// <summary>Integer to float, nearest even.</summary>
internal readonly struct FromInteger<TD, TA> : IScalar<TD, TA>
    where TD : INumber<TD> where TA : IBinaryInteger<TA>
{
    public static TD Run(TA a) => TD.CreateChecked(a);
}

/// <summary>Integer to integer: cut or extended by the source's sign.</summary>
internal readonly struct Resize<TD, TA> : IScalar<TD, TA>
    where TD : IBinaryInteger<TD> where TA : IBinaryInteger<TA>
{
    public static TD Run(TA a) => TD.CreateTruncating(a);
}

internal readonly struct ResizeSaturated<TD, TA> : IScalar<TD, TA>
    where TD : IBinaryInteger<TD> where TA : IBinaryInteger<TA>
{
    public static TD Run(TA a) => TD.CreateSaturating(a);
}

internal readonly struct FloatToDouble : IScalar<double, float>
{
    public static double Run(float a) => a;
}

internal readonly struct DoubleToFloat : IScalar<float, double>
{
    public static float Run(double a) => (float)a;
}

/// <summary>Input flushed (for .ftz).</summary>
internal readonly struct FlushFirst<TOp, TD> : IScalar<TD, float> where TOp : IScalar<TD, float>
{
    public static TD Run(float a) => TOp.Run(Flush.ToZero(a));
}

/// <summary>Result flushed.</summary>
internal readonly struct FlushLast<TOp, TA> : IScalar<float, TA> where TOp : IScalar<float, TA>
{
    public static float Run(TA a) => Flush.ToZero(TOp.Run(a));
}

internal readonly struct FloatToHalf : IScalar<ushort, float>
{
    // Hardware's NaN is 0x7fff.
    public static ushort Run(float a) =>
        float.IsNaN(a) ? (ushort)0x7fff : BitConverter.HalfToUInt16Bits((Half)a);
}

internal readonly struct HalfToFloat : IScalar<float, ushort>
{
    public static float Run(ushort a) => (float)BitConverter.UInt16BitsToHalf(a);
}

internal readonly struct FloatToBrain : IScalar<ushort, float>
{
    public static ushort Run(float a)
    {
        if (float.IsNaN(a)) return 0x7fff;
        uint bits = BitConverter.SingleToUInt32Bits(a);
        return (ushort)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

/// <summary>cvt.rn.bf16.f32 for a whole vector; NaN is 0x7fff.</summary>
internal readonly struct RoundBrain : IUnary<uint>
{
    public static Vector256<uint> Run(Vector256<uint> a) => Upper(a) >> 16;

    /// <summary>The rounded value in the upper half, zeros below.</summary>
    public static Vector256<uint> Upper(Vector256<uint> a)
    {
        var rounded = a + Vector256.Create(0x7fffu) + (a >> 16 & Vector256<uint>.One);
        var isNumber = Vector256.Equals(a.AsSingle(), a.AsSingle()).AsUInt32();
        return Vector256.ConditionalSelect(isNumber, rounded, Vector256.Create(0x7fff0000u))
            & Vector256.Create(0xffff0000u);
    }
}

/// <summary>cvt.rn.bf16x2.f32 d, a, b: a above, b below.</summary>
internal readonly struct PackBrain : IBinary<uint>
{
    public static Vector256<uint> Run(Vector256<uint> a, Vector256<uint> b) =>
        RoundBrain.Upper(a) | RoundBrain.Run(b);
}

/// <summary>.rz: cut.</summary>
internal readonly struct FloatToBrainCut : IScalar<ushort, float>
{
    public static ushort Run(float a) =>
        float.IsNaN(a) ? (ushort)0x7fff : (ushort)(BitConverter.SingleToUInt32Bits(a) >> 16);
}

internal readonly struct BrainToFloat : IScalar<float, ushort>
{
    public static float Run(ushort a) => BitConverter.UInt32BitsToSingle((uint)a << 16);
}

/// <summary>cvt d, a, b into two halves: a above, b below.</summary>
internal readonly struct PackTwo<TOp> : IScalar<uint, float, float> where TOp
    : IScalar<ushort, float>
{
    public static uint Run(float a, float b) => (uint)TOp.Run(a) << 16 | TOp.Run(b);
}

/// <summary>.relu: negative values and NaN become 0 first (NaN stays NaN).</summary>
internal readonly struct ReluFirst<TOp> : IScalar<ushort, float> where TOp : IScalar<ushort, float>
{
    public static ushort Run(float a) => TOp.Run(a < 0 || (a == 0 && float.IsNegative(a)) ? 0 : a);
}

/// <summary>Arithmetic on two-byte floats: computed in double (exact enough to round once), then
/// rounded.</summary>
internal readonly struct Fma16<TTo, TFrom> : IScalar<ushort, ushort, ushort, ushort>
    where TTo : IScalar<ushort, float> where TFrom : IScalar<float, ushort>
{
    public static ushort Run(ushort a, ushort b, ushort c)
    {
        // The float of the exact sum, rounded to odd so that the second rounding is not misled.
        var (sum, error) = Directed.Fma(TFrom.Run(a), TFrom.Run(b), TFrom.Run(c));
        float toZero = Directed.Round<TowardZero>(sum, error);
        bool exact = toZero == sum && error == 0;
        return TTo.Run(exact || !float.IsFinite(toZero)
            ? toZero
            : BitConverter.UInt32BitsToSingle(BitConverter.SingleToUInt32Bits(toZero) | 1));
    }
}

internal readonly struct Fma16X2<TTo, TFrom> : IScalar<uint, uint, uint, uint>
    where TTo : IScalar<ushort, float> where TFrom : IScalar<float, ushort>
{
    public static uint Run(uint a, uint b, uint c) =>
        (uint)Fma16<TTo, TFrom>.Run((ushort)(a >> 16), (ushort)(b >> 16), (ushort)(c >> 16)) << 16
        | Fma16<TTo, TFrom>.Run((ushort)a, (ushort)b, (ushort)c);
}
