using System.Runtime.Intrinsics;
using MiniCpmNative.GpuEmulator.Memory;

namespace MiniCpmNative.GpuEmulator.Machine;

/// <summary>
/// wgmma.mma_async m64nNk16, executed once for the four warps of a warpgroup when the last of them
/// comes. Warp w of the group holds rows 16w to 16w + 15 of D and A; with g = lane / 4 and
/// t = lane % 4 its register 4j + 2h + b is D's row g + 8h, column 8j + 2t + b, and A's registers
/// are those of mma.m16n8k16. B is read once, widened to panels of 16 by 8.
/// </summary>
internal static unsafe class Warpgroup
{
    private const int Depth = 16;

    /// <summary>Rows: D (N / 2), then A's 4 where A (-1) is no descriptor; B: descriptor; C:
    /// scale-d. Mode: bit 0 A is M-major, bit 1 B is N-major, bit 2 negates the product.</summary>
    public static void Multiply(Warp w, Instruction i)
    {
        int columns = i.Count, first = w.Index & ~3;
        var block = w.Block;
        int open = w.Fragments!.Open;
        for (int v = first; v < first + 4; v++)
        {
            var warp = block.Warps[v];
            if (warp.Fragments!.Open != open)
                throw warp.Fault(Check.WarpgroupOrder, 0,
                    $"warp {w.Index} has committed {open - 1} groups, this one " +
                    $"{warp.Fragments.Open - 1}");
            warp.Fragments.Issue(warp, i.Use!);
        }
        block.Shared.BeginGroupReads(w, open);
        float* a = stackalloc float[64 * Depth];
        float* b = stackalloc float[Depth * 256];
        if (i.A < 0)
            for (int v = 0; v < 4; v++) TakeRegisters(block.Warps[first + v], i, a + v * 256);
        else TakeA(w, MatrixDescriptor.Read(w, Same(w, i.A), 'A'), (i.Mode & 1) != 0, a);
        TakeB(w, MatrixDescriptor.Read(w, Same(w, i.B), 'B'), (i.Mode & 2) != 0, columns, b);
        if ((i.Mode & 4) != 0)
            for (int n = 0; n < 64 * Depth; n++) a[n] = -a[n];
        bool reverse = block.Options.ReverseMma;
        for (int v = 0; v < 4; v++)
        {
            var warp = block.Warps[first + v];
            uint scale = *(uint*)(warp.R + i.C) ^ i.FlipC;
            if (scale is not (0 or ~0u))
                throw warp.Fault(Check.Descriptor, 0, "scale-d differs among the lanes");
            for (int j = 0; j < columns / 8; j++)
                for (int half = 0; half < 2; half++)
                    Eight(a + (v * 2 + half) * 8 * Depth, b + j * Depth * 8,
                        (float*)(warp.R + i.Rows[j * 4 + half * 2]),
                        (float*)(warp.R + i.Rows[j * 4 + half * 2 + 1]), scale != 0, reverse);
        }
    }

    public static void Fence(Warp w, Instruction i) => w.Fragments?.Fence();

    public static void Commit(Warp w, Instruction i) => w.Fragments?.Commit();

    /// <summary>wait_group Mode.</summary>
    public static void WaitFor(Warp w, Instruction i)
    {
        if (w.Fragments is { } fragments)
            w.Block.Shared.EndGroupReads(w, fragments.Complete(i.Mode));
    }

    /// <summary>setmaxnreg: Mode registers a thread, fewer (Mode2 -1) or more (1), for which it
    /// waits until others have given theirs back.</summary>
    public static void SetRegisters(Warp w, Instruction i)
    {
        if (w.Exec != uint.MaxValue)
            throw w.Fault(Check.BarrierDivergence, 0, "setmaxnreg is for the whole warp");
        int now = w.Registers;
        if (i.Mode2 < 0 ? i.Mode > now : i.Mode < now)
            throw w.Fault(Check.RegisterCount, 0,
                $"{i.Mode} registers are {(i.Mode2 < 0 ? "more" : "fewer")} than the {now} it has");
        w.Polled = !w.Block.TryTakeRegisters(i.Mode - now);
        if (!w.Polled) w.Registers = i.Mode;
    }

    public static void ProxyFence(Warp w, Instruction i) => w.Block.Shared.FenceProxies(w.Index);

    private static ulong Same(Warp w, int row)
    {
        ulong first = *(ulong*)(w.R + row);
        for (int v = w.Index & ~3; v <= (w.Index | 3); v++)
            if (new ReadOnlySpan<ulong>(w.Block.Warps[v].R + row, 32).ContainsAnyExcept(first))
                throw w.Fault(Check.Descriptor, 0, "a descriptor differs among the threads");
        return first;
    }

