using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Ops;
using MiniCpmNative.Kernels.Updates;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Bytes that memory-bound kernels move between DRAM and chip at production sizes, as the emulator
/// counts them (sectors of 32 bytes, each once per launch), against what the operation cannot do
/// without: its operands read once, its results written once. What is read again from cache is
/// counted too, where a row says how much that may be.
/// </summary>
[TestFixture]
public sealed class CudaTrafficTests
{
    // Requests of a few bytes take a whole sector, as those of a row's statistics do.
    private const double Allowed = 1.05, RequestsAllowed = 1.1;

    // Bytes of an activation, and of a weight, a statistic or an index.
    private const int S = 2, F = 4;

    /// <summary>
    /// A kernel, the operation that launches it, its bytes for these inputs, and those it reads
    /// again (null: not looked at).
    /// </summary>
    private sealed record Traffic(
        string Kernel, string Case, Func<Value[], long> Bytes, Func<Value[], long>? Again = null);

    private static Traffic[] Table { get; } =
    [
        // A row's weights come from cache; a lane takes its 32 bytes of them in two requests.
        new("norm_forward", "rms_norm",
            v => (2 * S * Count(v)) + (F * (Rows(v) + Cols(v))), v => 2 * F * Count(v)),
        new("norm_backward", "rms_norm",
            v => (3 * S * Count(v)) + (F * (Rows(v) + Cols(v))), v => 2 * F * Count(v)),
        new("norm_weight_parts", "rms_norm",
            v => (2 * S * Count(v)) + (F * (Rows(v) + Cols(v))), Nothing),
        new("norm_forward", "layer_norm",
            v => (2 * S * Count(v)) + (F * 2 * (Rows(v) + Cols(v))), v => 4 * F * Count(v)),
        new("norm_backward", "layer_norm",
            v => (3 * S * Count(v)) + (F * ((2 * Rows(v)) + Cols(v))), v => 2 * F * Count(v)),
        new("norm_weight_parts", "layer_norm",
            v => (2 * S * Count(v)) + (F * 2 * (Rows(v) + Cols(v))), Nothing),
        new("gelu_forward", "gelu_tanh", v => 2 * S * Count(v), Nothing),
        new("gelu_backward", "gelu_tanh", v => 3 * S * Count(v), Nothing),
        new("gelu_forward", "gelu_erf", v => 2 * S * Count(v), Nothing),
        new("gelu_backward", "gelu_erf", v => 3 * S * Count(v), Nothing),
        new("swiglu_forward", "swiglu", v => 3 * S * Count(v), Nothing),
        new("swiglu_backward", "swiglu", v => 5 * S * Count(v), Nothing),
        new("add_forward", "add", v => 3 * S * Count(v), Nothing),
        new("scale_rows", "add", v => 2 * S * Count(v), Nothing),

        // Of a table only the rows that are asked for; of its gradient only those.
        new("lookup_rows", "position_gather",
            v => (2 * S * Count(v)) + (S * Used(v[2]) * Cols(v)) + Ids(v[2])),
        new("sum_by_id", "position_gather",
            v => (S * Count(v)) + (F * Used(v[2]) * Cols(v)) + (2 * Ids(v[2]))),
        new("splice_forward", "splice", v => (2 * S * Count(v)) + (F * Rows(v))),
        new("splice_text_backward", "splice",
            v => (S * ((2 * Count(v)) - (v[2].Data.Length * Cols(v)))) + (F * Rows(v))),
        new("gather_rows", "splice", v => (2 * S * v[2].Data.Length * Cols(v)) + Ids(v[2])),

        // Rows of the tables that no token uses are not read; the others are, for every head.
        new("rope", "rope", v => (2 * S * Count(v)) + (F * Rows(v))
            + (2 * F * v[1].Data.Distinct().Count() * v[2].Shape[1]), v => F * Count(v)),
    ];

    private static IEnumerable<string> Cases => Table.Select(t => t.Case).Distinct();

