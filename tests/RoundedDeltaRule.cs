using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Ops;
using static MiniCpmNative.Tests.RoundedLora;

namespace MiniCpmNative.Tests;

/// <summary>
/// <see cref="DeltaRule"/> by the equations of its chunks, matrix by matrix in double, that rounds
/// to a storage type what a GPU rounds: the operands of products, of which states and the results
/// of other products are some.
/// </summary>
internal sealed record RoundedDeltaRule(DeltaRule Inner, DType Storage) : RoundedOp(Inner, Storage)
{
    private const int Tokens = 64;

    private int KeyDim => Inner.KeyDim;

    private int ValueDim => Inner.ValueDim;

    private int Group => Inner.ValueHeads / Inner.KeyHeads;

    public override void CpuForward<T>(in CpuCall<T> call)
    {
        var y = new double[call.Output.Count];
        Operands x = Read(call);
        for (int s = 0; s + 1 < x.Starts.Length; s++)
            for (int head = 0; head < Inner.ValueHeads; head++)
                foreach (Chunk c in Chunks(x, s, head))
                {
                    double[] o = Product(c.Q, c.State, c.Count, ValueDim);
                    double[] own = Product(c.Scores, c.X, c.Count, ValueDim);
                    for (int i = 0; i < o.Length; i++)
                        o[i] = (c.Decay[i / ValueDim] * o[i]) + own[i];
                    Put(y, o, c, Inner.ValueHeads * ValueDim, head * ValueDim, ValueDim);
                }

        Write(call.Output, y);
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        Operands x = Read(call);
        double[] dy = Doubles(call.OutputGradient), dQkv = new double[x.Qkv.Length];
        double[] dGates = new double[x.Gates.Length], dLog = new double[Inner.ValueHeads];
        double[] dBias = new double[Inner.ValueHeads];
        for (int s = 0; s + 1 < x.Starts.Length; s++)
            for (int head = 0; head < Inner.ValueHeads; head++)
            {
                var dState = new double[KeyDim * ValueDim];
                foreach (Chunk c in Chunks(x, s, head).AsEnumerable().Reverse())
                    dState = Backward(x, c, head, dy, dState, dQkv, dGates, dLog, dBias);
            }

        Write(call.Gradient(0).Into, dQkv);
        Write(call.Gradient(1).Into, dGates);
        Write(call.Gradient(2).Into, dLog);
        Write(call.Gradient(3).Into, dBias);
    }

