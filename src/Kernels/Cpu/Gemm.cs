using System.Numerics;
using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// Matrix products on all cores: C = alpha * A B + beta * C + bias.
///
/// The scheme is Goto's (Anatomy of high-performance matrix multiplication, 2008), for some 500 k
/// at a time: of A in panels of TileRows rows and B in panels of two vectors, one panel lies in the
/// first-level cache while those of the other operand pass by from the second. With a large B the
/// threads divide its columns: A is packed once per call, on all cores, and every item of work
/// packs its part of B (widening 16-bit weights). With a small B they divide the rows: every item
/// packs its own rows of A, which then never leave its core, and nobody waits for the others in
/// between. Operands that gain nothing from packing are read where they lie: packed F32 weights,
/// activations against a narrow B (LoRA), weights against few rows.
///
/// Threads divide m and n only and every sum over k is taken in one order, in blocks that depend on
/// k alone, so results have the same bits for any number of threads. Buffers live as long as the
/// object and grow to the largest product seen: a warm call allocates nothing. Left out: splitting
/// k over threads, which would help only where m and n are both tiny.
/// </summary>
public sealed unsafe class Gemm : IDisposable
{
    /// <summary>
    /// Depth of a block along k: what a tile of C is loaded and stored for.
    /// </summary>
    private const int MaxKBlock = 512;

    /// <summary>
    /// Columns of a block of B, which an item packs: with MaxKBlock 768 KiB.
    /// </summary>
    private const int MaxNBlock = 384;

    /// <summary>
    /// Elements of A packed at a time, which should stay in the last-level cache.
    /// </summary>
    private const int LeftBudget = 4 << 20;
    private const int MaxMChunk = 4096;

    /// <summary>
    /// Elements of a B that stays in the last-level cache: what must be packed of it is packed once
    /// for all threads, and these divide the rows of A. Not where packing transposes panels, which
    /// is dearer than reading all of A: every thread does that for its own columns.
    /// </summary>
    private const int SharedLimit = 1 << 20;

    /// <summary>
    /// A is not packed for fewer columns, B not for fewer rows: each element is used too rarely.
    /// </summary>
    private const int NarrowCols = 64, FewRows = 32;

    /// <summary>
    /// Up to so many rows, products with a row-major transposed weight are dot products.
    /// </summary>
    private const int DotRows = 16;

    /// <summary>Multiply-adds below which waking other threads costs more than it gains.</summary>
    private const long SerialLimit = 256 << 10;

    private readonly Workers _workers;
    private readonly Lock _turn = new();
    private readonly Area[] _areas;

    /// <param name="workers">Threads to run on; several Gemm objects may share them.</param>
    /// <param name="set">Instructions to use; null takes the best there are.</param>
    /// <exception cref="PlatformNotSupportedException">
    /// The processor lacks the instructions.
    /// </exception>
    public Gemm(Workers workers, InstructionSet? set = null)
    {
        _workers = workers;
        Instructions = set ?? Best;
        if (Instructions > Best)
            throw new PlatformNotSupportedException($"this processor has no {Instructions}");
        _areas = new Area[workers.Count + 1];
        for (int i = 0; i < _areas.Length; i++) _areas[i] = new Area();
    }

    /// <summary>The widest instructions that this processor and runtime offer.</summary>
    public static InstructionSet Best =>
        Avx512Simd.IsSupported ? InstructionSet.Avx512
        : Avx2Simd.IsSupported ? InstructionSet.Avx2
        : InstructionSet.Portable;

    public InstructionSet Instructions { get; }

