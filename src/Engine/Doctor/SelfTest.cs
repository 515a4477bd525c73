using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cases;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Ops;
using MiniCpmNative.Kernels.Quantised;
using MiniCpmNative.Kernels.Updates;

namespace MiniCpmNative.Engine.Doctor;

/// <summary>
/// What went wrong: which result of which operation, its largest error, and what is allowed.
/// </summary>
public sealed record SelfTestFailure(string What, double Error, double Allowed);

/// <summary>
/// Runs every operation and update of a device, forward and backward, on small made-up inputs and
/// compares with the CPU in double. It finds a broken installation (a driver, library or card that
/// computes wrongly), not a rounding error too many: 8 units of the storage type's last place, of
/// each result's largest number, are allowed.
/// </summary>
public sealed class SelfTest : IDisposable
{
    private readonly Device _device;
    private readonly CpuDevice _exact = new(activations: DType.F64);
    private readonly List<SelfTestFailure> _failures = [];
    private readonly double _allowed;

    /// <param name="device">The device to test; what it allocates stays until it is
    /// disposed.</param>
    public SelfTest(Device device)
    {
        _device = device;
        _allowed = 8 * device.Activations switch
        {
            DType.BF16 => Math.Pow(2, -8),
            // Sums of a thousand float terms in whatever order.
            _ => Math.Pow(2, -17),
        };
    }

    /// <summary>Results compared.</summary>
    public int Results { get; private set; }

    /// <summary>Runs everything; empty when all is well.</summary>
    public IReadOnlyList<SelfTestFailure> Run()
    {
        foreach (OpCase each in OpCases.All)
            foreach (int size in each.SelfTestSizes) Run(each, size);
        QuantisedWeights();
        FillMemory();
        Update(DType.F32, DType.F32);
        Update(DType.F32, DType.BF16);
        foreach (UpdateRule rule in Enum.GetValues<UpdateRule>())
            Update(DType.F32, DType.F32, rule);
        Update(DType.F32, DType.U8, UpdateRule.AdamWDecaysLast);
        if (_device.Activations == DType.BF16) Update(_device.Activations, DType.F32);
        return _failures;
    }

    public void Dispose() => _exact.Dispose();

    private void Run(OpCase each, int size)
    {
        _device.Random = _exact.Random = new Randomness(5, 3, each.Dropout);
        Value[] inputs = each.Inputs(size);
        Run(each.Op, inputs, each.Op, inputs);
        // Parameters may be stored in another type than activations.
        DType other = _device.Activations == DType.F32 ? DType.BF16 : DType.F32;
        if (size == each.SelfTestSizes[^1] && inputs.Any(v => v.IsParameter && v.Exists))
            Run(each.Op, Array.ConvertAll(
                inputs, v => v.IsParameter && v.Exists ? v with { Type = other } : v), each.Op,
                inputs);
    }

    private void Run(Op op, Value[] inputs, Op exactOp, Value[] exactInputs)
    {
        using var device = new OpRun(_device, op, inputs);
        using var exact = new OpRun(_exact, exactOp, exactInputs);
        double[] outputGradient = Fill.Normal(99, exact.Count);
        foreach (OpRun each in (OpRun[])[device, exact])
        {
            each.Forward();
            each.Want(_ => true);
            each.Backward(outputGradient);
        }

        Compare($"{op} output", device.Output, exact.Output);
        if (exact.State is { } state) Compare($"{op} state", device.State!, state);
        for (int i = 0; i < inputs.Length; i++)
            if (device.HasGradient(i))
                Compare($"{op} gradient of {inputs[i].Name}", device.Gradient(i),
                    exact.Gradient(i));
    }

