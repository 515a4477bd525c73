using System.Numerics;
using System.Numerics.Tensors;
using MiniCpmNative.Kernels.Cpu;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y[r, c] = x[r, c] * rstd[r] * w[c],  rstd[r] = 1 / sqrt(mean_c(x[r, c]^2) + epsilon).
/// x[rows, cols], w[cols] -> y[rows, cols]; saves rstd[rows].
/// Root mean square layer normalisation, Zhang and Sennrich 2019; the decoder norms of the whole family.
/// </summary>
/// <exception cref="ShapeException">x is not float, or w does not have x's columns.</exception>
public sealed record RmsNorm(float Epsilon) : Op("rms_norm")
{
    // Rows per partial sum of dw; the partial sums are added in order, so any number of threads gives
    // the same bits.
    private const int GroupRows = 64;

    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec x = inputs.Float(this, 0, "x");
        inputs.Float(this, 1, "w").MustBe(this, "w", x.Shape.Cols);
        return new(x, new Spec(x.Type, new Shape((int)x.Shape.Rows)));
    }

    public override bool Differentiates(int input) => true;

    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Matrix<T> x = call.In(0);
        T epsilon = T.CreateChecked(Epsilon);
        call.Workers.For(x.Rows, new ForwardRows<T>(
            x, call.In(1), call.Output, call.Saved(0), epsilon));
    }

    // dx = rstd * (w*dy - x * rstd^2 * mean(w*dy*x)),  dw = sum over rows of dy * x * rstd.
    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        Matrix<T> x = call.In(0), w = call.In(1), dy = call.OutputGradient, rstd = call.Saved(0);
        Gradient<T> dx = call.Gradient(0), dw = call.Gradient(1);
        if (dx.Wanted) call.Workers.For(x.Rows, new BackwardRows<T>(x, w, dy, rstd, dx));
        if (!dw.Wanted) return;
        int groups = (x.Rows + GroupRows - 1) / GroupRows;
        Matrix<T> partial = call.Scratch(new Shape(groups, x.Cols));
        call.Workers.For(groups, new WeightGroups<T>(x, dy, rstd, partial));
        Sum.Rows(partial, dw);
    }

    private readonly struct ForwardRows<T>(
        Matrix<T> x, Matrix<T> w, Matrix<T> y, Matrix<T> rstd, T epsilon) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int r = begin; r < end; r++)
            {
                T mean = TensorPrimitives.SumOfSquares<T>(x.RowSpan(r)) / T.CreateChecked(x.Cols);
                T scale = T.One / T.Sqrt(mean + epsilon);
                rstd[r] = scale;
                TensorPrimitives.Multiply(x.RowSpan(r), scale, y.RowSpan(r));
                TensorPrimitives.Multiply<T>(y.RowSpan(r), w.RowSpan(0), y.RowSpan(r));
            }
        }
    }

    private readonly struct BackwardRows<T>(
        Matrix<T> x, Matrix<T> w, Matrix<T> dy, Matrix<T> rstd, Gradient<T> dx) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public unsafe void Run(int begin, int end, int worker)
        {
            for (int r = begin; r < end; r++)
            {
                T* px = x.Row(r), pdy = dy.Row(r);
                T dot = T.Zero;
                for (int c = 0; c < x.Cols; c++) dot += w[c] * pdy[c] * px[c];
                T scale = rstd[r], pull = scale * scale * dot / T.CreateChecked(x.Cols);
                long row = (long)r * x.Cols;
                for (int c = 0; c < x.Cols; c++)
                    dx.Put(row + c, scale * ((w[c] * pdy[c]) - (px[c] * pull)));
            }
        }
    }

    private readonly struct WeightGroups<T>(
        Matrix<T> x, Matrix<T> dy, Matrix<T> rstd, Matrix<T> partial) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public unsafe void Run(int begin, int end, int worker)
        {
            for (int group = begin; group < end; group++)
            {
                T* sum = partial.Row(group);
                partial.RowSpan(group).Clear();
                int last = Math.Min(x.Rows, (group + 1) * GroupRows);
                for (int r = group * GroupRows; r < last; r++)
                {
                    T* px = x.Row(r), pdy = dy.Row(r);
                    T scale = rstd[r];
                    for (int c = 0; c < x.Cols; c++) sum[c] += pdy[c] * (px[c] * scale);
                }
            }
        }
    }
}
