using System.Runtime.InteropServices;
using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Ops;
using MiniCpmNative.Kernels.Quantised;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Products with weights of 4 and 8 bits against those with the dense weight of the same numbers:
/// outputs and gradients have the same bits on each device. What the numbers are is held by
/// <see cref="FourBitCodesTests"/> and <see cref="FourBitCodesTests"/>.
/// </summary>
[TestFixture]
public sealed unsafe class QuantisedWeightTests
{
    // Columns that blocks cross, an odd number of elements, whole blocks, and several rows in eight
    // elements.
    private static readonly (int Outputs, int Inputs)[] s_sizes =
        [(9, 20), (13, 21), (40, 64), (7, 3)];

    // Rows that weights are unpacked for.
    private const int Many = 17;

    private static readonly string[] s_kinds =
        ["nf4", "nf4_nested", "fp4", "fp4_nested_part", "nf4_not_finite", "int8",
            "groups4", "groups4_ordered", "groups8"];

    private static readonly string[] s_ops =
        ["linear", "linear_transposed", "lora_dropout", "linears"];

    [Test]
    public void OnTheCpu(
        [ValueSource(nameof(s_kinds))] string kind, [ValueSource(nameof(s_ops))] string op,
        [Values(DType.F32, DType.F64)] DType type)
    {
        using var device = new CpuDevice(2, 1L << 26, type) { Random = new(3, 4, true) };
        foreach (var (outputs, inputs) in s_sizes)
            foreach (int rows in (int[])[0, 1, 33]) EqualsDense(device, kind, op, outputs, inputs, rows);
    }

    [TestCase(DType.F32)]
    [TestCase(DType.BF16)]
    public void OnCuda(DType type)
    {
        using var cuda = new CudaUnderTest();
        foreach (string kind in s_kinds)
            foreach (string op in s_ops)
                foreach (var (outputs, inputs) in s_sizes)
                    OnCuda(cuda, kind, op, type, outputs, inputs);
    }

    /// <summary>For planted mistakes: a few sizes of one kind.</summary>
    internal static void OnCuda(CudaUnderTest cuda, string kind, DType type)
    {
        foreach (var (outputs, inputs) in s_sizes)
            OnCuda(cuda, kind, "linear", type, outputs, inputs);
    }

    private static void OnCuda(
        CudaUnderTest cuda, string kind, string op, DType type, int outputs, int inputs)
    {
        cuda.ForgetSteps();
        CudaDevice device = cuda.Device(type);
        device.Random = new(3, 4, true);
        // More than are multiplied as they are unpacked.
        EqualsDense(device, kind, op, outputs, inputs, Many);
    }

    // Each as a sum in double of the numbers that a dense weight would have; columns that end in a
    // warp's stretch, and those that go through it more than once; rows off alignment.
    [TestCase(DType.F32)]
    [TestCase(DType.BF16)]
    public void FewRowsAreMultipliedAsTheyAreUnpacked(DType type)
    {
        using var cuda = new CudaUnderTest();
        foreach (string kind in s_kinds)
            foreach (var (outputs, inputs, rows) in ((int, int, int)[])
                [(16, 24, 2), (13, 264, KernelConstants.FewRows + 3), (3, 1024, 1)])
                FewRows(cuda, kind, type, outputs, inputs, rows, shifted: rows == 2 ? 0 : -1);
    }

