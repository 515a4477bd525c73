using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using MiniCpmNative.GpuEmulator.Machine;
using V = System.Runtime.Intrinsics.Vector256<float>;
using W = System.Runtime.Intrinsics.Vector256<double>;

namespace MiniCpmNative.GpuEmulator.Alu;

internal interface IWide
{
    static abstract W Run(W a);
}

/// <summary>
/// .approx functions, computed in double and rounded once; hardware is allowed about two units in
/// the last place. With EmulatorOptions.ApproximateUlps results move by up to that many units, by a
/// hash of their bits: kernels must not depend on better. sin, cos and tanh have absolute or larger
/// errors on hardware (2^-20.9, 2^-11); they move by the same units, which understates tanh.
/// </summary>
internal static unsafe class Approximate
{
    public static void Run1<TOp>(Warp w, Instruction i) where TOp : IWide
    {
        float* a = (float*)(w.R + i.A);
        bool flush = i.Mode2 != 0;
        for (int v = 0; v < 4; v++)
        {
            var x = Vector256.Load(a + v * 8);
            if (flush) x = Flush.ToZero(x);
            var (low, high) = Vector256.Widen(x);
            Put(w, i, v, Vector256.Narrow(TOp.Run(low), TOp.Run(high)), flush);
        }
    }

    /// <summary>div.approx (Mode 1: a times 1 / b, which is 0 for the largest b) and
    /// div.full.</summary>
    public static void Divide(Warp w, Instruction i)
    {
        float* a = (float*)(w.R + i.A), b = (float*)(w.R + i.B);
        bool flush = i.Mode2 != 0;
        for (int v = 0; v < 4; v++)
        {
            V x = Vector256.Load(a + v * 8), y = Vector256.Load(b + v * 8);
            if (flush) (x, y) = (Flush.ToZero(x), Flush.ToZero(y));
            var quotient = x / y;
            if (i.Mode == 1)
            {
                var size = Vector256.Abs(y);
                var large = Vector256.GreaterThan(size, Vector256.Create(8.507059e37f)) // 2^126
                    & Vector256.LessThan(size, Vector256.Create(float.PositiveInfinity));
                quotient = Vector256.ConditionalSelect(large, x * Vector256.CopySign(V.Zero, y),
                    quotient);
            }
            Put(w, i, v, quotient, flush);
        }
    }

    private static void Put(Warp w, Instruction i, int v, V value, bool flush)
    {
        int ulps = w.Block.Options.ApproximateUlps;
        if (ulps > 0) value = Shake(value, ulps);
        if (flush) value = Flush.ToZero(value);
        float* d = (float*)(w.R + i.D) + v * 8;
        Vector256.ConditionalSelect(Maps.Lanes<float>(w.Exec, v), value, Vector256.Load(d))
            .Store(d);
    }

    // Moves finite, normal, inexact-looking values by -ulps..ulps units; exact 0 and 1 stay, since
    // hardware returns them exactly for the arguments that make them.
    private static V Shake(V value, int ulps)
    {
        var bits = value.AsUInt32();
        var hash = bits * 0x9E3779B1u;
        hash ^= hash >> 15;
        hash *= 0x85EBCA77u;
        var step = ((hash >> 16) * (uint)(2 * ulps + 1) >> 16) - Vector256.Create((uint)ulps);
        var magnitude = Vector256.Abs(value);
        var moves = Vector256.GreaterThan(magnitude, Vector256.Create(1e-37f))
            & Vector256.LessThan(magnitude, Vector256.Create(1e38f)) & ~Vector256.Equals(magnitude,
            V.One);
        return Vector256.ConditionalSelect(moves, (bits + step).AsSingle(), value);
    }
}

internal readonly struct Ex2 : IWide
{
    public static W Run(W a) => Vector256.Exp(a * 0.69314718055994530942);
}

internal readonly struct Lg2 : IWide
{
    public static W Run(W a) => Vector256.Log2(a);
}

internal readonly struct RcpApprox : IWide
{
    public static W Run(W a) => W.One / a;
}

internal readonly struct SqrtApprox : IWide
{
    public static W Run(W a) => Vector256.Sqrt(a);
}

internal readonly struct RsqrtApprox : IWide
{
    public static W Run(W a) => W.One / Vector256.Sqrt(a);
}

internal readonly struct SinApprox : IWide
{
    public static W Run(W a) => Vector256.Sin(a);
}

internal readonly struct CosApprox : IWide
{
    public static W Run(W a) => Vector256.Cos(a);
}

internal readonly struct TanhApprox : IWide
{
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static W Run(W a) =>
        Vector256.Create(Math.Tanh(a[0]), Math.Tanh(a[1]), Math.Tanh(a[2]), Math.Tanh(a[3]));
}
