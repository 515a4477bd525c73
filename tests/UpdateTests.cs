using System.Text.Json;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Updates;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>AdamW, the gradient norm and clipping, against ten steps of torch.optim.AdamW.</summary>
[TestFixture]
public sealed class UpdateTests
{
    private const long StepBytes = 1L << 26;

    private static IEnumerable<ReferenceCase> Cases => ReferenceFile.Open("ops/adamw").Cases;

    [TestCaseSource(nameof(Cases))]
    public void TenStepsEqualPyTorch(object value)
    {
        var c = (ReferenceCase)value;
        foreach (DType type in (DType[])[DType.F32, DType.F64])
        {
            using var device = new CpuDevice(2, StepBytes, type);
            Train(c, device, DType.F64);
        }
    }

    [TestCaseSource(nameof(Cases))]
    public void NarrowWeightsAreTheRoundedMaster(object value)
    {
        var c = (ReferenceCase)value;
        using var device = new CpuDevice(2, StepBytes);
        if (c.Has("p0_bf16")) Train(c, device, DType.BF16);
        else Train(c, device, DType.F16);
    }

    private static unsafe void Train(ReferenceCase c, CpuDevice device, DType weights)
    {
        bool single = device.Activations == DType.F32;
        int[][] shapes = [.. c.Params.GetProperty("shapes").EnumerateArray()
            .Select(s => s.EnumerateArray().Select(e => e.GetInt32()).ToArray())];
        double[] decay = Numbers(c.Params.GetProperty("decay")), rates = c.Doubles("lr");
        double[] betas = Numbers(c.Params.GetProperty("betas"));
        JsonElement clip = c.Params.GetProperty("clip");
        double maxNorm = clip.ValueKind == JsonValueKind.Null ? 0 : clip.GetDouble();
        double epsilon = c.Params.GetProperty("eps").GetDouble();
        var ranges = new AdamWRange[shapes.Length];
        for (int i = 0; i < shapes.Length; i++)
        {
            Tensor New(string name) => device.Allocate(new(device.Activations, new Shape(shapes[i])), name);
            Tensor p = New("p"), master = Tensor.None;
            Write(device, p, c.Doubles($"p{i}"));
            if (weights != DType.F64)
                (p, master) = (device.Allocate(new(weights, new Shape(shapes[i])), "p"), p);
            ranges[i] = new(p, master, New("g"), New("m"), New("v"));
        }

        Tensor norm = device.Allocate(GradientNorm.Spec, "norm");
        for (int step = 0; step < rates.Length; step++)
        {
            for (int i = 0; i < ranges.Length; i++) Write(device, ranges[i].Gradient, At($"g{i}", step));
            device.GradientNorm([.. ranges.Select(r => r.Gradient)], maxNorm, norm);
            double[] statistics = new double[3];
            device.Read<double>(norm, statistics);
            double expectedNorm = c.Doubles("norm")[step];
            Assert.That(statistics[0], Is.EqualTo(expectedNorm).Within((single ? 1e-7 : 1e-12) * expectedNorm));
            Assert.That(statistics[2], Is.Zero);
            for (int i = 0; i < ranges.Length; i++)
            {
                device.Update(new(rates[step], betas[0], betas[1], epsilon, decay[i], step + 1), ranges[i], norm);
                Tensor p = ranges[i].Master.Exists ? ranges[i].Master : ranges[i].Weights;
                Close("p", i, Read(device, p));
                Close("m", i, Read(device, ranges[i].M));
                Close("v", i, Read(device, ranges[i].V));
                if (ranges[i].Master.Exists) Rounded(ranges[i], Read(device, p));
            }

            void Close(string key, int i, double[] got)
            {
                double[] expected = At($"{key}{i}_after", step);
                double largest = expected.Max(Math.Abs);
                double tolerance = single
                    ? (4 * c.F32Error(key)) + (1e-6 * largest)
                    : 1e-12 * Math.Max(largest, 1e-12);
                OpTests.AreClose(got, expected, tolerance, $"{c.Name} step {step} {key}{i}");
            }
        }

        double[] At(string key, int step)
        {
            double[] all = c.Doubles(key);
            int count = all.Length / rates.Length;
            return all[(step * count)..((step + 1) * count)];
        }

        static void Rounded(AdamWRange range, double[] master)
        {
            for (int e = 0; e < master.Length; e++)
            {
                ushort bits = ((ushort*)range.Weights.Data)[e];
                Assert.That(bits, Is.EqualTo(range.Weights.Type == DType.BF16
                    ? FloatBits.ToBF16((float)master[e]) : FloatBits.ToF16((float)master[e])));
            }
        }
    }

