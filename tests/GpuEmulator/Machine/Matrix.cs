using System.Numerics;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;
using MiniCpmNative.GpuEmulator.Alu;
using MiniCpmNative.GpuEmulator.Memory;

namespace MiniCpmNative.GpuEmulator.Machine;

/// <summary>
/// mma.sync, ldmatrix and stmatrix. With g = lane / 4 and t = lane % 4 a 16-bit fragment register
/// holds elements (g, 2t) and (g, 2t + 1) of an 8 x 8 piece: its row of 32 lanes is that piece,
/// row-major. For m16n8k16, A is the pieces (rows 0-7, k 0-7), (8-15, 0-7), (0-7, 8-15), (8-15,
/// 8-15); B is stored transposed, (n, k) pieces k 0-7 and k 8-15; C and D hold (g, 2t), (g, 2t+1),
/// (g+8, 2t), (g+8, 2t+1). Products of two bf16 or f16 are exact in float and sums are rounded to
/// float; the hardware's narrower alignment of addends is not modelled.
/// </summary>
internal static unsafe class Matrix
{
    /// <summary>m16n8k16 (Mode 2) or k8 (Mode 1). Rows: D 0-3, then A (2 * Mode), B (Mode), C
    /// 4.</summary>
    public static void Multiply<TWiden>(Warp w, Instruction i) where TWiden : IWiden
    {
        int depth = i.Mode * 8, pieces = i.Mode;
        float* a = stackalloc float[16 * 16];
        float* b = stackalloc float[16 * 8];
        for (int p = 0; p < pieces * 2; p++)
            WidenA<TWiden>((uint*)(w.R + i.Rows[4 + p]), a + (p & 1) * 8 * depth + (p >> 1) * 8,
                depth);
        for (int p = 0; p < pieces; p++)
            WidenB<TWiden>((uint*)(w.R + i.Rows[4 + pieces * 2 + p]), b + p * 64);
        int c = 4 + pieces * 3;
        for (int half = 0; half < 2; half++)
        {
            float* even = (float*)(w.R + i.Rows[c + half * 2]),
                odd = (float*)(w.R + i.Rows[c + half * 2 + 1]);
            float* toEven = (float*)(w.R + i.Rows[half * 2]),
                toOdd = (float*)(w.R + i.Rows[half * 2 + 1]);
            for (int g = 0; g < 8; g += 4)
                FourRows(a + (half * 8 + g) * depth, depth, b, even + g * 4, odd + g * 4, toEven
                    + g * 4,
                    toOdd + g * 4, w.Block.Options.ReverseMma);
        }
    }

    // Four rows of eight results; C's even and odd columns are interleaved while they are summed.
    private static void FourRows(
        float* a, int depth, float* b, float* even, float* odd, float* toEven, float* toOdd,
            bool reverse)
    {
        Vector256<float> s0 = Interleave(even, odd), s1 = Interleave(even + 4, odd + 4),
            s2 = Interleave(even + 8, odd + 8), s3 = Interleave(even + 12, odd + 12);
        for (int n = 0; n < depth; n++)
        {
            int k = reverse ? depth - 1 - n : n;
            var bk = Vector256.Load(b + k * 8);
            s0 = Vector256.FusedMultiplyAdd(Vector256.Create(a[k]), bk, s0);
            s1 = Vector256.FusedMultiplyAdd(Vector256.Create(a[k + depth]), bk, s1);
            s2 = Vector256.FusedMultiplyAdd(Vector256.Create(a[k + depth * 2]), bk, s2);
            s3 = Vector256.FusedMultiplyAdd(Vector256.Create(a[k + depth * 3]), bk, s3);
        }
        Part(s0, toEven, toOdd);
        Part(s1, toEven + 4, toOdd + 4);
        Part(s2, toEven + 8, toOdd + 8);
        Part(s3, toEven + 12, toOdd + 12);
    }

    internal static Vector256<float> Interleave(float* even, float* odd)
    {
        Vector128<float> e = Vector128.Load(even), o = Vector128.Load(odd);
        return Sse.IsSupported
            ? Vector256.Create(Sse.UnpackLow(e, o), Sse.UnpackHigh(e, o))
            : Vector256.Create(e[0], o[0], e[1], o[1], e[2], o[2], e[3], o[3]);
    }

