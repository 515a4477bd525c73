using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Wrong ids, positions, rows and targets on CUDA: the next read throws and names argument, place
/// and value, forward and backward; nothing foreign is touched (the emulator watches); afterwards
/// the same device computes the same bits as before.
/// </summary>
[TestFixture]
public sealed class CudaFaultTests
{
    private CudaUnderTest _cuda = null!;

    private static IEnumerable<TestCaseData> Cases { get; } =
    [
        Embedding(2, 40, "ids[2] is 40, expected 0 to 39"),
        Embedding(0, -1, "ids[0] is -1, expected 0 to 39"),
        Embedding(5, int.MinValue, "ids[5] is -2147483648, expected 0 to 39"),
        PositionGather(5, int.MaxValue, "ids[5] is 2147483647, expected 0 to 39"),
        PositionGather(1, -7, "ids[1] is -7, expected 0 to 39"),
        Splice(1, 9, "positions[1] is 9, expected 0 to 8"),
        Splice(2, -1, "positions[2] is -1, expected 0 to 8"),
        Splice(2, 7, "positions[2] is 7, as is another"),
        CrossEntropy(2, 1, 9, "rows[1] is 9, expected rising rows of h below 9"),
        CrossEntropy(2, 0, -1, "rows[0] is -1, expected rising rows of h below 9"),
        CrossEntropy(2, 2, 3, "rows[2] is 3, expected rising rows of h below 9"),
        CrossEntropy(2, 3, 4, "rows[3] is 4, expected rising rows of h below 9"),
        CrossEntropy(3, 0, 21, "targets[0] is 21, expected 0 to 20"),
        CrossEntropy(3, 3, int.MinValue, "targets[3] is -2147483648, expected 0 to 20"),
        Rope(8, 2, 9, "positions[2] is 9, expected 0 to 8"),
        Rope(8, 0, -1, "positions[0] is -1, expected 0 to 8"),
        Rope(32, 4, int.MaxValue, "positions[4] is 2147483647, expected 0 to 8"),
        Rope(32, 4, int.MinValue, "positions[4] is -2147483648, expected 0 to 8"),
        Heads(4, 2, 9, "positions[2] is 9, expected 0 to 8"),
        Heads(16, 1, -1, "positions[1] is -1, expected 0 to 8"),
        Terms(2, 0, 1, "starts[0] is 1, expected to rise from 0 to 6, the ids"),
        Terms(2, 2, 2, "starts[2] is 2, expected to rise from 0 to 6, the ids"),
        Terms(2, 3, 7, "starts[3] is 7, expected to rise from 0 to 6, the ids"),
        Terms(2, 4, 5, "starts[4] is 5, expected to rise from 0 to 6, the ids"),
        Terms(2, 1, -7, "starts[1] is -7, expected to rise from 0 to 6, the ids"),
        Terms(3, 1, 40, "ids[1] is 40, expected 0 to 39"),
        Terms(3, 5, -1, "ids[5] is -1, expected 0 to 39"),
        Terms(3, 4, 40, "ids[4] is 40, expected 0 to 39", cols: 5),
        .. Packed("causal_conv"), .. Packed("delta_rule"),
    ];

    [OneTimeSetUp]
    public void Make() => _cuda = new();

    [OneTimeTearDown]
    public void Free() => _cuda?.Dispose();

    [TestCaseSource(nameof(Cases))]
    public void TheNextReadNamesIt(object op, object values, int input, int index, int wrong,
        string message)
    {
        var (what, inputs) = ((Op)op, (Value[])values);
        // Heads that are turned with their biases are turned by the same positions.
        string name = what is Linears ? "rope" : what.Name;
        foreach (DType type in (DType[])[DType.F32, DType.BF16])
        {
            using var run = new OpRun(_cuda.Device(type), what, inputs);
            double[] dy = Fill.Normal(77, run.Count);
            run.Want(_ => true);
            List<double[]> sound = Results();
            int right = (int)inputs[input].Data[index];
            run.Set(input, index, wrong);
            run.Forward();
            Assert.That(() => run.Output, Throws.TypeOf<ShapeException>()
                .With.Message.EqualTo($"{name}: {message}"), $"forward {type}");
            run.Backward(dy);
            Assert.That(() => run.Output, Throws.TypeOf<ShapeException>()
                .With.Message.EqualTo($"{name}: {message}"), $"backward {type}");
            run.Set(input, index, right);
            Assert.That(Results(), Is.EqualTo(sound), $"afterwards {type}");
            Assert.That(_cuda.Emulator?.Fault, Is.Null);

            List<double[]> Results()
            {
                run.Forward();
                run.Backward(dy);
                return
                [
                    run.Output,
                    .. Enumerable.Range(0, inputs.Length).Where(run.HasGradient)
                    .Select(run.Gradient),
                ];
            }
        }
    }

