using MiniCpmNative.Engine.Model;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
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
            DType.F16 => Math.Pow(2, -11),
            // Sums of a thousand float terms in whatever order.
            _ => Math.Pow(2, -17),
        };
        device.Random = _exact.Random = new Randomness(5, 3, Dropout: true);
    }

    /// <summary>Results compared.</summary>
    public int Results { get; private set; }

    /// <summary>Runs everything; empty when all is well.</summary>
    public IReadOnlyList<SelfTestFailure> Run()
    {
        foreach (SelfTestCase each in SelfTestCases.All) Run(each);
        Fill();
        Update(DType.F32, DType.F32);
        Update(DType.F32, DType.BF16);
        if (_device.Activations is DType.BF16 or DType.F16) Update(_device.Activations, DType.F32);
        return _failures;
    }

    public void Dispose() => _exact.Dispose();

    private void Run(SelfTestCase each)
    {
        Side device = new(_device, each), exact = new(_exact, each);
        string name = each.Op.ToString();
        Compare($"{name} output", device.Output, exact.Output);
        for (int i = 0; i < each.Inputs.Length; i++)
            if (device.Gradient(i) is { } gradient)
                Compare($"{name} gradient of {each.Inputs[i].Name}", gradient, exact.Gradient(i)!);
    }

    private void Fill()
    {
        Tensor tensor =
            _device.Allocate(new Spec(_device.Activations, new Shape(1003)), "self-test");
        _device.Fill(tensor, 0.5);
        Compare("fill", _device.ReadFloats(tensor), [.. Enumerable.Repeat(0.5f, 1003)]);
    }

    // A step of AdamW on clipped gradients, with what precedes it; weights take the moments before
    // these are rounded, so that their type makes no difference.
    private void Update(DType weights, DType moments)
    {
        const int Rows = 5, Cols = 1000;
        var shape = new Shape(Rows, Cols);
        var step = new AdamW(1e-2, 0.9, 0.999, 1e-8, 0.1, Step: 3);
        float[] device = Step(_device, weights, moments, step, shape);
        float[] exact = Step(_exact, DType.F64, DType.F64, step, shape);
        Compare($"adamw on {weights} with moments in {moments}", device, exact);
    }

    private static float[] Step(Device device, DType weights, DType moments, AdamW step,
        Shape shape)
    {
        DType state = device.Activations.Statistics();
        Tensor values = Filled(weights, 1), gradient = Filled(state, 2), m = Filled(moments, 3);
        Tensor v = Filled(moments, 4, positive: true);
        Tensor master = weights == state ? Tensor.None : Filled(state, 1);
        Tensor norm = device.Allocate(GradientNorm.Spec, "norm");
        device.GradientNorm([gradient], 1.0, norm, Tensor.None);
        device.Update(step, new AdamWRange(values, master, gradient, m, v), norm);
        return device.ReadFloats(master.Exists ? master : values);

        Tensor Filled(DType type, int seed, bool positive = false)
        {
            Tensor tensor = device.Allocate(new Spec(type, shape), "adamw");
            float[] numbers = Numbers(seed, shape.Count);
            device.WriteFloats(tensor, positive ? Array.ConvertAll(numbers, Math.Abs) : numbers);
            return tensor;
        }
    }

    private void Compare(string what, float[] got, float[] exact)
    {
        Results++;
        double error = 0, largest = 1e-3;
        for (int i = 0; i < exact.Length; i++)
        {
            double difference = Math.Abs((double)got[i] - exact[i]);
            // A NaN is larger than any error.
            if (!(difference <= error))
                error = double.IsNaN(difference) ? double.MaxValue : difference;
            largest = Math.Max(largest, Math.Abs(exact[i]));
        }

        if (error > _allowed * largest) _failures.Add(new(what, error, _allowed * largest));
    }

    // Normal numbers that every storage type holds, so that both sides start from the same.
    private static unsafe float[] Numbers(int seed, long count)
    {
        var random = new Random(seed);
        var values = new float[count];
        for (int i = 0; i < values.Length; i++)
        {
            double radius = Math.Sqrt(-2 * Math.Log(1 - random.NextDouble()));
            values[i] = (float)(radius * Math.Cos(2 * Math.PI * random.NextDouble()));
        }

        var narrow = new ushort[count];
        fixed (float* wide = values)
        fixed (ushort* bits = narrow)
        {
            FloatBits.Narrow(wide, bits, DType.BF16, values.Length);
            FloatBits.Widen(bits, DType.BF16, wide, values.Length);
        }

        return values;
    }

    /// <summary>A case on one device, forward and backward.</summary>
    private sealed class Side
    {
        private readonly Device _device;
        private readonly GradientTarget[] _targets;
        private readonly Tensor _result;

        public Side(Device device, SelfTestCase each)
        {
            _device = device;
            DType type = device.Activations;
            Spec[] specs = Array.ConvertAll(each.Inputs, o => o.Exists ? o.Spec(type) : default);
            Outputs outputs = each.Op.Infer(specs, type);
            var inputs = new Tensor[specs.Length];
            for (int i = 0; i < inputs.Length; i++)
                if (specs[i].Exists) inputs[i] = Input(each.Inputs[i], specs[i], i);
            Tensor output = New(outputs.Output);
            _result = each.Op.Writes is int changed ? inputs[changed] : output;
            var saved = new Tensor[outputs.SavedCount];
            for (int i = 0; i < saved.Length; i++) saved[i] = New(outputs.Saved(i));
            device.Forward(each.Op, new OpCall(inputs, output, saved, recorded: true));

            Tensor outputGradient = New(outputs.Output);
            device.WriteFloats(outputGradient, Numbers(99, outputs.Output.Shape.Count));
            _targets = new GradientTarget[inputs.Length];
            for (int i = 0; i < inputs.Length; i++)
            {
                Operand operand = each.Inputs[i];
                if (!operand.Exists || operand.Ints is not null || !each.Op.Differentiates(i))
                    continue;
                DType kind = operand.IsParameter ? type.Statistics() : type;
                _targets[i] =
                    new GradientTarget(New(new Spec(kind, inputs[i].Shape)), Accumulate: false);
            }

            device.Backward(
                each.Op, new OpCall(inputs, output, saved, recorded: true, outputGradient,
                    _targets));
        }

        public float[] Output => _device.ReadFloats(_result);

        public float[]? Gradient(int input) =>
            _targets[input].Wanted ? _device.ReadFloats(_targets[input].Buffer) : null;

        private Tensor New(Spec spec) => _device.Allocate(spec, "self-test");

        private Tensor Input(Operand operand, Spec spec, int seed)
        {
            Tensor tensor = New(spec);
            if (operand.Ints is { } ints) _device.Write<int>(tensor, ints);
            else _device.WriteFloats(tensor, Numbers(seed, spec.Shape.Count));
            return tensor;
        }
    }
}
