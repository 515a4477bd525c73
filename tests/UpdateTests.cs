using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Updates;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// AdamW, the gradient norm and clipping, against ten steps of torch.optim.AdamW, on both devices;
/// and moments in BF16.
/// </summary>
[TestFixture]
public sealed class UpdateTests
{
    private const long StepBytes = 1L << 26;

    private CudaUnderTest? _cuda;

    public UpdateTests()
    {
    }

    internal UpdateTests(CudaUnderTest cuda) => _cuda = cuda;

    private static IEnumerable<ReferenceCase> Cases => ReferenceFile.Open("ops/adamw").Cases;

    [OneTimeTearDown]
    public void Free() => _cuda?.Dispose();

    [TestCaseSource(nameof(Cases))]
    public void TenStepsEqualPyTorch(object value)
    {
        var c = (ReferenceCase)value;
        foreach (DType type in (DType[])[DType.F32, DType.F64])
        {
            using var device = new CpuDevice(2, StepBytes, type);
            Train(c, device, DType.F64);
        }

        Train(c, Cuda(DType.F32), DType.F64);
    }

    [TestCaseSource(nameof(Cases))]
    public void NarrowWeightsAreTheRoundedMaster(object value)
    {
        var c = (ReferenceCase)value;
        using var device = new CpuDevice(2, StepBytes);
        DType type = c.Has("p0_bf16") ? DType.BF16 : DType.F16;
        Train(c, device, type);
        Train(c, Cuda(type == DType.BF16 ? type : DType.F32), type);
    }

