using System.Numerics;
using System.Numerics.Tensors;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y = x w^T + b + (c - 1) * (drop(x) w^T) + c * Scale * (drop(x) a^T) bb^T with c = m / n for each
/// column: weight-decomposed low-rank adaptation, Liu et al. 2024, as peft's lora.Linear with
/// use_dora; without dropout y = b + c * (x w^T + Scale * (x a^T) bb^T). x[rows, in], w[out, in],
/// optional b[out], a[rank, in], bb[out, rank], m[out] the magnitudes, n[out] the norms of
/// <see cref="AdaptedNorm"/>, constant here -> y[rows, out]; saves h = drop(x) a^T [rows, rank] and
/// u = drop(x) w^T + Scale * h bb^T [rows, out]. w is frozen. Layer, Scale, Dropout and Weight are
/// those of <see cref="LoraLinear"/>.
/// </summary>
/// <exception cref="ShapeException">
/// The shapes do not fit together; w is there beside a Weight.
/// </exception>
public sealed unsafe record DoraLinear : Op
{
    /// <param name="layer">A number of its own for each adapter: the key of its mask.</param>
    /// <param name="scale">alpha / rank.</param>
    /// <param name="dropout">Probability of a zero, in [0, 1).</param>
    /// <param name="weight">What stands for w where it is not dense.</param>
    public DoraLinear(int layer, double scale, double dropout, Weight? weight = null)
        : base("dora_linear")
    {
        _ = Philox.Threshold(dropout);
        (Layer, Scale, Dropout, Weight) = (layer, scale, dropout, weight);
    }

    public int Layer { get; }

    public double Scale { get; }

    public double Dropout { get; }

