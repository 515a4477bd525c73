using System.Numerics.Tensors;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;

namespace MiniCpmNative.Engine.Weights;

/// <summary>
/// The largest singular values of a matrix and their vectors, W[m, n] ~ U diag(s) Vt: the products
/// with W in F32 with W as it is stored, all else in double. Either so many steps of subspace
/// iteration from drawn vectors (torch.svd_lowrank's algorithm, Halko et al. 2011, algorithm 5.1),
/// or until the values stand, by subspaces filtered with Chebyshev polynomials of W^T W that damp
/// what is below the subspace's smallest value (Zhou, Saad, Tiago and Chelikowsky 2006). A whole
/// decomposition of 3584 x 18944 takes minutes; this one some forty products with 136 vectors.
/// </summary>
internal sealed unsafe class TruncatedSvd
{
    private const int MostDegree = 10, MostRounds = 100;
    private const double Converged = 1e-6;

    // How much more a filter may amplify the first vector than the last that is wanted: what
    // rounding leaves of the first in the last must not outgrow it.
    private const double MostGrowth = 1e6;

    private readonly Gemm _gemm;
    private readonly MatrixView _w;
    private readonly int _block;
    private readonly float[] _small, _large;

    // rows <= cols: what is higher than wide is turned.
    private TruncatedSvd(Gemm gemm, MatrixView w, int block)
    {
        (_gemm, _w, _block) = (gemm, w, block);
        (_small, _large) = (new float[block * w.Rows], new float[block * w.Cols]);
    }

    /// <param name="gemm">Multiplies.</param>
    /// <param name="w">W[m, n], F32, BF16 or F16.</param>
    /// <param name="rank">How many values; at most m and n.</param>
    /// <param name="iterations">Steps, or null for all that are needed.</param>
    /// <param name="seed">Of the first vectors.</param>
    /// <returns>ut[rank, m], s[rank] falling, vt[rank, n].</returns>
    public static (double[] Ut, double[] S, double[] Vt) Of(
        Gemm gemm, MatrixView w, int rank, int? iterations, ulong seed)
    {
        bool turned = w.Rows > w.Cols;
        if (turned) w = w.T;
        int block = iterations is not null ? rank : Math.Min(w.Rows, (2 * rank) + 8);
        var svd = new TruncatedSvd(gemm, w, block);
        for (int i = 0; i < svd._small.Length; i++)
            svd._small[i] = Philox.Draw(
                ((uint)i, 0, 0, 1), ((uint)seed, (uint)(seed >> 32))).X0 / 2147483648f - 1;
        var (ut, s, vt) = iterations is { } steps ? svd.Iterate(steps) : svd.Filter(rank);
        Array.Resize(ref ut, rank * w.Rows);
        Array.Resize(ref vt, rank * w.Cols);
        return turned ? (vt, s[..rank], ut) : (ut, s[..rank], vt);
    }

    private (double[] Ut, double[] S, double[] Vt) Iterate(int steps)
    {
        Down();
        Orthonormalise(_large, _w.Cols);
        for (int step = 0; step < steps; step++)
        {
            Up();
            Orthonormalise(_small, _w.Rows);
            Down();
            Orthonormalise(_large, _w.Cols);
        }

        // W ~ (W Q) Q^T.
        double[] right = Doubles(_large);
        Up();
        var (vt, s, ut) = Decompose(Doubles(_small), right, _w.Rows, _w.Cols);
        return (ut, s, vt);
    }

