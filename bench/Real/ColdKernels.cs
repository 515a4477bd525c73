using System.Globalization;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Bench.Real;

/// <summary>
/// bench kernels --cold [TOKENS ...]: every operation of a full-size step, forward and backward, at
/// 512, 2,048 and 8,192 tokens, timed kernel by kernel as a step finds it: with none of its
/// operands in the second-level cache, because as many copies of them take turns as are larger than
/// that. With --emulated, at 32 tokens and small widths, it only shows that it runs.
/// </summary>
internal sealed class ColdKernels
{
    private const long ColdBytes = 256L << 20;
    private const int Rounds = 12, Views = 10, Patches = 1024;

    private readonly CudaDevice _device;
    private readonly Peaks _peaks;
    private readonly bool _tiny;

    private ColdKernels(CudaDevice device, bool tiny)
    {
        (_device, _tiny) = (device, tiny);
        _peaks = Peaks.Measure(device, tiny ? 64 : 8192);
        device.Random = new(1, 1, Dropout: true);
    }

    // Frozen weights and tables get no gradient.
    private sealed record Input(Spec Spec, int[]? Ints = null, bool Trained = false);

    private sealed record Subject(
        string Name, Op Op, Input[] Inputs, double Pairs = 0, bool HasBackward = true);

    public static int Run(string[] args)
    {
        CultureInfo.CurrentCulture = CultureInfo.InvariantCulture;
        bool tiny = args.Contains("--emulated");
        int[] tokens = [.. args.Where(a => a != "--emulated").Select(int.Parse)];
        if (tokens.Length == 0) tokens = tiny ? [32] : [512, 2048, 8192];
        using EmulatedGpu? emulated = tiny ? new(new(), KernelBench.Nvrtc()) : null;
        CudaApi api = emulated?.Api ?? CudaApi.Load();
        using var context = new CudaContext(api);
        long free = context.Memory().Free;
        using var device = new CudaDevice(
            context, new ModuleCompiler(api.Nvrtc, ModuleCompiler.DefaultCache()), DType.BF16,
            stepBytes: Math.Min(free * 9 / 10, 40L << 30));
        var bench = new ColdKernels(device, tiny);
        foreach (int count in tokens)
        {
            Console.WriteLine();
            Console.WriteLine($"== {count:N0} tokens");
            bench.Time(bench.Decoder(count));
        }

        Console.WriteLine();
        Console.WriteLine($"== {Views} pictures of {(tiny ? 16 : Patches):N0} patches");
        bench.Time(bench.Vision());
        return 0;
    }

    private IEnumerable<Subject> Decoder(int tokens)
    {
        var (width, inner, vocabulary) = _tiny ? (256, 512, 1000) : (3584, 18944, 151666);
        int heads = width / 128, kv = _tiny ? 1 : 4, keys = kv * 128, rank = _tiny ? 8 : 64;
        Input x = Float(tokens, width), wide = Float(tokens, inner);
        int[] starts = [0, tokens], positions = [.. Enumerable.Range(0, tokens)];
        yield return new("rms_norm", new RmsNorm(1e-6), [x, Vector(width)]);
        yield return new("rope", new Rope(128),
            [x, Ints(positions), Table(tokens, 64), Table(tokens, 64)]);
        yield return new("attention", new Attention(heads, kv, 128, true, 0.088),
            [x, Float(tokens, keys), Float(tokens, keys), Ints(starts), Ints(starts)],
            StepWork.CausalPairs(tokens));
        yield return new("add", new Add(1), [x, x]);
        yield return new("swiglu", new SwiGlu(), [wide, wide]);
        foreach (var (from, to) in ((int, int)[])[
            (width, width), (width, keys), (width, inner), (inner, width)])
        {
            yield return new($"linear {from} to {to}", new Linear(),
                [Float(tokens, from), Weight(to, from)]);
            yield return new($"lora_linear {from} to {to}, r {rank}",
                new LoraLinear(1, 1, 0.05),
                [
                    Float(tokens, from), Weight(to, from), new(default),
                    Parameter(rank, from), Parameter(to, rank),
                ]);
        }

        int labels = tokens / 2;
        yield return new("cross_entropy", new CrossEntropy(),
            [
                x, Weight(vocabulary, width),
                Ints([.. Enumerable.Range(tokens - labels, labels)]),
                Ints([.. Enumerable.Range(0, labels).Select(i => i * 37 % vocabulary)]),
            ]);
        yield return new("embedding", new Embedding(),
            [
                new(new Spec(DType.BF16, new Shape(vocabulary, width))),
                Ints([.. Enumerable.Range(0, tokens).Select(i => i * 61 % vocabulary)]),
            ], HasBackward: false);
    }