    internal static void Part(Vector256<float> sum, float* even, float* odd)
    {
        var lanes = Vector256.Shuffle(sum, Vector256.Create(0, 2, 4, 6, 1, 3, 5, 7));
        lanes.GetLower().Store(even);
        lanes.GetUpper().Store(odd);
    }

    internal static void WidenA<TWiden>(uint* piece, float* to, int stride) where TWiden : IWiden
    {
        for (int g = 0; g < 8; g++)
            TWiden.Row((ushort*)(piece + g * 4)).Store(to + g * stride);
    }

    // B's piece holds (n, k); the product wants rows of n for each k. A word is the pair k = 2t, 2t
    // + 1 of one n: with the words of equal t side by side, both are a shift or a mask away.
    private static void WidenB<TWiden>(uint* piece, float* to) where TWiden : IWiden
    {
        if (typeof(TWiden) == typeof(Brain) && Avx2.IsSupported)
        {
            Vector256<uint> n01 = Vector256.Load(piece), n23 = Vector256.Load(piece + 8),
                n45 = Vector256.Load(piece + 16), n67 = Vector256.Load(piece + 24);
            Quarter(Avx2.UnpackLow(n01, n23), Avx2.UnpackLow(n45, n67), to);
            Quarter(Avx2.UnpackHigh(n01, n23), Avx2.UnpackHigh(n45, n67), to + 32);
            return;
        }
        float* rows = stackalloc float[64];
        for (int n = 0; n < 8; n++) TWiden.Row((ushort*)(piece + n * 4)).Store(rows + n * 8);
        for (int k = 0; k < 8; k++)
            for (int n = 0; n < 8; n++) to[k * 8 + n] = rows[n * 8 + k];
    }

    private static void Quarter(Vector256<uint> lower, Vector256<uint> upper, float* to)
    {
        Pair(Avx2.UnpackLow(lower.AsUInt64(), upper.AsUInt64()).AsUInt32(), to);
        Pair(Avx2.UnpackHigh(lower.AsUInt64(), upper.AsUInt64()).AsUInt32(), to + 16);
    }

    // The words of n 0, 2, 4, 6, 1, 3, 5, 7.
    private static void Pair(Vector256<uint> words, float* to)
    {
        words = Avx2.PermuteVar8x32(words, Vector256.Create(0u, 4, 1, 5, 2, 6, 3, 7));
        (words << 16).AsSingle().Store(to);
        (words & Vector256.Create(0xffff0000u)).AsSingle().Store(to + 8);
    }

    /// <summary>ldmatrix .x1/.x2/.x4 (Count), Mode 1 transposed: lanes 8m to 8m+7 give matrix m's
    /// rows.</summary>
    public static void Load(Warp w, Instruction i)
    {
        Address.Fill(w, i.A, i.AddressIs64, i.Offset);
        var shared = w.Block.Shared;
        w.Counters.SharedRequests++;
        for (int m = 0; m < i.Count; m++)
        {
            uint* row = (uint*)(w.R + i.Rows[m]);
            uint banks = 0;
            for (int n = 0; n < 8; n++)
            {
                int lane = m * 8 + n;
                ulong address = Address.ToShared(w.Addresses[lane]);
                byte* from = shared.Resolve(w, address, 16, lane);
                shared.ReadMatrixRow(w, from, lane);
                uint bank = 1u << (int)(address >> 4 & 7);
                if ((banks & bank) != 0) w.Counters.MatrixLoadConflicts++;
                banks |= bank;
                Vector128.Load((uint*)from).Store((uint*)(w.Staging + n * 16));
            }
            ushort* piece = (ushort*)w.Staging;
            if (i.Mode == 0) new ReadOnlySpan<uint>(piece, 32).CopyTo(new Span<uint>(row, 32));
            else Transpose(piece, (ushort*)row);
        }
    }

