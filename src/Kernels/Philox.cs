using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;

namespace MiniCpmNative.Kernels;

/// <summary>
/// Counter-based random numbers, Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
/// 1, 2, 3", 2011), and the dropout masks made of them. A number depends on its place alone, so any
/// device, thread split or recomputation draws the same:
///
///   key     = (seed low, seed high)
///   counter = (element / 8, layer, step low, step high);  the element takes 16 bits of word
///             element % 8 / 2, the low ones where it is even
///   keep    = bits >= round(p * 2^16), kept values are multiplied by 2^16 / (2^16 - that), which
///             keeps their mean, others by 0
///
/// where element = row * DrawnCols + col in the masked matrix, below 2^35. A NaN stays a NaN when
/// dropped, as PyTorch has it. Noise takes a whole word for each element, see
/// <see cref="Uniform"/>.
/// </summary>
public static unsafe class Philox
{
    /// <summary>
    /// Goes up with each change of the masks: checkpoints record it, and a run with dropout does
    /// not go on unnoticed with other masks. 1 drew 32 bits an element.
    /// </summary>
    public const int Version = 2;

    private const uint MultiplierA = 0xD2511F53, MultiplierB = 0xCD9E8D57;
    private const uint WeylA = 0x9E3779B9, WeylB = 0xBB67AE85;
    private const int Rounds = 10, Blocks = 8, Bits16 = 1 << 16, Lines = 128;

    /// <summary>
    /// The four words of one counter; rounds is 10 but for the published vectors of 7.
    /// </summary>
    public static (uint X0, uint X1, uint X2, uint X3) Draw(
        (uint X0, uint X1, uint X2, uint X3) counter, (uint K0, uint K1) key, int rounds = Rounds)
    {
        var (x0, x1, x2, x3) = counter;
        var (k0, k1) = key;
        for (int round = 0; round < rounds; round++)
        {
            ulong a = (ulong)MultiplierA * x0, b = (ulong)MultiplierB * x2;
            (x0, x1, x2, x3) =
                ((uint)(b >> 32) ^ x1 ^ k0, (uint)b, (uint)(a >> 32) ^ x3 ^ k1, (uint)a);
            k0 += WeylA;
            k1 += WeylB;
        }

        return (x0, x1, x2, x3);
    }

    /// <summary>Bits below this are dropped: round(p * 2^16), at most 2^16 - 1.</summary>
    /// <exception cref="ArgumentOutOfRangeException">p is not in [0, 1).</exception>
    public static int Threshold(double p) => p is >= 0 and < 1
        ? (int)Math.Min(Math.Round(p * Bits16), Bits16 - 1)
        : throw new ArgumentOutOfRangeException(nameof(p), p, "dropout must be in [0, 1)");

    /// <summary>What kept values are multiplied by.</summary>
    public static double Scale(double p) => Bits16 / (double)(Bits16 - Threshold(p));

    /// <summary>A matrix's columns as its mask counts them: whole vectors of bits.</summary>
    public static int DrawnCols(int cols) => (int)(((long)cols + Lines - 1) / Lines * Lines);

    /// <summary>Refuses a matrix whose mask has more numbers than there are.</summary>
    public static void MustBeDrawable(long rows, int cols)
    {
        if (rows * DrawnCols(cols) > 1L << 35)
            throw new ShapeException($"dropout over more than 2^35 elements: [{rows}, {cols}]");
    }

    /// <summary>
    /// keep[i] = 1 or 0 for the elements first .. first + count - 1 of a layer's matrix; first is a
    /// multiple of 8, and keep has room for count rounded up to 64.
    /// </summary>
    public static void Mask(
        Randomness random, int layer, int threshold, long first, int count, byte* keep)
    {
        for (int i = 0; i < count; i += 8 * Blocks)
            MaskBlocks(random, (uint)layer, (ushort)threshold, (uint)((first + i) >> 3), keep + i);
    }

