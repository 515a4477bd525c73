using System.Numerics;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace MiniCpmNative.GpuEmulator.Alu;

internal readonly struct Add<T> : IBinary<T>
{
    public static Vector256<T> Run(Vector256<T> a, Vector256<T> b) => a + b;
}

internal readonly struct Sub<T> : IBinary<T>
{
    public static Vector256<T> Run(Vector256<T> a, Vector256<T> b) => a - b;
}

internal readonly struct MulLo<T> : IBinary<T>
{
    public static Vector256<T> Run(Vector256<T> a, Vector256<T> b) => a * b;
}

internal readonly struct MadLo<T> : ITernary<T>
{
    public static Vector256<T> Run(Vector256<T> a, Vector256<T> b, Vector256<T> c) => a * b + c;
}

internal readonly struct Min<T> : IBinary<T>
{
    public static Vector256<T> Run(Vector256<T> a, Vector256<T> b) => Vector256.Min(a, b);
}

internal readonly struct Max<T> : IBinary<T>
{
    public static Vector256<T> Run(Vector256<T> a, Vector256<T> b) => Vector256.Max(a, b);
}

internal readonly struct And<T> : IBinary<T>
{
    public static Vector256<T> Run(Vector256<T> a, Vector256<T> b) => a & b;
}

internal readonly struct Or<T> : IBinary<T>
{
    public static Vector256<T> Run(Vector256<T> a, Vector256<T> b) => a | b;
}

internal readonly struct Xor<T> : IBinary<T>
{
    public static Vector256<T> Run(Vector256<T> a, Vector256<T> b) => a ^ b;
}

internal readonly struct Not<T> : IUnary<T>
{
    public static Vector256<T> Run(Vector256<T> a) => ~a;
}

internal readonly struct Neg<T> : IUnary<T>
{
    public static Vector256<T> Run(Vector256<T> a) => -a;
}

internal readonly struct Abs<T> : IUnary<T>
{
    public static Vector256<T> Run(Vector256<T> a) => Vector256.Abs(a);
}

internal readonly struct Copy<T> : IUnary<T>
{
    public static Vector256<T> Run(Vector256<T> a) => a;
}

internal readonly struct MulHiU32 : IBinary<uint>
{
    public static Vector256<uint> Run(Vector256<uint> a, Vector256<uint> b)
    {
        if (Avx2.IsSupported)
        {
            var even = Avx2.Multiply(a, b) >> 32;
            var odd = Avx2.Multiply((a.AsUInt64() >> 32).AsUInt32(),
                (b.AsUInt64() >> 32).AsUInt32());
            return Avx2.Blend(even.AsUInt32(), odd.AsUInt32(), 0b10101010);
        }
        var (al, ah) = Vector256.Widen(a);
        var (bl, bh) = Vector256.Widen(b);
        return Vector256.Narrow((al * bl) >> 32, (ah * bh) >> 32);
    }
}

/// <summary>Shift counts above the width give zero (or the sign), they do not wrap.</summary>
internal readonly struct Shl32 : IBinary<uint>
{
    public static Vector256<uint> Run(Vector256<uint> a, Vector256<uint> b) => Avx2.IsSupported
        ? Avx2.ShiftLeftLogicalVariable(a, b)
        : Vector256.Create(Each(a, b, (x, n) => n > 31 ? 0 : x << (int)n));

    internal static uint[] Each(Vector256<uint> a, Vector256<uint> b, Func<uint, uint, uint> shift)
    {
        var result = new uint[8];
        for (int n = 0; n < 8; n++) result[n] = shift(a[n], b[n]);
        return result;
    }
}

internal readonly struct Shr32 : IBinary<uint>
{
    public static Vector256<uint> Run(Vector256<uint> a, Vector256<uint> b) => Avx2.IsSupported
        ? Avx2.ShiftRightLogicalVariable(a, b)
        : Vector256.Create(Shl32.Each(a, b, (x, n) => n > 31 ? 0 : x >> (int)n));
}

internal readonly struct Sar32 : IBinary<uint>
{
    public static Vector256<uint> Run(Vector256<uint> a, Vector256<uint> b) => Avx2.IsSupported
        ? Avx2.ShiftRightArithmeticVariable(a.AsInt32(), b).AsUInt32()
        : Vector256.Create(Shl32.Each(a, b, (x, n) => (uint)((int)x >> (int)Math.Min(n, 31))));
}

internal readonly struct Shl64 : IScalar<ulong, ulong, uint>
{
    public static ulong Run(ulong a, uint n) => n > 63 ? 0 : a << (int)n;
}

internal readonly struct Shr64 : IScalar<ulong, ulong, uint>
{
    public static ulong Run(ulong a, uint n) => n > 63 ? 0 : a >> (int)n;
}

internal readonly struct Sar64 : IScalar<long, long, uint>
{
    public static long Run(long a, uint n) => a >> (int)Math.Min(n, 63);
}