    /// <summary>stmatrix .x1/.x2/.x4 (Count), Mode 1 transposed: the reverse of Load.</summary>
    public static void Store(Warp w, Instruction i)
    {
        Address.Fill(w, i.A, i.AddressIs64, i.Offset);
        var shared = w.Block.Shared;
        w.Counters.SharedRequests++;
        for (int m = 0; m < i.Count; m++)
        {
            byte* piece = w.R + i.Rows[m];
            if (i.Mode != 0)
            {
                Transpose((ushort*)piece, (ushort*)w.Staging);
                piece = w.Staging;
            }
            uint banks = 0;
            for (int n = 0; n < 8; n++)
            {
                int lane = m * 8 + n;
                ulong address = Address.ToShared(w.Addresses[lane]);
                byte* to = shared.Resolve(w, address, 16, lane);
                uint bank = 1u << (int)(address >> 4 & 7);
                if ((banks & bank) != 0) w.Counters.BankConflicts++;
                banks |= bank;
                shared.Write(w, to, piece + n * 16, 16, lane);
                Vector128.Load(piece + n * 16).Store(to);
            }
        }
    }

    internal static void Transpose(ushort* from, ushort* to)
    {
        if (!Sse2.IsSupported)
        {
            for (int r = 0; r < 8; r++)
                for (int c = 0; c < 8; c++) to[r * 8 + c] = from[c * 8 + r];
            return;
        }
        Vector128<ushort> r0 = Vector128.Load(from), r1 = Vector128.Load(from + 8),
            r2 = Vector128.Load(from + 16), r3 = Vector128.Load(from + 24),
                r4 = Vector128.Load(from + 32),
            r5 = Vector128.Load(from + 40), r6 = Vector128.Load(from + 48),
                r7 = Vector128.Load(from + 56);
        Vector128<uint> a0 = Sse2.UnpackLow(r0, r1).AsUInt32(),
            a1 = Sse2.UnpackLow(r2, r3).AsUInt32(),
            a2 = Sse2.UnpackLow(r4, r5).AsUInt32(), a3 = Sse2.UnpackLow(r6, r7).AsUInt32(),
            b0 = Sse2.UnpackHigh(r0, r1).AsUInt32(), b1 = Sse2.UnpackHigh(r2, r3).AsUInt32(),
            b2 = Sse2.UnpackHigh(r4, r5).AsUInt32(), b3 = Sse2.UnpackHigh(r6, r7).AsUInt32();
        Pairs(a0, a1, a2, a3, to);
        Pairs(b0, b1, b2, b3, to + 32);
    }

    private static void Pairs(
        Vector128<uint> p0, Vector128<uint> p1, Vector128<uint> p2, Vector128<uint> p3, ushort* to)
    {
        Vector128<ulong> l0 = Sse2.UnpackLow(p0, p1).AsUInt64(),
            l1 = Sse2.UnpackLow(p2, p3).AsUInt64(),
            h0 = Sse2.UnpackHigh(p0, p1).AsUInt64(), h1 = Sse2.UnpackHigh(p2, p3).AsUInt64();
        Sse2.UnpackLow(l0, l1).AsUInt16().Store(to);
        Sse2.UnpackHigh(l0, l1).AsUInt16().Store(to + 8);
        Sse2.UnpackLow(h0, h1).AsUInt16().Store(to + 16);
        Sse2.UnpackHigh(h0, h1).AsUInt16().Store(to + 24);
    }
}

/// <summary>Eight two-byte floats as floats.</summary>
internal unsafe interface IWiden
{
    static abstract Vector256<float> Row(ushort* at);
}

internal readonly unsafe struct Brain : IWiden
{
    public static Vector256<float> Row(ushort* at)
    {
        var (low, high) = Vector128.Widen(Vector128.Load(at));
        return Vector256.Create(low << 16, high << 16).AsSingle();
    }
}

internal readonly unsafe struct HalfRow : IWiden
{
    public static Vector256<float> Row(ushort* at)
    {
        var result = Vector256<float>.Zero;
        for (int n = 0; n < 8; n++) result = result.WithElement(n, HalfToFloat.Run(at[n]));
        return result;
    }
}
