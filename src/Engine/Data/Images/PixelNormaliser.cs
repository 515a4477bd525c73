using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// Bytes to normalised floats, ((byte / 255) - mean) / std with a float rounding after each step,
/// cut into patches. A table of the 256 results per channel defines it. The vector form multiplies
/// by reciprocals and corrects the quotients with fused multiply-adds; it is taken only when it
/// gives the table's bits for all 256 bytes of every channel.
/// </summary>
internal sealed unsafe class PixelNormaliser
{
    private const int VectorPatch = 14;

    private readonly float[] _table = new float[3 * 256];
    private readonly float[] _mean, _std, _inverse = new float[3];
    private readonly int _patch;

    public PixelNormaliser(ReadOnlySpan<float> mean, ReadOnlySpan<float> std, int patch)
    {
        if (mean.Length != 3 || std.Length != 3)
            throw new ArgumentException(
                $"mean has {mean.Length} and std {std.Length} values, expected 3");
        (_mean, _std, _patch) = (mean.ToArray(), std.ToArray(), patch);
        for (int c = 0; c < 3; c++)
        {
            _inverse[c] = 1 / std[c];
            for (int i = 0; i < 256; i++)
            {
                float unit = i / 255f;
                float centred = unit - mean[c];
                _table[(c * 256) + i] = centred / std[c];
            }
        }

        Vectorised = patch == VectorPatch && Fma.IsSupported && Avx2.IsSupported && SameBits();
    }

    /// <summary>The vector form is in use.</summary>
    public bool Vectorised { get; init; }

    /// <summary>
    /// One row of pixels (a multiple of the patch long, with 16 readable bytes behind it) into the
    /// rows of its patches: into[p * 3 * patch^2 + c * patch^2 + x].
    /// </summary>
    public void Write(ReadOnlySpan<byte> row, Span<float> into)
    {
        int patches = row.Length / (3 * _patch), area = _patch * _patch;
        if (into.Length < (((patches * 3) - 1) * area) + _patch)
            throw new ArgumentException("too short for the row's patches", nameof(into));
        fixed (byte* pixels = row)
        fixed (float* target = into)
        {
            if (Vectorised)
            {
                WriteVector(pixels, target, patches);
                return;
            }

            byte* pixel = pixels;
            for (int p = 0; p < patches; p++)
            {
                float* to = target + ((long)p * 3 * area);
                for (int x = 0; x < _patch; x++, pixel += 3)
                {
                    to[x] = _table[pixel[0]];
                    to[area + x] = _table[256 + pixel[1]];
                    to[(2 * area) + x] = _table[512 + pixel[2]];
                }
            }
        }
    }

    // 42 bytes of a patch's row are taken apart into 14 of each channel. Eight of them are one
    // vector of floats; the second vector begins at the sixth, so that no store leaves the row.
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private void WriteVector(byte* pixels, float* target, int patches)
    {
        const int Area = VectorPatch * VectorPatch;
        for (int c = 0; c < 3; c++)
        {
            var (s0, s1, s2) = (Channel(c), Channel(c - 16), Channel(c - 32));
            var mean = Vector256.Create(_mean[c]);
            var std = Vector256.Create(_std[c]);
            var inverse = Vector256.Create(_inverse[c]);
            byte* from = pixels;
            float* to = target + (c * Area);
            for (int p = 0; p < patches; p++, from += 3 * VectorPatch, to += 3 * Area)
            {
                var bytes = Ssse3.Shuffle(Vector128.Load(from), s0)
                    | Ssse3.Shuffle(Vector128.Load(from + 16), s1)
                    | Ssse3.Shuffle(Vector128.Load(from + 32), s2);
                Normalise(Avx2.ConvertToVector256Int32(bytes), mean, std, inverse).Store(to);
                var rest = Sse2.ShiftRightLogical128BitLane(bytes, VectorPatch - 8);
                Normalise(Avx2.ConvertToVector256Int32(rest), mean, std, inverse)
                    .Store(to + VectorPatch - 8);
            }
        }
    }

    // Bytes offset, offset + 3, ... of a load, each to its place; what is not in the load gives
    // zero.
    private static Vector128<byte> Channel(int offset)
    {
        Span<byte> places = stackalloc byte[16];
        for (int x = 0; x < 16; x++)
        {
            int at = (x * 3) + offset;
            places[x] = x < VectorPatch && at is >= 0 and < 16 ? (byte)at : (byte)128;
        }

        return Vector128.Create<byte>(places);
    }

    private static Vector256<float> Normalise(
        Vector256<int> bytes, Vector256<float> mean, Vector256<float> std, Vector256<float> inverse)
    {
        var whole = Vector256.Create(255f);
        var x = Vector256.ConvertToSingle(bytes);
        var centred = Divide(x, whole, Vector256.Create(1 / 255f)) - mean;
        return Divide(centred, std, inverse);
    }

    // Quotient estimate and one correction step: q + (a - q * b) / b.
    private static Vector256<float> Divide(Vector256<float> a, Vector256<float> b,
        Vector256<float> inverse)
    {
        var q = a * inverse;
        return Fma.MultiplyAdd(Fma.MultiplyAddNegated(q, b, a), inverse, q);
    }

    private bool SameBits()
    {
        Span<float> eight = stackalloc float[8];
        for (int i = 0; i < 3 * 256; i += 8)
        {
            int c = i / 256;
            Normalise(
                Vector256.CreateSequence(i & 255, 1), Vector256.Create(_mean[c]),
                Vector256.Create(_std[c]), Vector256.Create(_inverse[c])).CopyTo(eight);
            if (!MemoryMarshal.AsBytes(eight)
                .SequenceEqual(MemoryMarshal.AsBytes(_table.AsSpan(i, 8))))
                return false;
        }

        return true;
    }
}
