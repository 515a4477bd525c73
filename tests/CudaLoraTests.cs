using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Adapters with dropout on the CUDA device: sizes around every tile, the mask element for element,
/// and the bytes that their kernels and those of biases and casts move.
/// </summary>
[TestFixture]
public sealed class CudaLoraTests
{
    private const double Scale = 2;
    private const int Layer = 5, Outputs = 24;

    private static readonly Randomness s_random =
        new(0xFEDCBA9876543210, 0x1_0000_0007, Dropout: true);

    private static readonly DType[] s_types = [DType.F32, DType.BF16];

    private CudaUnderTest _cuda = null!;

    [SetUp]
    public void Make()
    {
        if (_cuda?.Emulator?.Fault is null && _cuda is not null) return;
        _cuda?.Dispose();
        _cuda = new();
    }

    [OneTimeTearDown]
    public void Free() => _cuda?.Dispose();

    // Rows of one block and of several, columns with and without 16-byte rows (of floats also with
    // an odd number of such vectors), all ranks' tiles; the last ones split their sums into parts,
    // of several steps and of more than stages.
    [TestCase(0, 16, 8, 0.5)]
    [TestCase(1, 48, 1, 0.05)]
    [TestCase(7, 33, 3, 0.5)]
    [TestCase(65, 48, 16, 0.05)]
    [TestCase(65, 75, 33, 0.5)]
    [TestCase(33, 20, 3, 0.5)]
    [TestCase(65, 44, 12, 0.05)]
    [TestCase(129, 160, 64, 0.05)]
    [TestCase(129, 37, 5, 0)]
    [TestCase(33, 272, 256, 0.05)]
    [TestCase(40, 129, 100, 0.5)]
    [TestCase(7, 1600, 8, 0.05)]
    [TestCase(33, 1601, 72, 0.5)]
    [TestCase(600, 33, 3, 0.5)]
    [TestCase(600, 48, 16, 0.05)]
    [TestCase(130, 1000, 64, 0.05)]
    public void SizesAroundTilesAgree(int rows, int cols, int rank, double dropout)
    {
        OpCase c = OpCases.All.Single(each => each.Name == "lora_linear_dropout");
        foreach (DType type in s_types)
            CudaOpTests.Compare(
                Device(type), c, type, new LoraLinear(Layer, Scale, dropout),
                Inputs(rows, cols, rank), null, $"[{rows}, {cols}] rank {rank} dropout {dropout}");
    }

    // Adapters of one input, each with a mask of its own.
    [TestCase(1, 31, 200, 8, 0.5)]
    [TestCase(2, 130, 33, 100, 0.05)]
    [TestCase(3, 130, 200, 64, 0.5)]
    [TestCase(3, 31, 144, 6, 0.05)]
    [TestCase(3, 1, 33, 8, 0.05)]
    [TestCase(3, 600, 33, 3, 0.5)]
    public void AdaptersOfOneInputAgree(int adapters, int rows, int cols, int rank, double dropout)
    {
        OpCase c = OpCases.All.Single(each => each.Name == "linears_dropout");
        var (op, inputs) = Adapters(adapters, rows, cols, rank, dropout);
        foreach (DType type in s_types)
            CudaOpTests.Compare(Device(type), c, type, op, inputs, null,
                $"{adapters} of [{rows}, {cols}] rank {rank} dropout {dropout}");
    }

    // Rows that are divided: each adapter's parts add to what is there, or do not, by themselves;
    // in vectors, between two of which the first adapter's gradient begins, or without.
    [TestCase(33)]
    [TestCase(36)]
    public void SumsOfPartsAddToWhatIsThere(int cols)
    {
        var (op, inputs) = Adapters(adapters: 3, rows: 600, cols, rank: 3, dropout: 0.5);
        int shifted = cols == 36 ? inputs.Length + 2 + 3 : -1;
        using var run = new OpRun(Device(DType.F32), op, inputs, shifted);
        OpTests.GradientsAccumulateAndMayBeAbsent(
            run, inputs, Fill.Normal(77, run.Count), 1e-6);
    }

    private static (Linears Op, Value[] Inputs) Adapters(
        int adapters, int rows, int cols, int rank, double dropout)
    {
        var op = new Linears(
            [.. Enumerable.Range(0, adapters).Select(i => new LinearPart(8 + i, Layer + i))], Scale,
            dropout);
        List<Value> inputs = [Value.Float("x", [rows, cols], Fill.Normal(1, rows * cols))];
        for (int i = 0; i < adapters; i++)
            inputs.AddRange(
            [
                Value.Float("w", [8 + i, cols], Fill.Normal(2 + i, (8 + i) * cols)),
                Value.Absent("b"),
                Value.Float("a", [rank, cols], Fill.Normal(5 + i, rank * cols)),
                Value.Float("bb", [8 + i, rank], Fill.Normal(8 + i, (8 + i) * rank)),
            ]);
        return (op, [.. inputs]);
    }