    private static void Train(ReferenceCase c, Device device, DType weights)
    {
        DType full = device.Activations.Statistics();
        bool single = full == DType.F32;
        int[][] shapes = [.. c.Params.GetProperty("shapes").EnumerateArray()
            .Select(s => s.EnumerateArray().Select(e => e.GetInt32()).ToArray())];
        double[] decay = Numbers(c.Params.GetProperty("decay")), rates = c.Doubles("lr");
        double[] betas = Numbers(c.Params.GetProperty("betas"));
        JsonElement clip = c.Params.GetProperty("clip");
        double maxNorm = clip.ValueKind == JsonValueKind.Null ? 0 : clip.GetDouble();
        double epsilon = c.Params.GetProperty("eps").GetDouble();
        var ranges = new UpdateRange[shapes.Length];
        for (int i = 0; i < shapes.Length; i++)
        {
            Tensor New(string name) => device.Allocate(new(full, new Shape(shapes[i])), name);
            Tensor p = New("p"), master = Tensor.None;
            Write(device, p, c.Doubles($"p{i}"));
            if (weights != DType.F64)
                (p, master) = (device.Allocate(new(weights, new Shape(shapes[i])), "p"), p);
            ranges[i] = new(p, master, New("g"), New("m"), New("v"));
        }

        Tensor norm = device.Allocate(GradientNorm.Spec, "norm");
        for (int step = 0; step < rates.Length; step++)
        {
            for (int i = 0; i < ranges.Length; i++)
                Write(device, ranges[i].Gradient, At($"g{i}", step));
            device.GradientNorm([.. ranges.Select(r => r.Gradient)], maxNorm, norm, Tensor.None);
            double[] statistics = new double[3];
            device.Read<double>(norm, statistics);
            double expectedNorm = c.Doubles("norm")[step];
            Assert.That(statistics[0],
                Is.EqualTo(expectedNorm).Within((single ? 1e-7 : 1e-12) * expectedNorm));
            Assert.That(statistics[2], Is.Zero);
            for (int i = 0; i < ranges.Length; i++)
            {
                device.Update(new(rates[step], betas[0], betas[1], epsilon, decay[i], step + 1),
                    ranges[i], norm);
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

        void Rounded(UpdateRange range, double[] master)
        {
            var stored = new ushort[master.Length];
            device.Read<ushort>(range.Weights, stored);
            for (int e = 0; e < master.Length; e++)
            {
                Assert.That(stored[e], Is.EqualTo(range.Weights.Type == DType.BF16
                    ? FloatBits.ToBF16((float)master[e]) : FloatBits.ToF16((float)master[e])));
            }
        }
    }

    [TestCase(1, false)]
    [TestCase(7, false)]
    [TestCase(100003, false)]
    [TestCase(1, true)]
    [TestCase(7, true)]
    [TestCase(100003, true)]
    public void ManyElementsEqualTheFormulaOneByOne(int count, bool cuda)
    {
        using var cpu = new CpuDevice(3, StepBytes);
        Device device = cuda ? Cuda(DType.F32) : cpu;
        var spec = new Spec(DType.F32, new Shape(count));
        Tensor[] t = [.. Enumerable.Range(0, 4).Select(i => device.Allocate(spec, "t"))];
        double[] p = Fill.Normal(1, count), g = Fill.Normal(2, count), m = Fill.Normal(3, count);
        double[] v = Array.ConvertAll(Fill.Normal(4, count), x => x * x);
        double[][] start = [p, g, m, v];
        for (int i = 0; i < 4; i++) Write(device, t[i], start[i]);
        Tensor norm = device.Allocate(GradientNorm.Spec, "norm");
        device.GradientNorm([t[1]], 0.5, norm, Tensor.None);
        double length = Math.Sqrt(g.Sum(x => x * x)), factor = Math.Min(1, 0.5 / (length + 1e-6));
        double[] statistics = new double[3];
        device.Read<double>(norm, statistics);
        Assert.That(statistics[0], Is.EqualTo(length).Within(1e-9 * length));
        Assert.That(statistics[1], Is.EqualTo(factor).Within(1e-9));
        var adam = new UpdateStep(0.01, 0.9, 0.99, 1e-8, 0.1, 3);
        device.Update(adam, new(t[0], Tensor.None, t[1], t[2], t[3]), norm);
        double[] got = Read(device, t[0]);
        for (int i = 0; i < count; i++)
        {
            double gradient = g[i] * factor, first = (0.9 * m[i]) + (0.1 * gradient);
            double second = (0.99 * v[i]) + (0.01 * gradient * gradient);
            double update = first / (1 - Math.Pow(0.9, 3))
                / (Math.Sqrt(second / (1 - Math.Pow(0.99, 3))) + 1e-8);
            double expected = (p[i] * (1 - (0.01 * 0.1))) - (0.01 * update);
            Assert.That(got[i], Is.EqualTo(expected).Within(2e-6 * Math.Max(1, Math.Abs(update))),
                $"[{i}]");
        }
    }

    [TestCase(false)]
    [TestCase(true)]
    public void NonFiniteGradientsAreCountedAndChangeNothing(bool cuda)
    {
        using var cpu = new CpuDevice(2, StepBytes);
        Device device = cuda ? Cuda(DType.F32) : cpu;
        var spec = new Spec(DType.F32, new Shape(50000));
        Tensor[] t = [.. Enumerable.Range(0, 4).Select(i => device.Allocate(spec, "t"))];
        double[] g = Fill.Normal(1, 50000);
        // Each in another place of a vector.
        (g[0], g[20001], g[20006], g[49999]) = (double.NaN, double.PositiveInfinity, double.NaN,
            double.NegativeInfinity);
        Write(device, t[1], g);
        Tensor norm = device.Allocate(GradientNorm.Spec, "norm");
        device.GradientNorm([t[1], t[0]], 1, norm, Tensor.None);
        double[] statistics = new double[3];
        device.Read<double>(norm, statistics);
        Assert.That(statistics[2], Is.EqualTo(4));
        Assert.That(double.IsFinite(statistics[0]), Is.False);
        // One alone is enough.
        (g[0], g[20001], g[20006]) = (0, 0, 0);
        Write(device, t[1], g);
        device.GradientNorm([t[1], t[0]], 1, norm, Tensor.None);
        device.Update(new(1, 0.9, 0.99, 1e-8, 0.1, 1),
            new(t[0], Tensor.None, t[1], t[2], t[3]), norm);
        foreach (int i in (int[])[0, 2, 3])
            Assert.That(Read(device, t[i]), Is.All.Zero);
    }

    [TestCase(false)]
    [TestCase(true)]
    public void LossesThatAreNotFiniteAreCountedAndAreNoGradients(bool cuda)
    {
        using var cpu = new CpuDevice(2, StepBytes);
        Device device = cuda ? Cuda(DType.F32) : cpu;
        Tensor New(int count) => device.Allocate(new(DType.F32, new Shape(count)), "t");
        Tensor g = New(3), losses = New(5), norm = device.Allocate(GradientNorm.Spec, "norm");
        Write(device, g, [2, 3, 6]);
        foreach (double bad in (double[])[1, double.NaN, double.PositiveInfinity])
        {
            Write(device, losses, [1, 2, bad, 4, bad]);
            device.GradientNorm([g], 1, norm, losses);
            double[] statistics = new double[3];
            device.Read<double>(norm, statistics);
            Assert.That(statistics[0], Is.EqualTo(7));
            Assert.That(statistics[2], Is.EqualTo(bad == 1 ? 0 : 2));
        }
    }

    [TestCase(false)]
    [TestCase(true)]
    public void LargeGradientsDoNotOverflowTheirNorm(bool cuda)
    {
        using var cpu = new CpuDevice(1, StepBytes);
        Device device = cuda ? Cuda(DType.F32) : cpu;
        Tensor norm = device.Allocate(GradientNorm.Spec, "norm");
        // In whole vectors, and with one more.
        foreach (int count in (int[])[4, 5])
        {
            Tensor g = device.Allocate(new(DType.F32, new Shape(count)), "g");
            Write(device, g, [.. Enumerable.Repeat(3e30, count)]);
            device.GradientNorm([g], 0, norm, Tensor.None);
            double[] statistics = new double[3];
            device.Read<double>(norm, statistics);
            Assert.That(statistics[0], Is.EqualTo(3e30 * Math.Sqrt(count)).Within(1e24));
            Assert.That(statistics[1], Is.EqualTo(1));
        }
    }

    // More parts than the block that adds them has threads.
    [TestCase(false)]
    [TestCase(true)]
    public void ManyRangesHaveOneNorm(bool cuda)
    {
        using var cpu = new CpuDevice(2, StepBytes);
        Device device = cuda ? Cuda(DType.F32) : cpu;
        Tensor norm = device.Allocate(GradientNorm.Spec, "norm");
        var ranges = new Tensor[600];
        double squares = 0;
        for (int i = 0; i < ranges.Length; i++)
        {
            ranges[i] = device.Allocate(new(DType.F32, new Shape(3)), "g");
            double[] values = Fill.Normal(i, 3);
            if (i % 200 == 199) values[1] = double.NaN;
            else squares += values.Sum(x => x * x);
            Write(device, ranges[i], values);
        }

        double[] statistics = new double[3];
        device.GradientNorm(ranges, 0, norm, Tensor.None);
        device.Read<double>(norm, statistics);
        Assert.That(statistics[2], Is.EqualTo(3));
        device.GradientNorm(
            [.. ranges.Where((_, i) => i % 200 != 199)], 0, norm, Tensor.None);
        device.Read<double>(norm, statistics);
        Assert.That(statistics[0], Is.EqualTo(Math.Sqrt(squares)).Within(1e-9 * squares));
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
            var range = new UpdateRange(t[0], Tensor.None, t[1], t[2], t[3]);
            var adam = new UpdateStep(0.01, 0.9, 0.99, 1e-8, 0.1, 3);
            long before = 0;
            for (int i = 0; i < 4; i++)
            {
                before = GC.GetAllocatedBytesForCurrentThread();
                device.GradientNorm(new(in t[1]), 1, norm, Tensor.None);
                device.Update(adam, range, norm);
            }

            Assert.That(GC.GetAllocatedBytesForCurrentThread() - before, Is.Zero);
            double[] statistics = new double[3];
            device.Read<double>(norm, statistics);
            if (double.IsNaN(first)) first = statistics[0];
            Assert.That(statistics[0], Is.EqualTo(first));
        }
    }

    // Each moment stands between two neighbours in BF16, and what it is on average is the exact
    // value: the mean of n differences of at most one step u is within 5 u / (2 sqrt(n)) of 0, five
    // standard deviations (a value in an interval of length u has at most u / 2).
    [TestCase(false)]
    [TestCase(true)]
    public void MomentsInBf16AreRoundedWithoutBias(bool cuda)
    {
        const int Count = 40003;
        using var cpu = new CpuDevice(2, StepBytes);
        Device device = cuda ? Cuda(DType.BF16) : cpu;
        double[] p = Fill.Normal(1, Count), g = Fill.Normal(2, Count);
        // Moments between 1 and 2, where the step is 1/128 for all;
        // the small changes are far below it.
        double[] m =
            [.. Fill.Normal(3, Count).Select(x => Brain(1.5 + Math.Clamp(x / 8, -0.4, 0.4)))];
        double[] v =
            [.. Fill.Normal(4, Count).Select(x => Brain(1.5 + Math.Clamp(x / 8, -0.4, 0.4)))];
        var bits = new List<ushort[]>();
        for (int run = 0; run < 2; run++)
        {
            UpdateRange range = New(device, DType.BF16, p, g, m, v, first: 8);
            device.Update(new(1e-3, 0.999, 0.9999, 1e-8, 0, 5, Seed: 7), range, Tensor.None);
            ushort[] means = Bits(device, range.M), squares = Bits(device, range.V);
            double meanError = 0, squareError = 0;
            int up = 0;
            for (int i = 0; i < Count; i++)
            {
                double mean = (0.999 * m[i]) + (0.001 * g[i]);
                double square = (0.9999 * v[i]) + (0.0001 * g[i] * g[i]);
                double gotMean = FloatBits.FromBF16(means[i]),
                    gotSquare = FloatBits.FromBF16(squares[i]);
                Assert.That(Math.Abs(gotMean - mean), Is.LessThan(1.0 / 128 + 1e-6), $"m[{i}]");
                Assert.That(Math.Abs(gotSquare - square), Is.LessThan(1.0 / 128 + 1e-6), $"v[{i}]");
                meanError += gotMean - mean;
                squareError += gotSquare - square;
                if (gotMean > mean) up++;
            }

            double bound = 5.0 / (2 * 128) / Math.Sqrt(Count);
            TestContext.Out.WriteLine(
                $"{meanError / Count:E2} {squareError / Count:E2} of {bound:E2}");
            Assert.That(Math.Abs(meanError / Count), Is.LessThan(bound));
            Assert.That(Math.Abs(squareError / Count), Is.LessThan(bound));
            Assert.That(up, Is.InRange(Count / 10, 9 * Count / 10));
            bits.Add(means);
            bits.Add(squares);
        }

        Assert.That(bits[2], Is.EqualTo(bits[0]), "the same seed and step round the same way");
        Assert.That(bits[3], Is.EqualTo(bits[1]));
        UpdateRange same = New(cpu, DType.BF16, p, g, m, v, first: 8);
        cpu.Update(new(1e-3, 0.999, 0.9999, 1e-8, 0, 5, Seed: 7), same, Tensor.None);
        Assert.That(bits[0].AsSpan().SequenceEqual(Bits(cpu, same.M)), "m as on the CPU");
        Assert.That(bits[1].AsSpan().SequenceEqual(Bits(cpu, same.V)), "v as on the CPU");
        UpdateRange other = New(device, DType.BF16, p, g, m, v, first: 8);
        device.Update(new(1e-3, 0.999, 0.9999, 1e-8, 0, 6, Seed: 7), other, Tensor.None);
        Assert.That(Bits(device, other.M), Is.Not.EqualTo(bits[0]),
            "another step rounds another way");
    }

    // Random bits that were added to them would make NaNs numbers.
    [TestCase(false)]
    [TestCase(true)]
    public void MomentsThatAreNoNumbersStayNone(bool cuda)
    {
        using var cpu = new CpuDevice(2, StepBytes);
        Device device = cuda ? Cuda(DType.BF16) : cpu;
        // As a GPU makes it: all bits are set, one more would carry.
        double none = BitConverter.Int64BitsToDouble(long.MaxValue);
        foreach (double bad in (double[])[none, double.PositiveInfinity])
        {
            double[] g = [.. Enumerable.Repeat(bad, 67)], zeros = new double[67];
            UpdateRange range = New(device, DType.BF16, zeros, g, zeros, zeros, first: 0);
            device.Update(
                new(1e-2, 0.9, 0.99, 1e-8, 0.1, 3, Seed: 9), range, Tensor.None);
            foreach (Tensor moments in (Tensor[])[range.M, range.V])
                Assert.That(Bits(device, moments).Select(FloatBits.FromBF16), double.IsNaN(bad)
                    ? Is.All.NaN : Is.All.EqualTo(float.PositiveInfinity));
        }
    }

    /// <summary>
    /// A range in pieces rounds as in one: the numbers belong to elements, not to calls.
    /// </summary>
    [TestCase(false)]
    [TestCase(true)]
    public void PiecesOfARangeRoundAsTheWhole(bool cuda)
    {
        const int Count = 1023, Cut = 512;
        using var cpu = new CpuDevice(2, StepBytes);
        Device device = cuda ? Cuda(DType.BF16) : cpu;
        double[] p = Fill.Normal(1, Count), g = Fill.Normal(2, Count);
        double[] m = [.. Fill.Normal(3, Count).Select(Brain)], v = [.. m.Select(x => Brain(x * x))];
        var step = new UpdateStep(1e-2, 0.9, 0.99, 1e-8, 0.1, 3, Seed: 9);
        UpdateRange whole = New(device, DType.BF16, p, g, m, v, first: 0);
        device.Update(step, whole, Tensor.None);
        ushort[] found = Bits(device, whole.M);
        UpdateRange left = New(device, DType.BF16, p[..Cut], g[..Cut], m[..Cut], v[..Cut], first: 0);
        UpdateRange right =
            New(device, DType.BF16, p[Cut..], g[Cut..], m[Cut..], v[Cut..], first: Cut);
        device.Update(step, left, Tensor.None);
        device.Update(step, right, Tensor.None);
        Assert.That((ushort[])[.. Bits(device, left.M), .. Bits(device, right.M)],
            Is.EqualTo(found));
        double[] got = Read(device, whole.Weights);
        for (int i = 0; i < Count; i++)
        {
            double mean = (0.9 * m[i]) + (0.1 * g[i]),
                square = (0.99 * v[i]) + (0.01 * g[i] * g[i]);
            double update = mean / (1 - Math.Pow(0.9, 3))
                / (Math.Sqrt(square / (1 - Math.Pow(0.99, 3))) + 1e-8);
            // The weights take the moments before they are rounded.
            Assert.That(got[i], Is.EqualTo((p[i] * (1 - 1e-3)) - (1e-2 * update)).Within(
                2e-6 * Math.Max(1, Math.Abs(update))), $"[{i}]");
        }
    }

    [Test]
    public void WrongRangesAreRefused()
    {
        using var device = new CpuDevice(1, StepBytes);
        Tensor New(DType type, int n) => device.Allocate(new(type, new Shape(n)), "t");
        Tensor f = New(DType.F32, 4), wrong = New(DType.F32, 5), narrow = New(DType.BF16, 4);
        var adam = new UpdateStep(0.01, 0.9, 0.99, 1e-8, 0.1, 1);
        Refused(new(f, Tensor.None, wrong, f, f), "gradient must be F32[4], got F32[5]");
        Refused(new(f, f, f, f, f), "master must be nothing");
        Refused(new(f, Tensor.None, f, narrow, f), "v must be BF16[4], got F32[4]");
        Refused(new(f, Tensor.None, f, f, f, First: 2), "first element is 2");
        Refused(new(narrow, Tensor.None, f, f, f), "master must be F32[4], got nothing");

        void Refused(UpdateRange range, string expected) => Assert.That(
            () => device.Update(adam, range, Tensor.None),
            Throws.TypeOf<ShapeException>().With.Message.Contain(expected));
    }

    private static double[] Numbers(JsonElement array) =>
        [.. array.EnumerateArray().Select(e => e.GetDouble())];

    private static void Write(Device device, Tensor tensor, double[] data)
    {
        if (tensor.Type == DType.F64) device.Write<double>(tensor, data);
        else device.Write<float>(tensor, Array.ConvertAll(data, v => (float)v));
    }

    private static double[] Read(Device device, Tensor tensor)
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

    private static double Brain(double value) => FloatBits.FromBF16(FloatBits.ToBF16((float)value));

    private static ushort[] Bits(Device device, Tensor tensor)
    {
        var bits = new ushort[tensor.Shape.Count];
        device.Read<ushort>(tensor, bits);
        return bits;
    }

    private static UpdateRange New(
        Device device, DType moments, double[] p, double[] g, double[] m, double[] v, long first)
    {
        var shape = new Shape(p.Length);
        Tensor Of(DType type, double[] values)
        {
            Tensor tensor = device.Allocate(new Spec(type, shape), "t");
            device.WriteFloats(tensor, Array.ConvertAll(values, x => (float)x));
            return tensor;
        }

        return new(Of(DType.F32, p), Tensor.None, Of(DType.F32, g), Of(moments, m),
            Of(moments, v), first);
    }

    private CudaDevice Cuda(DType activations) => (_cuda ??= new()).Device(activations);
}
