using static MiniCpmNative.Kernels.Cuda.CudaCall;

namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// The products of the low-rank adapters of one input that dropout masks go through, as
/// <see cref="Philox"/> defines them: section 8 of kernels.cu. Adapters have one rank; their h and
/// t lie one behind the other. Each product reads x, or reads and writes its gradient, once.
/// </summary>
internal readonly ref struct CudaLoraProducts
{
    // Kernels of sm_90 have up to three blocks on a multiprocessor; with two there are few parts.
    private const int BlocksPerMultiprocessor = 2;

    // Fewest columns of a part of h and rows of a part of da: a block's copies come several ahead.
    private const int FewestCols = 6 * KernelConstants.LoraDownCols;
    private const int FewestRows = 4 * KernelConstants.LoraARows;

    private readonly Tensor _mask;
    private readonly ReadOnlySpan<Tensor> _a;
    private readonly int _rows, _cols, _words;
    private readonly double _scale;

    /// <summary>Draws the masks.</summary>
    /// <param name="call">A run of the operation with dropout.</param>
    /// <param name="x">Rows and columns of what elements are dropped of.</param>
    /// <param name="a">The adapters' first matrices[rank, cols], at most three.</param>
    /// <param name="layers">The adapters' keys.</param>
    /// <param name="p">Probability of a zero.</param>
    public CudaLoraProducts(in CudaCall call, CudaMatrix x, ReadOnlySpan<Tensor> a,
        ReadOnlySpan<int> layers, double p)
    {
        Philox.MustBeDrawable(x.Rows, x.Cols);
        (_rows, _cols, _words) =
            (x.Rows, x.Cols, Philox.DrawnCols(x.Cols) / (8 * sizeof(int)));
        _a = a;
        _scale = Philox.Scale(p);
        _mask = call.Scratch(DType.I32, a.Length, _rows, _words);
        Grid grid = Grid.Elements((long)_rows * _words);
        call.Launch("dropout_mask",
            grid with { Blocks = grid.Blocks with { Y = a.Length } }, _mask, _rows, _words,
            call.Random.Seed, call.Random.Step, layers[0], layers.Length > 1 ? layers[1] : 0,
            layers.Length > 2 ? layers[2] : 0, Philox.Threshold(p));
    }

    private int Rank => _a[0].Shape[0];

    /// <summary>Whether a run of an operation drops anything.</summary>
    public static bool Drops(in CudaCall call, double p) => call.Random.Dropout && p > 0;

    /// <summary>h_n = drop_n(x) a_n^T. x[rows, cols], h[adapters, rows, rank].</summary>
    public void Down(in CudaCall call, CudaMatrix x, in Tensor h)
    {
        const int Cols = KernelConstants.LoraDownCols;
        int blocks = CeilingOf(_rows, KernelConstants.LoraDownRows)
            * CeilingOf(Rank, KernelConstants.LoraRanks) * _a.Length;
        if (blocks == 0) return;
        var (parts, each) =
            call.Split(_cols, blocks, BlocksPerMultiprocessor, FewestCols, Cols);
        Tensor part = parts > 1
            ? call.Scratch(DType.F32, parts, (int)h.Shape.Rows, Rank) : Tensor.None;
        call.Launch("lora_down", Tiles(call, blocks, 1, parts), h, part, x.Data, _mask,
            A(0), A(1), A(2), _rows, _cols, Rank, _a.Length, _words, each, _scale);
        if (parts == 1) return;
        long count = h.Shape.Count;
        call.Launch("lora_down_parts", Grid.Elements((count + 3) / 4), h, part, parts, count);
    }

    /// <summary>
    /// dx = sum over n of mask_n * (t_n a_n), or adds it. t[adapters, rows, rank], dx[rows, cols].
    /// </summary>
    public void GradientX(in CudaCall call, in Tensor t, GradientTarget dx) =>
        call.Launch("lora_gradient_x", Tiles(call, CeilingOf(_cols, KernelConstants.LoraXCols),
            CeilingOf(_rows, KernelConstants.LoraXRows)), dx.Buffer, t, _mask, A(0), A(1), A(2),
            _rows, _cols, Rank, _a.Length, _words, dx.Accumulate, _scale);

    /// <summary>
    /// da_n = t_n^T drop_n(x), or adds it; da[rank, cols] is F32, one for each adapter, wanted or
    /// not.
    /// </summary>
    public void GradientA(
        in CudaCall call, CudaMatrix x, in Tensor t, ReadOnlySpan<GradientTarget> da)
    {
        int blocks = CeilingOf(_cols, KernelConstants.LoraACols)
            * CeilingOf(Rank, KernelConstants.LoraRanks) * _a.Length;
        var (parts, each) = call.Split(
            _rows, blocks, BlocksPerMultiprocessor, FewestRows, KernelConstants.LoraARows);
        Tensor part = parts > 1
            ? call.Scratch(DType.F32, da.Length, parts, Rank * _cols) : Tensor.None;
        Span<Tensor> own = [Tensor.None, Tensor.None, Tensor.None];
        Span<Tensor> into = [Tensor.None, Tensor.None, Tensor.None];
        int accumulate = 0;
        for (int n = 0; n < da.Length; n++)
        {
            if (!da[n].Wanted) continue;
            own[n] = da[n].Buffer;
            into[n] = parts == 1 ? own[n] : part.Slice(n, 1);
            if (da[n].Accumulate) accumulate |= 1 << n;
        }

        call.Launch("lora_gradient_a", Tiles(call, blocks, parts), into[0], into[1], into[2], t,
            x.Data, _mask, _rows, _cols, Rank, _a.Length, _words, each,
            parts == 1 ? accumulate : 0, _scale);
        if (parts == 1) return;
        long count = (long)Rank * _cols;
        Grid grid = Grid.Elements((count + 3) / 4);
        call.Launch("lora_gradient_a_parts",
            grid with { Blocks = grid.Blocks with { Y = da.Length } }, own[0], own[1], own[2], part,
            parts, count, accumulate);
    }

    private Tensor A(int n) => n < _a.Length ? _a[n] : Tensor.None;

    // Stages of the two operands' tiles and of the mask's, as section 8 has them: of one size in
    // all.
    internal static int SharedBytes(DType real)
    {
        const int Elements = KernelConstants.LoraDownCols
            * (KernelConstants.LoraDownRows + KernelConstants.LoraRanks);
        return (real == DType.F32 ? 2 : 3) * ((Elements * real.Size()) + 1024);
    }

    private static Grid Tiles(in CudaCall call, int x, int y, int z = 1) =>
        new(new Dim3(x, y, z), KernelConstants.LoraThreads, SharedBytes(call.Real));
}