    // With a = 1 h and da are sums of what the mask leaves of x: a NaN stays one where it is
    // dropped, and 0 times infinity is one. So it is with dx where a is NaN.
    [TestCase(40)]
    [TestCase(33)]
    public void WhatIsNotFiniteIsNotHiddenByTheMask(int cols)
    {
        const int Rows = 20, Rank = 8;
        var op = new LoraLinear(Layer, 1, 0.5);
        double[] mask = RoundedLora.MaskOf(op, s_random, Rows, cols);
        double[] x = Ones(Rows * cols), a = Ones(Rank * cols);
        int kept = Array.FindIndex(mask, cols, m => m != 0);
        int dropped = Array.FindIndex(mask, 5 * cols, m => m == 0);
        int nan = Array.FindIndex(mask, 10 * cols, m => m == 0);
        (x[kept], x[dropped], x[nan]) =
            (double.PositiveInfinity, double.PositiveInfinity, double.NaN);
        a[cols - 2] = double.NaN;
        foreach (DType type in s_types)
        {
            using var run = new OpRun(Device(type), op,
            [
                Value.Float("x", [Rows, cols], x), Value.Float("w", [1, cols], new double[cols]),
                Value.Absent("b"), Value.Float("a", [Rank, cols], a),
                Value.Float("bb", [1, Rank], Ones(Rank)),
            ]);
            run.Forward();
            run.Want(i => i is 0 or 3);
            run.Backward(Ones(Rows));
            double[] h = run.Saved(0), dx = run.Gradient(0), da = run.Gradient(3);
            for (int r = 0; r < Rows; r++)
            {
                double sum = 0;
                for (int c = 0; c < cols; c++) sum += mask[(r * cols) + c] * x[(r * cols) + c];
                Assert.That(h[(r * Rank) + 1], Is.EqualTo(Storage.Round([sum], type)[0]),
                    $"{type} row {r}");
                Assert.That(h[r * Rank], Is.NaN, $"{type} row {r}, a NaN in a");
                for (int c = 0; c < cols; c++)
                    Assert.That(double.IsNaN(dx[(r * cols) + c]), Is.EqualTo(c == cols - 2),
                        $"{type} dx {r}, {c}");
            }

            for (int c = 0; c < cols; c++)
            {
                double sum = 0;
                for (int r = 0; r < Rows; r++) sum += mask[(r * cols) + c] * x[(r * cols) + c];
                Assert.That(da[c], Is.EqualTo(sum), $"{type} da {c}");
            }
        }
    }

    // With x = 1 and a = 1 on its diagonal the mask is h; with dy bb = 1 it is dx, and with one on
    // its diagonal da. In the first the elements [10, 8] and [37, 27] draw the threshold itself.
    [TestCase(71, 37, 29825 / 65536.0)]
    [TestCase(71, 48, 0.05)]
    [TestCase(33, 75, 0.5)]
    public void MasksAreThoseOfTheCpu(int rows, int cols, double dropout)
    {
        var op = new LoraLinear(Layer, 1, dropout);
        double[] mask = RoundedLora.MaskOf(op, s_random, rows, cols);
        Assert.That(mask.Distinct().Count(), Is.EqualTo(2));
        foreach (DType type in s_types)
        {
            double[] expected = Storage.Round(mask, type);
            using (var run = new OpRun(Device(type), op,
            [
                Value.Float("x", [rows, cols], Ones(rows * cols)),
                Value.Float("w", [1, cols], new double[cols]), Value.Absent("b"),
                Value.Float("a", [cols, cols], Diagonal(cols)),
                Value.Float("bb", [1, cols], Ones(cols)),
            ]))
            {
                run.Forward();
                Assert.That(run.Saved(0), Is.EqualTo(expected), $"{type} h");
                run.Want(i => i == 0);
                run.Backward(Ones(rows));
                Assert.That(run.Gradient(0), Is.EqualTo(expected), $"{type} dx");
            }

            using var back = new OpRun(Device(type), op,
            [
                Value.Float("x", [rows, cols], Ones(rows * cols)),
                Value.Float("w", [rows, cols], new double[rows * cols]), Value.Absent("b"),
                Value.Float("a", [rows, cols], new double[rows * cols]),
                Value.Float("bb", [rows, rows], Diagonal(rows)),
            ]);
            back.Forward();
            back.Want(i => i == 3);
            back.Backward(Diagonal(rows));
            Assert.That(
                back.Gradient(3), Is.EqualTo(Storage.Round(mask, DType.F32)), $"{type} da");
        }
    }

