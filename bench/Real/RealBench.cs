using System.Diagnostics;
using System.Globalization;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Bench.Real;

/// <summary>
/// bench real: the table of docs/gpu.md that compares training steps of a full-size model with
/// PyTorch's on one GPU, in one command. It makes the model and the rows, runs each case as a
/// training does, profiles one more step by events around each launch, and runs the peers, so that
/// all numbers are of one card in one call.
/// </summary>
internal sealed class RealBench
{
    private const int Warm = 3;
    private const double ShownMilliseconds = 0.2;

    private readonly RealOptions _options;
    private readonly DeviceSource _devices;
    private readonly DeviceChoice _device;
    private readonly Stopwatch _clock = Stopwatch.StartNew();
    private readonly Dictionary<string, Measured> _ours = [];
    private Peaks? _peaks;

    private RealBench(RealOptions options, CudaApi? emulated)
    {
        _options = options;
        _device = options.Device == "cpu" ? DeviceChoice.Cpu : DeviceChoice.Cuda;
        _devices = emulated is null
            ? DeviceSource.Default : new DeviceSource { Cuda = () => emulated };
    }

    /// <summary>Tokens per second by the middle step and the best one, and memory.</summary>
    internal sealed record Measured(double Median, double Best, double Step, double Gib);

    public static int Run(string[] args)
    {
        CultureInfo.CurrentCulture = CultureInfo.InvariantCulture;
        if (args.Contains("--help"))
        {
            Console.WriteLine(RealOptions.Usage);
            return 0;
        }

        RealOptions options;
        try
        {
            options = new RealOptions(args);
        }
        catch (ArgumentException wrong)
        {
            Console.Error.WriteLine($"bench real: {wrong.Message}; see bench real --help");
            return 2;
        }

        using EmulatedGpu? emulated =
            options.Device == "emulated" ? new(new(), KernelBench.Nvrtc()) : null;
        new RealBench(options, emulated?.Api).Run();
        return 0;
    }

    private void Run()
    {
        if (_device == DeviceChoice.Cuda) MeasurePeaks();
        foreach (RealCase each in _options.Cases)
            if (HasTime(each.Name)) TryRun(each);
        var peers = new Peers(_options, HasTime).Run();
        Console.WriteLine();
        Console.WriteLine($"{"case",-14} {"tok/s",9} {"best",9} {"step ms",9} {"GiB",7}"
            + "  ours / peer");
        foreach (RealCase each in _options.Cases)
        {
            if (!_ours.TryGetValue(each.Name, out Measured? own)) continue;
            Console.Write($"{each.Name,-14} {own.Median,9:f0} {own.Best,9:f0} "
                + $"{1e3 * own.Step,9:f1} {own.Gib,7:f2} ");
            foreach (string name in each.Peers)
                if (peers.TryGetValue(name, out double theirs)
                    || (_ours.TryGetValue(name, out Measured? other)
                        && (theirs = other.Median) > 0))
                    Console.Write($" {name} {own.Median / theirs:f2};");
            if (each.Goal > 0) Console.Write($" wanted {each.Goal:f2} of {each.Peers[0]};");
            if (each.MostGib > 0) Console.Write($" at most {each.MostGib} GiB");
            Console.WriteLine();
        }
    }

    private bool HasTime(string what)
    {
        if (_clock.Elapsed.TotalSeconds < _options.Seconds) return true;
        Console.WriteLine($"{what}: left out, {_options.Seconds} seconds are over");
        return false;
    }

    // On a device of its own, whose memory is free again afterwards.
    private void MeasurePeaks()
    {
        var arguments = new TrainArguments { Device = DeviceChoice.Cuda, Bf16 = true };
        using OpenDevice open = _devices.Open(arguments, Console.WriteLine);
        _peaks = Peaks.Measure((CudaDevice)open.Device, _options.IsTiny ? 128 : 8192);
    }

    // What one case fails of, the others need not.
    private void TryRun(RealCase each)
    {
        try
        {
            Run(each);
        }
        catch (Exception failure) when (failure is InputException or RunException
            or DeviceMemoryException or CudaException)
        {
            Console.WriteLine($"{each.Name} failed: {failure.Message}");
        }
    }