    internal static void FewRows(
        CudaUnderTest cuda, string kind, DType type, int outputs, int inputs, int rows,
        int shifted = -1)
    {
        cuda.ForgetSteps();
        CudaDevice device = cuda.Device(type);
        Weight weight = Make(device, kind, outputs, inputs, out double[] values);
        Value[] inputsOf = Of("linear", inputs, outputs, rows);
        // The first row asks for one weight, so that its own rounding shows.
        for (int k = 0; k < inputs; k++) inputsOf[0].Data[k] = k == inputs - 3 ? 3 : 0;
        using var run = new OpRun(device, new Linear(Weight: weight), inputsOf, shifted);
        bool counts = cuda.Emulator is not null;
        if (counts) cuda.Emulator!.ClearLaunches();
        run.Forward();
        double[] y = run.Output;
        if (counts)
            Assert.That(cuda.Emulator!.Launches.Select(l => l.Kernel),
                Has.None.StartsWith("unpack_").And.Some.StartsWith("multiply_"));
        double[] w = Storage.Round(values, type), x = Storage.Round(inputsOf[0].Data, type);
        double[] bias = Storage.Round(inputsOf[2].Data, type);
        for (int i = 0; i < y.Length; i++)
        {
            double sum = bias[i % outputs], size = Math.Abs(sum);
            for (int k = 0; k < inputs; k++)
            {
                double product = x[(i / outputs * inputs) + k] * w[(i % outputs * inputs) + k];
                (sum, size) = (sum + product, size + Math.Abs(product));
            }

            string what = $"{kind} {type} [{outputs}, {inputs}] of {rows} rows, {i}";
            if (i < outputs && type == DType.BF16 && kind != "nf4_not_finite")
                Assert.That(y[i], Is.EqualTo(Storage.Round([sum], type)[0]), what);
            else if (!double.IsFinite(sum))
                Assert.That(double.IsFinite(y[i]), Is.False, what);
            else
                Assert.That(y[i], Is.EqualTo(sum).Within((size * inputs * Math.ScaleB(1, -24))
                    + (Math.Abs(sum) * Math.ScaleB(1, type == DType.BF16 ? -8 : -24))), what);
        }

        if (outputs % 8 != 0 || kind == "nf4_not_finite") return;
        // As columns of wider rows, where q, k and v lie before their heads are turned: by nothing.
        Value none = Value.Absent("b");
        using var alone = new OpRun(
            device, new Linear(Weight: weight), [inputsOf[0], inputsOf[1], none]);
        LinearPart[] twice = [new(outputs, 0, weight), new(outputs, 1, weight)];
        using var wider = new OpRun(device, new Linears(twice, 1, 0, 8, 1),
        [
            inputsOf[0], inputsOf[1], none, none, none, inputsOf[1], none, none, none,
            Value.Int("positions", new int[rows]), Value.Float("cos", [1, 4], [1, 1, 1, 1]),
            Value.Float("sin", [1, 4], [0, 0, 0, 0]),
        ]);
        alone.Forward();
        wider.Forward();
        Assert.That(wider.Output, Is.EqualTo((double[])[.. alone.Output, .. alone.Output]),
            $"{kind} {type} as columns");
    }

    // More rows than are unpacked at a time: the same sums in the forward, in pieces in the
    // backward.
    [TestCase("nf4_nested")]
    [TestCase("int8")]
    public void InSeveralPieces(string kind)
    {
        const int Outputs = 1100, Inputs = 2000, Rows = 3;
        using var device = new CpuDevice(2, 1L << 27, DType.F64);
        Weight weight = Make(device, kind, Outputs, Inputs, out double[] values);
        using var run = new OpRun(device, new Linear(Weight: weight), Of("linear", Inputs, Outputs, Rows));
        Value[] dense = Of("linear", Inputs, Outputs, Rows);
        dense[1] = Value.Float("w", [Outputs, Inputs], values);
        using var plain = new OpRun(device, new Linear(), dense);
        double[] dy = Fill.Normal(77, run.Count);
        foreach (OpRun each in (OpRun[])[run, plain])
        {
            each.Forward();
            each.Want(i => i == 0, accumulate: _ => true);
            each.Backward(dy);
        }

        Assert.That(run.Output, Is.EqualTo(plain.Output).Within(1e-12));
        Assert.That(run.Gradient(0), Is.EqualTo(plain.Gradient(0)).Within(1e-12));
        Assert.That(plain.Output, Has.Some.Not.Zero);
    }

    [TestCase("nf4", 4.5)]
    [TestCase("nf4_nested", 4.127)]
    [TestCase("int8", 8)]
    [TestCase("groups4", 5.25)]
    [TestCase("groups8", 9.25)]
    public void BitsOfAnElement(string kind, double bits)
    {
        using var device = new CpuDevice(1, 1L << 20);
        Weight weight = Make(device, kind, 1024, 1024, out _);
        Assert.That(weight.Bytes * 8 / (1024.0 * 1024), Is.EqualTo(bits).Within(0.04));
        Assert.That(weight.Tensor.Exists, Is.False);
    }

