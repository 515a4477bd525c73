using System.Numerics;
using System.Runtime.InteropServices;
using System.Runtime.Intrinsics;
using MiniCpmNative.Kernels.Cpu;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Shape, mask and inputs of one attention problem in double; q k v dO are dense.
/// </summary>
public sealed record AttentionProblem(
    int Heads, int KvHeads, int HeadDim, int[] StartsQ, int[] StartsK, int[]? KeyLengths,
    bool Causal, double Scale)
{
    public int Tokens => StartsQ[^1];

    public int KeyTokens => StartsK[^1];

    /// <summary>Keys are counted from the end of those that count, not of all.</summary>
    public bool Cached { get; init; }

    public double[] Q { get; init; } = [];

    public double[] K { get; init; } = [];

    public double[] V { get; init; } = [];

    public double[] DO { get; init; } = [];

    /// <summary>Random inputs that float represents exactly.</summary>
    public static AttentionProblem Random(
        int heads, int kvHeads, int headDim, int[] queries, int[] keys, bool causal,
        int[]? keyLengths = null, double spread = 1, int seed = 5)
    {
        var random = new Random(seed);
        var shape = new AttentionProblem(
            heads, kvHeads, headDim, Starts(queries), Starts(keys), keyLengths, causal,
            1 / Math.Sqrt(headDim));
        int q = shape.Tokens * heads * headDim, k = shape.KeyTokens * kvHeads * headDim;
        return shape with { Q = Some(q), K = Some(k), V = Some(k), DO = Some(q) };

        double[] Some(int count)
        {
            var values = new double[count];
            for (int i = 0; i < count; i++)
                values[i] = (float)(spread * ((random.NextDouble() * 3) - 1.5));
            return values;
        }
    }

    /// <summary>Keys that a query, counted within its sequence, sees.</summary>
    public int Seen(int sequence, int query)
    {
        int queries = StartsQ[sequence + 1] - StartsQ[sequence];
        int keys = StartsK[sequence + 1] - StartsK[sequence];
        int limit = KeyLengths is null ? keys : Math.Clamp(KeyLengths[sequence], 0, keys);
        int last = Cached ? limit : keys;
        return Causal ? Math.Clamp(query + 1 + last - queries, 0, limit) : limit;
    }

    /// <summary>The same with keys and values that are no numbers where no query sees
    /// them.</summary>
    public AttentionProblem WithBadKeysUnseen()
    {
        double[] k = [.. K], v = [.. V];
        int row = KvHeads * HeadDim;
        for (int s = 0; s + 1 < StartsQ.Length; s++)
        {
            int queries = StartsQ[s + 1] - StartsQ[s];
            int first = StartsK[s] + (queries == 0 ? 0 : Seen(s, queries - 1));
            foreach (double[] values in (double[][])[k, v])
                Array.Fill(values, double.NaN, first * row, (StartsK[s + 1] - first) * row);
        }

        return this with { K = k, V = v };
    }

    /// <summary>
    /// The formulas written out with a whole score row, independent of the tiled kernels.
    /// </summary>
    public AttentionResult Naive()
    {
        var r = new AttentionResult(
            new double[Q.Length], new double[Tokens * Heads], new double[Q.Length],
            new double[K.Length], new double[K.Length]);
        for (int s = 0; s + 1 < StartsQ.Length; s++)
        {
            for (int i = 0; i < StartsQ[s + 1] - StartsQ[s]; i++)
            {
                for (int h = 0; h < Heads; h++)
                    NaiveRow(r, StartsQ[s] + i, StartsK[s], Seen(s, i), h);
            }
        }

        return r;
    }

    private void NaiveRow(in AttentionResult r, int token, int firstKey, int seen, int head)
    {
        int q = ((token * Heads) + head) * HeadDim;
        int Key(int j) => (((firstKey + j) * KvHeads) + (head / (Heads / KvHeads))) * HeadDim;
        double Dot(double[] x, int xAt, double[] y, int yAt)
        {
            double sum = 0;
            for (int d = 0; d < HeadDim; d++) sum += x[xAt + d] * y[yAt + d];
            return sum;
        }

        if (seen == 0)
        {
            r.Lse[(token * Heads) + head] = double.NegativeInfinity;
            return;
        }

        var logits = new double[seen];
        for (int j = 0; j < seen; j++) logits[j] = Scale * Dot(Q, q, K, Key(j));
        double max = logits.Max(), total = logits.Sum(x => Math.Exp(x - max));
        r.Lse[(token * Heads) + head] = max + Math.Log(total);
        var p = Array.ConvertAll(logits, x => Math.Exp(x - max) / total);
        double delta = 0;
        for (int j = 0; j < seen; j++)
        {
            delta += p[j] * Dot(DO, q, V, Key(j));
            for (int d = 0; d < HeadDim; d++) r.O[q + d] += p[j] * V[Key(j) + d];
        }

        for (int j = 0; j < seen; j++)
        {
            double ds = p[j] * (Dot(DO, q, V, Key(j)) - delta);
            for (int d = 0; d < HeadDim; d++)
            {
                r.DQ[q + d] += Scale * ds * K[Key(j) + d];
                r.DK[Key(j) + d] += Scale * ds * Q[q + d];
                r.DV[Key(j) + d] += p[j] * DO[q + d];
            }
        }
    }

    private static int[] Starts(int[] lengths)
    {
        var starts = new int[lengths.Length + 1];
        for (int s = 0; s < lengths.Length; s++) starts[s + 1] = starts[s] + lengths[s];
        return starts;
    }
}