    // Weights of 4 and 8 bits against a dense one of their numbers: few rows, and many.
    private unsafe void QuantisedWeights()
    {
        const int Few = 5, Many = 20, Outputs = 40, Inputs = 72;
        float[] values = [.. Fill.Normal(2, Outputs * Inputs).Select(v => (float)v)];
        FourBitCodes codes;
        fixed (float* from = values)
            codes = FourBitCodes.Of(new(Outputs, Inputs, 64, 256), FourBitKind.Nf4, DType.F32,
                from);
        codes.Unpack(0, values);
        Run(new FourBitWeight(_device, codes));
        byte[] bytes =
            [.. Fill.Below(3, Outputs * Inputs, 255).Select(v => (byte)(sbyte)(v - 127))];
        float[] scales = [.. Enumerable.Range(1, Outputs).Select(r => 0.1f * r)];
        values = [.. bytes.Select((e, i) => (sbyte)e * scales[i / Inputs] / 127)];
        Run(new Int8RowsWeight(_device, Inputs, bytes, scales));
        var form = new GroupedForm(Outputs, Inputs, Bits: 8, GroupSize: Inputs, IsOrdered: false);
        values = [.. bytes.Select((e, i) => (e - (i / Inputs)) * scales[i / Inputs])];
        Run(new GroupedWeight(_device, new GroupedCodes(form, bytes, scales,
            [.. Enumerable.Range(0, Outputs).Select(r => (byte)r)], null)));

        void Run(Weight weight)
        {
            Value w = Value.Float(
                "w", [Outputs, Inputs], Array.ConvertAll(values, v => (double)v));
            foreach (int rows in (int[])[Few, Many])
            {
                Value x = Value.Float("x", [rows, Inputs], Fill.Normal(1, rows * Inputs));
                this.Run(new Linear(Weight: weight), [x, Value.Absent("w")], new Linear(), [x, w]);
            }
        }
    }

    private void FillMemory()
    {
        Tensor tensor =
            _device.Allocate(new Spec(_device.Activations, new Shape(1003)), "self-test");
        _device.Fill(tensor, 0.5);
        Compare("fill", Doubles(_device, tensor), [.. Enumerable.Repeat(0.5, 1003)]);
    }

    // A step on clipped gradients, with what precedes it; weights take the moments before these are
    // rounded, so that their type makes no difference. Moments in 8 bits begin at 0.
    private void Update(DType weights, DType moments, UpdateRule rule = UpdateRule.AdamW)
    {
        const int Rows = 5, Cols = 1000;
        var shape = new Shape(Rows, Cols);
        var step = new UpdateStep(1e-2, 0.9, 0.999, 1e-8, 0.1, Step: 3, Rule: rule);
        bool isZero = moments == DType.U8;
        double[] device = Step(_device, weights, moments, step, shape, isZero);
        double[] exact = Step(_exact, DType.F64, DType.F64, step, shape, isZero);
        Compare($"{rule} on {weights} with moments in {moments}", device, exact);
    }

    private static double[] Step(Device device, DType weights, DType moments, UpdateStep step,
        Shape shape, bool isZero)
    {
        DType state = device.Activations.Statistics();
        Tensor values = Filled(new(weights, shape), 1), gradient = Filled(new(state, shape), 2);
        Tensor master = weights == state ? Tensor.None : Filled(new(state, shape), 1);
        int seed = 3;
        Tensor[] states = [.. new OptimizerForm(step.Rule, moments).StatesOf(moments, shape)
            .Select(s => isZero ? device.Allocate(s.Spec, s.Name)
                : Filled(s.Spec, seed++, positive: s.Name != "first_moment"))];
        Tensor norm = device.Allocate(GradientNorm.Spec, "norm");
        device.GradientNorm([gradient], 1.0, norm, Tensor.None);
        device.Update(step, OptimizerForm.Range(values, master, gradient, 0, states), norm);
        return Doubles(device, master.Exists ? master : values);

        Tensor Filled(Spec spec, int seed, bool positive = false)
        {
            Tensor tensor = device.Allocate(spec, "update");
            float[] numbers =
                Array.ConvertAll(Fill.Normal(seed, spec.Shape.Count), v => (float)v);
            device.WriteFloats(tensor, positive ? Array.ConvertAll(numbers, Math.Abs) : numbers);
            return tensor;
        }
    }

    private static double[] Doubles(Device device, in Tensor tensor) =>
        Array.ConvertAll(device.ReadFloats(tensor), v => (double)v);

    private void Compare(string what, double[] got, double[] exact)
    {
        Results++;
        double error = 0, largest = 1e-3;
        for (int i = 0; i < exact.Length; i++)
        {
            double difference = Math.Abs(got[i] - exact[i]);
            // A NaN is larger than any error.
            if (!(difference <= error))
                error = double.IsNaN(difference) ? double.MaxValue : difference;
            largest = Math.Max(largest, Math.Abs(exact[i]));
        }

        if (error > _allowed * largest) _failures.Add(new(what, error, _allowed * largest));
    }
}