    [Test]
    public void EvaluationDrawsNoMask()
    {
        CudaDevice device = Device(DType.BF16);
        Value[] inputs = Inputs(65, 48, 8);
        double[][] dropped = Results(new(Layer, Scale, 0.5)), plain = Results(new(Layer, Scale, 0));
        Assert.That(dropped[0], Is.Not.EqualTo(plain[0]));
        device.Random = s_random with { Dropout = false };
        _cuda.Emulator?.ClearLaunches();
        double[][] evaluated = Results(new(Layer, Scale, 0.5));
        Assert.That(evaluated, Is.EqualTo(plain));
        _cuda.Context.Synchronise();
        if (_cuda.Emulator is { } gpu)
            Assert.That(gpu.Launches.Select(l => l.Kernel), Has.None.StartsWith("lora_"));

        double[][] Results(LoraLinear op)
        {
            using var run = new OpRun(device, op, inputs);
            run.Forward();
            run.Want(_ => true);
            run.Backward(Fill.Normal(77, run.Count));
            return [run.Output, run.Gradient(0), run.Gradient(3), run.Gradient(4)];
        }
    }

    /// <summary>
    /// Weights that lie behind each other are multiplied by as one, with adapters on all layers, on
    /// some, or on none: the same numbers as separately but for the order of roundings.
    /// </summary>
    [TestCase(true, true)]
    [TestCase(true, false)]
    [TestCase(false, false)]
    public unsafe void WeightsThatLieTogetherGiveTheSame(bool first, bool second)
    {
        const int Rows = 33, Cols = 24, Rank = 4;
        int[] outputs = [16, 8];
        CudaDevice device = Device(DType.BF16);
        var op = new Linears([new(16, 3), new(8, 4)], 2, 0.3, headDim: 8, rotated: 1);
        List<Value> values = [Value.Float("x", [Rows, Cols], Fill.Normal(1, Rows * Cols))];
        for (int i = 0; i < 2; i++)
        {
            values.Add(Value.Float(
                "w", [outputs[i], Cols], Fill.Normal(2 + i, outputs[i] * Cols)));
            values.Add(Value.Float("b", [outputs[i]], Fill.Normal(4 + i, outputs[i])));
            bool adapted = i == 0 ? first : second;
            values.Add(adapted
                ? Value.Float("a", [Rank, Cols], Fill.Normal(6 + i, Rank * Cols))
                : Value.Absent("a"));
            values.Add(adapted
                ? Value.Float("bb", [outputs[i], Rank], Fill.Normal(8 + i, outputs[i] * Rank))
                : Value.Absent("bb"));
        }

        values.AddRange([Value.Int("positions", Fill.Below(10, Rows, 11)),
            Value.Float("cos", [11, 4], Fill.Normal(11, 44)),
            Value.Float("sin", [11, 4], Fill.Normal(12, 44))]);
        using var apart = new OpRun(device, op, [.. values]);
        apart.Forward();
        apart.Want(i => i == 0);
        double[] dy = Fill.Normal(77, apart.Count);
        apart.Backward(dy);

        Tensor[] inputs =
            [.. values.Select(v => v.Exists ? New(v.Spec(DType.BF16), v.Data) : default)];
        device.PackTogether((16 + 8) * Cols * 2);
        for (int i = 0; i < 2; i++)
        {
            float[] w = [.. values[1 + (4 * i)].Data.Select(v => (float)v)];
            fixed (float* data = w)
                inputs[1 + (4 * i)] = device.Pack(DType.F32, outputs[i], Cols, data, "w");
        }

        Assert.That(inputs[5].Data - inputs[1].Data, Is.EqualTo((nint)inputs[1].Spec.Bytes));
        Outputs infer = op.Infer([.. inputs.Select(t => t.Spec)], DType.BF16);
        Tensor y = New(infer.Output), dx = New(inputs[0].Spec);
        Tensor[] saved = infer.SavedCount == 0 ? [] : [New(infer.Saved(0))];
        device.Forward(op, new OpCall(inputs, y, saved, recorded: true));
        var gradients = new GradientTarget[inputs.Length];
        gradients[0] = new(dx, Accumulate: false);
        device.Backward(op, new OpCall(
            inputs, y, saved, true, New(infer.Output, dy), gradients));
        Agree(device.ReadFloats(y), apart.Output);
        Agree(device.ReadFloats(dx), apart.Gradient(0));

        Tensor New(Spec spec, double[]? data = null)
        {
            Tensor tensor = device.Allocate(spec, "test");
            if (data is null) return tensor;
            if (spec.Type == DType.I32) device.Write<int>(tensor, [.. data.Select(v => (int)v)]);
            else device.WriteFloats(tensor, [.. data.Select(v => (float)v)]);
            return tensor;
        }

        void Agree(float[] got, double[] expected)
        {
            double most = expected.Max(Math.Abs) / 64;
            Assert.That(got.Zip(expected, (g, e) => Math.Abs(g - e)).Max(), Is.LessThan(most));
        }
    }

