using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;
using V = System.Runtime.Intrinsics.Vector256<float>;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// 8 floats; a tile of 6 x 16 takes 12 accumulators, two columns and one broadcast of 16.
/// </summary>
internal readonly unsafe struct Avx2Simd : ISimd<float, V>
{
    public static bool IsSupported => Avx2.IsSupported && Fma.IsSupported;

    public static int Width => 8;

    public static int TileRows => 6;

    public static V Zero => V.Zero;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Broadcast(float value) => Vector256.Create(value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Load(float* p) => Vector256.Load(p);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V LoadBF16(ushort* p) =>
        (Avx2.ConvertToVector256Int32(Vector128.Load(p)) << 16).AsSingle();

    /// <summary>As <see cref="Avx512Simd.LoadF16"/>.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V LoadF16(ushort* p)
    {
        var bits = Avx2.ConvertToVector256Int32(Vector128.Load(p));
        var magnitude = bits & Vector256.Create(0x7FFF);
        var scale = Vector256.Create(5.192296858534828e33f);
        var value = ((magnitude << 13).AsSingle() * scale).AsInt32();
        var special = Vector256.GreaterThanOrEqual(magnitude, Vector256.Create(0x7C00))
            & Vector256.Create(0x7F800000);
        return (value | special | ((bits & Vector256.Create(0x8000)) << 16)).AsSingle();
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store(float* p, V value) => value.Store(p);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    static V ISimd<float, V>.Fma(V a, V b, V c) =>
        System.Runtime.Intrinsics.X86.Fma.MultiplyAdd(a, b, c);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Sum(V value) => Vector256.Sum(value);

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
        Avx.Permute2x128(a0, b0, 0x20).Store(to);
        Avx.Permute2x128(a1, b1, 0x20).Store(to + toStride);
        Avx.Permute2x128(a2, b2, 0x20).Store(to + (2 * toStride));
        Avx.Permute2x128(a3, b3, 0x20).Store(to + (3 * toStride));
        to += 4 * toStride;
        Avx.Permute2x128(a0, b0, 0x31).Store(to);
        Avx.Permute2x128(a1, b1, 0x31).Store(to + toStride);
        Avx.Permute2x128(a2, b2, 0x31).Store(to + (2 * toStride));
        Avx.Permute2x128(a3, b3, 0x31).Store(to + (3 * toStride));
    }

    /// <summary>
    /// Four rows in; out j holds, in its 128-bit lane l, column 4 l + j of the four.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Quad<S>(
        byte* from, nint step, int row, int last, out V u0, out V u1, out V u2, out V u3)
        where S : IStorage
    {
        V r0 = S.Load<float, V, Avx2Simd>(from + (Math.Min(row, last) * step));
        V r1 = S.Load<float, V, Avx2Simd>(from + (Math.Min(row + 1, last) * step));
        V r2 = S.Load<float, V, Avx2Simd>(from + (Math.Min(row + 2, last) * step));
        V r3 = S.Load<float, V, Avx2Simd>(from + (Math.Min(row + 3, last) * step));
        var t0 = Avx.UnpackLow(r0, r1).AsDouble();
        var t1 = Avx.UnpackHigh(r0, r1).AsDouble();
        var t2 = Avx.UnpackLow(r2, r3).AsDouble();
        var t3 = Avx.UnpackHigh(r2, r3).AsDouble();
        u0 = Avx.UnpackLow(t0, t2).AsSingle();
        u1 = Avx.UnpackHigh(t0, t2).AsSingle();
        u2 = Avx.UnpackLow(t1, t3).AsSingle();
        u3 = Avx.UnpackHigh(t1, t3).AsSingle();
    }
}