    /// <summary>
    /// c[m, n] = alpha * a[m, k] b[k, n] + beta * c + bias[n]. Any of a and b may be a transposed
    /// view, b may be packed, and b's type may be F32, BF16 or F16 where a and c are F32; or all
    /// are F64. With beta 0 c is not read; k = 0 leaves beta * c + bias. c must not overlap the
    /// operands. Infinities and NaN spread as in any other sum of products. May be called inside a
    /// body of the same workers, and then runs on the calling thread.
    /// </summary>
    /// <exception cref="ShapeException">
    /// Sizes do not fit, or types are not the ones above.
    /// </exception>
    public void Multiply(
        MatrixView a,
        MatrixView b,
        MatrixView c,
        double alpha = 1,
        double beta = 0,
        void* bias = null)
    {
        Check(a, b, c);
        if (c.Rows == 0 || c.Cols == 0) return;
        if (c.Type == DType.F64)
        {
            Run<double, Vector<double>, PortableSimd<double>>(a, b, c, alpha, beta, bias);
            return;
        }

        switch (Instructions)
        {
            case InstructionSet.Avx512:
                Run<float, Vector512<float>, Avx512Simd>(a, b, c, (float)alpha, (float)beta, bias);
                break;
            case InstructionSet.Avx2:
                Run<float, Vector256<float>, Avx2Simd>(a, b, c, (float)alpha, (float)beta, bias);
                break;
            default:
                Run<float, Vector<float>, PortableSimd<float>>(
                    a, b, c, (float)alpha, (float)beta, bias);
                break;
        }
    }

    public void Dispose()
    {
        foreach (var area in _areas) area.Dispose();
    }

    private static void Check(in MatrixView a, in MatrixView b, in MatrixView c)
    {
        if (a.Rows != c.Rows || b.Cols != c.Cols || a.Cols != b.Rows)
            throw new ShapeException($"gemm: {a} times {b} does not give {c}");
        bool known = c.Type is DType.F64
            ? b.Type is DType.F64
            : c.Type is DType.F32 && b.Type is DType.F32 or DType.BF16 or DType.F16;
        if (!known || a.Type != c.Type || a.IsPacked || c.IsPacked)
        {
            throw new ShapeException(
                $"gemm: {a} times {b} into {c}: a and c must be F32 and not packed, b F32, BF16 or "
                + "F16; or all F64");
        }
    }

    private void Run<T, V, I>(
        in MatrixView a, in MatrixView b, in MatrixView c, T alpha, T beta, void* bias)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
        where V : unmanaged
        where I : ISimd<T, V>
    {
        var plan = new GemmPlan<T>
        {
            M = c.Rows,
            N = c.Cols,
            K = a.Cols,
            A = (T*)a.Data,
            ARow = a.IsTransposed ? 1 : (nint)a.Stride,
            ACol = a.IsTransposed ? (nint)a.Stride : 1,
            B = (byte*)b.Data,
            BType = b.Type,
            BStride = (nint)b.Stride,
            BLayout = (b.IsPacked, b.IsTransposed) switch
            {
                (false, false) => RightLayout.Rows,
                (false, true) => RightLayout.Transposed,
                (true, true) => RightLayout.Panels,
                (true, false) => RightLayout.TransposedPanels,
            },
            C = (T*)c.Data,
            CRow = c.IsTransposed ? 1 : (nint)c.Stride,
            CCol = c.IsTransposed ? (nint)c.Stride : 1,
            Alpha = alpha,
            Beta = beta,
            Bias = (T*)bias,
        };
        if (plan.K == 0)
        {
            Scale(plan);
            return;
        }

        int worker = Workers.Current;
        if (worker >= 0)
        {
            Execute<T, V, I>(ref plan, _areas[worker + 1]);
            return;
        }

        lock (_turn) Execute<T, V, I>(ref plan, _areas[0]);
    }

