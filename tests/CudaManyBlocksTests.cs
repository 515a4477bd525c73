using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Kernels whose blocks, or turns of a block's threads, lie side by side along columns, with more
/// columns than one block has at a time; the op cases have fewer.
/// </summary>
[TestFixture]
public sealed class CudaManyBlocksTests
{
    // More columns than a block has threads, and than it has threads of 16 bytes of floats.
    private const int Narrow = 259, Wide = 1032;

    private CudaUnderTest _cuda = null!;

    private static IEnumerable<TestCaseData> Cases =>
        from problem in ((Op Op, Value[] Inputs)[])
        [
            (new CausalConv(), Conv(Narrow)),
            (new CausalConv(), Conv(Wide)),
            (new CausalConv(), [.. Conv(Wide), X("state", 6, Wide)]),
            (new AdaptedNorm(2),
                [X("w", Narrow, 2), X("a", 1, 2), X("bb", Narrow, 1), Above(100, "squares", Narrow)]),
            (new DoraLinear(3, 2, 0),
            [
                X("x", 3, 5), X("w", Wide, 5), X("b", Wide), X("a", 4, 5), X("bb", Wide, 4),
                X("m", Wide), Above(1, "n", Wide),
            ]),
            (new Experts(2),
            [
                X("x", 2, Narrow), X("logits", 2, 2), X("w", 2 * 2 * Narrow, Narrow),
                X("w1", 2 * Narrow, Narrow),
            ]),
            // Threads have experts, too; the last row chooses the last.
            (new Experts(1),
            [
                X("x", 5, 3), Chosen(X("logits", 5, Narrow)), X("w", 2 * Narrow, 3),
                X("w1", 3 * Narrow, 1),
            ]),
        ]
        select new TestCaseData(problem.Op, problem.Inputs).SetArgDisplayNames(
            problem.Op.Name, string.Join(' ', problem.Inputs.Select(x => x.Shape[^1])));

    [OneTimeSetUp]
    public void Make() => _cuda = new();

    [OneTimeTearDown]
    public void Free() => _cuda?.Dispose();

    [TestCaseSource(nameof(Cases))]
    public void Agrees(Op op, Value[] inputs) => CudaOpTests.Compare(
        _cuda.Device(DType.F32), OpCases.All.First(c => c.Op.Name == op.Name), DType.F32, op, inputs,
        null, op.Name);

    private static Value[] Conv(int channels) =>
        [X("x", 4, channels), X("w", channels, 4), Value.Int("cu_seqlens", 0, 1, 4)];

    private static Value X(string name, params int[] shape) =>
        Value.Float(name, shape, Fill.Normal(name.Length + shape[0], new Shape(shape).Count));

    private static Value Chosen(Value logits) => logits with { Data = [.. logits.Data[..^1], 9] };

    private static Value Above(double least, string name, int count) => X(name, count) with
    {
        Data = [.. Fill.Normal(7, count).Select(v => least + Math.Abs(v))],
    };
}
