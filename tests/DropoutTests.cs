using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Random numbers against their published vectors, and the dropout of LoRA made of them.
/// </summary>
[TestFixture]
public sealed unsafe class DropoutTests
{
    private const long StepBytes = 1L << 26;

    [Test]
    public void PhiloxEqualsThePublishedVectors()
    {
        var file = ReferenceFile.Open("ops/philox");
        Check("kat_counter", "kat_key", "kat_output", file.Ints("kat_rounds"));
        Check("counter", "key", "output", null);

        void Check(string counters, string keys, string outputs, int[]? rounds)
        {
            uint[] c = Words(counters), k = Words(keys), expected = Words(outputs);
            Assert.That(c, Has.Length.GreaterThanOrEqualTo(24));
            for (int i = 0; i < c.Length / 4; i++)
            {
                var (x0, x1, x2, x3) = Philox.Draw(
                    (c[4 * i], c[(4 * i) + 1], c[(4 * i) + 2], c[(4 * i) + 3]),
                    (k[2 * i], k[(2 * i) + 1]), rounds?[i] ?? 10);
                Assert.That((uint[])[x0, x1, x2, x3], Is.EqualTo(expected[(4 * i)..((4 * i) + 4)]));
            }
        }

        uint[] Words(string name) => Array.ConvertAll(file.Ints(name), v => (uint)v);
    }

    [Test]
    public void TheMaskIsTheDocumentedFunctionOfItsPlace()
    {
        var random = new Randomness(0x123456789ABCDEF0, 0x1_0000_0005, Dropout: true);
        int threshold = Philox.Threshold(0.3);
        Assert.That(threshold, Is.EqualTo(19661));
        var mask = new byte[128];
        const long First = (1L << 34) + 64;
        fixed (byte* keep = mask) Philox.Mask(random, 9, threshold, First, 100, keep);
        for (int i = 0; i < 100; i++)
        {
            long element = First + i;
            var (x0, x1, x2, x3) = Philox.Draw(
                ((uint)(element / 8), 9, 5, 1), (0x9ABCDEF0, 0x12345678));
            uint word = (element % 8 / 2) switch { 0 => x0, 1 => x1, 2 => x2, _ => x3 };
            uint bits = element % 2 == 0 ? word & 0xFFFF : word >> 16;
            Assert.That(mask[i], Is.EqualTo(bits >= threshold ? 1 : 0), $"element {i}");
        }
    }

    [Test]
    public void TheShareOfZerosIsTheProbability()
    {
        const int Count = 1 << 20;
        var mask = new byte[Count];
        foreach (double p in (double[])[0.05, 0.5])
        {
            fixed (byte* keep = mask)
                Philox.Mask(new(1, 2, true), 3, Philox.Threshold(p), 0, Count, keep);
            // Four standard deviations; what is kept is scaled so that the mean stays.
            double deviation = Math.Sqrt(p * (1 - p) / Count);
            double kept = mask.Sum(b => (double)b) / Count;
            Assert.That(1 - kept, Is.EqualTo(p).Within(4 * deviation));
            Assert.That(kept * Philox.Scale(p), Is.EqualTo(1).Within(4 * deviation / (1 - p)));
            Assert.That(Philox.Scale(p) * (1 - p), Is.EqualTo(1).Within(1e-5));
        }
    }

    [Test]
    public void ProbabilitiesOutsideTheRangeAreRefused()
    {
        foreach (double p in (double[])[1, -0.1, double.NaN])
            Assert.That(() =>
                new LoraLinear(0, 1, p), Throws.TypeOf<ArgumentOutOfRangeException>());
    }

    // Rows that end within a draw; a tall matrix has several tiles of rows.
    [TestCase(5, 37)]
    [TestCase(1, 1)]
    [TestCase(75, 9000)]
    public void LoraDropsWhatTheMaskSays(int rows, int cols)
    {
        using var device = new CpuDevice(2, StepBytes, DType.F64) { Random = new(11, 4, true) };
        const double P = 0.25, Scale = 0.5;
        Value[] inputs = Inputs(rows, cols);
        using var run = new OpRun(device, new LoraLinear(6, Scale, P), inputs);
        double[] dy = Fill.Normal(1, run.Count);
        run.Forward();
        run.Want(_ => true);
        run.Backward(dy);
        double[] mask = Mask(device.Random, 6, P, rows, cols);
        Check(run, inputs, mask, Scale, dy);
    }