    private void Execute<T, V, I>(ref GemmPlan<T> plan, Area area)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
        where V : unmanaged
        where I : ISimd<T, V>
    {
        bool native = plan.BType.Size() == sizeof(T);
        if (plan.BLayout == RightLayout.Transposed && plan.M <= DotRows && plan.ACol == 1)
        {
            Dot<T, V, I>(ref plan);
            return;
        }

        if (native && plan.BLayout == RightLayout.Rows && plan.ARow == 1 && plan.ACol > 1
            && plan.N <= FewRows && plan.M > plan.N && plan.Bias is null)
        {
            SwapOperands(ref plan);
        }

        bool packLeft = plan.ACol != 1 || plan.N > NarrowCols;
        plan.DirectB = native && (plan.BLayout == RightLayout.Panels
            || (plan.BLayout == RightLayout.Rows && plan.M <= FewRows));
        bool smallRight = (long)plan.N * plan.K <= SharedLimit
            && plan.BLayout is not RightLayout.TransposedPanels;
        plan.OwnLeft = packLeft && smallRight && plan.M > FewRows;
        packLeft &= !plan.OwnLeft;
        bool shareRight = !plan.DirectB && smallRight;
        bool packRight = !plan.DirectB && !shareRight;

        int tile = I.TileRows;
        int kBlocks = (plan.K + MaxKBlock - 1) / MaxKBlock;
        plan.KBlock = RoundUp((plan.K + kBlocks - 1) / kBlocks, PackedMatrix.PanelRows);
        int chunk = packLeft ? Math.Min(plan.M, RoundUp(MaxMChunk, tile)) : plan.M;
        int depth = plan.K;
        if (packLeft)
            depth = Math.Min(depth, Math.Max(1, LeftBudget / chunk / plan.KBlock) * plan.KBlock);

        int panels = (plan.N + PackedMatrix.PanelRows - 1) / PackedMatrix.PanelRows;
        if (plan.OwnLeft)
            (plan.MBlock, plan.ItemsN, plan.Panels) = (OwnRows(plan, tile), 1, panels);
        else SplitColumns(ref plan, panels);
        int leftPanels = (chunk + tile - 1) / tile;
        plan.PanelStride = ((nint)depth * tile) + GemmPlan<T>.LeftPad;
        plan.ScratchStride = plan.OwnLeft
            ? plan.MBlock / tile * (((nint)plan.KBlock * tile) + GemmPlan<T>.LeftPad)
            : (nint)plan.KBlock * (packRight ? plan.NBlock : PackedMatrix.PanelRows);
        int slots = Workers.Current < 0 ? _workers.Count : 1;
        nint left = packLeft ? leftPanels * plan.PanelStride : 0;
        nint right = shareRight ? (nint)panels * PackedMatrix.PanelRows * plan.K : 0;
        var memory = (T*)area.Take((left + right + (slots * plan.ScratchStride)) * sizeof(T));
        plan.PackedA = packLeft ? memory : null;
        plan.SharedB = shareRight ? memory + left : null;
        plan.Scratch = memory + left + right;
        if (slots == 1) plan.ScratchStride = 0;

        for (plan.M0 = 0; plan.M0 < plan.M; plan.M0 += chunk)
        {
            plan.MCount = Math.Min(chunk, plan.M - plan.M0);
            for (plan.K0 = 0; plan.K0 < plan.K; plan.K0 += depth)
            {
                plan.KCount = Math.Min(depth, plan.K - plan.K0);
                bool firstPass = plan.M0 == 0 && plan.K0 == 0;
                Pass<T, V, I>(ref plan, packRight, shareRight && firstPass ? panels : 0);
            }
        }
    }

    /// <summary>
    /// Packs A for M0 .., K0 .., and all of B where it is shared, then multiplies.
    /// </summary>
    private void Pass<T, V, I>(ref GemmPlan<T> plan, bool packRight, int rightPanels)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
        where V : unmanaged
        where I : ISimd<T, V>
    {
        int tile = I.TileRows;
        int leftPanels = plan.PackedA is null ? 0 : (plan.MCount + tile - 1) / tile;
        long work = (long)plan.MCount * plan.N * plan.KCount;
        fixed (GemmPlan<T>* shared = &plan)
        {
            var pack = new GemmPackBody<T, V, I> { Plan = shared, LeftPanels = leftPanels };
            For(leftPanels + rightPanels, pack, work);
            if (!plan.OwnLeft) plan.MBlock = SplitRows(plan, packRight, tile);
            int items = plan.ItemsN * ((plan.MCount + plan.MBlock - 1) / plan.MBlock);
            For(items, new GemmBody<T, V, I> { Plan = shared }, work);
        }
    }