    public Weight? Weight { get; }

    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        var (rows, output, rank) = LoraLinear.Check(this, inputs, Weight);
        inputs.Float(this, 5, "m").MustBe(this, "m", output);
        inputs.Float(this, 6, "n").MustBe(this, "n", output);
        return new(new Spec(activations, new Shape(rows, output)),
            new Spec(activations, new Shape(rows, rank)),
            new Spec(activations, new Shape(rows, output)));
    }

    public override bool Differentiates(int input) => input is not (1 or 6);

    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Matrix<T> x = call.In(0), y = call.Output, h = call.Saved(0), u = call.Saved(1);
        Matrix<T> dropped = x, factor = Factors(call, T.Zero);
        CpuWeight<T> w = call.Weight(1, Weight);
        var mask = new Dropout<T>(call.Random, Layer, Dropout);
        if (mask.Active)
        {
            dropped = call.Scratch(new Shape(x.Rows, x.Cols));
            mask.Apply(call.Workers, x, 0, dropped, accumulate: false);
        }

        w.Multiply(dropped, u);
        call.Gemm.Multiply(dropped.View, call.View(3).T, h.View);
        if (mask.Active)
        {
            w.Multiply(x, y, bias: call.In(2));
            Elementwise.Scale(call.Workers, u, -T.One, new Gradient<T>(y, accumulate: true));
        }

        call.Gemm.Multiply(h.View, call.View(4).T, u.View, Scale, beta: 1);
        call.Workers.For(y.Rows, mask.Active
            ? new RowWork<T>(u, factor, y, y) : new RowWork<T>(u, factor, call.In(2), y));
    }

    // With g = c * dy and t = Scale * g bb: dbb = Scale * g^T h, da = t^T drop(x), dm = sum of
    // dy * u / n, dx = dy w + mask * ((g - dy) w + t a).
    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        Matrix<T> x = call.In(0), dy = call.OutputGradient, h = call.Saved(0), u = call.Saved(1);
        Gradient<T> dx = call.Gradient(0), da = call.Gradient(3), dm = call.Gradient(5);
        Sum.Rows(call, dy, call.Gradient(2));
        Matrix<T> g = call.Scratch(new Shape(dy.Rows, dy.Cols));
        if (dm.Wanted)
        {
            call.Workers.For(g.Rows, new RowWork<T>(u, Inverse(call), default, g, dy));
            Sum.Rows(call, g, dm);
        }

        call.Workers.For(g.Rows, new RowWork<T>(dy, Factors(call, T.Zero), default, g));
        call.Multiply(g.View.T, h.View, call.Gradient(4), Scale);
        if (!dx.Wanted && !da.Wanted) return;
        Matrix<T> t = call.Scratch(new Shape(h.Rows, h.Cols));
        call.Gemm.Multiply(g.View, call.View(4), t.View, Scale);
        CpuWeight<T> w = call.Weight(1, Weight);
        var mask = new Dropout<T>(call.Random, Layer, Dropout);
        if (!mask.Active)
        {
            call.Multiply(t.View.T, x.View, da);
            w.MultiplyTransposed(g, dx);
            if (dx.Wanted) call.Gemm.Multiply(t.View, call.View(3), dx.Into.View, beta: 1);
            return;
        }

        Matrix<T> masked = call.Scratch(new Shape(x.Rows, x.Cols));
        if (da.Wanted)
        {
            mask.Apply(call.Workers, x, 0, masked, accumulate: false);
            call.Multiply(t.View.T, masked.View, da);
        }

        if (!dx.Wanted) return;
        call.Workers.For(g.Rows, new RowWork<T>(dy, Factors(call, T.One), default, g));
        w.MultiplyTransposed(g, masked);
        call.Gemm.Multiply(t.View, call.View(3), masked.View, beta: 1);
        w.MultiplyTransposed(dy, dx);
        mask.Apply(call.Workers, masked, 0, dx.Into, accumulate: true);
    }

    // What is rounded between two products is the adapter's part, the smaller one. A mask is
    // multiplied by as zeros and ones, its factor in the product, so that no x is rounded.
    public override void CudaForward(in CudaCall call)
    {
        Tensor x = call.In(0), y = call.Output, h = call.Saved(0), u = call.Saved(1);
        CudaWeight w = call.Weight(1, Weight);
        bool drops = CudaLoraProducts.Drops(call, Dropout);
        Tensor kept = drops ? Masked(call, x) : x;
        double factor = drops ? Philox.Scale(Dropout) : 1;
        call.Multiply(kept, ((CudaMatrix)call.In(3)).T, h, factor);
        call.Multiply(h, ((CudaMatrix)call.In(4)).T, u, Scale);
        w.Multiply(kept, u, factor, beta: 1);
        if (drops)
        {
            w.Multiply(x, y);
            w.Multiply(kept, y, -factor, beta: 1);
        }

        Columns(call, y, u, call.Floats(2), minus: 0, accumulate: drops);
    }

    public override void CudaBackward(in CudaCall call)
    {
        Tensor x = call.In(0), dy = call.OutputGradient, h = call.Saved(0);
        int rows = (int)dy.Shape.Rows, cols = dy.Shape.Cols;
        GradientTarget dx = call.Gradient(0), da = call.FloatGradient(3);
        CudaWeight w = call.Weight(1, Weight);
        call.SumRows(dy, call.FloatGradient(2));
        Tensor g = call.Scratch(call.Real, rows, cols);
        Backward(call, g, dy);
        call.Multiply(((CudaMatrix)g).T, h, call.AnyGradient(4), Scale);
        if (!dx.Wanted && !da.Wanted) return;
        Tensor t = call.Scratch(call.Real, rows, h.Shape.Cols);
        call.Multiply(g, call.In(4), t, Scale);
        if (!CudaLoraProducts.Drops(call, Dropout))
        {
            call.Multiply(((CudaMatrix)t).T, x, da);
            if (!dx.Wanted) return;
            call.Multiply(t, call.In(3), dx);
            w.MultiplyTransposed(g, dx.Buffer, beta: 1);
            return;
        }

        if (da.Wanted)
        {
            ArenaMark mark = call.Mark();
            call.Multiply(((CudaMatrix)t).T, Masked(call, x), da, Philox.Scale(Dropout));
            call.Pop(mark);
        }

        if (!dx.Wanted) return;
        Columns(call, g, dy, Tensor.None, minus: 1, accumulate: false);
        Tensor part = call.Scratch(call.Real, rows, x.Shape.Cols);
        call.Multiply(t, call.In(3), part);
        w.MultiplyTransposed(g, part, beta: 1);
        w.MultiplyTransposed(dy, dx);
        Mask(call, dx.Buffer, part, Philox.Scale(Dropout), accumulate: true);
    }

    private static Matrix<T> Inverse<T>(in CpuCall<T> call)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        Matrix<T> n = call.In(6), inverse = call.Scratch(new Shape(1, n.Cols));
        for (int j = 0; j < n.Cols; j++) inverse[j] = T.One / n[j];
        return inverse;
    }

    // m / n - minus; an infinite norm is no factor of 0.
    private static Matrix<T> Factors<T>(in CpuCall<T> call, T minus)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        Matrix<T> m = call.In(5), n = call.In(6), factor = call.Scratch(new Shape(1, n.Cols));
        for (int j = 0; j < n.Cols; j++)
            factor[j] = (m[j] / n[j]) + (n[j] - n[j]) - minus;
        return factor;
    }

    // The elements of x that are kept, zeros elsewhere.
    private Tensor Masked(in CudaCall call, in Tensor x)
    {
        Tensor kept = call.Scratch(call.Real, (int)x.Shape.Rows, x.Shape.Cols);
        Mask(call, kept, x, 1, accumulate: false);
        return kept;
    }

    private void Mask(in CudaCall call, in Tensor y, in Tensor x, double factor, bool accumulate)
    {
        int rows = (int)x.Shape.Rows, cols = x.Shape.Cols;
        Philox.MustBeDrawable(rows, cols);
        call.Launch("dora_mask", Grid.Elements((long)rows * ((cols + 7) / 8)), y, x, rows, cols,
            Philox.DrawnCols(cols) / 32, call.Random.Seed, call.Random.Step, Layer,
            Philox.Threshold(Dropout), factor, accumulate);
    }

    private static void Columns(
        in CudaCall call, in Tensor y, in Tensor x, in Tensor b, double minus, bool accumulate)
    {
        int rows = (int)y.Shape.Rows, cols = y.Shape.Cols;
        if (rows == 0) return;
        call.Launch("dora_columns", Grid.ColumnVectors(cols, rows, call.Real), y, x,
            call.Floats(5), call.Floats(6), b, rows, cols, minus, accumulate);
    }

    // g = c * dy, and dm.
    private static void Backward(in CudaCall call, in Tensor g, in Tensor dy)
    {
        const int FewestRows = 64, BlocksPerMultiprocessor = 2;
        GradientTarget dm = call.FloatGradient(5);
        int rows = (int)dy.Shape.Rows, cols = dy.Shape.Cols;
        Grid tiles = Grid.Tiles(cols, 1, call.Real);
        var (parts, each) = call.Split(
            rows, tiles.Blocks.X, BlocksPerMultiprocessor, FewestRows, multiple: 1);
        Tensor part = call.Scratch(DType.F32, parts, cols);
        call.Launch("dora_backward", Grid.Tiles(cols, parts, call.Real), g, part, dy,
            call.Saved(1), call.Floats(5), call.Floats(6), rows, cols, each);
        if (dm.Wanted) call.SumParts(part, dm);
    }

    /// <summary>
    /// y = x factor + b by row, where b is one row, y itself or none; times another matrix.
    /// </summary>
    private readonly struct RowWork<T>(
        Matrix<T> x, Matrix<T> factor, Matrix<T> b, Matrix<T> y, Matrix<T> times = default)
        : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int r = begin; r < end; r++)
            {
                Span<T> to = y.RowSpan(r);
                ReadOnlySpan<T> from = x.RowSpan(r);
                ReadOnlySpan<T> scale = factor.RowSpan(0);
                if (b.Exists)
                    TensorPrimitives.MultiplyAdd(from, scale, b.RowSpan(b.Data == y.Data ? r : 0),
                        to);
                else TensorPrimitives.Multiply(from, scale, to);
                if (times.Exists) TensorPrimitives.Multiply(to, times.RowSpan(r), to);
            }
        }
    }
}