    // Returns dS, adds to the rest.
    private double[] Backward(Operands x, Chunk c, int head, double[] dy, double[] dEnd,
        double[] dQkv, double[] dGates, double[] dLog, double[] dBias)
    {
        int n = c.Count, key = head / Group, keys = Inner.KeyHeads * KeyDim;
        double[] dO = Take(dy, c, Inner.ValueHeads * ValueDim, head * ValueDim, ValueDim);
        double[] end = Rounded(dEnd), across = Transposed(end, KeyDim, ValueDim);
        double[] stateAcross = Transposed(c.State, KeyDim, ValueDim);
        double[] dX = Product(Transposed(c.Scores, n, n), dO, n, ValueDim);
        double[] fromEnd = Product(c.K, end, n, ValueDim);
        dX = Rounded([.. dX.Select((d, i) => d + (c.Rest[i / ValueDim] * fromEnd[i]))]);
        double[] dR = Product(Transposed(c.Inverse, n, n), dX, n, ValueDim);
        double[] dRead = Rounded([.. dR.Select((d, i) =>
            -c.Beta[i / ValueDim] * c.Decay[i / ValueDim] * d)]);
        dR = Rounded(dR);
        double[] decayed = Rounded([.. dO.Select((d, i) => c.Decay[i / ValueDim] * d)]);
        double[] rest = Rounded([.. c.X.Select((v, i) => c.Rest[i / ValueDim] * v)]);
        double[] dStart = Product(Transposed(c.Q, n, KeyDim), decayed, KeyDim, ValueDim);
        double[] written = Product(Transposed(c.K, n, KeyDim), dRead, KeyDim, ValueDim);
        for (int i = 0; i < dStart.Length; i++)
            dStart[i] += written[i] + (c.Decay[n - 1] * dEnd[i]);

        double[] dq = Product(decayed, stateAcross, n, KeyDim);
        double[] dk = Product(rest, across, n, KeyDim);
        double[] read = Product(dR, stateAcross, n, KeyDim);
        double[] xAcross = Transposed(c.X, n, ValueDim);
        double[] dp = Product(dO, xAcross, n, n), dl = Product(dR, xAcross, n, n);
        double[] db = new double[n], dBeta = new double[n];
        double[] a = new double[n * n], lower = new double[n * n];
        db[n - 1] = c.Decay[n - 1] * c.State.Zip(end, (p, q) => p * q).Sum();
        for (int i = 0; i < n; i++)
        {
            double drawn = c.Decay[i] * Dot(c.K, read, i, KeyDim), kept = Dot(c.K, dk, i, KeyDim);
            db[i] += Dot(c.Q, dq, i, KeyDim) - kept - (c.Beta[i] * drawn);
            db[n - 1] += kept;
            dBeta[i] += Dot(dR, c.V, i, ValueDim) - drawn;
            for (int j = 0; j <= i; j++)
            {
                int at = (i * n) + j;
                double decay = Math.Exp(c.Sum[i] - c.Sum[j]);
                a[at] = dp[at] * decay;
                if (j == i) continue;
                double ofLower = -dl[at] * decay * c.KeyProducts[at];
                double pull = (dp[at] * c.Scores[at]) + (c.Beta[i] * ofLower);
                db[i] += pull;
                db[j] -= pull;
                dBeta[i] += ofLower;
                lower[at] = -dl[at] * decay * c.Beta[i];
            }
        }

        (a, lower) = (Rounded(a), Rounded(lower));
        double[] ofQueries = Product(a, c.K, n, KeyDim);
        double[] ofKeys = Product(Transposed(a, n, n), c.Q, n, KeyDim);
        double[] below = Product(lower, c.K, n, KeyDim);
        double[] above = Product(Transposed(lower, n, n), c.K, n, KeyDim);
        for (int i = 0; i < dq.Length; i++)
        {
            int r = i / KeyDim;
            dq[i] += ofQueries[i];
            dk[i] += ofKeys[i] + below[i] + above[i] - (c.Beta[r] * c.Decay[r] * read[i]);
        }

        AddUnits(x, c, dQkv, dq, key * KeyDim, 1 / Math.Sqrt(KeyDim));
        AddUnits(x, c, dQkv, dk, keys + (key * KeyDim), 1);
        Put(dQkv, [.. dR.Select((d, i) => c.Beta[i / ValueDim] * d)], c, x.Cols,
            (2 * keys) + (head * ValueDim), ValueDim);
        double sum = 0, strength = Math.Exp(x.ALog[head]);
        for (int i = n - 1; i >= 0; i--)
        {
            sum += db[i];
            int row = (c.First + i) * 2 * Inner.ValueHeads;
            double input = x.Gates[row + Inner.ValueHeads + head] + x.DtBias[head];
            double da = -sum * strength / (1 + Math.Exp(-input));
            dGates[row + head] = dBeta[i] * c.Beta[i] * (1 - c.Beta[i]);
            dGates[row + Inner.ValueHeads + head] = da;
            dLog[head] += sum * c.Gate[i];
            dBias[head] += da;
        }

        return dStart;
    }

