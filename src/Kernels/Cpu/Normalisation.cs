using System.Numerics;
using System.Numerics.Tensors;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// Row normalisation, y = (x - mean) * rstd * w + b, as LayerNorm has it and, with mean and b left
/// out, RMSNorm: one pair of loops serves both. Two passes for the variance: E[x^2] - E[x]^2 would
/// lose it where the mean is large. Memory-bound; each row is read from memory once.
/// </summary>
internal static unsafe class Normalisation
{
    // Rows per partial sum of dw and db; the partial sums are added in order, so any number of
    // threads gives the same bits.
    private const int GroupRows = 64;

    public static void Forward<T>(
        Workers workers, Matrix<T> x, Matrix<T> w, Matrix<T> b,
        Matrix<T> y, Matrix<T> mean, Matrix<T> rstd, double epsilon)
        where T : unmanaged, IBinaryFloatingPointIeee754<T> =>
        workers.For(x.Rows, new ForwardRows<T>(x, w, b, y, mean, rstd, Real.Of<T>(epsilon)));

    // With g = w * dy and n = (x - mean) * rstd:
    // dx = rstd * (g - mean(g) - n * mean(g * n)),  dw = sum of dy * n,  db = sum of dy over rows;
    // without a mean, mean(g) is left out too.
    public static void Backward<T>(
        in CpuCall<T> call, Matrix<T> dy, Matrix<T> x, Matrix<T> w, Matrix<T> mean, Matrix<T> rstd,
        Gradient<T> dx, Gradient<T> dw, Gradient<T> db)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        if (dx.Wanted) call.Workers.For(x.Rows, new BackwardRows<T>(x, w, dy, mean, rstd, dx));
        if (dw.Wanted)
        {
            int groups = (x.Rows + GroupRows - 1) / GroupRows;
            Matrix<T> partial = call.Scratch(new Shape(groups, x.Cols));
            call.Workers.For(groups, new WeightGroups<T>(x, dy, mean, rstd, partial));
            Sum.Rows(partial, dw);
        }

        Sum.Rows(call, dy, db);
    }

    private static T Of<T>(Matrix<T> values, int row)
        where T : unmanaged, INumber<T> => values.Exists ? values[row] : T.Zero;

    private readonly struct ForwardRows<T>(
        Matrix<T> x, Matrix<T> w, Matrix<T> b, Matrix<T> y, Matrix<T> mean, Matrix<T> rstd,
        T epsilon)
        : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            T cols = Real.Of<T>(x.Cols);
            for (int r = begin; r < end; r++)
            {
                T centre = T.Zero;
                if (mean.Exists) mean[r] = centre = TensorPrimitives.Sum<T>(x.RowSpan(r)) / cols;
                T variance = Sum.SquaredDistances(x.Row(r), centre, x.Cols) / cols;
                T scale = T.One / T.Sqrt(variance + epsilon);
                rstd[r] = scale;
                Elementwise.Map(x.Row(r), w.Data, b.Data, y.Row(r), x.Cols, false,
                    new Normalised<T>(centre, scale));
            }
        }
    }

    private readonly struct BackwardRows<T>(
        Matrix<T> x, Matrix<T> w, Matrix<T> dy, Matrix<T> mean, Matrix<T> rstd, Gradient<T> dx)
        : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            T cols = Real.Of<T>(x.Cols);
            for (int r = begin; r < end; r++)
            {
                T centre = Of(mean, r), scale = rstd[r];
                Sum.Weighted(w.Data, dy.Row(r), x.Row(r), centre, x.Cols, out T sum, out T pull);
                if (!mean.Exists) sum = T.Zero;
                Elementwise.Map(x.Row(r), w.Data, dy.Row(r), dx.Into.Row(r), x.Cols, dx.Accumulate,
                    new InputGradient<T>(centre, scale, sum / cols, scale * scale * pull / cols));
            }
        }
    }

    private readonly struct WeightGroups<T>(
        Matrix<T> x, Matrix<T> dy, Matrix<T> mean, Matrix<T> rstd, Matrix<T> partial) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int group = begin; group < end; group++)
            {
                int first = group * GroupRows, last = Math.Min(x.Rows, first + GroupRows);
                for (int r = first; r < last; r++)
                    Elementwise.Map(x.Row(r), dy.Row(r), null, partial.Row(group), x.Cols,
                        accumulate: r > first, new Normalised<T>(Of(mean, r), rstd[r]));
            }
        }
    }

    private readonly struct Normalised<T>(T centre, T scale) : IMap<T>
        where T : unmanaged
    {
        public Vector<T> At(Vector<T> x, Vector<T> w, Vector<T> b) =>
            ((x - Vector.Create(centre)) * scale * w) + b;
    }

    private readonly struct InputGradient<T>(T centre, T scale, T mean, T pull) : IMap<T>
        where T : unmanaged
    {
        public Vector<T> At(Vector<T> x, Vector<T> w, Vector<T> dy) =>
            ((w * dy) - Vector.Create(mean) - ((x - Vector.Create(centre)) * pull)) * scale;
    }
}