    // Of a position that stands twice the later place is named, whichever block comes first.
    [Test]
    public void OfARepeatedPositionTheLaterIsNamedInAnyOrder([Values(0, 3)] int seed)
    {
        if (CudaUnderTest.IsReal) Assert.Ignore("an order of the emulator");
        const int Rows = 1000;
        int[] positions = [.. Enumerable.Range(0, Rows)];
        positions[300] = positions[^1];
        _cuda.Dispose();
        _cuda = new(new EmulatorOptions { Seed = seed, Threads = 1 });
        using (var run = new OpRun(_cuda.Device(DType.F32), new Splice(),
            [X("x", Rows, 1), X("features", Rows, 1), Value.Int("positions", positions)]))
        {
            run.Forward();
            Assert.That(() => run.Output, Throws.TypeOf<ShapeException>()
                .With.Message.EqualTo("splice: positions[999] is 999, as is another"));
        }

        _cuda.Dispose();
        _cuda = new();
    }

    private static TestCaseData Embedding(int index, int wrong, string message) => Case(
        new Embedding(), [X("table", 40, 5), Ids()], 1, index, wrong, message);

    private static TestCaseData PositionGather(int index, int wrong, string message) => Case(
        new PositionGather(), [X("x", 6, 16), X("table", 40, 16), Ids()], 2, index, wrong, message);

    private static TestCaseData Terms(
        int input, int index, int wrong, string message, int cols = 16) => Case(
        new WeightedGather(),
        [
            X("x", 4, cols), X("table", 40, cols), Value.Int("starts", 0, 3, 3, 5, 6), Ids(),
            Value.Float("weights", [6], Fill.Normal(6, 6)),
        ],
        input, index, wrong, message);

    private static IEnumerable<TestCaseData> Packed(string name)
    {
        OpCase c = OpCases.All.Single(each => each.Name == name);
        int input = Array.FindIndex(c.Inputs(7), v => v.IsInteger);
        foreach (var (index, wrong) in ((int, int)[])[(0, 1), (1, -1), (2, 99), (3, 6)])
            yield return Case(c.Op, c.Inputs(7), input, index, wrong,
                $"cu_seqlens[{index}] is {wrong}, expected to rise from 0 to 7, the tokens");
    }

    private static TestCaseData Splice(int index, int wrong, string message) => Case(
        new Splice(), [X("x", 9, 5), X("features", 4, 5), Value.Int("positions", 7, 2, 5)], 2,
        index, wrong, message);

    private static TestCaseData CrossEntropy(int input, int index, int wrong,
        string message) => Case(
        new CrossEntropy(),
        [
            X("h", 9, 5), X("w", 21, 5), Value.Int("rows", 0, 3, 4, 8),
            Value.Int("targets", 20, 0, 7, 7),
        ],
        input, index, wrong, message);

    private static TestCaseData Rope(int headDim, int index, int wrong, string message) => Case(
        new Rope(headDim),
        [
            X("x", 5, 3 * headDim), Value.Int("positions", 3, 8, 0, 0, 5), X("cos", 9, headDim / 2),
            X("sin", 9, headDim / 2),
        ],
        1, index, wrong, message);

    private static TestCaseData Heads(int headDim, int index, int wrong, string message)
    {
        Value none = Value.Absent("a");
        return Case(
            new Linears([new(headDim), new(headDim)], 1, 0, headDim, 1),
            [
                X("x", 5, 3), X("w", headDim, 3), none, none, none, X("w1", headDim, 3), none, none,
                none, Value.Int("positions", 3, 8, 0, 0, 5), X("cos", 9, headDim / 2),
                X("sin", 9, headDim / 2),
            ],
            9, index, wrong, message);
    }

    private static TestCaseData Case(
        Op op, Value[] inputs, int input, int index, int wrong, string message) =>
        new TestCaseData(op, inputs, input, index, wrong, message).SetArgDisplayNames(
            op.Name, $"{inputs[input].Name}[{index}] = {wrong}");

    private static Value Ids() => Value.Int("ids", 39, 0, 4, 4, 17, 1);

    private static Value X(string name, int rows, int cols) =>
        Value.Float(name, [rows, cols], Fill.Normal(rows, rows * cols));
}
