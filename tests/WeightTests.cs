using MiniCpmNative.Autograd;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Linear and LoraLinear over a weight of another kind than dense, against the dense weight of the
/// same numbers: outputs and gradients have the same bits on each device.
/// </summary>
[TestFixture]
public sealed class WeightTests
{
    private const int Outputs = 9, Inputs = 20;

    private static readonly string[] s_cases =
        ["linear", "linear_transposed", "lora", "lora_dropout"];

    [Test]
    public void AnotherKindEqualsTheDenseWeightOnTheCpu(
        [ValueSource(nameof(s_cases))] string name, [Values(DType.F32, DType.F64)] DType type,
        [Values(0, 1, 7, 130)] int rows)
    {
        using var device = new CpuDevice(2, 1L << 26, type) { Random = new(3, 4, true) };
        EqualsDense(device, name, rows);
    }

    [Test]
    public void AnotherKindEqualsTheDenseWeightOnCuda(
        [ValueSource(nameof(s_cases))] string name, [Values(DType.F32, DType.BF16)] DType type)
    {
        using var cuda = new CudaUnderTest(source: Int8Weight.Source, keep: true);
        CudaDevice device = cuda.Device(type);
        device.Random = new(3, 4, true);
        foreach (int rows in (int[])[0, 1, 7, 70]) EqualsDense(device, name, rows);
    }

    [TestCaseSource(nameof(s_cases))]
    public void GradientsEqualCentralDifferences(string name)
    {
        const double Step = 1e-5;
        using var device = new CpuDevice(2, 1L << 26, DType.F64) { Random = new(3, 4, true) };
        var weight = new Int8Weight(device, Outputs, Inputs, 1);
        Value[] inputs = InputsOf(name, rows: 5);
        using var run = new OpRun(device, OpOf(name, weight), inputs);
        double[] dy = Fill.Normal(77, run.Count);
        run.Forward();
        run.Want(_ => true);
        run.Backward(dy);
        double worst = 0;
        for (int i = 0; i < inputs.Length; i++)
        {
            if (!run.HasGradient(i)) continue;
            double[] gradient = run.Gradient(i);
            double largest = gradient.Max(Math.Abs);
            for (int e = 0; e < gradient.Length; e++)
            {
                double x = inputs[i].Data[e], up = Loss(x + Step), down = Loss(x - Step);
                run.Set(i, e, x);
                worst = Math.Max(worst,
                    Math.Abs(((up - down) / (2 * Step)) - gradient[e]) / largest);

                double Loss(double moved)
                {
                    run.Set(i, e, moved);
                    run.Forward();
                    return run.Output.Zip(dy, (y, d) => y * d).Sum();
                }
            }
        }

        Assert.That(worst, Is.LessThan(1e-6));
    }

    [TestCaseSource(nameof(s_cases))]
    public void AWarmCallAllocatesNothing(string name)
    {
        using var device = new CpuDevice(2, 1L << 26) { Random = new(3, 4, true) };
        var weight = new Int8Weight(device, Outputs, Inputs, 1);
        Op op = OpOf(name, weight);
        Value[] inputs = InputsOf(name, rows: 33);
        using var run = new OpRun(device, op, inputs);
        run.Forward();
        run.Want(_ => true);
        run.Backward(Fill.Normal(77, run.Count));
        Spec[] specs = Array.ConvertAll(inputs, v => v.Spec(DType.F32));
        for (int i = 0; i < 3; i++) Both();
        long before = GC.GetAllocatedBytesForCurrentThread();
        Both();
        Assert.That(GC.GetAllocatedBytesForCurrentThread() - before, Is.Zero);

        void Both()
        {
            op.Infer(specs, DType.F32);
            run.ForwardAgain();
            run.BackwardAgain();
        }
    }