    private IEnumerable<Subject> Vision()
    {
        var (patches, width, inner) = _tiny ? (16, 144, 288) : (Patches, 1152, 4304);
        int rows = Views * patches, heads = width / 72;
        Input x = Float(rows, width);
        int[] starts = [.. Enumerable.Range(0, Views + 1).Select(i => i * patches)];
        yield return new("layer_norm", new LayerNorm(1e-6), [x, Vector(width), Vector(width)]);
        yield return new("gelu", new Gelu(GeluKind.Tanh), [Float(rows, inner)]);
        foreach (int dim in (int[])[72, 64, 80])
        {
            Input own = Float(rows, heads * dim);
            yield return new($"attention, heads of {dim}",
                new Attention(heads, heads, dim, false, 0.118),
                [own, own, own, Ints(starts), Ints(starts)], (double)Views * patches * patches);
        }
    }

    private void Time(IEnumerable<Subject> subjects)
    {
        Console.WriteLine($"{"operation",-32} {"kernel",-46} {"n",3} {"us",9} {"bound",9} {"%",4}");
        foreach (Subject each in subjects)
        {
            ArenaMark mark = _device.Step.Mark();
            Time(each);
            _device.Step.Pop(mark);
        }
    }

    private void Time(Subject subject)
    {
        Spec[] specs = [.. subject.Inputs.Select(i => i.Spec)];
        Outputs outputs = subject.Op.Infer(specs, _device.Activations);
        long bytes = specs.Sum(s => s.Exists ? s.Bytes : 0) + outputs.Output.Bytes;
        var copies = new Copy[_tiny ? 2 : (int)Math.Clamp(1 + (ColdBytes / bytes), 2, 64)];
        for (int i = 0; i < copies.Length; i++)
            copies[i] = new Copy(_device, subject.Op, subject.Inputs, outputs);
        using var profile = new StepProfile(_device, (_, _, _) => subject.Pairs);
        foreach (bool backward in (bool[])[false, true])
        {
            if (backward && !subject.HasBackward) continue;
            // The first run loads code; then each copy's turn comes as often.
            copies[0].Run(_device, subject.Op, backward);
            _device.Watch = profile;
            int runs = _tiny ? 2 : (Rounds + copies.Length - 1) / copies.Length * copies.Length;
            for (int i = 0; i < runs; i++)
                copies[i % copies.Length].Run(_device, subject.Op, backward);
            _device.Watch = null;
            IReadOnlyList<KernelTime> times = profile.Take();
            foreach (KernelTime time in times)
            {
                double us = time.Microseconds / runs, bound = time.Bound(_peaks) / runs;
                Console.WriteLine($"{subject.Name + (backward ? ", backward" : ""),-32} "
                    + $"{time.Name,-46} {time.Launches / runs,3} {us,9:f1} {bound,9:f1} "
                    + $"{100 * bound / us,4:f0}");
            }
        }
    }

    private static Input Float(int rows, int cols) =>
        new(new Spec(DType.BF16, new Shape(rows, cols)), Trained: true);

    private static Input Weight(int rows, int cols) =>
        new(new Spec(DType.BF16, new Shape(rows, cols), Layout.Packed));

    private static Input Parameter(int rows, int cols) =>
        new(new Spec(DType.F32, new Shape(rows, cols)), Trained: true);

    private static Input Vector(int count) => new(new Spec(DType.F32, new Shape(count)));

    private static Input Table(int rows, int cols) =>
        new(new Spec(DType.F32, new Shape(rows, cols)));

    private static Input Ints(int[] values) =>
        new(new Spec(DType.I32, new Shape(values.Length)), values);

    /// <summary>All tensors of one run, in the step's memory.</summary>
    private sealed class Copy
    {
        private readonly Tensor[] _inputs, _saved;
        private readonly Tensor _output, _outputGradient;
        private readonly GradientTarget[] _targets;

        public Copy(CudaDevice device, Op op, Input[] inputs, Outputs outputs)
        {
            Tensor New(Spec spec) => device.Step.Push(spec, op.Name);
            _inputs = [.. inputs.Select(i => i.Spec.Exists ? New(i.Spec) : Tensor.None)];
            for (int i = 0; i < inputs.Length; i++)
            {
                if (inputs[i].Ints is { } values) device.Write<int>(_inputs[i], values);
                else if (_inputs[i].Exists) DeviceNoise.Fill(device, _inputs[i]);
            }

            _output = New(outputs.Output);
            _saved = [.. Enumerable.Range(0, outputs.SavedCount)
                .Select(i => New(outputs.Saved(i)))];
            _outputGradient = New(outputs.Output);
            DeviceNoise.Fill(device, _outputGradient);
            _targets =
            [
                .. inputs.Select(i => i.Trained
                    ? new GradientTarget(New(i.Spec), Accumulate: false) : GradientTarget.None),
            ];
        }

        public void Run(CudaDevice device, Op op, bool backward)
        {
            if (backward)
                device.Backward(op, new OpCall(
                    _inputs, _output, _saved, recorded: true, _outputGradient, _targets));
            else device.Forward(op, new OpCall(_inputs, _output, _saved, recorded: true));
        }
    }
}