    private void Dot<T, V, I>(ref GemmPlan<T> plan)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
        where V : unmanaged
        where I : ISimd<T, V>
    {
        const int Group = GemmDot<T, V, I, BFloat16>.Group;
        int groups = (plan.N + Group - 1) / Group;
        long work = (long)plan.M * plan.N * plan.K;
        fixed (GemmPlan<T>* shared = &plan)
        {
            switch (plan.BType)
            {
                case DType.BF16:
                    For(groups, new GemmDot<T, V, I, BFloat16> { Plan = shared }, work);
                    break;
                case DType.F16:
                    For(groups, new GemmDot<T, V, I, Half16> { Plan = shared }, work);
                    break;
                default:
                    For(groups, new GemmDot<T, V, I, Native<T>> { Plan = shared }, work);
                    break;
            }
        }
    }

    private void For<TBody>(int count, TBody body, long work)
        where TBody : unmanaged, IRangeBody
    {
        if (work > SerialLimit) _workers.For(count, body);
        else if (count > 0) body.Run(0, count, Math.Max(0, Workers.Current));
    }

    /// <summary>
    /// C^T = B^T A^T: a narrow C from a long transposed A, whose rows are then read in place.
    /// </summary>
    private static void SwapOperands<T>(ref GemmPlan<T> plan)
        where T : unmanaged
    {
        (plan.M, plan.N) = (plan.N, plan.M);
        (plan.CRow, plan.CCol) = (plan.CCol, plan.CRow);
        var a = (byte*)plan.A;
        plan.A = (T*)plan.B;
        plan.B = a;
        (plan.ACol, plan.BStride) = (plan.BStride, plan.ACol);
    }

    /// <summary>Blocks of columns: some four per thread, as wide as the cache allows.</summary>
    private void SplitColumns<T>(ref GemmPlan<T> plan, int panels)
        where T : unmanaged
    {
        int most = MaxNBlock / PackedMatrix.PanelRows;
        int enough = Math.Min(4 * _workers.Count, (panels + 3) / 4);
        int items = Math.Max((panels + most - 1) / most, enough);
        // The same number for each thread, as far as there are panels.
        items = Math.Min(Math.Max(1, panels), RoundUp(items, _workers.Count));
        plan.NBlock = (panels + items - 1) / items * PackedMatrix.PanelRows;
        (plan.ItemsN, plan.Panels) = (items, panels);
    }

    /// <summary>
    /// Rows of an item that packs them itself: some four items for each thread.
    /// </summary>
    private int OwnRows<T>(in GemmPlan<T> plan, int tile)
        where T : unmanaged
    {
        const int Most = GemmPlan<T>.CachedRows;
        int least = (plan.M + Most - 1) / Most;
        int items = RoundUp(Math.Max(4 * _workers.Count, least), _workers.Count);
        return RoundUp(Math.Max(2 * tile, (plan.M + items - 1) / items), tile);
    }

    /// <summary>
    /// Rows of an item: all of them, unless there are too few blocks of columns for the threads.
    /// </summary>
    private int SplitRows<T>(in GemmPlan<T> plan, bool packRight, int tile)
        where T : unmanaged
    {
        int parts = ((4 * _workers.Count) + plan.ItemsN - 1) / plan.ItemsN;
        int least = packRight ? 8 * tile : 2 * tile;
        int rows = Math.Max(least, (plan.MCount + parts - 1) / parts);
        return RoundUp(rows, tile);
    }

    private static void Scale<T>(in GemmPlan<T> plan)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        for (int i = 0; i < plan.M; i++)
        {
            for (int j = 0; j < plan.N; j++)
            {
                T* c = plan.C + (i * plan.CRow) + (j * plan.CCol);
                T value = plan.Bias is null ? T.Zero : plan.Bias[j];
                *c = plan.Beta == T.Zero ? value : (plan.Beta * *c) + value;
            }
        }
    }

    private static int RoundUp(int value, int unit) => (value + unit - 1) / unit * unit;

    /// <summary>Memory for packing of one caller, which grows and stays.</summary>
    private sealed class Area : IDisposable
    {
        private HugeMemory? _memory;

        public byte* Take(nint bytes)
        {
            if (_memory is null || _memory.Bytes < bytes)
            {
                _memory?.Dispose();
                _memory = null;
                _memory = new HugeMemory(bytes);
            }

            return _memory.Data;
        }

        public void Dispose()
        {
            _memory?.Dispose();
            _memory = null;
        }
    }
}