    private void Run(RealCase each)
    {
        var total = Stopwatch.StartNew();
        string model = Model(each);
        ModelSpec spec = ModelSpec.Read(model);
        string rowsFile = RealRows.Write(_options.Folder, spec.Rows().Tokenizer, each.Tokens,
            each.Pictures ? _options.PictureSide : 0);
        TrainArguments arguments = each.Arguments(
            model, rowsFile, Path.Combine(_options.Folder, "out"), _device,
            bf16: _device == DeviceChoice.Cuda);
        // As the case has it, wherever it fits.
        arguments = arguments with
        {
            StreamWeights = arguments.StreamWeights ?? StreamedWeights.False,
            OffloadOptimizer = arguments.OffloadOptimizer == true,
            OffloadParam = arguments.OffloadParam == true,
        };
        if (!each.Checkpointing && !arguments.Streams)
            arguments = arguments with { Recompute = _options.Recompute };
        Console.WriteLine();
        Console.WriteLine($"== {each.Name}: {each.What}");
        total.Restart();
        using TunedModel training =
            TunedModel.Open(arguments, _devices, Console.WriteLine);
        var rows = DataRows.Open(
            arguments.DataPath!, arguments, training.Spec.Rows(), _ => { });
        MemoryPlan? plan = Plan(arguments, training, rows);
        Batch[] batches = Batches(each, rows);
        var trainer = new Trainer(arguments, training) { Together = plan?.Together ?? 1 };
        var queued = new Batch[each.Passes];
        double loaded = total.Elapsed.TotalSeconds;
        var seconds = new List<double>();
        long tokens = 0;
        for (int step = 0; step < Warm + _options.Steps; step++)
        {
            for (int i = 0; i < queued.Length; i++)
                queued[i] = batches[((step * queued.Length) + i) % batches.Length];
            trainer.Queue(step, queued, 1e-4);
            while (trainer.TryTake(step == Warm + _options.Steps - 1, out StepResult result))
            {
                if (result.Step == 1)
                    Console.WriteLine($"loss of the first step {result.Loss:f4}, "
                        + $"{result.Tokens:N0} tokens, {result.SupervisedTokens:N0} supervised");
                if (result.Step > Warm) seconds.Add(result.Seconds);
                tokens = result.Tokens;
            }
        }

        double whole = total.Elapsed.TotalSeconds;
        seconds.Sort();
        double median = seconds[seconds.Count / 2];
        if (plan is not null)
            Console.WriteLine($"planned {plan.Parts.Total / (double)(1 << 30):f3} GiB, taken "
                + $"{training.Device.MemoryInUse / (double)(1 << 30):f3}");
        double gib = training.Device.MemoryInUse / (double)(1 << 30);
        _ours[each.Name] = new(tokens / median, tokens / seconds[0], median, gib);
        Console.WriteLine($"{tokens / median:N0} tok/s (best {tokens / seconds[0]:N0}), step "
            + $"{1e3 * median:f1} ms, {gib:f2} GiB; loaded in {loaded:f1} s, "
            + $"{Warm + _options.Steps} steps done {whole:f1} s after the start");
        if (training.Device is CudaDevice device)
        {
            if (each.Pictures) VisionForward(training, batches[0], device);
            if (_options.Profiled.Contains(each.Name))
                Profile(training, trainer, batches[0], device, median);
        }
    }

    private string Model(RealCase each)
    {
        ModelSizes sizes = each.IsSmall && !_options.IsTiny ? ModelSizes.Small : _options.Sizes;
        string folder = Path.Combine(_options.Folder,
            $"model-{sizes.Hidden}-{sizes.Layers}-{sizes.Inter}-{sizes.Vocab}-{sizes.VLayers}");
        if (File.Exists(Path.Combine(folder, "made"))) return folder;
        var clock = Stopwatch.StartNew();
        ModelSpec spec = sizes.Write(_options.Base, folder);
        File.WriteAllText(Path.Combine(folder, "made"), "");
        Console.WriteLine($"made {folder}: {spec.Parameters.Count:N0} parameters, "
            + $"{clock.Elapsed.TotalSeconds:f1} s");
        return folder;
    }

    // As a run does it; in the order of the file, as the batches here.
    private MemoryPlan? Plan(TrainArguments arguments, TunedModel training, DataRows rows)
    {
        if (training.Device is not CudaDevice device) return null;
        arguments = arguments with { TrainSamplingStrategy = SamplingStrategy.Sequential };
        var (free, total) = device.Context.Memory();
        MemoryPlan plan = MemoryPlan.Make(
            arguments, training.Base.Planned, device.Card, rows, null, new(arguments, rows.Count),
            arguments.MemoryLimit?.Bytes(total) ?? free + device.Context.HeldBytes);
        plan.Apply(training);
        Console.WriteLine(plan);
        return plan;
    }

    private static Batch[] Batches(RealCase each, DataRows rows)
    {
        var batches = new Batch[Math.Max(1, Math.Min(4, rows.Count / each.Batch))];
        for (int i = 0; i < batches.Length; i++)
        {
            (batches[i] = new Batch()).Clear();
            for (int row = 0; row < each.Batch; row++)
                rows.Append(((i * each.Batch) + row) % rows.Count, batches[i]);
        }

        return batches;
    }

    private static void VisionForward(TunedModel training, Batch batch, CudaDevice device)
    {
        training.Graph.Recording = false;
        training.Hidden(batch);
        training.Graph.EndStep();
        double seconds = Peaks.Seconds(device, 10, () =>
        {
            training.Model.Vision.Forward(training.Graph, null);
            training.Graph.EndStep();
        });
        training.Graph.Recording = true;
        Console.WriteLine($"vision tower forward of {batch.Grids.Count / 2} views: "
            + $"{1e3 * seconds:f2} ms");
    }

    private void Profile(
        TunedModel training, Trainer trainer, Batch batch, CudaDevice device, double median)
    {
        using var profile = new StepProfile(device, StepWork.PairsOf(batch));
        device.Watch = profile;
        trainer.Step(Warm + _options.Steps, [batch], 1e-4);
        device.Watch = null;
        KernelTime.Print(profile.Take(), _peaks!, median, _options.IsTiny ? 0 : ShownMilliseconds);
    }
}
