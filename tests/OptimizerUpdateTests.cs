using System.Text.Json;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Updates;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// The optimizers beside torch's AdamW, step by step from the recorded state before each, on both
/// devices: bitsandbytes' AdamW in 8 and 32 bits, Lion, plain descent.
/// </summary>
[TestFixture]
public sealed partial class OptimizerUpdateTests
{
    private const long StepBytes = 1L << 26;

    private CudaUnderTest? _cuda;

    public OptimizerUpdateTests()
    {
    }

    internal OptimizerUpdateTests(CudaUnderTest cuda) => _cuda = cuda;

    private static IEnumerable<TestCaseData> EightBit => Of("optim/adamw8bit");

    private static IEnumerable<TestCaseData> Elementwise =>
    [
        .. Of("optim/adamw32bit", UpdateRule.AdamWDecaysLast), .. Of("optim/lion", UpdateRule.Lion),
        .. Of("optim/sgd", UpdateRule.Sgd),
    ];

    [OneTimeTearDown]
    public void Free() => _cuda?.Dispose();

    [Test]
    public void TheTablesAreThoseOfBitsandbytes()
    {
        var file = ReferenceFile.Open("optim/dynamic_maps");
        Assert.That(DynamicMap.Signed, Is.EqualTo(file.Floats("signed")));
        Assert.That(DynamicMap.Unsigned, Is.EqualTo(file.Floats("unsigned")));
    }

    /// <summary>To the bit: with these factors 0 becomes the moment with the other sign.</summary>
    [Test]
    public void CodesStandForTheTable([Values] bool cuda)
    {
        const int Count = DynamicMap.Block;
        using var cpu = new CpuDevice(2, StepBytes);
        Device device = cuda ? Cuda(DType.F32) : cpu;
        Tensor New(DType type, int n) => device.Allocate(new(type, new Shape(n)), "t");
        var range = new UpdateRange(New(DType.F32, Count), Tensor.None, New(DType.F32, Count),
            New(DType.U8, Count), New(DType.U8, Count), 0, New(DType.F32, 1), New(DType.F32, 1));
        device.WriteFloats(range.Weights, new float[Count]);
        device.WriteFloats(range.Gradient, new float[Count]);
        device.Write<byte>(range.M, [.. Enumerable.Range(0, Count).Select(i => (byte)i)]);
        device.Write<byte>(range.V, [.. Enumerable.Repeat(byte.MaxValue, Count)]);
        device.WriteFloats(range.MScales, [1]);
        device.WriteFloats(range.VScales, [1]);
        device.Update(new UpdateStep(1, 0.5, 0.5, 0, 0, 1, 0, UpdateRule.AdamWDecaysLast), range,
            Tensor.None);
        Assert.That(device.ReadFloats(range.Weights),
            Is.EqualTo(DynamicMap.Signed.Select(x => -x)));
    }

    [TestCaseSource(nameof(Quantisations))]
    public void CodesAreTheNearestEntries(object value)
    {
        var c = (ReferenceCase)value;
        float[] table = c.Params.GetProperty("signed").GetBoolean()
            ? DynamicMap.Signed : DynamicMap.Unsigned;
        float[] x = Floats(c, "x"), scales = Floats(c, "absmax");
        double[] expected = c.Doubles("code_cuda"), tie = c.Doubles("near_tie");
        for (int i = 0; i < x.Length; i++)
        {
            byte code = DynamicMap.Code(table, x[i] / scales[i / DynamicMap.Block]);
            Assert.That(Math.Abs(code - expected[i]), Is.LessThanOrEqualTo(tie[i]), $"[{i}] {x[i]}");
        }
    }

    /// <summary>
    /// A negative number that is nearest to 0 becomes the least negative one, as in bitsandbytes'
    /// kernels, which compare sign bits; a positive one becomes 0, whose sign bit it has.
    /// </summary>
    [Test]
    public void ASmallMomentOf8BitsKeepsItsSign([Values] bool cuda)
    {
        using var cpu = new CpuDevice(2, StepBytes);
        Device device = cuda ? Cuda(DType.F32) : cpu;
        Tensor New(DType type, int n) => device.Allocate(new(type, new Shape(n)), "t");
        var range = new UpdateRange(New(DType.F32, 5), Tensor.None, New(DType.F32, 5),
            New(DType.U8, 5), Tensor.None, 0, New(DType.F32, 1));
        Tensor norm = device.Allocate(GradientNorm.Spec, "norm");
        device.WriteFloats(range.Weights, new float[5]);
        device.WriteFloats(range.Gradient, [1, -1e-8f, 1e-8f, 0, -1]);
        device.Write<byte>(range.M, new byte[5]);
        device.WriteFloats(range.MScales, [0]);
        device.GradientNorm([range.Gradient], 0, norm, Tensor.None);
        device.Update(
            new UpdateStep(0.1, 0.9, 0.9, 0, 0, 1, 0, UpdateRule.Lion), range, norm);
        // The table ascends: 127 is 0, 255 is 1, and there is no -1.
        Assert.That(Bytes(device, range.M), Is.EqualTo((byte[])[255, 126, 127, 127, 0]));

        // Of nothing at all the codes are those of 0, whatever they were, and no value moves.
        float[] before = device.ReadFloats(range.Weights);
        device.WriteFloats(range.Gradient, new float[5]);
        device.WriteFloats(range.MScales, [0]);
        device.Update(
            new UpdateStep(0.1, 0.9, 0.9, 0, 0, 1, 0, UpdateRule.Lion), range, norm);
        Assert.That(Bytes(device, range.M), Is.All.EqualTo(127));
        Assert.That(device.ReadFloats(range.Weights), Is.EqualTo(before));
    }