    [Test]
    public void ADenseWeightMultipliesAsTheOperationsDo()
    {
        using var device = new CpuDevice(2, 1L << 26, DType.F64);
        Tensor w = device.Allocate(new Spec(DType.F64, new Shape(Outputs, Inputs)), "w");
        device.Write<double>(w, Fill.Normal(4, Outputs * Inputs));
        var weight = new DenseWeight(w);
        Assert.That((weight.Outputs, weight.Inputs, weight.Bytes),
            Is.EqualTo((Outputs, Inputs, 8L * Outputs * Inputs)));
        Value[] inputs = InputsOf("linear", rows: 6);
        Value dense = Value.Float("w", [Outputs, Inputs], Fill.Normal(4, Outputs * Inputs));
        using var run = new OpRun(device, new Linear(false, new Wrapped(weight)), inputs);
        using var plain =
            new OpRun(device, new Linear(false, weight), [inputs[0], dense, inputs[2]]);
        double[] dy = Fill.Normal(77, run.Count);
        foreach (OpRun each in (OpRun[])[run, plain])
        {
            each.Forward();
            each.Want(_ => true);
            each.Backward(dy);
        }

        Assert.That(run.Output, Is.EqualTo(plain.Output));
        Assert.That(run.Gradient(0), Is.EqualTo(plain.Gradient(0)));
        Assert.That(plain.HasGradient(1) && !run.HasGradient(1));
    }

    [TestCaseSource(nameof(s_cases))]
    public void SizesComeFromTheWeightAndAMatrixBesideItIsRefused(string name)
    {
        using var device = new CpuDevice(1, 1L << 26);
        Op op = OpOf(name, new Int8Weight(device, Outputs, Inputs, 1));
        Value[] inputs = InputsOf(name, rows: 4);
        Spec[] specs = Array.ConvertAll(inputs, v => v.Spec(DType.F32));
        int cols = name == "linear_transposed" ? Inputs : Outputs;
        Assert.That(op.Infer(specs, DType.F32).Output.Shape, Is.EqualTo(new Shape(4, cols)));
        specs[1] = new Spec(DType.F32, new Shape(Outputs, Inputs));
        Assert.That(() => op.Infer(specs, DType.F32), Throws.TypeOf<ShapeException>().With
            .Message.EqualTo($"{op.Name}: w must be left out beside Int8Weight[9, 20], "
                + "got F32[9, 20]"));
        specs[1] = default;
        specs[0] = new Spec(DType.F32, new Shape(4, 7));
        Assert.That(() => op.Infer(specs, DType.F32), Throws.TypeOf<ShapeException>().With
            .Message.Contains(": x "));
    }

    // A block says when its weights are needed: once for each run of its forward, held through
    // what a recomputation unwinds, and given back also when something throws.
    [TestCase(false, "acquire forward release")]
    [TestCase(true, "acquire forward release gradient acquire forward gradient release")]
    public void ABlockAcquiresWhatItRunsWith(bool checkpoint, string expected)
    {
        using var device = new CpuDevice(1, 1L << 26);
        var graph = new Graph(device);
        Tensor Parameter() => device.Allocate(new Spec(DType.F32, new Shape(1, 4)), "p");
        Tensor x = graph.Parameter(Parameter(), Parameter());
        var block = new Block();
        Tensor y = graph.Run(block, x, block, checkpoint);
        graph.GradientVisitor = (_, _) => block.Log.Add("gradient");
        graph.Backward(y, 1);
        graph.EndStep();
        // Gradients outside the block's recomputation are visited after its release.
        Assert.That(string.Join(" ", block.Log), Does.StartWith(expected));
        Assert.That(block.Log.Count(l => l == "acquire"),
            Is.EqualTo(block.Log.Count(l => l == "release")));
        Assert.That(block.Held, Is.Zero);

        block.Throws = true;
        Assert.That(() => graph.Run(block, x, block, checkpoint),
            Throws.TypeOf<InvalidOperationException>());
        Assert.That(block.Held, Is.Zero);
        graph.EndStep();
        block.Throws = false;
        y = graph.Run(block, x, block, checkpoint);
        block.Throws = true;
        if (checkpoint)
            Assert.That(() => graph.Backward(y, 1), Throws.TypeOf<InvalidOperationException>());
        Assert.That(block.Held, Is.Zero);
    }