    private (double[] Ut, double[] S, double[] Vt) Filter(int rank)
    {
        double last = double.PositiveInfinity;
        for (int round = 0; ; round++)
        {
            // The best of the subspace: W ~ Q (Q^T W).
            Orthonormalise(_small, _w.Rows);
            double[] left = Doubles(_small);
            Down();
            var found = Decompose(Doubles(_large), left, _w.Cols, _w.Rows);
            Floats(found.Ut, _small);
            Floats(found.Vt, _large);
            if (_block == _w.Rows) return found;
            // W v = s u would hold of true values; W^T u = s v holds of all.
            Up();
            double error = 0;
            for (int i = 0; i < rank; i++)
            {
                double squares = 0;
                for (int j = 0; j < _w.Rows; j++)
                {
                    double off = _small[(i * _w.Rows) + j]
                        - (found.S[i] * found.Ut[(i * _w.Rows) + j]);
                    squares += off * off;
                }

                error = Math.Max(error, Math.Sqrt(squares));
            }

            // Or no better than before: what the rounding of products leaves.
            double largest = found.S[0], smallest = found.S[_block - 1];
            if (error <= Converged * largest || (round > 2 && error > last / 2)
                || smallest <= Converged * largest || round == MostRounds)
                return found;
            last = error;
            Floats(found.Ut, _small);
            Damp(smallest * smallest, found.S[rank - 1] * found.S[rank - 1], largest * largest);
        }
    }

    // small = T(small), the Chebyshev polynomial of W W^T that is at most 1 in 0..bound and grows
    // fastest above, divided on the way by what it is at the top.
    private void Damp(double bound, double wanted, double top)
    {
        double half = bound / 2, sigma = half / (top - half), first = sigma;
        double apart = Math.Acosh((top - half) / half) - Math.Acosh((wanted - half) / half);
        int degree = (int)Math.Clamp(Math.Log(MostGrowth) / Math.Max(apart, 0.1), 1, MostDegree);
        var before = new float[_small.Length];
        for (int step = 0; step < degree; step++)
        {
            float[] now = [.. _small];
            Down();
            Up();
            double next = step == 0 ? sigma : 1 / ((2 / first) - sigma);
            double factor = (step == 0 ? 1 : 2) * next / half;
            double back = step == 0 ? 0 : sigma * next;
            for (int i = 0; i < now.Length; i++)
                _small[i] = (float)((factor * (_small[i] - (half * now[i]))) - (back * before[i]));
            (before, sigma) = (now, next);
        }
    }

    // left[block, width] = L q and W ~ base^T left: the values are those of L.
    private (double[] Ut, double[] S, double[] Vt) Decompose(
        double[] product, double[] basis, int width, int height)
    {
        double[] lower = Factorisation.Lq(product, _block, width);
        var (ut, s, vt) = Factorisation.Svd(lower, _block);
        return (Combine(ut, basis, height), s, Combine(vt, product, width));
    }

    // c[block, width] = turns[block, block] rows[block, width].
    private double[] Combine(double[] turns, double[] rows, int width)
    {
        var combined = new double[rows.Length];
        for (int i = 0; i < _block; i++)
        {
            Span<double> sum = combined.AsSpan(i * width, width);
            for (int j = 0; j < _block; j++)
                TensorPrimitives.MultiplyAdd(
                    rows.AsSpan(j * width, width), turns[(i * _block) + j], sum, sum);
        }

        return combined;
    }

    private void Orthonormalise(float[] rows, int size)
    {
        double[] exact = Doubles(rows);
        Factorisation.Lq(exact, _block, size);
        Floats(exact, rows);
    }

    // large = small W.
    private void Down() => Multiply(_small, _w, _large);

    // small = large W^T.
    private void Up() => Multiply(_large, _w.T, _small);

    private void Multiply(float[] x, MatrixView w, float[] y)
    {
        fixed (float* from = x)
        fixed (float* to = y)
            _gemm.Multiply(new MatrixView(from, DType.F32, _block, w.Rows), w,
                new MatrixView(to, DType.F32, _block, w.Cols));
    }

    private static double[] Doubles(float[] values)
    {
        var wide = new double[values.Length];
        TensorPrimitives.ConvertTruncating<float, double>(values, wide);
        return wide;
    }

    private static void Floats(double[] values, float[] target) =>
        TensorPrimitives.ConvertTruncating<double, float>(values, target);
}
