using System.Numerics.Tensors;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Weights;

/// <summary>
/// Factorisations in double of matrices with few rows, on one thread; whoever has a large matrix
/// multiplies it down to few rows first (<see cref="TruncatedSvd"/>).
/// </summary>
internal static class Factorisation
{
    // Rows that keep less of themselves than this beside those before them are rounding alone.
    private const double Dependent = 1e-13;
    private const int MostSweeps = 60;

    /// <summary>
    /// rows[count, size] = L[count, count] q[count, size], q orthonormal and written over rows, L
    /// lower triangular and returned. Gram and Schmidt's, every row twice. For a row that depends
    /// on those before it L has 0 on the diagonal, and q any row that is orthogonal to them.
    /// Expects count at most size.
    /// </summary>
    public static double[] Lq(double[] rows, int count, int size)
    {
        var lower = new double[count * count];
        for (int i = 0; i < count; i++)
        {
            Span<double> row = rows.AsSpan(i * size, size);
            double whole = TensorPrimitives.Norm<double>(row);
            double left = Remove(rows, i, row, lower.AsSpan(i * count, i));
            bool depends = !(left > Dependent * whole);
            lower[(i * count) + i] = depends ? 0 : left;
            for (uint draw = 0; depends; draw++)
            {
                for (int j = 0; j < size; j++)
                    row[j] = Philox.Draw(((uint)j, (uint)i, draw, 0), (1, 0)).X0 - 2147483647.5;
                whole = TensorPrimitives.Norm<double>(row);
                left = Remove(rows, i, row, default);
                depends = left < 1e-3 * whole;
            }

            TensorPrimitives.Divide(row, left, row);
        }

        return lower;
    }

    /// <summary>
    /// square[n, n] = U diag(s) Vt, s falling; U's columns are the rows of ut. Rows of Vt and ut
    /// where s is 0 are 0 in Vt. Hestenes 1958: rows are rotated in pairs until they are
    /// orthogonal.
    /// </summary>
    public static (double[] Ut, double[] S, double[] Vt) Svd(double[] square, int n)
    {
        double[] rows = [.. square], turns = new double[n * n];
        for (int i = 0; i < n; i++) turns[(i * n) + i] = 1;
        bool rotated = true;
        for (int sweep = 0; rotated && sweep < MostSweeps; sweep++)
        {
            rotated = false;
            for (int p = 0; p < n; p++)
                for (int q = p + 1; q < n; q++)
                    rotated |= Rotate(rows, turns, n, p, q);
        }

        double[] norms = [.. Enumerable.Range(0, n).Select(
            i => TensorPrimitives.Norm<double>(rows.AsSpan(i * n, n)))];
        int[] order = [.. Enumerable.Range(0, n).OrderByDescending(i => norms[i])];
        var (ut, s, vt) = (new double[n * n], new double[n], new double[n * n]);
        for (int k = 0; k < n; k++)
        {
            s[k] = norms[order[k]];
            turns.AsSpan(order[k] * n, n).CopyTo(ut.AsSpan(k * n));
            if (s[k] > 0)
                TensorPrimitives.Divide(rows.AsSpan(order[k] * n, n), s[k], vt.AsSpan(k * n, n));
        }

        return (ut, s, vt);
    }

    // Takes the part along the first rows out of one; returns what is left of it.
    private static double Remove(
        double[] rows, int count, Span<double> row, Span<double> along)
    {
        for (int pass = 0; pass < 2; pass++)
            for (int j = 0; j < count; j++)
            {
                ReadOnlySpan<double> other = rows.AsSpan(j * row.Length, row.Length);
                double part = TensorPrimitives.Dot(other, row);
                TensorPrimitives.MultiplyAdd(other, -part, row, row);
                if (along.Length > 0) along[j] += part;
            }

        return TensorPrimitives.Norm<double>(row);
    }

    private static bool Rotate(double[] rows, double[] turns, int n, int p, int q)
    {
        Span<double> first = rows.AsSpan(p * n, n), second = rows.AsSpan(q * n, n);
        double a = TensorPrimitives.SumOfSquares<double>(first);
        double b = TensorPrimitives.SumOfSquares<double>(second);
        double both = TensorPrimitives.Dot<double>(first, second);
        if (!(Math.Abs(both) > 1e-15 * Math.Sqrt(a * b))) return false;
        double ratio = (b - a) / (2 * both);
        double tan = (ratio < 0 ? -1 : 1) / (Math.Abs(ratio) + Math.Sqrt(1 + (ratio * ratio)));
        double cos = 1 / Math.Sqrt(1 + (tan * tan)), sin = cos * tan;
        Turn(first, second, cos, sin);
        Turn(turns.AsSpan(p * n, n), turns.AsSpan(q * n, n), cos, sin);
        return true;
    }

    private static void Turn(Span<double> first, Span<double> second, double cos, double sin)
    {
        for (int i = 0; i < first.Length; i++)
            (first[i], second[i]) = ((cos * first[i]) - (sin * second[i]),
                (sin * first[i]) + (cos * second[i]));
    }
}
