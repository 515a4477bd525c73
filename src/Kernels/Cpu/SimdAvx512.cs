using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;
using V = System.Runtime.Intrinsics.Vector512<float>;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// 16 floats; a tile of 12 x 32 takes 24 accumulators, two columns and one broadcast of 32.
/// </summary>
internal readonly unsafe struct Avx512Simd : ISimd<float, V>
{
    public static bool IsSupported =>
        Avx512F.IsSupported && Avx512BW.IsSupported && Avx512DQ.IsSupported
        && Avx512F.VL.IsSupported;

    public static int Width => 16;

    public static int TileRows => 12;

    public static V Zero => V.Zero;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Broadcast(float value) => Vector512.Create(value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Load(float* p) => Vector512.Load(p);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V LoadBF16(ushort* p) =>
        (Avx512F.ConvertToVector512UInt32(Vector256.Load(p)) << 16).AsSingle();

    // Shifting exponent and mantissa in place and multiplying by 2^112 moves the exponent bias,
    // also for subnormals; infinities and NaN get their full exponent afterwards.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V LoadF16(ushort* p)
    {
        var bits = Avx512F.ConvertToVector512UInt32(Vector256.Load(p));
        var magnitude = bits & Vector512.Create(0x7FFFu);
        var scale = Vector512.Create(5.192296858534828e33f);
        var value = ((magnitude << 13).AsSingle() * scale).AsUInt32();
        var special = Vector512.GreaterThanOrEqual(magnitude, Vector512.Create(0x7C00u))
            & Vector512.Create(0x7F800000u);
        return (value | special | ((bits & Vector512.Create(0x8000u)) << 16)).AsSingle();
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store(float* p, V value) => value.Store(p);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Fma(V a, V b, V c) => Avx512F.FusedMultiplyAdd(a, b, c);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Sum(V value) => Vector512.Sum(value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Prefetch(void* p) => Sse.Prefetch0(p);

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void Transpose<S>(byte* from, nint stride, int rows, float* to, nint toStride)
        where S : IStorage
    {
        nint step = stride * S.Size;
        int last = rows - 1;
        Quad<S>(from, step, 0, last, out V a0, out V a1, out V a2, out V a3);
        Quad<S>(from, step, 4, last, out V b0, out V b1, out V b2, out V b3);
        Quad<S>(from, step, 8, last, out V c0, out V c1, out V c2, out V c3);
        Quad<S>(from, step, 12, last, out V d0, out V d1, out V d2, out V d3);
        Lanes(ref a0, ref b0, ref c0, ref d0);
        Lanes(ref a1, ref b1, ref c1, ref d1);
        Lanes(ref a2, ref b2, ref c2, ref d2);
        Lanes(ref a3, ref b3, ref c3, ref d3);
        a0.Store(to);
        a1.Store(to + toStride);
        a2.Store(to + (2 * toStride));
        a3.Store(to + (3 * toStride));
        to += 4 * toStride;
        b0.Store(to);
        b1.Store(to + toStride);
        b2.Store(to + (2 * toStride));
        b3.Store(to + (3 * toStride));
        to += 4 * toStride;
        c0.Store(to);
        c1.Store(to + toStride);
        c2.Store(to + (2 * toStride));
        c3.Store(to + (3 * toStride));
        to += 4 * toStride;
        d0.Store(to);
        d1.Store(to + toStride);
        d2.Store(to + (2 * toStride));
        d3.Store(to + (3 * toStride));
    }

    /// <summary>
    /// Four rows in; out j holds, in its 128-bit lane l, column 4 l + j of the four.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Quad<S>(
        byte* from, nint step, int row, int last, out V u0, out V u1, out V u2, out V u3)
        where S : IStorage
    {
        V r0 = S.Load<float, V, Avx512Simd>(from + (Math.Min(row, last) * step));
        V r1 = S.Load<float, V, Avx512Simd>(from + (Math.Min(row + 1, last) * step));
        V r2 = S.Load<float, V, Avx512Simd>(from + (Math.Min(row + 2, last) * step));
        V r3 = S.Load<float, V, Avx512Simd>(from + (Math.Min(row + 3, last) * step));
        var t0 = Avx512F.UnpackLow(r0, r1).AsDouble();
        var t1 = Avx512F.UnpackHigh(r0, r1).AsDouble();
        var t2 = Avx512F.UnpackLow(r2, r3).AsDouble();
        var t3 = Avx512F.UnpackHigh(r2, r3).AsDouble();
        u0 = Avx512F.UnpackLow(t0, t2).AsSingle();
        u1 = Avx512F.UnpackHigh(t0, t2).AsSingle();
        u2 = Avx512F.UnpackLow(t1, t3).AsSingle();
        u3 = Avx512F.UnpackHigh(t1, t3).AsSingle();
    }

    /// <summary>Transposes the 4 x 4 matrix of 128-bit lanes of four vectors.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Lanes(ref V a, ref V b, ref V c, ref V d)
    {
        V even0 = Avx512F.Shuffle4x128(a, b, 0x88);
        V even1 = Avx512F.Shuffle4x128(c, d, 0x88);
        V odd0 = Avx512F.Shuffle4x128(a, b, 0xDD);
        V odd1 = Avx512F.Shuffle4x128(c, d, 0xDD);
        a = Avx512F.Shuffle4x128(even0, even1, 0x88);
        b = Avx512F.Shuffle4x128(odd0, odd1, 0x88);
        c = Avx512F.Shuffle4x128(even0, even1, 0xDD);
        d = Avx512F.Shuffle4x128(odd0, odd1, 0xDD);
    }
}