    /// <summary>
    /// Noise of a row, uniform in [-size, size): to[i] = ((word >> 8) * 2^-23 - 1) * size, with
    /// word i % 4 of counter (row * (cols rounded up to 32) / 4 + i / 4, 2^32 - 1, step low, step
    /// high); no layer has that number.
    /// </summary>
    public static void Uniform(Randomness random, long row, float size, Span<float> to)
    {
        const float Unit = 1f / (1 << 23);
        Span<float> words = stackalloc float[4 * Blocks];
        uint block = (uint)(row * ((to.Length + words.Length - 1) / words.Length * Blocks));
        for (int i = 0; i < to.Length; i += words.Length, block += Blocks)
        {
            Words(random, uint.MaxValue, block, out var x0, out var x1, out var x2, out var x3);
            for (int lane = 0; lane < Blocks; lane++)
            {
                words[4 * lane] = Number(x0[lane]);
                words[(4 * lane) + 1] = Number(x1[lane]);
                words[(4 * lane) + 2] = Number(x2[lane]);
                words[(4 * lane) + 3] = Number(x3[lane]);
            }

            words[..Math.Min(words.Length, to.Length - i)].CopyTo(to[i..]);
        }

        float Number(uint word) => (((word >> 8) * Unit) - 1) * size;
    }

    // Eight counters side by side. Half h of word j of a block becomes byte 2 j + h of its eight.
    private static void MaskBlocks(
        Randomness random, uint layer, ushort threshold, uint block, byte* keep)
    {
        Words(random, layer, block, out var x0, out var x1, out var x2, out var x3);
        Vector256<ushort> limit = Vector256.Create(threshold);
        Vector256<uint> low = Kept(x0, limit) | (Kept(x1, limit) << 16);
        Vector256<uint> high = Kept(x2, limit) | (Kept(x3, limit) << 16);
        (Vector256.WidenLower(low) | (Vector256.WidenLower(high) << 32)).Store((ulong*)keep);
        (Vector256.WidenUpper(low) | (Vector256.WidenUpper(high) << 32)).Store((ulong*)keep + 4);
    }

    // The words of eight counters in a row.
    private static void Words(Randomness random, uint layer, uint block, out Vector256<uint> x0,
        out Vector256<uint> x1, out Vector256<uint> x2, out Vector256<uint> x3)
    {
        x0 = Vector256.Create(block) + Vector256<uint>.Indices;
        x1 = Vector256.Create(layer);
        x2 = Vector256.Create((uint)random.Step);
        x3 = Vector256.Create((uint)(random.Step >> 32));
        uint k0 = (uint)random.Seed, k1 = (uint)(random.Seed >> 32);
        for (int round = 0; round < Rounds; round++)
        {
            Multiply(x0, MultiplierA, out Vector256<uint> highA, out Vector256<uint> lowA);
            Multiply(x2, MultiplierB, out Vector256<uint> highB, out Vector256<uint> lowB);
            x0 = highB ^ x1 ^ Vector256.Create(k0);
            x2 = highA ^ x3 ^ Vector256.Create(k1);
            (x1, x3) = (lowB, lowA);
            k0 += WeylA;
            k1 += WeylB;
        }
    }

    // 1 or 0 for the low half of a word, in byte 0, and for the high one, in byte 1.
    private static Vector256<uint> Kept(Vector256<uint> words, Vector256<ushort> limit)
    {
        Vector256<uint> kept = Vector256.GreaterThanOrEqual(words.AsUInt16(), limit).AsUInt32();
        return (kept & Vector256.Create(1u)) | ((kept >>> 8) & Vector256.Create(1u << 8));
    }

    // 32 x 32 -> 64 bits in the even lanes, then in the odd ones.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Multiply(
        Vector256<uint> x, uint factor, out Vector256<uint> high, out Vector256<uint> low)
    {
        Vector256<ulong> wide = Vector256.Create((ulong)factor),
            mask = Vector256.Create(0xFFFFFFFFul);
        Vector256<ulong> even = (x.AsUInt64() & mask) * wide, odd = (x.AsUInt64() >>> 32) * wide;
        high = ((even >>> 32) | (odd & ~mask)).AsUInt32();
        low = ((even & mask) | (odd << 32)).AsUInt32();
    }
}
