using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using V = System.Runtime.Intrinsics.Vector256<float>;
using W = System.Runtime.Intrinsics.Vector256<double>;

namespace MiniCpmNative.GpuEmulator.Alu;

// Single and double precision. Rounding is to nearest even as on the host; .ftz takes subnormal
// inputs and results as zeros of their sign; .sat clamps to [0, 1] with NaN as 0. Payloads of NaN
// results are the host's, not 0x7fffffff.

internal static class Flush
{
    /// <summary>Subnormals become zero of their sign.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V ToZero(V x) => Vector256.ConditionalSelect(
        Vector256.LessThan(Vector256.Abs(x), Vector256.Create(1.17549435e-38f)),
            x & Vector256.Create(-0f), x);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float ToZero(float x) => MathF.Abs(x) < 1.17549435e-38f ? MathF.CopySign(0, x)
        : x;
}

internal readonly struct Ftz1<TOp> : IUnary<float> where TOp : IUnary<float>
{
    public static V Run(V a) => Flush.ToZero(TOp.Run(Flush.ToZero(a)));
}

internal readonly struct Ftz2<TOp> : IBinary<float> where TOp : IBinary<float>
{
    public static V Run(V a, V b) => Flush.ToZero(TOp.Run(Flush.ToZero(a), Flush.ToZero(b)));
}

internal readonly struct Ftz3<TOp> : ITernary<float> where TOp : ITernary<float>
{
    public static V Run(V a, V b, V c) =>
        Flush.ToZero(TOp.Run(Flush.ToZero(a), Flush.ToZero(b), Flush.ToZero(c)));
}

internal readonly struct Sat2<TOp> : IBinary<float> where TOp : IBinary<float>
{
    public static V Run(V a, V b) => Saturate.Run(TOp.Run(a, b));
}

internal readonly struct Sat3<TOp> : ITernary<float> where TOp : ITernary<float>
{
    public static V Run(V a, V b, V c) => Saturate.Run(TOp.Run(a, b, c));
}

internal readonly struct Saturate : IUnary<float>
{
    public static V Run(V a) => Vector256.MinNumber(Vector256.MaxNumber(a, V.Zero), V.One)
        & ~Vector256.IsNaN(a);
}

/// <summary>Compares take flushed inputs too, but their result is no number.</summary>
internal readonly struct FtzInputs<TOp> : IBinary<float> where TOp : IBinary<float>
{
    public static V Run(V a, V b) => TOp.Run(Flush.ToZero(a), Flush.ToZero(b));
}

internal readonly struct AddF : IBinary<float>
{
    public static V Run(V a, V b) => a + b;
}

internal readonly struct SubF : IBinary<float>
{
    public static V Run(V a, V b) => a - b;
}

internal readonly struct MulF : IBinary<float>
{
    public static V Run(V a, V b) => a * b;
}

internal readonly struct DivF : IBinary<float>
{
    public static V Run(V a, V b) => a / b;
}

internal readonly struct FmaF : ITernary<float>
{
    public static V Run(V a, V b, V c) => Vector256.FusedMultiplyAdd(a, b, c);
}

internal readonly struct MinF : IBinary<float>
{
    public static V Run(V a, V b) => Vector256.MinNumber(a, b);
}

internal readonly struct MaxF : IBinary<float>
{
    public static V Run(V a, V b) => Vector256.MaxNumber(a, b);
}

/// <summary>.NaN variants: a NaN on either side wins.</summary>
internal readonly struct MinNaN : IBinary<float>
{
    public static V Run(V a, V b) => Vector256.Min(a, b);
}

internal readonly struct MaxNaN : IBinary<float>
{
    public static V Run(V a, V b) => Vector256.Max(a, b);
}

internal readonly struct AbsF : IUnary<float>
{
    public static V Run(V a) => Vector256.Abs(a);
}

internal readonly struct NegF : IUnary<float>
{
    public static V Run(V a) => -a;
}

internal readonly struct SqrtF : IUnary<float>
{
    public static V Run(V a) => Vector256.Sqrt(a);
}

internal readonly struct RcpF : IUnary<float>
{
    public static V Run(V a) => V.One / a;
}

/// <summary>copysign d, a, b: the sign of a on the magnitude of b.</summary>
internal readonly struct CopySignF : IBinary<float>
{
    public static V Run(V a, V b) => (a & Vector256.Create(-0f)) | Vector256.Abs(b);
}

internal readonly struct AddD : IBinary<double>
{
    public static W Run(W a, W b) => a + b;
}

internal readonly struct SubD : IBinary<double>
{
    public static W Run(W a, W b) => a - b;
}

internal readonly struct MulD : IBinary<double>
{
    public static W Run(W a, W b) => a * b;
}

internal readonly struct DivD : IBinary<double>
{
    public static W Run(W a, W b) => a / b;
}

internal readonly struct FmaD : ITernary<double>
{
    public static W Run(W a, W b, W c) => Vector256.FusedMultiplyAdd(a, b, c);
}

internal readonly struct MinD : IBinary<double>
{
    public static W Run(W a, W b) => Vector256.MinNumber(a, b);
}

internal readonly struct MaxD : IBinary<double>
{
    public static W Run(W a, W b) => Vector256.MaxNumber(a, b);
}

internal readonly struct AbsD : IUnary<double>
{
    public static W Run(W a) => Vector256.Abs(a);
}

internal readonly struct NegD : IUnary<double>
{
    public static W Run(W a) => -a;
}

internal readonly struct SqrtD : IUnary<double>
{
    public static W Run(W a) => Vector256.Sqrt(a);
}

internal readonly struct RcpD : IUnary<double>
{
    public static W Run(W a) => W.One / a;
}

internal readonly struct CopySignD : IBinary<double>
{
    public static W Run(W a, W b) => (a & Vector256.Create(-0d)) | Vector256.Abs(b);
}
