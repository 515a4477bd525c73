using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;

namespace MiniCpmNative.Kernels;

/// <summary>
/// Counter-based random numbers, Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
/// 1, 2, 3", 2011), and the dropout masks made of them. A number depends on its place alone, so any
/// device, thread split or recomputation draws the same:
///
///   key     = (seed low, seed high)
///   counter = (element / 4, layer, step low, step high);  the element takes word element % 4
///   keep    = word >= floor(p * 2^32), kept values are multiplied by 1 / (1 - p), others by 0
///
/// where element = row * cols + col in the masked matrix, below 2^34. A NaN stays a NaN when
/// dropped, as PyTorch has it.
/// </summary>
public static unsafe class Philox
{
    private const uint MultiplierA = 0xD2511F53, MultiplierB = 0xCD9E8D57;
    private const uint WeylA = 0x9E3779B9, WeylB = 0xBB67AE85;
    private const int Rounds = 10, Blocks = 8;

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

    /// <summary>Words below this are dropped: floor(p * 2^32).</summary>
    /// <exception cref="ArgumentOutOfRangeException">p is not in [0, 1).</exception>
    public static uint Threshold(double p) => p is >= 0 and < 1
        ? (uint)(p * 4294967296.0)
        : throw new ArgumentOutOfRangeException(nameof(p), p, "dropout must be in [0, 1)");

    /// <summary>
    /// keep[i] = 1 or 0 for the elements first .. first + count - 1 of a layer's matrix; first is a
    /// multiple of 32, and keep has room for count rounded up to 32.
    /// </summary>
    public static void Mask(
        Randomness random, int layer, uint threshold, long first, int count, byte* keep)
    {
        for (int i = 0; i < count; i += 4 * Blocks)
        {
            uint block = (uint)((first + i) >> 2);
            MaskBlocks(random, (uint)layer, threshold, block).Store((uint*)(keep + i));
        }
    }

    // Eight counters side by side. Word j of a block becomes byte j of its lane, so that the stored
    // lanes are the mask in element order.
    private static Vector256<uint> MaskBlocks(Randomness random, uint layer, uint threshold,
        uint block)
    {
        Vector256<uint> x0 = Vector256.Create(block) + Vector256<uint>.Indices;
        Vector256<uint> x1 = Vector256.Create(layer);
        Vector256<uint> x2 = Vector256.Create((uint)random.Step);
        Vector256<uint> x3 = Vector256.Create((uint)(random.Step >> 32));
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

        Vector256<uint> limit = Vector256.Create(threshold);
        return (Vector256.GreaterThanOrEqual(x0, limit) & Vector256.Create(1u))
            | (Vector256.GreaterThanOrEqual(x1, limit) & Vector256.Create(1u << 8))
            | (Vector256.GreaterThanOrEqual(x2, limit) & Vector256.Create(1u << 16))
            | (Vector256.GreaterThanOrEqual(x3, limit) & Vector256.Create(1u << 24));
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