    private static void EqualsDense(Device device, string name, int rows)
    {
        var weight = new Int8Weight(device, Outputs, Inputs, 1);
        Value[] inputs = InputsOf(name, rows), dense = [.. inputs];
        dense[1] = Value.Float("w", [Outputs, Inputs], weight.Dequantised);
        using var run = new OpRun(device, OpOf(name, weight), inputs);
        using var plain = new OpRun(device, OpOf(name, null), dense);
        double[] dy = Storage.Round(Fill.Normal(77, run.Count), DType.BF16);
        foreach (OpRun each in (OpRun[])[run, plain])
        {
            each.Forward();
            each.Want(_ => true);
            each.Backward(dy);
            each.Want(i => i == 0, accumulate: _ => true);
            each.Backward(dy);
        }

        Assert.That(weight.Products, Is.EqualTo(3), "one product in each direction and run");
        Assert.That(run.Output, Is.EqualTo(plain.Output));
        Assert.That(run.Gradient(0), Is.EqualTo(plain.Gradient(0)));
        foreach (OpRun each in (OpRun[])[run, plain])
        {
            each.Want(_ => true);
            each.Backward(dy);
        }

        Assert.That(run.HasGradient(1), Is.False);
        for (int i = 0; i < inputs.Length; i++)
            if (run.HasGradient(i)) Assert.That(run.Gradient(i), Is.EqualTo(plain.Gradient(i)));
    }

    private static Op OpOf(string name, Weight? weight) => name switch
    {
        "linear" => new Linear(Weight: weight),
        "linear_transposed" => new Linear(Transposed: true, weight),
        "lora" => new LoraLinear(2, 0.5, 0, weight),
        _ => new LoraLinear(2, 0.5, 0.3, weight),
    };

    private static Value[] InputsOf(string name, int rows)
    {
        var (output, input) =
            name == "linear_transposed" ? (Inputs, Outputs) : (Outputs, Inputs);
        Value[] linear =
        [
            Value.Float("x", [rows, input], Fill.Normal(1, rows * input)), Value.Absent("w"),
            Value.Float("b", [output], Fill.Normal(2, output)),
        ];
        return name.StartsWith("linear", StringComparison.Ordinal) ? linear :
        [
            .. linear, Value.Float("a", [3, input], Fill.Normal(3, 3 * input)),
            Value.Float("bb", [output, 3], Fill.Normal(5, output * 3)),
        ];
    }

    /// <summary>A dense weight as the operation sees any other kind.</summary>
    private sealed class Wrapped(DenseWeight inner) : Weight
    {
        public override int Outputs => inner.Outputs;

        public override int Inputs => inner.Inputs;

        public override long Bytes => inner.Bytes;

        public override void Multiply<T>(in CpuCall<T> call, Matrix<T> x, Matrix<T> y,
            double alpha, double beta, Matrix<T> bias) =>
            inner.Multiply(call, x, y, alpha, beta, bias);

        public override void MultiplyTransposed<T>(in CpuCall<T> call, Matrix<T> x, Matrix<T> y,
            double alpha, double beta, Matrix<T> bias) =>
            inner.MultiplyTransposed(call, x, y, alpha, beta, bias);

        public override void Multiply(in CudaCall call, CudaMatrix x, CudaMatrix y, double alpha,
            double beta) =>
            inner.Multiply(call, x, y, alpha, beta);

        public override void MultiplyTransposed(in CudaCall call, CudaMatrix x, CudaMatrix y,
            double alpha, double beta) =>
            inner.MultiplyTransposed(call, x, y, alpha, beta);
    }

    private sealed class Block : IBlock<object>
    {
        private readonly Gelu _gelu = new(GeluKind.Erf);

        public List<string> Log { get; } = [];

        public int Held { get; private set; }

        public bool Throws { get; set; }

        public bool Trainable => true;

        public Tensor Forward(Graph graph, Tensor x, object context)
        {
            Log.Add("forward");
            return Throws ? throw new InvalidOperationException() : graph.Run(_gelu, x);
        }

        public void Acquire(bool backward)
        {
            Held++;
            Log.Add("acquire");
        }

        public void Release()
        {
            Held--;
            Log.Add("release");
        }
    }
}