internal readonly struct Shl16 : IScalar<ushort, ushort, uint>
{
    public static ushort Run(ushort a, uint n) => n > 15 ? (ushort)0 : (ushort)(a << (int)n);
}

internal readonly struct Shr16 : IScalar<ushort, ushort, uint>
{
    public static ushort Run(ushort a, uint n) => n > 15 ? (ushort)0 : (ushort)(a >> (int)n);
}

internal readonly struct Sar16 : IScalar<ushort, short, uint>
{
    public static ushort Run(short a, uint n) => (ushort)(a >> (int)Math.Min(n, 15));
}

/// <summary>Division by zero gives all ones, the remainder the dividend, as the hardware's code
/// does.</summary>
internal readonly struct Div<T> : IScalar<T, T, T> where T : IBinaryInteger<T>
{
    public static T Run(T a, T b) => T.IsZero(b) ? T.AllBitsSet
        : b == T.AllBitsSet && T.IsNegative(b) ? unchecked(T.Zero - a) : a / b;
}

internal readonly struct Rem<T> : IScalar<T, T, T> where T : IBinaryInteger<T>
{
    public static T Run(T a, T b) => T.IsZero(b) ? a
        : b == T.AllBitsSet && T.IsNegative(b) ? T.Zero : a % b;
}

internal readonly struct MulHi<T, TWide> : IScalar<T, T, T>
    where T : unmanaged, IBinaryInteger<T> where TWide : IBinaryInteger<TWide>
{
    public static unsafe T Run(T a, T b) => T.CreateTruncating(
        (TWide.CreateTruncating(a) * TWide.CreateTruncating(b)) >> (sizeof(T) * 8));
}

internal readonly struct MulHiS16 : IScalar<ushort, short, short>
{
    public static ushort Run(short a, short b) => (ushort)((a * b) >> 16);
}

internal readonly struct MulWide<TWide, T> : IScalar<TWide, T, T>
    where T : IBinaryInteger<T> where TWide : IBinaryInteger<TWide>
{
    public static TWide Run(T a, T b) => TWide.CreateTruncating(a) * TWide.CreateTruncating(b);
}

internal readonly struct MadWide<TWide, T> : IScalar<TWide, T, T, TWide>
    where T : IBinaryInteger<T> where TWide : IBinaryInteger<TWide>
{
    public static TWide Run(T a, T b, TWide c) =>
        TWide.CreateTruncating(a) * TWide.CreateTruncating(b) + c;
}

internal readonly struct MadHi<T, TWide> : IScalar<T, T, T, T>
    where T : unmanaged, IBinaryInteger<T> where TWide : IBinaryInteger<TWide>
{
    public static T Run(T a, T b, T c) => MulHi<T, TWide>.Run(a, b) + c;
}

/// <summary>Operations on 16-bit registers; what stands in the upper half of their lanes is
/// unused.</summary>
internal readonly struct Add16 : IScalar<ushort, ushort, ushort>
{
    public static ushort Run(ushort a, ushort b) => (ushort)(a + b);
}

internal readonly struct Sub16 : IScalar<ushort, ushort, ushort>
{
    public static ushort Run(ushort a, ushort b) => (ushort)(a - b);
}

internal readonly struct Mul16 : IScalar<ushort, ushort, ushort>
{
    public static ushort Run(ushort a, ushort b) => (ushort)(a * b);
}

internal readonly struct Mad16 : IScalar<ushort, ushort, ushort, ushort>
{
    public static ushort Run(ushort a, ushort b, ushort c) => (ushort)(a * b + c);
}

/// <summary>min or max of 16-bit values of type T, stored as bits.</summary>
internal readonly struct Min16<T> : IScalar<ushort, T, T> where T : IBinaryInteger<T>
{
    public static ushort Run(T a, T b) => ushort.CreateTruncating(T.Min(a, b));
}

internal readonly struct Max16<T> : IScalar<ushort, T, T> where T : IBinaryInteger<T>
{
    public static ushort Run(T a, T b) => ushort.CreateTruncating(T.Max(a, b));
}

internal readonly struct Neg16 : IScalar<ushort, ushort>
{
    public static ushort Run(ushort a) => (ushort)-a;
}

internal readonly struct Abs16 : IScalar<ushort, short>
{
    public static ushort Run(short a) => (ushort)Math.Abs((int)a);
}

/// <summary>.relu: what is negative becomes 0.</summary>
internal readonly struct ReluLast<TOp> : IBinary<int> where TOp : IBinary<int>
{
    public static Vector256<int> Run(Vector256<int> a, Vector256<int> b) =>
        Vector256.Max(TOp.Run(a, b), Vector256<int>.Zero);
}

internal readonly struct AddSaturated : IScalar<int, int, int>
{
    public static int Run(int a, int b) => (int)Math.Clamp((long)a + b, int.MinValue, int.MaxValue);
}

internal readonly struct SubSaturated : IScalar<int, int, int>
{
    public static int Run(int a, int b) => (int)Math.Clamp((long)a - b, int.MinValue, int.MaxValue);
}