    [TestCaseSource(nameof(Cases))]
    public void NothingIsMovedInVain(string name)
    {
        if (CudaUnderTest.IsReal) Assert.Ignore("counted by the emulator only");
        using var cuda = new CudaUnderTest(new EmulatorOptions { Footprint = true });
        OpCase c = OpCases.All.Single(each => each.Name == name);
        Value[] inputs = c.Production();
        using var run = new OpRun(cuda.Device(DType.BF16), c.ProductionOp ?? c.Op, inputs);
        cuda.Emulator!.ClearLaunches();
        run.Forward();
        run.Want(_ => true);
        run.Backward(Fill.Normal(77, run.Count));
        cuda.Context.Synchronise();
        foreach (Traffic t in Table.Where(t => t.Case == name))
        {
            long needed = t.Bytes(inputs);
            LaunchCounters[] launches =
                [.. cuda.Emulator.Launches.Where(l => l.Kernel == t.Kernel)];
            Assert.That(launches, Is.Not.Empty, t.Kernel);
            foreach (LaunchCounters launch in launches)
            {
                string what = $"{t.Kernel}: {launch.DramBytes} bytes, {needed} needed "
                    + $"({(double)launch.DramBytes / needed:0.000})";
                TestContext.Out.WriteLine(what);
                Assert.That(launch.DramBytes, Is.InRange(needed, (long)(Allowed * needed)), what);
                if (t.Again is null) continue;
                long requested = 32 * (launch.GlobalReadSectors + launch.GlobalWriteSectors);
                long expected = needed + t.Again(inputs);
                what = $"{t.Kernel}: {requested} bytes requested, {expected} expected "
                    + $"({(double)requested / expected:0.000})";
                TestContext.Out.WriteLine(what);
                Assert.That(requested, Is.LessThan(RequestsAllowed * expected), what);
            }
        }
    }

    // What attention cannot do without: its operands once. Tiles of keys and values are read again
    // for every tile of queries, from L2.
    [TestCase(64)]
    [TestCase(72)]
    [TestCase(80)]
    [TestCase(96)]
    [TestCase(128)]
    [TestCase(256)]
    public void AttentionMovesItsOperandsOnce(int headDim)
    {
        const int Tokens = 300, Heads = 4, KvHeads = 2;
        if (CudaUnderTest.IsReal) Assert.Ignore("counted by the emulator only");
        using var cuda = new CudaUnderTest(new EmulatorOptions { Footprint = true });
        int[] starts = [0, 100, Tokens];
        using var run = new OpRun(
            cuda.Device(DType.BF16), new Attention(Heads, KvHeads, headDim, Causal: true, 0.1),
            [
                X("q", Heads), X("k", KvHeads), X("v", KvHeads), Value.Int("cu_seqlens_q", starts),
                Value.Int("cu_seqlens_k", starts), Value.Absent("key_lengths"),
            ]);
        cuda.Emulator!.ClearLaunches();
        run.Forward();
        run.Want(_ => true);
        run.Backward(Fill.Normal(77, run.Count));
        cuda.Context.Synchronise();
        long query = S * Tokens * Heads * headDim, key = S * Tokens * KvHeads * headDim;
        long statistic = F * Tokens * Heads;
        Check(cuda, $"attention_forward_{headDim}", (2 * query) + (2 * key) + statistic);
        Check(cuda, "attention_statistics", (2 * query) + (4 * statistic));
        // Float parts of dk and dv, two of each; sums of dq where two tiles of keys add to it.
        // A tile has 128 keys, of wide heads 64.
        int tile = headDim > 128 ? 64 : 128;
        int twice = Math.Max(0, 100 - tile) + Math.Max(0, 200 - tile);
        Check(cuda, $"attention_backward_{headDim}",
            (3 * query) + (2 * key) + (2 * 2 * 2 * key) + (2 * statistic)
            + (2L * F * twice * Heads * headDim));

        Value X(string name, int heads) => Value.Float(
            name, [Tokens, heads * headDim], Fill.Normal(heads, Tokens * heads * headDim));
    }

    // One query each over a cache: its keys that count once for all heads, and the parts of shares
    // once to and fro.
    [TestCase(128, 1, 0)]
    [TestCase(256, 2, 0)]
    [TestCase(128, 1, 4)]
    public void DecodingReadsItsKeysOnce(int headDim, int sequences, int splits)
    {
        const int Heads = 8, KvHeads = 2, Length = 250;
        if (CudaUnderTest.IsReal) Assert.Ignore("counted by the emulator only");
        using var cuda = new CudaUnderTest(new EmulatorOptions { Footprint = true });
        int room = splits == 0 ? 300 : 256 * splits, length = splits == 0 ? Length : room - 3;
        int[] Ends(int each) => [.. Enumerable.Range(0, sequences + 1).Select(s => s * each)];
        using var run = new OpRun(cuda.Device(DType.BF16),
            new Attention(Heads, KvHeads, headDim, Causal: true, 0.1, Cached: true),
            [
                X("q", sequences, Heads), X("k", sequences * room, KvHeads),
                X("v", sequences * room, KvHeads), Value.Int("cu_seqlens_q", Ends(1)),
                Value.Int("cu_seqlens_k", Ends(room)),
                Value.Int("key_lengths", [.. Enumerable.Repeat(length, sequences)]),
            ]);
        cuda.Emulator!.ClearLaunches();
        run.Forward(recorded: false);
        cuda.Context.Synchronise();
        long query = S * sequences * Heads * headDim, statistic = F * sequences * Heads;
        long keys = 2L * S * sequences * length * KvHeads * headDim;
        long parts = (long)splits * F * Heads * (headDim + 2);
        Check(cuda, "attention_decode",
            query + keys + (splits == 0 ? query + statistic : parts));
        if (splits > 0) Check(cuda, "attention_decode_merge", parts + query + statistic);

        Value X(string name, int tokens, int heads) => Value.Float(
            name, [tokens, heads * headDim], Fill.Normal(heads, tokens * heads * headDim));
    }