    [TestCase("nf4", DType.BF16)]
    [TestCase("nf4_nested", DType.F32)]
    [TestCase("int8", DType.BF16)]
    [TestCase("groups4", DType.BF16)]
    public void UnpackingMovesEachByteOnce(string kind, DType type)
    {
        LaunchCounters launch = Counted(kind, type, Many, "unpack_", out long w);
        long needed = w + (512L * 1024 * type.Size());
        Assert.That(launch.DramBytes, Is.InRange(needed * 0.99, needed * 1.05));
    }

    // The codes once, however many rows there are, beside the rows.
    [TestCase("nf4_nested", 1)]
    [TestCase("nf4", KernelConstants.FewRows)]
    [TestCase("int8", 3)]
    [TestCase("groups4", 2)]
    public void FewRowsReadTheCodesOnce(string kind, int rows)
    {
        LaunchCounters launch = Counted(kind, DType.BF16, rows, "multiply_", out long w);
        long needed = w + (rows * (512L + 1024) * 2);
        Assert.That(launch.DramBytes, Is.InRange(needed * 0.99, needed * 1.05));
    }

    private static LaunchCounters Counted(
        string kind, DType type, int rows, string kernel, out long bytes)
    {
        const int Outputs = 512, Inputs = 1024;
        if (CudaUnderTest.IsReal) Assert.Ignore("counted by the emulator only");
        using var cuda = new CudaUnderTest(new EmulatorOptions { Footprint = true });
        CudaDevice device = cuda.Device(type);
        Weight weight = Make(device, kind, Outputs, Inputs, out _);
        using var run = new OpRun(
            device, new Linear(Weight: weight), [.. Of("linear", Inputs, Outputs, rows)[..2],
                Value.Absent("b")]);
        cuda.Emulator!.ClearLaunches();
        run.Forward();
        cuda.Context.Synchronise();
        bytes = weight.Bytes;
        LaunchCounters launch = cuda.Emulator.Launches.Single(
            l => l.Kernel.StartsWith(kernel, StringComparison.Ordinal));
        TestContext.Out.WriteLine($"{launch.DramBytes} bytes");
        return launch;
    }

    private static void EqualsDense(
        Device device, string kind, string op, int outputs, int inputs, int rows)
    {
        Weight weight = Make(device, kind, outputs, inputs, out double[] values);
        var (from, to) = op == "linear_transposed" ? (outputs, inputs) : (inputs, outputs);
        Value[] others = Of(op, from, to, rows), dense = [.. others];
        dense[1] = Value.Float("w", [outputs, inputs], values);
        if (op == "linears") dense[5] = dense[1] with { Name = "w1" };
        using var run = new OpRun(device, OpOf(op, outputs, weight), others);
        using var plain = new OpRun(device, OpOf(op, outputs, null), dense);
        double[] dy = Storage.Round(Fill.Normal(78, run.Count), DType.BF16);
        foreach (OpRun each in (OpRun[])[run, plain])
        {
            each.Forward();
            each.Want(i => i == 0, accumulate: _ => true);
            each.Backward(dy);
            each.Want(_ => true);
            each.Backward(dy);
        }

        string what = $"{kind} {op} [{outputs}, {inputs}] of {rows} rows";
        Assert.That(run.Output, Is.EqualTo(plain.Output), what);
        for (int i = 0; i < others.Length; i++)
            if (run.HasGradient(i))
                Assert.That(run.Gradient(i), Is.EqualTo(plain.Gradient(i)), $"{what}, {i}");
        Assert.That(run.HasGradient(1), Is.False);
    }

