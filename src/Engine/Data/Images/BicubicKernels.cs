using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// Weighted sums of pixels, out = clip((half + sum k * pixel) >> precision, 0, 255) per byte: exact
/// integers, so that the AVX2 and the plain forms agree bit for bit. Across: four rows at a time
/// share an output's taps. Down: 32 bytes of a row at a time, whatever their channel.
/// </summary>
internal static unsafe class BicubicKernels
{
    /// <summary>
    /// Four rows: to[r][3x + c] from the taps of output x. The rows have 16 readable bytes behind
    /// the last tap and one writable byte behind the last pixel.
    /// </summary>
    public static void Across(BicubicWeights weights, byte** from, byte** to, int outputs,
        bool plain)
    {
        fixed (int* first = weights.First, packed = weights.Packed)
        {
            if (Avx2.IsSupported && !plain)
            {
                AcrossAvx2(
                    first, packed, weights.Groups, weights.Precision, from, to, outputs);
                return;
            }
        }

        int precision = weights.Precision, half = 1 << (precision - 1);
        for (int r = 0; r < 4; r++)
        {
            for (int x = 0; x < outputs; x++)
            {
                byte* pixel = from[r] + (weights.First[x] * 3);
                int red = half, green = half, blue = half;
                for (int t = 0; t < weights.MaxTaps; t++, pixel += 3)
                {
                    int k = weights.Tap(x, t);
                    red += k * pixel[0];
                    green += k * pixel[1];
                    blue += k * pixel[2];
                }

                byte* into = to[r] + (x * 3);
                (into[0], into[1], into[2]) =
                    (Clip(red, precision), Clip(green, precision), Clip(blue, precision));
            }
        }
    }

    /// <summary>
    /// One row of bytes from the rows of output y's taps (a multiple of 4 pointers, those beyond
    /// the own taps to any row). Rows and target have room up to the next multiple of 32 bytes.
    /// </summary>
    public static void Down(BicubicWeights weights, int y, byte** rows, byte* to, int bytes,
        bool plain)
    {
        if (Avx2.IsSupported && !plain)
        {
            fixed (int* packed = &weights.Packed[y * weights.Groups * 4])
                DownAvx2(packed, weights.Groups, weights.Precision, rows, to, bytes);
            return;
        }

        for (int i = 0; i < bytes; i++)
        {
            int sum = 1 << (weights.Precision - 1);
            for (int t = 0; t < weights.MaxTaps; t++) sum += weights.Tap(y, t) * rows[t][i];
            to[i] = Clip(sum, weights.Precision);
        }
    }

