using System.Numerics;
using MiniCpmNative.Kernels.Updates;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// The CPU's Adafactor, in double: rows' means, columns' means, the size of the change, the change.
/// </summary>
internal static unsafe class CpuAdafactor
{
    private const int Columns = 64;

    private enum Stage { Rows, Columns, Squares, Change }

    public static void Run<T>(
        Workers workers, Arena scratch, in UpdateStep step, in UpdateRange range, double factor)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        var sizes = AdafactorSizes.Of(range.Weights.Shape);
        int rows = checked(sizes.Batch * sizes.Rows);
        ArenaMark mark = scratch.Mark();
        var means = (double*)scratch.Push(
            new Spec(DType.F64, new Shape(sizes.Batch)), "adafactor").Data;
        var squares = (double*)scratch.Push(new Spec(DType.F64, new Shape(rows)), "adafactor").Data;
        var work = new Work<T>(range, step, sizes, factor, (nint)means,
            (nint)squares, 0, Stage.Rows);
        workers.For(rows, work);
        if (range.V.Exists)
            workers.For(sizes.Batch * ((sizes.Cols + Columns - 1) / Columns),
                work with { Stage = Stage.Columns });
        for (int b = 0; b < sizes.Batch && range.V.Exists; b++)
        {
            means[b] = 0;
            for (int r = 0; r < sizes.Rows; r++)
                means[b] += Real.ToDouble(((T*)range.M.Data)[(b * sizes.Rows) + r]) / sizes.Rows;
        }

        workers.For(rows, work with { Stage = Stage.Squares });
        double all = 0;
        for (int r = 0; r < rows; r++) all += squares[r];
        double size = Math.Sqrt(all / range.Weights.Shape.Count);
        workers.For(rows, work with
        {
            Stage = Stage.Change,
            Rate = step.LearningRate / Math.Max(1, size / UpdateStep.MostChange),
        });
        scratch.Pop(mark);
    }

    private readonly record struct Work<T>(
        UpdateRange Range, UpdateStep Step, AdafactorSizes Sizes, double Factor, nint MeansAt,
        nint SquaresAt, double Rate, Stage Stage) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        private T* P => (T*)(Range.Master.Exists ? Range.Master : Range.Weights).Data;

        public void Run(int begin, int end, int worker)
        {
            for (int i = begin; i < end; i++)
            {
                if (Stage == Stage.Rows) MeanOfRow(i);
                else if (Stage == Stage.Columns) MeansOfColumns(i);
                else if (Stage == Stage.Squares) ((double*)SquaresAt)[i] = Change(i, apply: false);
                else Change(i, apply: true);
            }
        }

        private double Squared(long i)
        {
            double g = Real.ToDouble(((T*)Range.Gradient.Data)[i]) * Factor;
            return (g * g) + UpdateStep.LeastSquare;
        }

        private T Averaged(T old, double now)
        {
            double keep = Step.SecondDecay;
            return Real.Of<T>((Real.ToDouble(old) * keep) + (now * (1 - keep)));
        }

        private void MeanOfRow(int row)
        {
            long first = (long)row * Sizes.Cols;
            var m = (T*)Range.M.Data;
            double sum = 0;
            for (int c = 0; c < Sizes.Cols; c++)
            {
                // A vector keeps each element's own.
                if (Range.V.Exists) sum += Squared(first + c);
                else m[first + c] = Averaged(m[first + c], Squared(first + c));
            }

            if (Range.V.Exists) m[row] = Averaged(m[row], sum / Sizes.Cols);
        }

        private void MeansOfColumns(int item)
        {
            double* sums = stackalloc double[Columns];
            int perBatch = (Sizes.Cols + Columns - 1) / Columns, batch = item / perBatch;
            int from = item % perBatch * Columns, count = Math.Min(Columns, Sizes.Cols - from);
            for (int c = 0; c < count; c++) sums[c] = 0;
            for (int r = 0; r < Sizes.Rows; r++)
                for (int c = 0; c < count; c++)
                    sums[c] += Squared(
                        ((((long)batch * Sizes.Rows) + r) * Sizes.Cols) + from + c);
            T* v = (T*)Range.V.Data + ((long)batch * Sizes.Cols) + from;
            for (int c = 0; c < count; c++) v[c] = Averaged(v[c], sums[c] / Sizes.Rows);
        }

        // The sum of squares of a row's changes, which are made where asked for.
        private double Change(int row, bool apply)
        {
            long first = (long)row * Sizes.Cols;
            int batch = row / Sizes.Rows;
            T* m = (T*)Range.M.Data, p = P;
            double keep = 1 - (Step.LearningRate * Step.WeightDecay), squares = 0;
            double ofRow = Range.V.Exists
                ? Real.ToDouble(m[row]) / ((double*)MeansAt)[batch] : 1;
            T* ofColumns = Range.V.Exists
                ? (T*)Range.V.Data + ((long)batch * Sizes.Cols) : m + first;
            for (int c = 0; c < Sizes.Cols; c++)
            {
                double change = Real.ToDouble(((T*)Range.Gradient.Data)[first + c]) * Factor
                    / Math.Sqrt(ofRow * Real.ToDouble(ofColumns[c]));
                squares += change * change;
                if (apply)
                    p[first + c] = Real.Of<T>(
                        (Real.ToDouble(p[first + c]) * keep) - (change * Rate));
            }

            if (apply && Range.Master.Exists)
                FloatBits.Narrow((float*)p + first, (ushort*)Range.Weights.Data + first,
                    Range.Weights.Type, Sizes.Cols);
            return squares;
        }
    }
}