    private static Weight Make(
        Device device, string kind, int outputs, int inputs, out double[] values)
    {
        double[] random = Fill.Normal(outputs, outputs * inputs);
        if (kind == "int8")
        {
            byte[] elements = [.. random.Select(v => (byte)(sbyte)Math.Clamp(v * 50, -127, 127))];
            float[] scales = [.. Enumerable.Range(0, outputs).Select(r => 0.3f + (0.7f * (r % 7)))];
            values = [.. elements.Select((e, i) =>
                (double)((sbyte)e * scales[i / inputs] / 127f))];
            return new Int8RowsWeight(device, inputs, elements, scales);
        }

        if (kind.StartsWith("groups", StringComparison.Ordinal))
            return Grouped(device, kind, outputs, inputs, random, out values);
        float[] floats = Array.ConvertAll(random, v => (float)v);
        bool nested = kind.Contains("nested");
        // As rows of a larger matrix they have another place among the blocks of blocks.
        int before = kind.EndsWith("part", StringComparison.Ordinal) ? 1024 : 0;
        floats = [.. Fill.Normal(5, before * inputs).Select(v => (float)(2 * v)), .. floats];
        // Blocks of any power of two.
        bool nf4 = kind.StartsWith("nf4", StringComparison.Ordinal);
        var form = new FourBitForm(
            before + outputs, inputs, nf4 ? 64 : 128, !nested ? 0 : nf4 ? 256 : 64);
        FourBitCodes codes;
        fixed (float* from = floats)
            codes = FourBitCodes.Of(
                form, nf4 ? FourBitKind.Nf4 : FourBitKind.Fp4, DType.F32, from);
        if (kind == "nf4_not_finite")
            (codes.Scales[0], codes.Scales[^1]) = (float.NaN, float.PositiveInfinity);
        var back = new float[outputs * inputs];
        codes.Unpack((long)before * inputs, back);
        values = Array.ConvertAll(back, v => (double)v);
        return new FourBitWeight(device, codes.Rows(before, outputs));
    }

    // Groups of 12 columns, which nothing divides; ordered, each column has any of them.
    private static GroupedWeight Grouped(Device device, string kind, int outputs, int inputs,
        double[] random, out double[] values)
    {
        int bits = kind.Contains('8') ? 8 : 4;
        bool isOrdered = kind.EndsWith("ordered", StringComparison.Ordinal);
        var form = new GroupedForm(outputs, inputs, bits, inputs == 1024 ? 32 : 12, isOrdered);
        int[]? groupOf = isOrdered
            ? [.. Enumerable.Range(0, inputs).Select(k => k * 7 % form.Groups)] : null;
        float[] scales = [.. Enumerable.Range(0, form.Scales).Select(i => 0.01f + (0.003f * (i % 11)))];
        byte[] zeros = [.. Enumerable.Range(0, form.Scales).Select(i => (byte)(i * 5 % (1 << bits)))];
        int[] codes = [.. random.Select(v => (int)Math.Abs(v * 1000) % (1 << bits))];
        var packed = new byte[form.CodeBytes];
        for (int i = 0; i < codes.Length; i++)
            packed[i * bits / 8] |= (byte)(codes[i] << (i * bits % 8));
        values = [.. codes.Select((code, i) =>
        {
            int at = (i / inputs * form.Groups) + (groupOf?[i % inputs] ?? i % inputs / form.GroupSize);
            return (double)((code - zeros[at]) * scales[at]);
        })];
        return new GroupedWeight(
            device, new GroupedCodes(form, packed, scales, zeros, groupOf));
    }

    private static Op OpOf(string name, int outputs, Weight? weight) => name switch
    {
        "linear" => new Linear(Weight: weight),
        "linear_transposed" => new Linear(Transposed: true, weight),
        "linears" => new Linears(
            [new LinearPart(outputs, 0, weight), new LinearPart(outputs, 1, weight)], 0.5),
        _ => new LoraLinear(2, 0.5, 0.3, weight),
    };

    private static Value[] Of(string name, int from, int to, int rows)
    {
        Value[] layer =
        [
            Value.Absent("w"), Value.Float("b", [to], Fill.Normal(2, to)),
            Value.Float("a", [3, from], Fill.Normal(3, 3 * from)),
            Value.Float("bb", [to, 3], Fill.Normal(5, to * 3)),
        ];
        Value x = Value.Float("x", [rows, from], Fill.Normal(1, rows * from));
        return name switch
        {
            "linears" => [x, .. layer, Value.Absent("w1"), Value.Absent("b1"), Value.Absent("a1"),
                Value.Absent("bb1")],
            "lora_dropout" => [x, .. layer],
            _ => [x, .. layer[..2]],
        };
    }
}
