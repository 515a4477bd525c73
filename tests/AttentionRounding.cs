using MiniCpmNative.Kernels;

namespace MiniCpmNative.Tests;

/// <summary>
/// How far the gradients of attention may lie from those in double, element by element, when o, p
/// and dS are rounded to the type that the products take and the results to that they are stored
/// in. An error of rounding x lies within h(x), half a unit in x's last place, and is taken as
/// spread evenly there and independent of the others; a sum of c e has then the variance
/// sum (c h)^2 / 3 and lies beyond 8 of its deviations once in 4e13 times (uniform errors are
/// sub-Gaussian: 2 exp(-8^2 / 2)). A sum of few never exceeds sum |c| h, whatever its errors are.
/// What accumulates in float on the way is far below that.
/// </summary>
internal sealed class AttentionRounding
{
    private const double Deviations = 8;

    private readonly AttentionProblem _problem;
    private readonly DType _type;
    private readonly bool _productsRound;
    private readonly Errors _dq, _dk, _dv;

    private AttentionRounding(AttentionProblem problem, in AttentionResult exact, DType type)
    {
        (_problem, _type) = (problem, type);
        _productsRound = problem.HeadDim is 64 or 72 or 80 or 96 or 128 or 256;
        (_dq, _dk, _dv) = (new(exact.DQ.Length), new(exact.DK.Length), new(exact.DV.Length));
        for (int s = 0; s + 1 < problem.StartsQ.Length; s++)
            for (int i = 0; i < problem.StartsQ[s + 1] - problem.StartsQ[s]; i++)
                for (int head = 0; head < problem.Heads; head++)
                    AddRow(exact, problem.StartsQ[s] + i, problem.StartsK[s], problem.Seen(s, i), head);
    }

    /// <summary>The most that each element of dq, dk and dv may differ.</summary>
    public static (double[] DQ, double[] DK, double[] DV) Allowed(
        AttentionProblem problem, in AttentionResult exact, DType type)
    {
        var rounding = new AttentionRounding(problem, exact, type);
        return (rounding._dq.Allowed(exact.DQ, type), rounding._dk.Allowed(exact.DK, type),
            rounding._dv.Allowed(exact.DV, type));
    }

    private void AddRow(in AttentionResult exact, int token, int firstKey, int seen, int head)
    {
        AttentionProblem a = _problem;
        int dim = a.HeadDim, statistic = (token * a.Heads) + head, q = statistic * dim;
        int Key(int j) => (((firstKey + j) * a.KvHeads) + (head / (a.Heads / a.KvHeads))) * dim;
        double Dot(double[] x, int xAt, double[] y, int yAt)
        {
            double sum = 0;
            for (int d = 0; d < dim; d++) sum += x[xAt + d] * y[yAt + d];
            return sum;
        }

        // o enters dS by delta = dO . o, which all keys of the query share.
        double delta = Dot(a.DO, q, exact.O, q), deltaSquare = 0, deltaMost = 0;
        for (int d = 0; d < dim; d++)
        {
            double error = Math.Abs(a.DO[q + d]) * Half(exact.O[q + d], _type);
            deltaSquare += error * error;
            deltaMost += error;
        }

        var mean = new double[dim];
        for (int j = 0; j < seen; j++)
        {
            int k = Key(j);
            double p = Math.Exp((a.Scale * Dot(a.Q, q, a.K, k)) - exact.Lse[statistic]);
            double ds = p * (Dot(a.DO, q, a.V, k) - delta);
            double halfP = _productsRound ? Half(p, _type) : 0;
            double halfDs = _productsRound ? a.Scale * Half(ds, _type) : 0;
            for (int d = 0; d < dim; d++)
            {
                mean[d] += a.Scale * p * a.K[k + d];
                _dq.Add(q + d, halfDs * a.K[k + d]);
                _dk.Add(k + d, halfDs * a.Q[q + d]);
                _dv.Add(k + d, halfP * a.DO[q + d]);
                _dk.Add(k + d, a.Scale * p * a.Q[q + d], deltaSquare, deltaMost);
            }
        }

        for (int d = 0; d < dim; d++) _dq.Add(q + d, mean[d], deltaSquare, deltaMost);
    }

    // Half a unit in the last place of x.
    private static double Half(double x, DType type) => x == 0
        ? 0
        : Math.ScaleB(1, Math.ILogB(x) - (type == DType.BF16 ? 8 : 24));

    private sealed class Errors(int count)
    {
        private readonly double[] _squares = new double[count], _most = new double[count];

        public void Add(int at, double half) => Add(at, half, 1, 1);

        // c times errors whose halves have a sum of squares and a sum.
        public void Add(int at, double c, double squares, double most)
        {
            _squares[at] += c * c * squares;
            _most[at] += Math.Abs(c) * most;
        }

        public double[] Allowed(double[] exact, DType type)
        {
            var allowed = new double[exact.Length];
            double largest = exact.Select(Math.Abs).Append(1).Max();
            for (int i = 0; i < exact.Length; i++)
            {
                double inside = Math.Min(_most[i], Deviations * Math.Sqrt(_squares[i] / 3))
                    + (1e-5 * largest);
                allowed[i] = inside + Half(Math.Abs(exact[i]) + inside, type);
            }

            return allowed;
        }
    }
}