    private static IEnumerable<ReferenceCase> Quantisations =>
        ReferenceFile.Open("optim/quantize_blockwise").Cases;

    [TestCaseSource(nameof(EightBit))]
    public void EachStepIn8BitsEqualsBitsandbytes(object value, bool cuda)
    {
        var c = (ReferenceCase)value;
        bool narrow = c.Params.GetProperty("dtype").GetString() == "BF16";
        using var cpu = new CpuDevice(2, StepBytes);
        Device device = cuda ? Cuda(narrow ? DType.BF16 : DType.F32) : cpu;
        int count = c.Doubles("p").Length, blocks = DynamicMap.Blocks(count);
        Tensor New(DType type, int n) => device.Allocate(new(type, new Shape(n)), "t");
        Tensor p = New(DType.F32, count), weights = narrow ? New(DType.BF16, count) : p;
        var range = new UpdateRange(
            weights, narrow ? p : Tensor.None, New(DType.F32, count), New(DType.U8, count),
            New(DType.U8, count), 0, New(DType.F32, blocks), New(DType.F32, blocks));
        Tensor norm = device.Allocate(GradientNorm.Spec, "norm");
        double[] rates = c.Doubles("lr");
        int moved = 0;
        for (int step = 0; step < rates.Length; step++)
        {
            float[] before = step == 0 ? Floats(c, "p") : At("p_after", step - 1, count);
            float[] g = At("g", step, count);
            device.WriteFloats(p, before);
            device.WriteFloats(range.Gradient, g);
            foreach (var (codes, scales, i) in Moments(range))
            {
                device.Write<byte>(codes, step == 0 ? new byte[count]
                    : Array.ConvertAll(At($"c{i}_after", step - 1, count), v => (byte)v));
                device.WriteFloats(
                    scales, step == 0 ? new float[blocks] : At($"a{i}_after", step - 1, blocks));
            }

            byte[] codesBefore = Bytes(device, range.M);
            device.GradientNorm([range.Gradient], 0, norm, Tensor.None);
            device.Update(Step(c, rates[step], step, UpdateRule.AdamWDecaysLast), range, norm);
            float[] got = device.ReadFloats(p);
            if (!g.All(float.IsFinite))
            {
                Assert.That(got, Is.EqualTo(before), "a step that is not finite changes nothing");
                Assert.That(Bytes(device, range.M), Is.EqualTo(codesBefore));
                continue;
            }

            float[] expected = At("p_after", step, count);
            double largest = expected.Max(Math.Abs);
            for (int e = 0; e < count; e++)
            {
                if (!narrow)
                {
                    Assert.That(got[e], Is.EqualTo(expected[e]).Within(1e-6 * largest));
                    continue;
                }

                // Rounded once, from a master; there twice: one step apart at a few.
                int apart = Math.Abs(FloatBits.ToBF16(got[e]) - FloatBits.ToBF16(expected[e]));
                Assert.That(apart, Is.LessThanOrEqualTo(1), $"step {step} p[{e}]");
                moved += apart;
            }

            foreach (var (codes, scales, i) in Moments(range))
            {
                float[] wanted = At($"a{i}_after", step, blocks), scale = device.ReadFloats(scales);
                for (int b = 0; b < blocks; b++)
                    Assert.That(scale[b], Is.EqualTo(wanted[b]).Within(1e-6 * wanted[b]));
                float[] code = At($"c{i}_after", step, count), near = At($"near{i}", step, count);
                byte[] found = Bytes(device, codes);
                for (int e = 0; e < count; e++)
                    if (wanted[e / DynamicMap.Block] > 0)
                        Assert.That(Math.Abs(found[e] - code[e]), Is.LessThanOrEqualTo(near[e]),
                            $"step {step} code {i} of {e}");
            }
        }

        Assert.That(moved, Is.LessThan(count * rates.Length / 50));

        float[] At(string key, int step, int each) => Floats(c, key)[(step * each)..((step + 1) * each)];
    }

