namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// The products of a low-rank adapter that a dropout mask goes through, as <see cref="Philox"/>
/// defines it: section 8 of kernels.cu. Each reads x, or reads and writes its gradient, once.
/// </summary>
internal readonly ref struct CudaLoraProducts
{
    private const int BlocksPerMultiprocessor = 2;

    private readonly Randomness _random;
    private readonly int _layer;
    private readonly uint _threshold;
    private readonly double _scale;

    public CudaLoraProducts(in CudaCall call, int layer, double p)
    {
        (_random, _layer, _threshold) = (call.Random, layer, Philox.Threshold(p));
        _scale = 1 / (1 - p);
        Active = _random.Dropout && p > 0;
    }

    public bool Active { get; }

    /// <summary>h = drop(x) a^T. x[rows, cols], a[rank, cols], h[rows, rank].</summary>
    public void Down(in CudaCall call, CudaMatrix x, in Tensor a, in Tensor h)
    {
        const int Cols = KernelConstants.LoraDownCols;
        int rank = a.Shape[0];
        int blocks = CeilingOf(x.Rows, KernelConstants.LoraDownRows)
            * CeilingOf(rank, KernelConstants.LoraRanks);
        Check(x);
        if (blocks == 0) return;
        var (parts, each) =
            call.Split(x.Cols, blocks, BlocksPerMultiprocessor, fewest: 2 * Cols, Cols);
        Tensor part = parts > 1 ? call.Scratch(DType.F32, parts, x.Rows, rank) : Tensor.None;
        call.Launch("lora_down", Grid.Blocks256(blocks, 1, parts), h, part, x.Data, a, x.Rows,
            x.Cols, rank, each, _random.Seed, _random.Step, _layer, _threshold, _scale);
        if (parts == 1) return;
        long count = h.Shape.Count;
        call.Launch("lora_down_parts", Grid.Elements(count), h, part, parts, count);
    }

    /// <summary>
    /// dx = mask * (t a), or adds it. t[rows, rank], a[rank, cols], dx[rows, cols].
    /// </summary>
    public void GradientX(in CudaCall call, CudaMatrix t, in Tensor a, GradientTarget dx)
    {
        int cols = a.Shape.Cols, tilesOfRows = CeilingOf(t.Rows, KernelConstants.LoraXRows);
        call.Launch("lora_gradient_x",
            Grid.Blocks256(tilesOfRows, CeilingOf(cols, KernelConstants.LoraXCols)), dx.Buffer,
            t.Data, a, t.Rows, cols, t.Cols, dx.Accumulate, _random.Seed, _random.Step, _layer, _threshold,
            _scale);
    }

    /// <summary>da = t^T drop(x), or adds it. da[rank, cols] is F32.</summary>
    public void GradientA(in CudaCall call, CudaMatrix x, CudaMatrix t, GradientTarget da)
    {
        const int Rows = KernelConstants.LoraARows;
        int rank = t.Cols, tiles = CeilingOf(x.Cols, KernelConstants.LoraACols);
        int chunks = CeilingOf(rank, KernelConstants.LoraRanks);
        var (parts, each) = call.Split(
            x.Rows, tiles * chunks, BlocksPerMultiprocessor, fewest: 2 * Rows, Rows);
        bool whole = parts == 1;
        Tensor into = whole ? da.Buffer : call.Scratch(DType.F32, parts, rank * x.Cols);
        call.Launch("lora_gradient_a", Grid.Blocks256(tiles, parts, chunks), into, t.Data,
            x.Data, x.Rows,
            x.Cols, rank, each, whole && da.Accumulate, _random.Seed, _random.Step, _layer,
            _threshold, _scale);
        if (!whole) call.SumParts(into, da);
    }

    private static void Check(CudaMatrix x)
    {
        if ((long)x.Rows * x.Cols > 1L << 34)
            throw new ShapeException($"dropout over more than 2^34 elements: [{x.Rows}, {x.Cols}]");
    }

    private static int CeilingOf(int value, int divisor) => (value + divisor - 1) / divisor;
}