    private List<Chunk> Chunks(Operands x, int sequence, int head)
    {
        var chunks = new List<Chunk>();
        var state = new double[KeyDim * ValueDim];
        int end = x.Starts[sequence + 1], keys = Inner.KeyHeads * KeyDim;
        for (int first = x.Starts[sequence]; first < end; first += Tokens)
        {
            int n = Math.Min(Tokens, end - first);
            var c = new Chunk(first, n) { State = Rounded(state) };
            c.Q = Units(x, c, head / Group * KeyDim, 1 / Math.Sqrt(KeyDim));
            c.K = Units(x, c, keys + (head / Group * KeyDim), 1);
            c.V = Take(x.Qkv, c, x.Cols, (2 * keys) + (head * ValueDim), ValueDim);
            for (int i = 0; i < n; i++)
            {
                int row = (first + i) * 2 * Inner.ValueHeads;
                double input = x.Gates[row + Inner.ValueHeads + head] + x.DtBias[head];
                c.Beta[i] = 1 / (1 + Math.Exp(-x.Gates[row + head]));
                c.Gate[i] = -Math.Exp(x.ALog[head]) * Math.Log(1 + Math.Exp(input));
                c.Sum[i] = c.Gate[i] + (i > 0 ? c.Sum[i - 1] : 0);
                c.Decay[i] = Math.Exp(c.Sum[i]);
            }

            for (int i = 0; i < n; i++) c.Rest[i] = Math.Exp(c.Sum[n - 1] - c.Sum[i]);
            c.KeyProducts = Product(c.K, Transposed(c.K, n, KeyDim), n, n);
            double[] scores = Product(c.Q, Transposed(c.K, n, KeyDim), n, n);
            c.Inverse = new double[n * n];
            for (int i = 0; i < n; i++)
            {
                c.Inverse[(i * n) + i] = 1;
                for (int j = 0; j < n; j++)
                {
                    double decay = Math.Exp(c.Sum[i] - c.Sum[j]);
                    scores[(i * n) + j] *= j <= i ? decay : 0;
                    if (j >= i) continue;
                    double lower = c.Beta[i] * decay * c.KeyProducts[(i * n) + j];
                    for (int k = 0; k <= j; k++)
                        c.Inverse[(i * n) + k] -= lower * c.Inverse[(j * n) + k];
                }
            }

            (c.Scores, c.Inverse) = (Rounded(scores), Rounded(c.Inverse));
            double[] read = Product(c.K, c.State, n, ValueDim);
            double[] r = Rounded([.. read.Select((v, i) => c.Beta[i / ValueDim]
                * (c.V[i] - (c.Decay[i / ValueDim] * v)))]);
            double[] solved = Product(c.Inverse, r, n, ValueDim);
            c.X = Rounded(solved);
            double[] rest = Rounded([.. solved.Select((v, i) => c.Rest[i / ValueDim] * v)]);
            double[] written = Product(Transposed(c.K, n, KeyDim), rest, KeyDim, ValueDim);
            state = [.. state.Zip(written, (p, q) => (c.Decay[n - 1] * p) + q)];
            chunks.Add(c);
        }

        return chunks;
    }

    private double[] Units(Operands x, Chunk c, int column, double scale)
    {
        double[] rows = Take(x.Qkv, c, x.Cols, column, KeyDim);
        return Rounded(
            [.. rows.Select((v, i) => v * scale / Length(rows, i / KeyDim))]);
    }

    private void AddUnits(
        Operands x, Chunk c, double[] into, double[] gradient, int column, double scale)
    {
        double[] rows = Take(x.Qkv, c, x.Cols, column, KeyDim);
        for (int i = 0; i < rows.Length; i++)
        {
            double length = Length(rows, i / KeyDim);
            double pull = Dot(rows, gradient, i / KeyDim, KeyDim) / (length * length);
            into[((c.First + (i / KeyDim)) * x.Cols) + column + (i % KeyDim)] +=
                scale / length * (gradient[i] - (rows[i] * pull));
        }
    }

    private double Length(double[] rows, int row) =>
        Math.Sqrt(Dot(rows, rows, row, KeyDim) + 1e-6);

    private static double Dot(double[] a, double[] b, int row, int cols)
    {
        double sum = 0;
        for (int c = row * cols; c < (row + 1) * cols; c++) sum += a[c] * b[c];
        return sum;
    }

    private static double[] Take(double[] from, Chunk c, int stride, int column, int cols) =>
    [
        .. Enumerable.Range(0, c.Count * cols)
            .Select(i => from[((c.First + (i / cols)) * stride) + column + (i % cols)]),
    ];

    private static void Put(
        double[] into, double[] values, Chunk c, int stride, int column, int cols)
    {
        for (int i = 0; i < values.Length; i++)
            into[((c.First + (i / cols)) * stride) + column + (i % cols)] = values[i];
    }

    private static Operands Read<T>(in CpuCall<T> call)
        where T : unmanaged, System.Numerics.IBinaryFloatingPointIeee754<T>
    {
        Matrix<int> starts = call.Ints(4);
        return new(Doubles(call.In(0)), call.In(0).Cols, Doubles(call.In(1)), Doubles(call.In(2)),
            Doubles(call.In(3)),
            [.. starts.RowSpan(0)]);
    }

    private sealed record Operands(double[] Qkv, int Cols, double[] Gates, double[] ALog,
        double[] DtBias, int[] Starts);

    private sealed class Chunk(int first, int count)
    {
        public readonly int First = first, Count = count;
        public readonly double[] Beta = new double[count], Gate = new double[count];
        public readonly double[] Sum = new double[count], Decay = new double[count];
        public readonly double[] Rest = new double[count];
        public double[] State = [], Q = [], K = [], V = [], X = [], KeyProducts = [], Scores = [];
        public double[] Inverse = [];
    }
}