    [TestCaseSource(nameof(Elementwise))]
    public void EachStepEqualsItsFormula(object value, UpdateRule rule, bool cuda)
    {
        var c = (ReferenceCase)value;
        using var cpu = new CpuDevice(2, StepBytes);
        Device device = cuda ? Cuda(DType.F32) : cpu;
        int count = c.Doubles("p").Length;
        string[] states = rule switch
        {
            UpdateRule.Lion => ["m"],
            UpdateRule.Sgd => [],
            _ => ["m", "v"],
        };
        Tensor New() => device.Allocate(new(DType.F32, new Shape(count)), "t");
        Tensor p = New(), g = New();
        Tensor[] moments = [.. states.Select(_ => New()), Tensor.None, Tensor.None];
        double[] rates = c.Doubles("lr");
        for (int step = 0; step < rates.Length; step++)
        {
            device.WriteFloats(p, step == 0 ? Floats(c, "p") : Part("p_after", step - 1));
            device.WriteFloats(g, Part("g", step));
            for (int i = 0; i < states.Length; i++)
                device.WriteFloats(moments[i],
                    step == 0 ? new float[count] : Part(states[i] + "_after", step - 1));
            device.Update(Step(c, rates[step], step, rule),
                new(p, Tensor.None, g, moments[0], moments[1]), Tensor.None);
            float[] near = c.Has("near") ? Part("near", step) : new float[count];
            Close(device.ReadFloats(p), Part("p_after", step), near, $"step {step} p");
            for (int i = 0; i < states.Length; i++)
                Close(device.ReadFloats(moments[i]), Part(states[i] + "_after", step),
                    new float[count], $"step {step} {states[i]}");
        }

        float[] Part(string key, int step) => Floats(c, key)[(step * count)..((step + 1) * count)];

        static void Close(float[] got, float[] expected, float[] near, string what)
        {
            double largest = expected.Max(Math.Abs);
            for (int i = 0; i < got.Length; i++)
                if (near[i] == 0)
                    Assert.That(got[i], Is.EqualTo(expected[i]).Within(1e-6 * largest),
                        $"{what}[{i}]");
        }
    }

