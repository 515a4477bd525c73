using System.Diagnostics;
using MiniCpmNative.Kernels.Cpu;

namespace MiniCpmNative.Bench;

/// <summary>
/// Attention forward and backward at the family's shapes: `bench attention [threads] [seconds]`.
/// GFLOP/s count the visible pairs only, 4 * headDim forward and 10 * headDim backward (five
/// products), also where backward works through seven.
/// </summary>
internal static unsafe class AttentionBench
{
    private sealed record Case(
        string Name, int Queries, int Keys, int Heads, int KvHeads, int HeadDim, bool Causal)
    {
        public double Pairs =>
            (Causal ? Queries * (Queries + 1.0) / 2 : Queries * (double)Keys) * Heads;
    }

    private static readonly Case[] Cases =
    [
        new("step benchmark", 512, 512, 8, 8, 64, true),
        new("decoder 2.6", 1024, 1024, 28, 4, 128, true),
        new("vision", 1024, 1024, 16, 16, 72, false),
        new("resampler", 64, 1024, 28, 28, 128, false),
    ];

    public static void Run(string[] args)
    {
        int threads = args.Length > 0 ? int.Parse(args[0]) : Environment.ProcessorCount;
        double seconds = args.Length > 1 ? double.Parse(args[1]) : 1;
        using var workers = new Workers(threads);
        Console.WriteLine($"{threads} threads, best of runs over {seconds} s, float");
        foreach (Case c in Cases) Measure(c, workers, seconds);
    }

    private static void Measure(Case c, Workers workers, double seconds)
    {
        int row = c.Heads * c.HeadDim, keyRow = c.KvHeads * c.HeadDim;
        long q = (long)c.Queries * row, k = (long)c.Keys * keyRow;
        long elements = (4 * q) + (4 * k) + ((long)c.Queries * c.Heads);
        using var memory = new HugeMemory(elements * sizeof(float));
        var next = (float*)memory.Data;
        float* Take(long count)
        {
            float* taken = next;
            next += count;
            return taken;
        }

        float* queries = Take(q), dO = Take(q), keys = Take(k), values = Take(k);
        var random = new Random(1);
        for (long i = 0; i < (2 * q) + (2 * k); i++) queries[i] = (random.NextSingle() * 2) - 1;
        int* starts = stackalloc int[4] { 0, c.Queries, 0, c.Keys };
        var arguments = new AttentionArguments<float>
        {
            Q = queries,
            K = keys,
            V = values,
            O = Take(q),
            QStride = row,
            KStride = keyRow,
            VStride = keyRow,
            OStride = row,
            Lse = Take((long)c.Queries * c.Heads),
            Heads = c.Heads,
            KvHeads = c.KvHeads,
            HeadDim = c.HeadDim,
            Sequences = 1,
            CuSeqlensQ = starts,
            CuSeqlensK = starts + 2,
            Causal = c.Causal,
            Scale = 1 / MathF.Sqrt(c.HeadDim),
            Scratch = null,
        };
        using var scratch =
            new HugeMemory(FlashAttention.BackwardScratchBytes(arguments, workers.Count));
        arguments = arguments with { Scratch = scratch.Data };
        var gradients = new AttentionGradients<float>
        {
            DO = dO,
            DOStride = row,
            DQ = new() { Data = Take(q), Stride = row },
            DK = new() { Data = Take(k), Stride = keyRow },
            DV = new() { Data = Take(k), Stride = keyRow },
        };
        double forward = Best(seconds, () => FlashAttention.Forward(workers, arguments));
        double backward =
            Best(seconds, () => FlashAttention.Backward(workers, arguments, gradients));
        double flops = c.Pairs * c.HeadDim / 1e9;
        Console.WriteLine(
            $"{c.Name,-16} {c.Queries}x{c.Keys} {c.Heads}/{c.KvHeads} heads of {c.HeadDim,-4}"
            + $" forward {forward * 1e3,8:F3} ms {4 * flops / forward,6:F1} GFLOP/s"
            + $"   backward {backward * 1e3,8:F3} ms {10 * flops / backward,6:F1} GFLOP/s");
    }

    private static double Best(double seconds, Action action)
    {
        for (int i = 0; i < 30; i++) action();
        var times = new List<double>();
        long start = Stopwatch.GetTimestamp();
        while (times.Count < 5 || Stopwatch.GetElapsedTime(start).TotalSeconds < seconds)
        {
            long before = Stopwatch.GetTimestamp();
            action();
            times.Add(Stopwatch.GetElapsedTime(before).TotalSeconds);
        }

        return times.Min();
    }
}