    // The recorded masks of PyTorch's dropout, through the definition of the mask as a factor of x:
    // the adapter alone sees the masked x, the frozen weight the whole.
    [Test]
    public void WithPyTorchsMasksTheResultIsPeftS()
    {
        using var device = new CpuDevice(2, StepBytes, DType.F64);
        int count = 0;
        foreach (ReferenceCase c in ReferenceFile.Open("ops/lora_linear").Cases)
        {
            double keepScale = c.Params.GetProperty("keep_scale").GetDouble();
            double scale = c.Params.GetProperty("scale").GetDouble();
            double[] mask = Array.ConvertAll(c.Doubles("keep"), k => k * keepScale),
                x = c.Doubles("x");
            Value In(string key) => c.Has(key)
                ? Value.Float(key, c.Shape(key), c.Doubles(key)) : Value.Absent(key);
            Value w = In("w");
            Value masked = Value.Float("x", c.Shape("x"), [.. x.Zip(mask, (a, b) => a * b)]);
            using var frozen = new OpRun(device, new Linear(), [In("x"), w, In("b")]);
            using var adapter = new OpRun(device, new LoraLinear(0, scale, 0),
                [masked, w with { Data = new double[w.Data.Length] }, Value.Absent("b"), In("a"),
                    In("bb")]);
            foreach (OpRun run in (OpRun[])[frozen, adapter])
            {
                run.Forward();
                run.Want(_ => true);
                run.Backward(c.Doubles("dy"));
            }

            Close("y", [.. frozen.Output.Zip(adapter.Output, (a, b) => a + b)]);
            Close("dx", [.. frozen.Gradient(0).Zip(adapter.Gradient(0).Zip(mask, (g, m) => g * m),
                (a, b) => a + b)]);
            Close("da", adapter.Gradient(3));
            Close("dbb", adapter.Gradient(4));
            count++;

            void Close(string key, double[] got) => OpTests.AreClose(got, c.Doubles(key),
                (c.Small ? 1e-7 : 1e-9) * Math.Max(1, c.Doubles(key).Max(Math.Abs)),
                $"{c.Name} {key}");
        }

        Assert.That(count, Is.GreaterThanOrEqualTo(4));
    }

    [Test]
    public void EvaluationDropsNothingAndStepsDiffer()
    {
        using var device = new CpuDevice(2, StepBytes) { Random = new(11, 4, false) };
        Value[] inputs = Inputs(6, 40);
        double[] Output(LoraLinear op)
        {
            using var run = new OpRun(device, op, inputs);
            run.Forward();
            return run.Output;
        }

        double[] plain = Output(new(6, 1, 0));
        Assert.That(Output(new(6, 1, 0.5)), Is.EqualTo(plain));
        device.Random = new(11, 4, true);
        double[] first = Output(new(6, 1, 0.5));
        Assert.That(first, Is.Not.EqualTo(plain));
        Assert.That(Output(new(6, 1, 0.5)), Is.EqualTo(first));
        Assert.That(Output(new(7, 1, 0.5)), Is.Not.EqualTo(first));
        device.Random = new(11, 5, true);
        Assert.That(Output(new(6, 1, 0.5)), Is.Not.EqualTo(first));
        device.Random = new(12, 4, true);
        Assert.That(Output(new(6, 1, 0.5)), Is.Not.EqualTo(first));
    }

    private static Value[] Inputs(int rows, int cols) =>
    [
        Value.Float("x", [rows, cols], Fill.Normal(2, rows * cols)),
        Value.Float("w", [3, cols], Fill.Normal(3, 3 * cols)),
        Value.Absent("b"),
        Value.Float("a", [2, cols], Fill.Normal(4, 2 * cols)),
        Value.Float("bb", [3, 2], Fill.Normal(5, 6)),
    ];

    private static double[] Mask(Randomness random, int layer, double p, int rows, int cols)
    {
        var mask = new double[rows * cols];
        double limit = Math.Round(p * 65536);
        for (int e = 0; e < mask.Length; e++)
        {
            int drawn = (e / cols * ((cols + 127) / 128 * 128)) + (e % cols);
            var (x0, x1, x2, x3) = Philox.Draw(
                ((uint)drawn / 8, (uint)layer, (uint)random.Step, (uint)(random.Step >> 32)),
                ((uint)random.Seed, (uint)(random.Seed >> 32)));
            uint word = (drawn % 8 / 2) switch { 0 => x0, 1 => x1, 2 => x2, _ => x3 };
            uint bits = drawn % 2 == 0 ? word & 0xFFFF : word >> 16;
            mask[e] = bits >= limit ? 65536 / (65536 - limit) : 0;
        }

        return mask;
    }

    // y = x w^T + Scale (mask x) a^T bb^T and its gradients, sum by sum.
    private static void Check(OpRun run, Value[] inputs, double[] mask, double scale, double[] dy)
    {
        double[] x = inputs[0].Data, w = inputs[1].Data, a = inputs[3].Data, bb = inputs[4].Data;
        int rows = inputs[0].Shape[0], cols = inputs[0].Shape[1], outs = 3, rank = 2;
        double[] y = new double[rows * outs], dx = new double[x.Length], da = new double[a.Length];
        for (int r = 0; r < rows; r++)
        {
            for (int o = 0; o < outs; o++)
            {
                for (int k = 0; k < rank; k++)
                {
                    double part = scale * bb[(o * rank) + k], h = 0, d = dy[(r * outs) + o] * part;
                    for (int c = 0; c < cols; c++)
                    {
                        int e = (r * cols) + c, ae = (k * cols) + c;
                        h += mask[e] * x[e] * a[ae];
                        dx[e] += d * mask[e] * a[ae];
                        da[ae] += d * mask[e] * x[e];
                    }

                    y[(r * outs) + o] += part * h;
                }

                for (int c = 0; c < cols; c++)
                {
                    y[(r * outs) + o] += x[(r * cols) + c] * w[(o * cols) + c];
                    dx[(r * cols) + c] += dy[(r * outs) + o] * w[(o * cols) + c];
                }
            }
        }

        OpTests.AreClose(run.Output, y, 1e-9 * y.Max(Math.Abs), "y");
        OpTests.AreClose(run.Gradient(0), dx, 1e-9 * dx.Max(Math.Abs), "dx");
        OpTests.AreClose(run.Gradient(3), da, 1e-9 * da.Max(Math.Abs), "da");
    }
}