    private static byte Clip(int sum, int precision) =>
        (byte)Math.Clamp(sum >> precision, 0, 255);

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void AcrossAvx2(
        int* first, int* packed, int groups, int precision, byte** from, byte** to, int outputs)
    {
        // 16 bytes hold four pixels: taps 0 and 1 as pairs (r, r) (g, g) (b, b) in the lower half,
        // 2 and 3 in the upper one; 128 gives zero.
        const byte No = 128;
        var pairs = Vector256.Create(
            0, No, 3, No, 1, No, 4, No, 2, No, 5, No, No, No, No, No,
            6, No, 9, No, 7, No, 10, No, 8, No, 11, No, No, No, No, No);
        var highs = Vector256.Create(0, 0, 0, 0, 1, 1, 1, 1);
        var lows = Vector256.Create(2, 2, 2, 2, 3, 3, 3, 3);
        var half = Vector128.Create(1 << (precision - 1));
        byte* s0 = from[0], s1 = from[1], s2 = from[2], s3 = from[3];
        byte* t0 = to[0], t1 = to[1], t2 = to[2], t3 = to[3];
        for (int x = 0; x < outputs; x++)
        {
            Vector256<int> h0 = default, h1 = default, h2 = default, h3 = default;
            Vector256<int> l0 = default, l1 = default, l2 = default, l3 = default;
            nint at = first[x] * 3;
            for (int g = 0; g < groups; g++, at += 12, packed += 4)
            {
                var taps = Avx2.BroadcastVector128ToVector256(packed);
                var high = Avx2.PermuteVar8x32(taps, highs).AsInt16();
                var low = Avx2.PermuteVar8x32(taps, lows).AsInt16();
                Add(s0 + at, pairs, high, low, ref h0, ref l0);
                Add(s1 + at, pairs, high, low, ref h1, ref l1);
                Add(s2 + at, pairs, high, low, ref h2, ref l2);
                Add(s3 + at, pairs, high, low, ref h3, ref l3);
            }

            var pixels = Sse2.PackUnsignedSaturate(
                Sse2.PackSignedSaturate(
                    Join(h0, l0, half, precision), Join(h1, l1, half, precision)),
                Sse2.PackSignedSaturate(
                    Join(h2, l2, half, precision), Join(h3, l3, half, precision))).AsInt32();
            *(int*)t0 = pixels.ToScalar();
            *(int*)t1 = pixels.GetElement(1);
            *(int*)t2 = pixels.GetElement(2);
            *(int*)t3 = pixels.GetElement(3);
            t0 += 3;
            t1 += 3;
            t2 += 3;
            t3 += 3;
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Add(
        byte* pixels, Vector256<byte> pairs, Vector256<short> high, Vector256<short> low,
        ref Vector256<int> h, ref Vector256<int> l)
    {
        var two = Avx2.Shuffle(Avx2.BroadcastVector128ToVector256(pixels), pairs).AsInt16();
        h += Avx2.MultiplyAddAdjacent(two, high);
        l += Avx2.MultiplyAddAdjacent(two, low);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector128<int> Join(
        Vector256<int> high, Vector256<int> low, Vector128<int> half, int precision)
    {
        var sum = (high << BicubicWeights.LowBits) + low;
        return (sum.GetLower() + sum.GetUpper() + half) >> precision;
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void DownAvx2(
        int* packed, int groups, int precision, byte** rows, byte* to, int bytes)
    {
        var half = Vector256.Create(1 << (precision - 1));
        for (nint i = 0; i < bytes; i += 32)
        {
            Vector256<int> h0 = default, h1 = default, h2 = default, h3 = default;
            Vector256<int> l0 = default, l1 = default, l2 = default, l3 = default;
            for (int pair = 0; pair < groups * 2; pair++)
            {
                int* taps = packed + ((pair >> 1) * 4) + (pair & 1);
                var high = Vector256.Create(taps[0]).AsInt16();
                var low = Vector256.Create(taps[2]).AsInt16();
                var a = Vector256.Load(rows[2 * pair] + i);
                var b = Vector256.Load(rows[(2 * pair) + 1] + i);
                var (x, y) = (Avx2.UnpackLow(a, b), Avx2.UnpackHigh(a, b));
                var two = Avx2.UnpackLow(x, default).AsInt16();
                h0 += Avx2.MultiplyAddAdjacent(two, high);
                l0 += Avx2.MultiplyAddAdjacent(two, low);
                two = Avx2.UnpackHigh(x, default).AsInt16();
                h1 += Avx2.MultiplyAddAdjacent(two, high);
                l1 += Avx2.MultiplyAddAdjacent(two, low);
                two = Avx2.UnpackLow(y, default).AsInt16();
                h2 += Avx2.MultiplyAddAdjacent(two, high);
                l2 += Avx2.MultiplyAddAdjacent(two, low);
                two = Avx2.UnpackHigh(y, default).AsInt16();
                h3 += Avx2.MultiplyAddAdjacent(two, high);
                l3 += Avx2.MultiplyAddAdjacent(two, low);
            }

            var lower = Avx2.PackSignedSaturate(
                Join(h0, l0, half, precision), Join(h1, l1, half, precision));
            var upper = Avx2.PackSignedSaturate(
                Join(h2, l2, half, precision), Join(h3, l3, half, precision));
            Avx2.PackUnsignedSaturate(lower, upper).Store(to + i);
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector256<int> Join(
        Vector256<int> high, Vector256<int> low, Vector256<int> half, int precision) =>
        ((high << BicubicWeights.LowBits) + low + half) >> precision;
}