    private static void TakeRegisters(Warp w, Instruction i, float* to)
    {
        int at = i.Count / 2;
        for (int p = 0; p < 4; p++)
            Matrix.WidenA<Brain>((uint*)(w.R + i.Rows[at + p]), to + (p & 1) * 8 * Depth
                + (p >> 1) * 8, Depth);
    }

    // a[row][k].
    private static void TakeA(Warp w, in MatrixDescriptor d, bool major, float* a)
    {
        if (!major)
        {
            for (int r = 0; r < 64; r++)
                for (int c = 0; c < 2; c++)
                    Brain.Row(Piece(w, d.OfRow(r, c))).Store(a + r * Depth + c * 8);
            return;
        }
        ushort* rows = stackalloc ushort[64], columns = stackalloc ushort[64];
        for (int c = 0; c < 8; c++)
            for (int k = 0; k < Depth; k += 8)
            {
                for (int n = 0; n < 8; n++)
                    Vector128.Load(Piece(w, d.OfDepth(k + n, c))).Store(rows + n * 8);
                Matrix.Transpose(rows, columns);
                for (int n = 0; n < 8; n++)
                    Brain.Row(columns + n * 8).Store(a + (c * 8 + n) * Depth + k);
            }
    }

    // b[column / 8][k][column % 8].
    private static void TakeB(Warp w, in MatrixDescriptor d, bool major, int columns, float* b)
    {
        if (major)
        {
            for (int k = 0; k < Depth; k++)
                for (int c = 0; c < columns / 8; c++)
                    Brain.Row(Piece(w, d.OfDepth(k, c))).Store(b + (c * Depth + k) * 8);
            return;
        }
        ushort* rows = stackalloc ushort[64], depths = stackalloc ushort[64];
        for (int r = 0; r < columns; r += 8)
            for (int c = 0; c < 2; c++)
            {
                for (int n = 0; n < 8; n++)
                    Vector128.Load(Piece(w, d.OfRow(r + n, c))).Store(rows + n * 8);
                Matrix.Transpose(rows, depths);
                for (int n = 0; n < 8; n++)
                    Brain.Row(depths + n * 8).Store(b + (r * 2 + c * 8 + n) * 8);
            }
    }

    private static ushort* Piece(Warp w, int address)
    {
        var shared = w.Block.Shared;
        byte* at = shared.Resolve(w, (ulong)address, 16, 0);
        shared.ReadByGroup(w, at);
        return (ushort*)at;
    }

    // Eight rows of a, eight columns: one register pair of a warp.
    private static void Eight(float* a, float* b, float* even, float* odd, bool add, bool reverse)
    {
        Vector256<float> s0 = default, s1 = default, s2 = default, s3 = default, s4 = default,
            s5 = default, s6 = default, s7 = default;
        if (add)
        {
            s0 = Matrix.Interleave(even, odd);
            s1 = Matrix.Interleave(even + 4, odd + 4);
            s2 = Matrix.Interleave(even + 8, odd + 8);
            s3 = Matrix.Interleave(even + 12, odd + 12);
            s4 = Matrix.Interleave(even + 16, odd + 16);
            s5 = Matrix.Interleave(even + 20, odd + 20);
            s6 = Matrix.Interleave(even + 24, odd + 24);
            s7 = Matrix.Interleave(even + 28, odd + 28);
        }
        int k = reverse ? Depth - 1 : 0, step = reverse ? -1 : 1;
        for (int n = 0; n < Depth; n++, k += step)
        {
            var bk = Vector256.Load(b + k * 8);
            float* ak = a + k;
            s0 = Vector256.FusedMultiplyAdd(Vector256.Create(ak[0]), bk, s0);
            s1 = Vector256.FusedMultiplyAdd(Vector256.Create(ak[Depth]), bk, s1);
            s2 = Vector256.FusedMultiplyAdd(Vector256.Create(ak[Depth * 2]), bk, s2);
            s3 = Vector256.FusedMultiplyAdd(Vector256.Create(ak[Depth * 3]), bk, s3);
            s4 = Vector256.FusedMultiplyAdd(Vector256.Create(ak[Depth * 4]), bk, s4);
            s5 = Vector256.FusedMultiplyAdd(Vector256.Create(ak[Depth * 5]), bk, s5);
            s6 = Vector256.FusedMultiplyAdd(Vector256.Create(ak[Depth * 6]), bk, s6);
            s7 = Vector256.FusedMultiplyAdd(Vector256.Create(ak[Depth * 7]), bk, s7);
        }
        Matrix.Part(s0, even, odd);
        Matrix.Part(s1, even + 4, odd + 4);
        Matrix.Part(s2, even + 8, odd + 8);
        Matrix.Part(s3, even + 12, odd + 12);
        Matrix.Part(s4, even + 16, odd + 16);
        Matrix.Part(s5, even + 20, odd + 20);
        Matrix.Part(s6, even + 24, odd + 24);
        Matrix.Part(s7, even + 28, odd + 28);
    }
}