    [Test]
    public void NothingIsMovedTwice()
    {
        if (CudaUnderTest.IsReal) Assert.Ignore("counted by the emulator only");
        const int Rows = 448, Cols = 640, Rank = 16, S = 2, F = 4;
        const long X = (long)Rows * Cols * S, H = (long)Rows * Rank * S, A = (long)Rank * Cols * S;
        const long Y = (long)Rows * Outputs * S, Mask = (long)Rows * Cols / 8;
        _cuda.Dispose();
        _cuda = null!;
        using var cuda = new CudaUnderTest(new EmulatorOptions { Footprint = true });
        CudaDevice device = cuda.Device(DType.BF16);
        device.Random = s_random;
        using var run = new OpRun(
            device, new LoraLinear(Layer, Scale, 0.05), Inputs(Rows, Cols, Rank, DType.F32));
        cuda.Emulator!.ClearLaunches();
        run.Forward();
        run.Want(_ => true);
        run.Backward(Fill.Normal(77, run.Count));
        cuda.Context.Synchronise();
        Check("fill_rows", Y + (Outputs * F));
        Check("dropout_mask", Mask);
        Check("lora_down", X + Mask + A + H);
        Check("lora_gradient_x", X + Mask + H + A);
        Check("lora_gradient_a", X + Mask + H + (A / S * F));
        Check("cast_to_real", A / S * (S + F), Outputs * Rank * (S + F));

        // The sum of rows at a size where its parts weigh little.
        cuda.Emulator.ClearLaunches();
        using var bias = new OpRun(device, new Linear(),
        [
            Value.Float("x", [Rows, 1], Ones(Rows)), Value.Float("w", [Cols, 1], Ones(Cols)),
            Value.Float("b", [Cols], Ones(Cols)),
        ]);
        bias.Forward();
        bias.Want(i => i == 2);
        bias.Backward(Fill.Normal(77, bias.Count));
        cuda.Context.Synchronise();
        Check("fill_rows", X + (Cols * F));
        Check("sum_rows", X + (2 * Cols * F));

        void Check(string kernel, params long[] sizes)
        {
            LaunchCounters[] launches = [.. cuda.Emulator.Launches.Where(l => l.Kernel == kernel)];
            Assert.That(launches, Has.Length.GreaterThanOrEqualTo(sizes.Length), kernel);
            foreach (LaunchCounters launch in launches)
            {
                long needed = sizes.MinBy(n => Math.Abs(n - launch.DramBytes));
                string what = $"{kernel}: {launch.DramBytes} bytes, {needed} needed";
                TestContext.Out.WriteLine(what);
                Assert.That(launch.DramBytes, Is.InRange(needed, (long)(1.05 * needed)), what);
                Assert.That(launch.LocalBytes, Is.Zero, kernel);
            }
        }
    }

    // Warps and blocks in other orders, the other order of a product's sums, the other compiler.
    [TestCase(DeviceCompiler.Nvrtc)]
    [TestCase(DeviceCompiler.Clang)]
    public void AnyOrderAgrees(object compiler)
    {
        if (CudaUnderTest.IsReal) Assert.Ignore("a choice of the emulator");
        _cuda.Dispose();
        _cuda = new(new EmulatorOptions { Seed = 3, ReverseMma = true }, (DeviceCompiler)compiler);
        SizesAroundTilesAgree(65, 48, 16, 0.05);
        SizesAroundTilesAgree(33, 75, 70, 0.5);
        SizesAroundTilesAgree(600, 48, 3, 0.5);
        _cuda.Dispose();
        _cuda = null!;
    }

    private CudaDevice Device(DType type)
    {
        CudaDevice device = _cuda.Device(type);
        device.Random = s_random;
        return device;
    }

    private static Value[] Inputs(int rows, int cols, int rank, DType parameters = DType.F64) =>
    [
        Value.Float("x", [rows, cols], Fill.Normal(1, rows * cols)),
        Value.Float("w", [Outputs, cols], Fill.Normal(2, Outputs * cols)),
        Value.Float("b", [Outputs], Fill.Normal(3, Outputs)),
        Value.Float("a", [rank, cols], Fill.Normal(4, rank * cols)) with { Type = parameters },
        Value.Float("bb", [Outputs, rank],
            Fill.Normal(5, Outputs * rank)) with { Type = parameters },
    ];

    private static double[] Ones(int count) => [.. Enumerable.Repeat(1.0, count)];

    private static double[] Diagonal(int n)
    {
        var values = new double[n * n];
        for (int i = 0; i < n; i++) values[(i * n) + i] = 1;
        return values;
    }
}
