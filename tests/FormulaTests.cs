using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Operations without a file of PyTorch's, against their formulas written out element by element,
/// output and gradients in double.
/// </summary>
[TestFixture]
public sealed class FormulaTests
{
    [TestCase(0, 3)]
    [TestCase(2, 5)]
    [TestCase(0, 9)]
    [TestCase(9, 0)]
    public void ColumnsAreThoseOfX(int begin, int count)
    {
        const int Rows = 4, Cols = 9;
        double[] x = Fill.Normal(1, Rows * Cols), y = new double[Rows * count];
        double[] dy = Fill.Normal(2, y.Length), dx = new double[x.Length];
        for (int r = 0; r < Rows; r++)
            for (int c = 0; c < count; c++)
            {
                y[(r * count) + c] = x[(r * Cols) + begin + c];
                dx[(r * Cols) + begin + c] = dy[(r * count) + c];
            }

        Equals(new Columns(begin, count), [Value.Float("x", [Rows, Cols], x)], dy, y, dx);
    }

    // Together the parts of a row are the row, and their gradients its gradient.
    [Test]
    public void TheGradientsOfAllPartsAddUp()
    {
        double[] x = Fill.Normal(1, 4 * 9), dy = Fill.Normal(2, 4 * 9);
        using var device = new CpuDevice(1, 1L << 24, DType.F64);
        var sum = new double[x.Length];
        foreach (int begin in (int[])[0, 3, 6])
        {
            using var run = new OpRun(device, new Columns(begin, 3), [Value.Float("x", [4, 9], x)]);
            run.Forward();
            run.Want(_ => true);
            run.Backward(
                [.. Enumerable.Range(0, 12).Select(i => dy[(i / 3 * 9) + begin + (i % 3)])]);
            sum = [.. sum.Zip(run.Gradient(0), (a, b) => a + b)];
        }

        Assert.That(sum, Is.EqualTo(dy));
    }

    [TestCase(-1, 3)]
    [TestCase(7, 3)]
    [TestCase(int.MaxValue, 3)]
    [TestCase(3, -1)]
    [TestCase(1, int.MaxValue)]
    public void ColumnsOutsideXAreRefused(int begin, int count) => Assert.That(
        () => new Columns(begin, count).Infer(
            [new Spec(DType.F32, new Shape(4, 9))], DType.F32),
        Throws.TypeOf<ShapeException>().With.Message.StartsWith("columns: x must be columns "));

    [Test]
    public void ScaleMultiplies()
    {
        double[] x = Fill.Normal(1, 21), dy = Fill.Normal(2, 21);
        Equals(new Scale(-0.3), [Value.Float("x", [3, 7], x)], dy,
            [.. x.Select(v => -0.3 * v)], [.. dy.Select(v => -0.3 * v)]);
    }

    // A sparse matrix times a table is the dense matrix times the table; an id may stand twice in a
    // row, and a row may have no term.
    [Test]
    public void WeightedGatherIsAMatrixTimesATable()
    {
        const int Rows = 6, Cols = 5, Positions = 4;
        int[] starts = [0, 2, 2, 5, 6, 10, 10], ids = [3, 0, 1, 1, 2, 0, 0, 1, 2, 3];
        double[] weights = Fill.Normal(5, ids.Length), x = Fill.Normal(1, Rows * Cols);
        double[] table = Fill.Normal(2, Positions * Cols), dy = Fill.Normal(3, Rows * Cols);
        var matrix = new double[Rows, Positions];
        for (int r = 0; r < Rows; r++)
            for (int k = starts[r]; k < starts[r + 1]; k++) matrix[r, ids[k]] += weights[k];
        double[] y = [.. x], dTable = new double[table.Length];
        for (int r = 0; r < Rows; r++)
            for (int p = 0; p < Positions; p++)
                for (int c = 0; c < Cols; c++)
                {
                    y[(r * Cols) + c] += matrix[r, p] * table[(p * Cols) + c];
                    dTable[(p * Cols) + c] += matrix[r, p] * dy[(r * Cols) + c];
                }

        Equals(new WeightedGather(),
        [
            Value.Float("x", [Rows, Cols], x), Value.Float("table", [Positions, Cols], table),
            Value.Int("starts", starts), Value.Int("ids", ids),
            Value.Float("weights", [ids.Length], weights),
        ], dy, y, dy, dTable);
    }

    [TestCase(2, 0, 1, "starts[0] is 1, expected to rise from 0 to 3, the ids")]
    [TestCase(2, 1, -1, "starts[1] is -1, expected to rise from 0 to 3, the ids")]
    [TestCase(2, 1, 4, "starts[1] is 4, expected to rise from 0 to 3, the ids")]
    [TestCase(2, 2, 2, "starts[2] is 2, expected to rise from 0 to 3, the ids")]
    [TestCase(3, 1, 4, "ids[1] is 4, expected 0 to 3")]
    [TestCase(3, 2, -1, "ids[2] is -1, expected 0 to 3")]
    public void WrongTermsAreNamed(int input, int index, int wrong, string message)
    {
        Value[] inputs =
        [
            Value.Float("x", [2, 5], Fill.Normal(1, 10)),
            Value.Float("table", [4, 5], Fill.Normal(2, 20)), Value.Int("starts", 0, 2, 3),
            Value.Int("ids", 0, 1, 2), Value.Float("weights", [3], [1, 2, 3]),
        ];
        inputs[input].Data[index] = wrong;
        using var device = new CpuDevice(1, 1L << 24);
        using var run = new OpRun(device, new WeightedGather(), inputs);
        Assert.That(() => run.Forward(), Throws.TypeOf<ShapeException>()
            .With.Message.EqualTo($"weighted_gather: {message}"));
    }

    private static void Equals(
        Op op, Value[] inputs, double[] dy, double[] output, params double[][] gradients)
    {
        using var device = new CpuDevice(2, 1L << 24, DType.F64);
        using var run = new OpRun(device, op, inputs);
        run.Forward();
        run.Want(_ => true);
        run.Backward(dy);
        OpTests.AreClose(run.Output, output, 1e-14, "output");
        for (int i = 0; i < gradients.Length; i++)
            OpTests.AreClose(run.Gradient(i), gradients[i], 1e-14, inputs[i].Name);
    }
}