/// <summary>All results, dense.</summary>
public readonly record struct AttentionResult(
    double[] O, double[] Lse, double[] DQ, double[] DK, double[] DV)
{
    public IEnumerable<(string Name, double[] Values)> All() =>
        [("o", O), ("lse", Lse), ("dq", DQ), ("dk", DK), ("dv", DV)];
}

/// <summary>Which gradients are asked for, and how.</summary>
[Flags]
internal enum Ask
{
    None = 0,
    DQ = 1,
    DK = 2,
    DV = 4,
    All = 7,
    Accumulate = 8,
}

/// <summary>
/// Runs the kernels on a problem. With gap each row is followed by foreign elements, as in a fused
/// qkv buffer; around every buffer lie guard elements, and Run fails when a write touches either.
/// </summary>
internal sealed unsafe class AttentionRunner<T>(
    int threads = 2, int gap = 0, bool narrow = false, int runs = 1)
    where T : unmanaged, IBinaryFloatingPointIeee754<T>
{
    /// <summary>What accumulated gradients start from.</summary>
    public const double Start = 0.5;

    private const double Guard = -12345;

    /// <summary>Managed bytes that the last of the runs allocated on the calling thread.</summary>
    public long Allocated { get; private set; }

    public AttentionResult Run(AttentionProblem problem, Ask ask = Ask.All)
    {
        int row = problem.Heads * problem.HeadDim, keyRow = problem.KvHeads * problem.HeadDim;
        var q = new Rows(problem.Q, row, gap);
        var k = new Rows(problem.K, keyRow, gap);
        var v = new Rows(problem.V, keyRow, gap);
        var dO = new Rows(problem.DO, row, gap);
        var o = new Rows(new double[problem.Q.Length], row, gap);
        var lse = new Rows(new double[problem.Tokens * problem.Heads], problem.Heads, 0);
        var dq = new Rows(Filled(problem.Q.Length), row, gap);
        var dk = new Rows(Filled(problem.K.Length), keyRow, gap);
        var dv = new Rows(Filled(problem.K.Length), keyRow, gap);
        using var workers = new Workers(threads);
        fixed (int* startsQ = problem.StartsQ, startsK = problem.StartsK)
        fixed (int* lengths = problem.KeyLengths)
        {
            var arguments = new AttentionArguments<T>
            {
                Q = q.Data,
                K = k.Data,
                V = v.Data,
                O = o.Data,
                Lse = lse.Data,
                QStride = q.Stride,
                KStride = k.Stride,
                VStride = v.Stride,
                OStride = o.Stride,
                Heads = problem.Heads,
                KvHeads = problem.KvHeads,
                HeadDim = problem.HeadDim,
                Sequences = problem.StartsQ.Length - 1,
                CuSeqlensQ = startsQ,
                CuSeqlensK = startsK,
                KeyLengths = lengths,
                Causal = problem.Causal,
                Cached = problem.Cached,
                Scale = T.CreateChecked(problem.Scale),
                Scratch = null,
            };
            using var scratch =
                new HugeMemory(FlashAttention.BackwardScratchBytes(arguments, threads) + (1 << 12));
            arguments = arguments with { Scratch = scratch.Data };
            var gradients = new AttentionGradients<T>
            {
                DO = dO.Data,
                DOStride = dO.Stride,
                DQ = Target(dq, Ask.DQ),
                DK = Target(dk, Ask.DK),
                DV = Target(dv, Ask.DV),
            };
            for (int run = 0; run < runs; run++)
            {
                long before = GC.GetAllocatedBytesForCurrentThread();
                Call(workers, arguments, gradients);
                Allocated = GC.GetAllocatedBytesForCurrentThread() - before;
            }
        }

        foreach (Rows rows in (Rows[])[q, k, v, dO]) rows.Dense();
        return new AttentionResult(o.Dense(), lse.Dense(), dq.Dense(), dk.Dense(), dv.Dense());

        AttentionTarget<T> Target(Rows rows, Ask which) => (ask & which) == 0
            ? default
            : new()
            {
                Data = rows.Data,
                Stride = rows.Stride,
                Accumulate = ask.HasFlag(Ask.Accumulate),
            };
    }

    private void Call(
        Workers workers, in AttentionArguments<T> arguments, in AttentionGradients<T> gradients)
    {
        if (narrow)
        {
            FlashAttention.Forward<Lanes256<T>, Vector256<T>, T>(workers, arguments);
            FlashAttention.Backward<Lanes256<T>, Vector256<T>, T>(workers, arguments, gradients);
        }
        else
        {
            FlashAttention.Forward(workers, arguments);
            FlashAttention.Backward(workers, arguments, gradients);
        }
    }

    private static double[] Filled(int count)
    {
        var values = new double[count];
        Array.Fill(values, Start);
        return values;
    }

    private sealed class Rows
    {
        private const int Margin = 64;
        private readonly T[] _memory;
        private readonly int _row, _count;

        public Rows(double[] values, int row, int gap)
        {
            (_row, _count, Stride) = (row, values.Length / row, row + gap);
            _memory = GC.AllocateArray<T>((_count * Stride) + (2 * Margin), pinned: true);
            Array.Fill(_memory, T.CreateChecked(Guard));
            for (int i = 0; i < values.Length; i++)
                _memory[Index(i)] = T.CreateTruncating(values[i]);
            Data = (T*)Marshal.UnsafeAddrOfPinnedArrayElement(_memory, Margin);
        }

        public T* Data { get; }

        public int Stride { get; }

        public double[] Dense()
        {
            var values = new double[_count * _row];
            for (int i = 0; i < values.Length; i++)
                values[i] = double.CreateTruncating(_memory[Index(i)]);
            for (int i = 0; i < _memory.Length; i++)
            {
                int at = i - Margin;
                bool mine = at >= 0 && at < _count * Stride && at % Stride < _row;
                if (mine) continue;
                Assert.That(double.CreateTruncating(_memory[i]), Is.EqualTo(Guard), $"guard {at}");
            }

            return values;
        }

        private int Index(int i) => Margin + (i / _row * Stride) + (i % _row);
    }
}
