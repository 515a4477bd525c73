using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Lookups and cross-entropy on CUDA at the sizes and types that the op cases leave out.
/// </summary>
[TestFixture]
public sealed class CudaLookupTests
{
    private CudaUnderTest _cuda = null!;

    public CudaLookupTests()
    {
    }

    internal CudaLookupTests(CudaUnderTest cuda) => _cuda = cuda;

    [OneTimeSetUp]
    public void Make() => _cuda = new();

    [OneTimeTearDown]
    public void Free() => _cuda?.Dispose();

    // The second is no multiple of 16 bytes in either type: rows of logits are padded.
    [Test]
    public void CrossEntropyOfALargeVocabulary(
        [Values(DType.F32, DType.BF16)] DType type, [Values(151_700, 151_666)] int vocabulary) =>
        Compare(Case("cross_entropy"), type, new CrossEntropy(),
            Head(tokens: 6, cols: 16, labels: 3, vocabulary));

    // More labels than a chunk has rows, as gathered rows and,
    // where all tokens have one, as they lie.
    [Test]
    public void CrossEntropyInChunks(
        [Values(DType.F32, DType.BF16)] DType type, [Values(2300, 2500)] int labels) =>
        Compare(Case("cross_entropy"), type, new CrossEntropy(),
            Head(tokens: 2500, cols: 8, labels, vocabulary: 37));

    [Test]
    public void TheFirstOfEqualLogitsIsTheChosenOne([Values(DType.F32, DType.BF16)] DType type)
    {
        // Two of 2003 columns are equal and largest: each place of a vector beside the next, those
        // of the last warp, and those behind the last vector. The target is the first of them, the
        // second, another.
        const int Vocabulary = 2003;
        (int First, int Second)[] equal =
        [
            (700, 1900), (700, 701), (701, 702), (702, 703), (703, 704), (1985, 1990), (1999, 2000),
            (2000, 2001), (2001, 2002),
        ];
        int rows = 3 * equal.Length;
        double[] h = new double[rows * equal.Length], w = new double[Vocabulary * equal.Length];
        for (int i = 0; i < equal.Length; i++)
        {
            for (int row = 3 * i; row < 3 * (i + 1); row++) h[(row * equal.Length) + i] = 1;
            w[(equal[i].First * equal.Length) + i] = w[(equal[i].Second * equal.Length) + i] = 3;
        }

        Value[] inputs =
        [
            Value.Float("h", [rows, equal.Length], h),
            Value.Float("w", [Vocabulary, equal.Length], w),
            Value.Int("rows", [.. Enumerable.Range(0, rows)]),
            Value.Int("targets", [.. equal.SelectMany(e => (int[])[e.First, e.Second, 5])]),
        ];
        using var run = new OpRun(_cuda.Device(type), new CrossEntropy(), inputs);
        run.Forward(recorded: false);
        Assert.That(run.Saved(1),
            Is.EqualTo(equal.SelectMany(_ => (double[])[1, 0, 0]).ToArray()));
    }

    [Test]
    public void TokensOfOneRowAndOfOneRowEach([Values(DType.F32, DType.BF16)] DType type)
    {
        const int Tokens = 1023;
        int[][] ids =
        [
            [.. Enumerable.Repeat(1, Tokens)],
            Fill.Distinct(6, Tokens, Tokens),
            Fill.Below(7, 2 * Tokens, 3),
        ];
        foreach (int[] each in ids)
            Compare(Case("embedding"), type, new Embedding(3),
                [Table(DType.F64, rows: Tokens, cols: 8), Value.Int("ids", each)]);
    }

    [Test]
    public void ATableOfAnyTypeIsReadAsItIs(
        [Values(DType.F32, DType.BF16)] DType type, [Values(5, 16)] int cols)
    {
        double[][]? first = null;
        foreach (DType stored in (DType[])[DType.F32, DType.BF16, DType.F16])
        {
            using var run = new OpRun(_cuda.Device(type), new PositionGather(),
            [
                Value.Float("x", [9, cols], Fill.Normal(1, 9 * cols)), Table(stored, rows: 7, cols),
                Value.Int("ids", Fill.Below(2, 9, 7)),
            ]);
            run.Forward();
            run.Want(_ => true);
            run.Backward(Fill.Normal(77, run.Count));
            double[][] results = [run.Output, run.Gradient(0), run.Gradient(1)];
            first ??= results;
            Assert.That(results, Is.EqualTo(first), stored.ToString());
        }
    }

    private void Compare(OpCase c, DType type, Op op, Value[] inputs) =>
        CudaOpTests.Compare(_cuda.Device(type), c, type, op, inputs, null, op.ToString());

    private static OpCase Case(string name) => OpCases.All.First(c => c.Name == name);

    private static Value[] Head(int tokens, int cols, int labels, int vocabulary) =>
    [
        Value.Float("h", [tokens, cols], Fill.Normal(1, tokens * cols)),
        Value.Float("w", [vocabulary, cols], Fill.Normal(2, (long)vocabulary * cols)),
        Value.Int("rows", Fill.Distinct(3, labels, tokens, rising: true)),
        Value.Int("targets", Fill.Below(4, labels, vocabulary)),
    ];

    // Numbers that every float type holds.
    private static Value Table(DType stored, int rows, int cols) => new(
        "table", stored, [rows, cols],
        [.. Fill.Below(5, rows * cols, 256).Select(v => (v - 128) / 64.0)]);
}