    // Logits are read a second time, from L2 where a chunk fits; their gradient is written in BF16.
    [Test]
    public void TheLossReadsLogitsAndWritesTheirGradient()
    {
        const int Labels = 64, Cols = 64, Vocabulary = 32000;
        if (CudaUnderTest.IsReal) Assert.Ignore("counted by the emulator only");
        using var cuda = new CudaUnderTest(new EmulatorOptions { Footprint = true });
        using var run = new OpRun(cuda.Device(DType.BF16), new CrossEntropy(),
            [
                Value.Float("h", [2 * Labels, Cols], Fill.Normal(1, 2 * Labels * Cols)),
                Value.Float("w", [Vocabulary, Cols], Fill.Normal(2, Vocabulary * Cols)),
                Value.Int("rows", [.. Enumerable.Range(0, Labels).Select(i => 2 * i)]),
                Value.Int("targets", Fill.Below(3, Labels, Vocabulary)),
            ]);
        cuda.Emulator!.ClearLaunches();
        run.Forward();
        run.Want(input => input == 0);
        run.Backward([1]);
        cuda.Context.Synchronise();
        Check(cuda, "cross_entropy_rows", (long)(F + S) * Labels * Vocabulary);
        Check(cuda, "cross_entropy_scatter", (S * 3 * Labels * Cols) + (F * Labels));
    }

    private static void Check(CudaUnderTest cuda, string kernel, long needed)
    {
        long moved = cuda.Emulator!.Launches.Single(l => l.Kernel == kernel).DramBytes;
        TestContext.Out.WriteLine(
            $"{kernel}: {moved} of {needed} ({(double)moved / needed:0.000})");
        Assert.That(moved, Is.InRange(needed, (long)(Allowed * needed)), kernel);
    }

    // Bytes per parameter: gradient; p, m and v read and written,
    // the gradient read, the bf16 copy written.
    [TestCase(DType.F32, "adamw", (6 * F) + F + S)]
    [TestCase(DType.BF16, "adamw_bf16_moments", (2 * F) + (4 * S) + F + S)]
    [TestCase(DType.U8, "update_8bit", (2 * F) + 4 + F + S)]
    [TestCase(DType.U8, "update_8bit", (2 * F) + 2 + F + S, UpdateRule.Lion)]
    [TestCase(DType.F32, "lion", (4 * F) + F + S, UpdateRule.Lion)]
    [TestCase(DType.F32, "lion", (2 * F) + F + S, UpdateRule.Sgd)]
    public void AStepOfTheOptimizerMovesItsStateOnce(
        DType moments, string kernel, int bytes, UpdateRule rule = UpdateRule.AdamW)
    {
        const int Count = 1 << 20;
        if (CudaUnderTest.IsReal) Assert.Ignore("counted by the emulator only");
        using var cuda = new CudaUnderTest(new EmulatorOptions { Footprint = true });
        CudaDevice device = cuda.Device(DType.BF16);
        Tensor New(DType type) => device.Allocate(new(type, new Shape(Count)), "adamw");
        var states = new OptimizerForm(rule, moments).StatesOf(moments, new Shape(Count));
        var range = OptimizerForm.Range(New(DType.BF16), New(DType.F32), New(DType.F32), 0,
            [.. states.Select(s => device.Allocate(s.Spec, s.Name))]);
        Tensor norm = device.Allocate(GradientNorm.Spec, "norm");
        device.GradientNorm([range.Gradient], 1, norm, Tensor.None);
        device.Update(new UpdateStep(1e-3, 0.9, 0.999, 1e-8, 0, 1, 0, rule), range, norm);
        cuda.Context.Synchronise();
        Check(cuda, "gradient_norm_parts", (long)F * Count);
        Check(cuda, kernel, (long)bytes * Count);
    }

    // Different ids, and the bytes of all.
    private static long Used(Value ids) => ids.Data.Distinct().Count();

    private static long Ids(Value ids) => F * ids.Data.Length;

    private static long Nothing(Value[] values) => 0;

    private static long Count(Value[] values) => new Shape(values[0].Shape).Count;

    private static long Rows(Value[] values) => new Shape(values[0].Shape).Rows;

    private static long Cols(Value[] values) => new Shape(values[0].Shape).Cols;
}
