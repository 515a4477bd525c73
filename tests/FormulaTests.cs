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

    [Test]
    public void ReluPassesWhatIsPositive()
    {
        double[] x = [-2, -0.5, 0, 1e-9, 3, -0.0], dy = [1, 2, 3, 4, 5, 6];
        Equals(new Relu(), [Value.Float("x", [6], x)], dy, [0, 0, 0, 1e-9, 3, 0],
            [0, 0, 0, 4, 5, 0]);
    }

    // A linear layer behind it is torch.nn.Conv1d(channels, outputs, 3, stride, padding=1): the sum
    // over taps and channels that its documentation gives, with zeros around the clip.
    [TestCase(6, 1)]
    [TestCase(6, 2)]
    [TestCase(7, 2)]
    [TestCase(1, 2)]
    public void UnfoldedFramesMakeAConvolution(int frames, int stride)
    {
        const int Clips = 2, Channels = 3, Outputs = 4, Taps = 3;
        int outFrames = ((frames + 2 - Taps) / stride) + 1;
        double[] x = Fill.Normal(1, Clips * frames * Channels);
        double[] w = Fill.Normal(2, Outputs * Channels * Taps);
        double[] g = Fill.Normal(3, Clips * outFrames * Outputs), dx = new double[x.Length];
        double[] conv = new double[g.Length];
        double[] dy = new double[Clips * outFrames * Channels * Taps];
        for (int s = 0; s < Clips; s++)
            for (int t = 0; t < outFrames; t++)
                for (int o = 0; o < Outputs; o++)
                    for (int c = 0; c < Channels; c++)
                        for (int j = 0; j < Taps; j++)
                        {
                            int frame = (t * stride) + j - 1, to = (s * outFrames) + t;
                            double weight = w[(((o * Channels) + c) * Taps) + j];
                            dy[(((to * Channels) + c) * Taps) + j] += weight * g[(to * Outputs) + o];
                            if (frame < 0 || frame >= frames) continue;
                            int from = (((s * frames) + frame) * Channels) + c;
                            conv[(to * Outputs) + o] += weight * x[from];
                            dx[from] += weight * g[(to * Outputs) + o];
                        }

        using var device = new CpuDevice(1, 1L << 24, DType.F64);
        using var run = new OpRun(device, new Unfold(Channels, stride),
            [Value.Float("x", [Clips, frames * Channels], x)]);
        run.Forward();
        for (int to = 0; to < Clips * outFrames; to++)
            for (int o = 0; o < Outputs; o++)
                Assert.That(Enumerable.Range(0, Channels * Taps).Sum(i =>
                    run.Output[(to * Channels * Taps) + i] * w[(o * Channels * Taps) + i]),
                    Is.EqualTo(conv[(to * Outputs) + o]).Within(1e-12));
        run.Want(_ => true);
        run.Backward(dy);
        Assert.That(run.Gradient(0), Is.EqualTo(dx).Within(1e-12));
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

    // Every expert of every row, the ones that were not chosen times zero. The first is the choice
    // of all rows, the last of none; of equal logits the first wins.
    [TestCase(1, 1)]
    [TestCase(5, 2)]
    [TestCase(5, 4)]
    public void ExpertsAreTheirWeightedSum(int rows, int chosen)
    {
        const int Width = 4, Count = 5, Inner = 3;
        double[] x = Fill.Normal(1, rows * Width), w = Fill.Normal(2, Count * 2 * Inner * Width);
        double[] down = Fill.Normal(3, Count * Width * Inner), dy = Fill.Normal(4, rows * Width);
        double[] z = [.. Fill.Normal(5, rows * Count).Select(
            (v, i) => i % Count == 0 ? 9 : i % Count == Count - 1 ? -9 : v)];
        if (rows > 1 && chosen == 2) z[Count + 2] = z[Count + 1] = 5;
        double[] y = new double[x.Length], dx = new double[x.Length], dz = new double[z.Length],
            dw = new double[w.Length], dDown = new double[down.Length];
        for (int r = 0; r < rows; r++)
        {
            int[] best = [.. Enumerable.Range(0, Count)
                .OrderByDescending(e => z[(r * Count) + e]).Take(chosen)];
            double all = best.Sum(e => Math.Exp(z[(r * Count) + e]));
            var dg = new double[Count];
            foreach (int e in best)
            {
                double g = Math.Exp(z[(r * Count) + e]) / all;
                for (int i = 0; i < Inner; i++)
                {
                    int gate = ((2 * e * Inner) + i) * Width, up = gate + (Inner * Width);
                    double p = 0, q = 0, da = 0;
                    for (int c = 0; c < Width; c++)
                    {
                        p += w[gate + c] * x[(r * Width) + c];
                        q += w[up + c] * x[(r * Width) + c];
                    }

                    double s = 1 / (1 + Math.Exp(-p)), a = p * s * q;
                    for (int c = 0; c < Width; c++)
                    {
                        int at = (((e * Width) + c) * Inner) + i;
                        y[(r * Width) + c] += g * down[at] * a;
                        dDown[at] += g * dy[(r * Width) + c] * a;
                        da += down[at] * dy[(r * Width) + c];
                    }

                    dg[e] += da * a;
                    double dp = g * da * q * (s + (p * s * (1 - s))), dq = g * da * p * s;
                    for (int c = 0; c < Width; c++)
                    {
                        dx[(r * Width) + c] += (dp * w[gate + c]) + (dq * w[up + c]);
                        dw[gate + c] += dp * x[(r * Width) + c];
                        dw[up + c] += dq * x[(r * Width) + c];
                    }
                }
            }

            double Weight(int e) => Math.Exp(z[(r * Count) + e]) / all;
            foreach (int e in best)
                dz[(r * Count) + e] = Weight(e) * (dg[e] - best.Sum(other => Weight(other) * dg[other]));
        }

        Equals(new Experts(chosen),
        [
            Value.Float("x", [rows, Width], x), Value.Float("logits", [rows, Count], z),
            Value.Float("w", [Count * 2 * Inner, Width], w),
            Value.Float("w1", [Count * Width, Inner], down),
        ], dy, y, dx, dz, dw, dDown);
    }

    [Test]
    public void ARowWithALogitThatIsNoNumberIsNone()
    {
        double[] z = Fill.Normal(5, 3 * 4);
        z[(1 * 4) + 3] = double.NaN;
        using var device = new CpuDevice(1, 1L << 24);
        using var run = new OpRun(device, new Experts(2),
        [
            Value.Float("x", [3, 2], Fill.Normal(1, 6)), Value.Float("logits", [3, 4], z),
            Value.Float("w", [4 * 2 * 3, 2], Fill.Normal(2, 48)),
            Value.Float("w1", [4 * 2, 3], Fill.Normal(3, 24)),
        ]);
        run.Forward();
        Assert.That(run.Output.Select(double.IsNaN),
            Is.EqualTo((bool[])[false, false, true, true, false, false]));
    }

    [Test]
    public void FewerExpertsThanAreChosenAreRefused() => Assert.That(
        () => new Experts(3).Infer(
            [
                new Spec(DType.F32, new Shape(5, 4)), new Spec(DType.F32, new Shape(5, 2)),
                new Spec(DType.F32, new Shape(12, 4)), new Spec(DType.F32, new Shape(8, 3)),
            ], DType.F32),
        Throws.TypeOf<ShapeException>().With.Message.EqualTo(
            "experts: logits must be columns for at least 3 experts, got F32[5, 2]"));

    [Test]
    public void GatedAddIsItsFormula()
    {
        const int Rows = 3, Cols = 5;
        double[] x = Fill.Normal(1, Rows * Cols), up = Fill.Normal(2, Rows * Cols);
        double[] gate = Fill.Normal(3, Rows), dy = Fill.Normal(4, Rows * Cols);
        double S(int r) => 1 / (1 + Math.Exp(-gate[r]));
        Equals(new GatedAdd(),
        [
            Value.Float("x", [Rows, Cols], x), Value.Float("up", [Rows, Cols], up),
            Value.Float("gate", [Rows, 1], gate),
        ], dy, [.. x.Select((v, i) => v + (up[i] * S(i / Cols)))], dy,
            [.. dy.Select((v, i) => v * S(i / Cols))],
            [.. gate.Select((_, r) => S(r) * (1 - S(r)) * Enumerable.Range(r * Cols, Cols)
                .Sum(i => dy[i] * up[i]))]);
    }

    private static void Equals(
        Op op, Value[] inputs, double[] dy, double[] output, params double[][] gradients)
    {
        using var device = new CpuDevice(2, 1L << 24, DType.F64);
        using var run = new OpRun(device, op, inputs);
        run.Forward();
        run.Want(_ => true);
        run.Backward(dy);
        Close(run.Output, output, "output");
        for (int i = 0; i < gradients.Length; i++)
            Close(run.Gradient(i), gradients[i], inputs[i].Name);

        static void Close(double[] got, double[] expected, string what) => OpTests.AreClose(
            got, expected, 1e-14 * expected.Append(1).Max(Math.Abs), what);
    }
}
