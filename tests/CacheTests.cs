using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Attention over a cache of keys and values: what is computed token by token, or in pieces, equals
/// the whole sequence computed at once.
/// </summary>
[TestFixture]
public sealed class CacheTests
{
    private const int Heads = 6, KvHeads = 2, Room = 40;

    // Tokens of each sequence that the steps bring, one line per step: prefill, then one at a time,
    // then pieces of different sizes, and sequences that rest or have ended.
    private static readonly int[][] s_steps =
    [
        [7, 1, 20], [1, 1, 1], [1, 0, 1], [5, 3, 0], [1, 1, 1], [0, 1, 12],
    ];

    private static IEnumerable<TestCaseData> Cases =>
        from headDim in (int[])[8, 48, 64, 128, 256]
        from type in (DType[])[DType.F64, DType.F32]
        select new TestCaseData(headDim, type).SetArgDisplayNames($"{headDim}", $"{type}");

    [TestCaseSource(nameof(Cases))]
    public void StepsOverACacheEqualTheWholeOnTheCpu(int headDim, object type)
    {
        using var device = new CpuDevice(2, 1L << 26, (DType)type);
        double[][] steps = Stepwise(device, headDim), whole = Whole(device, headDim);
        for (int s = 0; s < whole.Length; s++)
            OpTests.AreClose(steps[s], whole[s], (DType)type == DType.F64 ? 1e-14 : 1e-6,
                $"sequence {s}");
    }

    // The error against double may be twice that of the whole computed at once, as it is for every
    // operation: both round the same inputs.
    [Test]
    public void StepsOverACacheEqualTheWholeOnCuda(
        [Values(8, 64, 72, 128, 256)] int headDim, [Values(DType.F32, DType.BF16)] DType type)
    {
        using var exact = new CpuDevice(2, 1L << 26, DType.F64);
        using var cuda = new CudaUnderTest();
        CudaDevice device = cuda.Device(type);
        double[][] expected = Whole(exact, headDim, type), whole = Whole(device, headDim, type);
        double[][] steps = Stepwise(device, headDim, type);
        for (int s = 0; s < whole.Length; s++)
        {
            double error = whole[s].Zip(expected[s], (a, b) => Math.Abs(a - b)).Max();
            OpTests.AreClose(steps[s], expected[s], (2 * error) + 1e-5, $"sequence {s}");
        }
    }

    [TestCase(3, 5, "cache_append: slots[3] is 5, expected rising rows of the cache below 12")]
    [TestCase(3, 4, "cache_append: slots[3] is 4, expected rising rows of the cache below 12")]
    [TestCase(3, 12, "cache_append: slots[3] is 12, expected rising rows of the cache below 12")]
    [TestCase(1, 12, "cache_append: slots[1] is 12, expected rising rows of the cache below 12")]
    [TestCase(0, -1, "cache_append: slots[0] is -1, expected rising rows of the cache below 12")]
    public void WrongSlotsAreNamed(int index, int wrong, string message)
    {
        Value[] inputs =
        [
            Value.Float("cache", [12, 8], Fill.Normal(1, 96)),
            Value.Float("x", [4, 8], Fill.Normal(2, 32)), Value.Int("slots", 0, 2, 5, 7),
        ];
        inputs[2].Data[index] = wrong;
        using var cpu = new CpuDevice(1, 1L << 24);
        using var run = new OpRun(cpu, new CacheAppend(), inputs);
        Assert.That(() => run.Forward(),
            Throws.TypeOf<ShapeException>().With.Message.EqualTo(message));
        // In another order of blocks: one behind a wrong slot is not held against it.
        using var cuda = new CudaUnderTest(new EmulatorOptions { Seed = 3, Threads = 1 });
        using var onCuda = new OpRun(cuda.Device(DType.F32), new CacheAppend(), inputs);
        onCuda.Forward();
        Assert.That(() => onCuda.Output,
            Throws.TypeOf<ShapeException>().With.Message.EqualTo(message));
    }

    [Test]
    public void OnlyTheSlotsAreWritten()
    {
        double[] cache = Fill.Normal(1, 12 * 5), x = Fill.Normal(2, 3 * 5);
        Value[] inputs =
        [
            Value.Float("cache", [12, 5], [.. cache]), Value.Float("x", [3, 5], x),
            Value.Int("slots", 1, 2, 11),
        ];
        x.AsSpan(0, 10).CopyTo(cache.AsSpan(5));
        x.AsSpan(10, 5).CopyTo(cache.AsSpan(55));
        using var cpu = new CpuDevice(1, 1L << 24);
        using var cuda = new CudaUnderTest();
        foreach (Device device in (Device[])[cpu, cuda.Device(DType.BF16)])
        {
            using var run = new OpRun(device, new CacheAppend(), inputs);
            run.Forward();
            Assert.That(run.Output, Is.EqualTo(cache));
        }
    }