    [TestCase(1)]
    [TestCase(7)]
    [TestCase(100003)]
    public void ManyElementsEqualTheFormulaOneByOne(int count)
    {
        using var device = new CpuDevice(3, StepBytes);
        var spec = new Spec(DType.F32, new Shape(count));
        Tensor[] t = [.. Enumerable.Range(0, 4).Select(i => device.Allocate(spec, "t"))];
        double[] p = Fill.Normal(1, count), g = Fill.Normal(2, count), m = Fill.Normal(3, count);
        double[] v = Array.ConvertAll(Fill.Normal(4, count), x => x * x);
        double[][] start = [p, g, m, v];
        for (int i = 0; i < 4; i++) Write(device, t[i], start[i]);
        Tensor norm = device.Allocate(GradientNorm.Spec, "norm");
        device.GradientNorm([t[1]], 0.5, norm);
        double length = Math.Sqrt(g.Sum(x => x * x)), factor = Math.Min(1, 0.5 / (length + 1e-6));
        double[] statistics = new double[3];
        device.Read<double>(norm, statistics);
        Assert.That(statistics[0], Is.EqualTo(length).Within(1e-9 * length));
        Assert.That(statistics[1], Is.EqualTo(factor).Within(1e-9));
        var adam = new AdamW(0.01, 0.9, 0.99, 1e-8, 0.1, 3);
        device.Update(adam, new(t[0], Tensor.None, t[1], t[2], t[3]), norm);
        double[] got = Read(device, t[0]);
        for (int i = 0; i < count; i++)
        {
            double gradient = g[i] * factor, first = (0.9 * m[i]) + (0.1 * gradient);
            double second = (0.99 * v[i]) + (0.01 * gradient * gradient);
            double update = first / (1 - Math.Pow(0.9, 3))
                / (Math.Sqrt(second / (1 - Math.Pow(0.99, 3))) + 1e-8);
            double expected = (p[i] * (1 - (0.01 * 0.1))) - (0.01 * update);
            Assert.That(got[i], Is.EqualTo(expected).Within(2e-6 * Math.Max(1, Math.Abs(update))), $"[{i}]");
        }
    }

    [Test]
    public void NonFiniteGradientsAreCountedAndChangeNothing()
    {
        using var device = new CpuDevice(2, StepBytes);
        var spec = new Spec(DType.F32, new Shape(50000));
        Tensor[] t = [.. Enumerable.Range(0, 4).Select(i => device.Allocate(spec, "t"))];
        double[] g = Fill.Normal(1, 50000);
        (g[0], g[20000], g[49999]) = (double.NaN, double.PositiveInfinity, double.NegativeInfinity);
        Write(device, t[1], g);
        Tensor norm = device.Allocate(GradientNorm.Spec, "norm");
        device.GradientNorm([t[1], t[0]], 1, norm);
        double[] statistics = new double[3];
        device.Read<double>(norm, statistics);
        Assert.That(statistics[2], Is.EqualTo(3));
        Assert.That(double.IsFinite(statistics[0]), Is.False);
        device.Update(new(1, 0.9, 0.99, 1e-8, 0.1, 1), new(t[0], Tensor.None, t[1], t[2], t[3]), norm);
        foreach (int i in (int[])[0, 2, 3])
            Assert.That(Read(device, t[i]), Is.All.Zero);
    }