    /// <summary>
    /// Odd sizes and addresses, clipping and a rounded copy: what follows from the formula in
    /// double and the nearest entry, with what lies around untouched.
    /// </summary>
    [TestCase(1, 0, UpdateRule.AdamWDecaysLast, false)]
    [TestCase(1, 0, UpdateRule.AdamWDecaysLast, true)]
    [TestCase(1023, 1, UpdateRule.AdamWDecaysLast, false)]
    [TestCase(1023, 1, UpdateRule.AdamWDecaysLast, true)]
    [TestCase(5003, 0, UpdateRule.Lion, false)]
    [TestCase(5003, 0, UpdateRule.Lion, true)]
    [TestCase(259, 3, UpdateRule.Lion, true)]
    public void AnySizeAndAddressIn8Bits(int count, int shift, UpdateRule rule, bool cuda)
    {
        using var cpu = new CpuDevice(2, StepBytes);
        Device device = cuda ? Cuda(DType.BF16) : cpu;
        int blocks = DynamicMap.Blocks(count);
        var step = new UpdateStep(1e-2, 0.9, 0.99, 1e-8, 0.1, 3, 0, rule);
        bool isAdam = rule != UpdateRule.Lion;
        double[] p = Fill.Normal(1, count), g = Fill.Normal(2, count);
        byte[] m = Codes(3), v = Codes(4);
        float[] scales = [.. Fill.Normal(5, blocks).Select(x => (float)Math.Abs(x) + 0.1f)];
        Tensor NewAt(DType type, int n)
        {
            // Three elements behind, which nobody may touch.
            Tensor all = device.Allocate(new(type, new Shape(n + 8)), "t");
            return new(all.Data + shift * type.Size(), new(type, new Shape(n)));
        }

        Tensor master = NewAt(DType.F32, count), none = Tensor.None;
        var range = new UpdateRange(NewAt(DType.BF16, count), master, NewAt(DType.F32, count),
            NewAt(DType.U8, count), isAdam ? NewAt(DType.U8, count) : none, 0,
            NewAt(DType.F32, blocks), isAdam ? NewAt(DType.F32, blocks) : none);
        device.WriteFloats(master, Narrow(p));
        device.WriteFloats(range.Gradient, Narrow(g));
        device.Write<byte>(range.M, m);
        device.WriteFloats(range.MScales, scales);
        if (isAdam)
        {
            device.Write<byte>(range.V, v);
            device.WriteFloats(range.VScales, scales);
        }

        Tensor norm = device.Allocate(GradientNorm.Spec, "norm");
        device.GradientNorm([range.Gradient], 0.5, norm, none);
        device.Update(step, range, norm);
        double factor = Math.Min(1, 0.5 / (Math.Sqrt(g.Sum(x => x * x)) + 1e-6));
        var (means, squares) = (new double[count], new double[count]);
        float[] got = device.ReadFloats(master), rounded = device.ReadFloats(range.Weights);
        for (int i = 0; i < count; i++)
        {
            double gradient = (float)g[i] * factor, scale = scales[i / 256];
            double first = DynamicMap.Signed[m[i]] * scale, expected;
            if (isAdam)
            {
                means[i] = (0.9 * first) + (0.1 * gradient);
                squares[i] = (0.99 * DynamicMap.Unsigned[v[i]] * scale) + (0.01 * gradient * gradient);
                double update = means[i] / (1 - Math.Pow(0.9, 3))
                    / (Math.Sqrt(squares[i] / (1 - Math.Pow(0.99, 3))) + 1e-8);
                expected = (p[i] - (0.01 * update)) * (1 - (0.01 * 0.1));
                // 1 - b in 32 bits, and moments that cancel.
                Assert.That(got[i], Is.EqualTo(expected).Within(1e-5 * Math.Max(1, Math.Abs(update))));
            }
            else
            {
                double sign = Math.Sign((0.9 * first) + (0.1 * gradient));
                means[i] = (0.99 * first) + (0.01 * gradient);
                expected = (p[i] * (1 - (0.01 * 0.1))) - (0.01 * sign);
                Assert.That(got[i], Is.EqualTo(expected).Within(1e-6), $"[{i}]");
            }

            Assert.That(rounded[i], Is.EqualTo(FloatBits.FromBF16(FloatBits.ToBF16(got[i]))));
        }

        Nearest(range.M, range.MScales, means, DynamicMap.Signed);
        if (isAdam) Nearest(range.V, range.VScales, squares, DynamicMap.Unsigned);
        foreach (Tensor t in (Tensor[])[range.Weights, master, range.M, range.MScales])
        {
            var behind = new Tensor(t.Data + (nint)t.Spec.Bytes, new(DType.U8, new Shape(5)));
            Assert.That(Bytes(device, behind), Is.All.Zero);
        }

        byte[] Codes(int seed) =>
            [.. Fill.Normal(seed, count).Select(x => (byte)Math.Clamp(128 + (x * 50), 0, 255))];

        // No entry is nearer than the code's by more than rounding.
        void Nearest(Tensor codes, Tensor found, double[] values, float[] table)
        {
            float[] scale = device.ReadFloats(found);
            byte[] code = Bytes(device, codes);
            for (int i = 0; i < count; i++)
            {
                int begin = i / 256 * 256;
                double largest = values[begin..Math.Min(count, begin + 256)].Max(Math.Abs);
                Assert.That(scale[i / 256], Is.EqualTo(largest).Within(2e-5 * largest));
                double x = values[i] / largest;
                double least = table.Where(t => table[0] == 0 || x < 0 == t < 0)
                    .Min(t => Math.Abs(t - x));
                Assert.That(Math.Abs(table[code[i]] - x), Is.LessThanOrEqualTo(least + 2e-5),
                    $"code of [{i}]");
            }
        }
    }

    private static IEnumerable<(Tensor Codes, Tensor Scales, int Number)> Moments(UpdateRange range) =>
        [(range.M, range.MScales, 1), (range.V, range.VScales, 2)];

    private static UpdateStep Step(ReferenceCase c, double rate, int step, UpdateRule rule)
    {
        double[] betas = c.Params.TryGetProperty("betas", out JsonElement both)
            ? [.. both.EnumerateArray().Select(e => e.GetDouble())] : [0, 0];
        double epsilon = c.Params.TryGetProperty("eps", out JsonElement eps) ? eps.GetDouble() : 0;
        return new(rate, betas[0], betas[1], epsilon, c.Params.GetProperty("decay").GetDouble(),
            step + 1, 0, rule);
    }

    private static IEnumerable<TestCaseData> Of(string file, UpdateRule? rule = null)
    {
        foreach (ReferenceCase c in ReferenceFile.Open(file).Cases)
            foreach (bool cuda in (bool[])[false, true])
                yield return (rule is { } its ? new TestCaseData(c, its, cuda)
                    : new TestCaseData(c, cuda))
                    .SetArgDisplayNames($"{file} {c.Name}", cuda ? "cuda" : "cpu");
    }

    private static float[] Floats(ReferenceCase c, string key) => Narrow(c.Doubles(key));

    private static float[] Narrow(double[] values) => Array.ConvertAll(values, v => (float)v);

    private static byte[] Bytes(Device device, Tensor tensor)
    {
        var bytes = new byte[tensor.Shape.Count];
        device.Read<byte>(tensor, bytes);
        return bytes;
    }

    private CudaDevice Cuda(DType activations) => (_cuda ??= new()).Device(activations);
}