    [Test]
    public void WhatNeedsAGradientIsNotCached()
    {
        using var device = new CpuDevice(1, 1L << 24);
        var graph = new Graph(device);
        Tensor New() => device.Allocate(new Spec(DType.F32, new Shape(2, 4)), "x");
        Tensor slots = device.Allocate(new Spec(DType.I32, new Shape(2)), "slots");
        Tensor x = graph.Parameter(New(), New());
        Assert.That(() => graph.Run(new CacheAppend(), New(), x, slots),
            Throws.TypeOf<ShapeException>().With.Message.EqualTo(
                "cache_append: input 1 has no gradient, but needs one"));
    }

    private static int[] Totals =>
        [.. Enumerable.Range(0, s_steps[0].Length).Select(s => s_steps.Sum(step => step[s]))];

    private static double[] Numbers(string name, int sequence, int tokens, int cols, DType type) =>
        Storage.Round(Fill.Normal(name[0] + (7 * sequence), tokens * cols), type);

    // The output of each sequence, all tokens at once.
    private static double[][] Whole(Device device, int headDim, DType type = DType.F32)
    {
        int[] totals = Totals, starts = Starts(totals);
        Value Rows(string name, int cols) => Value.Float(name, [starts[^1], cols],
            [.. totals.SelectMany((n, s) => Numbers(name, s, n, cols, type))]);
        using var run = new OpRun(device, OpOf(headDim, cached: false),
        [
            Rows("q", Heads * headDim), Rows("k", KvHeads * headDim), Rows("v", KvHeads * headDim),
            Value.Int("cu_seqlens_q", starts), Value.Int("cu_seqlens_k", starts),
            Value.Absent("key_lengths"),
        ]);
        run.Forward(recorded: false);
        double[] output = run.Output;
        return [.. totals.Select((n, s) =>
            output[(starts[s] * Heads * headDim)..(starts[s + 1] * Heads * headDim)])];
    }

    // The same in steps over a cache that has Room rows for each sequence.
    private static double[][] Stepwise(Device device, int headDim, DType type = DType.F32)
    {
        int queryCols = Heads * headDim, keyCols = KvHeads * headDim, sequences = Totals.Length;
        var graph = new Graph(device) { Recording = false };
        int[] lengths = new int[sequences], rooms = Starts([.. Enumerable.Repeat(Room, sequences)]);
        var room = new Spec(device.Activations, new Shape(rooms[^1], keyCols));
        Tensor keys = device.Allocate(room, "keys"), values = device.Allocate(room, "values");
        // What was never written must not count.
        device.Fill(keys, double.NaN);
        device.Fill(values, double.NaN);
        var outputs = Totals.Select(_ => new List<double>()).ToArray();
        foreach (int[] step in s_steps)
        {
            int[] before = [.. lengths], starts = Starts(step);
            int[] slots = [.. Enumerable.Range(0, sequences).SelectMany(
                s => Enumerable.Range(rooms[s] + before[s], step[s]))];
            for (int s = 0; s < sequences; s++) lengths[s] += step[s];
            Tensor at = Ints(slots);
            graph.Run(new CacheAppend(), keys, Rows("k", keyCols), at);
            graph.Run(new CacheAppend(), values, Rows("v", keyCols), at);
            Tensor o = graph.Run(OpOf(headDim, cached: true), Rows("q", queryCols), keys, values,
                Ints(starts), Ints(rooms), Ints(lengths));
            double[] got = Read(device, o);
            for (int s = 0; s < sequences; s++)
                outputs[s].AddRange(got[(starts[s] * queryCols)..(starts[s + 1] * queryCols)]);
            graph.EndStep();

            Tensor Rows(string name, int cols)
            {
                double[] rows = [.. Enumerable.Range(0, sequences).SelectMany(s =>
                    Numbers(name, s, Totals[s], cols, type)
                        [(before[s] * cols)..(lengths[s] * cols)])];
                var tensor = device.Allocate(
                    new Spec(device.Activations, new Shape(starts[^1], cols)), name);
                if (tensor.Type == DType.F64) device.Write<double>(tensor, rows);
                else device.WriteFloats(tensor, Array.ConvertAll(rows, v => (float)v));
                return tensor;
            }
        }

        return [.. outputs.Select(o => o.ToArray())];

        Tensor Ints(int[] values)
        {
            Tensor tensor = device.Allocate(new Spec(DType.I32, new Shape(values.Length)), "ints");
            device.Write<int>(tensor, values);
            return tensor;
        }
    }

    private static double[] Read(Device device, Tensor tensor)
    {
        if (tensor.Type != DType.F64)
            return Array.ConvertAll(device.ReadFloats(tensor), v => (double)v);
        var values = new double[tensor.Shape.Count];
        device.Read<double>(tensor, values);
        return values;
    }

    private static Attention OpOf(int headDim, bool cached) =>
        new(Heads, KvHeads, headDim, Causal: true, 1 / Math.Sqrt(headDim), cached);

    private static int[] Starts(int[] lengths) =>
        [0, .. lengths.Select((_, i) => lengths[..(i + 1)].Sum())];
}