    [Test]
    public void LargeGradientsDoNotOverflowTheirNorm()
    {
        using var device = new CpuDevice(1, StepBytes);
        Tensor g = device.Allocate(new(DType.F32, new Shape(4)), "g");
        Write(device, g, [3e30, -3e30, 3e30, 3e30]);
        Tensor norm = device.Allocate(GradientNorm.Spec, "norm");
        device.GradientNorm([g], 0, norm);
        double[] statistics = new double[3];
        device.Read<double>(norm, statistics);
        Assert.That(statistics[0], Is.EqualTo(6e30).Within(1e24));
        Assert.That(statistics[1], Is.EqualTo(1));
    }

    [Test]
    public void TheNormIsTheSameOnAnyNumberOfThreadsAndAWarmStepAllocatesNothing()
    {
        double first = double.NaN;
        foreach (int threads in (int[])[1, 2, 3])
        {
            using var device = new CpuDevice(threads, StepBytes);
            var spec = new Spec(DType.F32, new Shape(99999));
            Tensor[] t = [.. Enumerable.Range(0, 4).Select(i => device.Allocate(spec, "t"))];
            Write(device, t[1], Fill.Normal(1, 99999));
            Tensor norm = device.Allocate(GradientNorm.Spec, "norm");
            var range = new AdamWRange(t[0], Tensor.None, t[1], t[2], t[3]);
            var adam = new AdamW(0.01, 0.9, 0.99, 1e-8, 0.1, 3);
            long before = 0;
            for (int i = 0; i < 4; i++)
            {
                before = GC.GetAllocatedBytesForCurrentThread();
                device.GradientNorm(new(in t[1]), 1, norm);
                device.Update(adam, range, norm);
            }

            Assert.That(GC.GetAllocatedBytesForCurrentThread() - before, Is.Zero);
            double[] statistics = new double[3];
            device.Read<double>(norm, statistics);
            if (double.IsNaN(first)) first = statistics[0];
            Assert.That(statistics[0], Is.EqualTo(first));
        }
    }

    [Test]
    public void WrongRangesAreRefused()
    {
        using var device = new CpuDevice(1, StepBytes);
        Tensor New(DType type, int n) => device.Allocate(new(type, new Shape(n)), "t");
        Tensor f = New(DType.F32, 4), wrong = New(DType.F32, 5), narrow = New(DType.BF16, 4);
        var adam = new AdamW(0.01, 0.9, 0.99, 1e-8, 0.1, 1);
        Refused(new(f, Tensor.None, wrong, f, f), "gradient must be F32[4], got F32[5]");
        Refused(new(f, f, f, f, f), "master must be nothing");
        Refused(new(narrow, Tensor.None, f, f, f), "master must be F32[4], got nothing");

        void Refused(AdamWRange range, string expected) => Assert.That(
            () => device.Update(adam, range, Tensor.None),
            Throws.TypeOf<ShapeException>().With.Message.Contain(expected));
    }

    private static double[] Numbers(JsonElement array) => [.. array.EnumerateArray().Select(e => e.GetDouble())];

    private static void Write(CpuDevice device, Tensor tensor, double[] data)
    {
        if (tensor.Type == DType.F64) device.Write<double>(tensor, data);
        else device.Write<float>(tensor, Array.ConvertAll(data, v => (float)v));
    }

    private static double[] Read(CpuDevice device, Tensor tensor)
    {
        var values = new double[tensor.Shape.Count];
        if (tensor.Type == DType.F64)
        {
            device.Read<double>(tensor, values);
            return values;
        }

        var floats = new float[values.Length];
        device.Read<float>(tensor, floats);
        return Array.ConvertAll(floats, v => (double)v);
    }
}
