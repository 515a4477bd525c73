using System.Diagnostics;
using System.Globalization;
using MiniCpmNative.Bench.Real;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Generate;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Quantised;

namespace MiniCpmNative.Bench;

/// <summary>
/// Time of a prompt and of the tokens behind it, greedy, for one answer and for 16 at once, beside
/// what memory allows: a token can do no better than to read the decoder's weights once. Prompts
/// are of any tokens, without pictures.
/// </summary>
internal sealed class GenerateBench
{
    private const string Usage = """
        bench generate MODEL [--device NAME]
            a model at hand, on the CPU or a GPU
        bench generate --real [--peer PYTHON] [--sizes tiny] [--device NAME] [--folder DIR]
            a full-size model of MiniCPM-V-2_6's form with random weights, on a GPU unless --device
            says cpu, or emulated; with --peer transformers' generate in the same call
        bench generate --counted [TB/s TFLOP/s]
            the same on a device that only counts: bytes, launches, and the least time at the rates
            of a card (those of an H100: 3.02 and 785)
        """;

    private const int Prompt = 256, Answer = 64;

    private static readonly int[] s_batches = [1, 16];

    private readonly Dictionary<string, double> _ours = [];

    public static int Run(string[] args)
    {
        CultureInfo.CurrentCulture = CultureInfo.InvariantCulture;
        if (args is ["--counted", .. var rates] && rates.Length is 0 or 2)
        {
            Count(rates.Length == 0 ? 3.02 : double.Parse(rates[0]),
                rates.Length == 0 ? 785 : double.Parse(rates[1]));
            return 0;
        }

        bool real = args[0] == "--real", tiny = Option(args, "--sizes") == "tiny";
        if (!real && args[0].StartsWith('-'))
        {
            Console.Error.WriteLine(Usage);
            return 2;
        }

        ModelSizes sizes = tiny ? ModelSizes.Tiny : ModelSizes.Full;
        string folder = !real ? args[0] : Path.GetFullPath(Path.Combine(
            Option(args, "--folder") ?? "bench-real", tiny ? "generate-tiny" : "generate"));
        if (real && !File.Exists(Path.Combine(folder, "config.json")))
            sizes.Write(Path.Combine(AppContext.BaseDirectory, "base"), folder);
        string device = Option(args, "--device") ?? (real ? "cuda" : "auto");
        using EmulatedGpu? emulated =
            device == "emulated" ? new(new(), KernelBench.Nvrtc()) : null;
        var bench = new GenerateBench();
        bench.Time(folder, device, emulated?.Api, tiny ? 4 : Answer);
        if (Option(args, "--peer") is { } python) bench.Compare(python, sizes);
        return 0;
    }

    private static string? Option(string[] args, string name) =>
        Array.IndexOf(args, name) is >= 0 and var at && at + 1 < args.Length ? args[at + 1] : null;

    private void Time(string folder, string device, CudaApi? emulated, int answer)
    {
        var arguments = new TrainArguments
        {
            ModelNameOrPath = folder,
            Device = device == "emulated" ? DeviceChoice.Cuda
                : Enum.Parse<DeviceChoice>(device, ignoreCase: true),
            Bf16 = true,
        };
        using AskedModel model = AskedModel.Open(arguments, null,
            emulated is null ? null : new DeviceSource { Cuda = () => emulated },
            Console.WriteLine);
        double bytes = ReadBytes(model.Model.Spec);
        Console.WriteLine(
            $"{model.Model.DeviceName}; {bytes / 1e9:0.000} GB of bfloat16 weights a token");
        var generator = new Generator(model.Model, model.Counter);
        int vocabulary = model.Model.Spec.Decoder.VocabSize;
        foreach (int batch in s_batches)
        {
            GenerationInput[] inputs = [.. Enumerable.Range(0, batch).Select(row => new
                GenerationInput(Prompt, to => to.AddRow([.. Enumerable.Range(0, Prompt)
                    .Select(i => (int)(((31L * i) + (97 * row) + 7) % vocabulary))], [])))];
            var settings = new GenerationSettings { MaxNewTokens = answer };
            double first = double.MaxValue, rest = double.MaxValue;
            // The first round warms up.
            for (int round = 0; round < 4; round++)
            {
                long start = Stopwatch.GetTimestamp(), begun = 0;
                int said = 0;
                generator.Run(inputs, settings, (_, _) =>
                {
                    if (++said == batch) begun = Stopwatch.GetTimestamp();
                    return true;
                });
                if (round == 0) continue;
                first = Math.Min(first, Stopwatch.GetElapsedTime(start, begun).TotalSeconds);
                rest = Math.Min(rest, Stopwatch.GetElapsedTime(begun).TotalSeconds);
            }

            double step = rest / (answer - 1);
            _ours[$"generate-{batch}"] = batch / step;
            Console.WriteLine($"batch {batch,2}: prompts of {Prompt} tokens "
                + $"{first / batch * 1e3:0.0} ms each; {step * 1e3:0.00} ms a step, "
                + $"{batch / step:0} tokens/s; weights at {bytes / step / 1e9:0.0} GB/s");
        }

        Console.WriteLine($"16 at once are {_ours["generate-16"] / _ours["generate-1"]:0.0} times "
            + $"one; memory in use {model.Model.Device.MemoryInUse / (double)(1 << 30):0.00} GiB");
        double copy = CopyRate(model.Model.Device, emulated is not null);
        Console.WriteLine($"copies at {copy / 1e9:0.0} GB/s, read and written: one answer reads "
            + $"its weights at {100 * bytes * _ours["generate-1"] / copy:0} % of that");
    }

    private void Compare(string python, ModelSizes sizes)
    {
        var found = new Dictionary<string, double>();
        Peers.Run(python,
            [
                Peers.Script("hf_generate.py"),
                $"{sizes.Hidden},{sizes.Layers},{sizes.Inter},{sizes.Heads},{sizes.Kv},{sizes.Vocab}",
                $"{Prompt}", $"{Answer}", string.Join(',', s_batches),
            ],
            found);
        foreach (var (name, own) in _ours)
            if (found.TryGetValue(name, out double theirs))
                Console.WriteLine($"{name}: {own / theirs:0.00} times transformers");
    }

    // All of the decoder but the embeddings, of which rows are read.
    private static double ReadBytes(ModelSpec spec) => spec.Parameters.All
        .Where(p => p.Part == ModelPart.Decoder
            && (spec.Decoder.TiedHead || !p.Name.Contains("embed_tokens")))
        .Sum(p => 2.0 * p.Shape.Count);

    // What moving memory from one place to another reaches, read and written bytes together.
    private static double CopyRate(Device device, bool emulated)
    {
        if (device is CudaDevice gpu)
        {
            gpu.ReserveStep(emulated ? 1 << 20 : 3L << 30);
            return Peaks.Measure(gpu, emulated ? 64 : 8192).BytesPerSecond;
        }

        const int Each = 64 << 20;
        int threads = Environment.ProcessorCount;
        byte[][] from = [.. Enumerable.Range(0, threads).Select(_ => new byte[Each])],
            to = [.. Enumerable.Range(0, threads).Select(_ => new byte[Each])];
        double best = 0;
        for (int round = 0; round < 6; round++)
        {
            long start = Stopwatch.GetTimestamp();
            Parallel.For(0, threads, i => from[i].CopyTo(to[i], 0));
            if (round > 0)
                best = Math.Max(best,
                    2.0 * Each * threads / Stopwatch.GetElapsedTime(start).TotalSeconds);
        }

        return best;
    }

    private static void Count(double terabytes, double teraflops)
    {
        string folder = Directory.CreateTempSubdirectory("cpmx-bench-").FullName;
        try
        {
            ModelSpec spec = ModelSizes.Full.Describe(
                Path.Combine(AppContext.BaseDirectory, "base"), folder);
            double weights = ReadBytes(spec);
            Console.WriteLine($"untimed: counted at {terabytes:0.00} TB/s and {teraflops:0} "
                + $"TFLOP/s; reading {weights / 1e9:0.00} GB of weights once takes "
                + $"{weights / terabytes / 1e9:0.00} ms");
            Console.WriteLine($"{"bits",4} {"batch",5} {"tokens",6} {"launches",8} "
                + $"{"products GB",11} "
                + $"{"other MB",9} {"cache MB",9} {"least ms",9} {"tokens/s",9}");
            foreach (bool in4Bits in (bool[])[false, true])
                foreach (int batch in (int[])[1, 8, 16])
                    foreach (int tokens in (int[])[Prompt, 4096])
                        Count(spec, in4Bits, batch, tokens, terabytes * 1e12, teraflops * 1e12);
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }
    }

    private static void Count(
        ModelSpec spec, bool in4Bits, int batch, int tokens, double bytesPerSecond,
        double flopsPerSecond)
    {
        CudaContext context = CountingCuda.Context(new("counted", 132, 90, 80L << 30));
        CudaDevice device = CountingCuda.Device(context, DType.BF16);
        using LoadedModel model = LoadedModel.Plan(
            new OpenDevice(device, "counted", context), spec, _ => DType.BF16,
            new LoadOptions
            {
                Kind = new QuantisedKind(spec.Parameters, DType.BF16,
                    in4Bits ? new Quantisation(FourBitKind.Nf4, Nested: true) : null, null),
            });
        var cache = new KeyValueCache(device, spec.Decoder, batch, tokens);
        var step = new Batch();
        step.Clear();
        for (int i = 0; i < batch; i++)
        {
            step.AddRow([i], []);
            step.LabelRows.Add(i);
        }

        var work = new DecodeWork(bytesPerSecond, flopsPerSecond, cache.TotalBytes);
        model.Graph.Recording = false;
        device.Watch = work;
        model.Model.LabelLogits(model.Graph, model.Hidden(step, cache: cache));
        model.Graph.EndStep();
        Console.WriteLine($"{(in4Bits ? 4 : 16),4} {batch,5} {tokens,6} {work.Launches,8} "
            + $"{work.Products / 1e9,11:0.000} "
            + $"{work.Rest / 1e6,9:0.0} {cache.TotalBytes / 1e6,9:0.0} {1e3 * work.Seconds,9:0.00} "
            + $"{batch / work.Seconds,9:0}");
    }

    // The least that each launch takes, one after the other, at the rates of a card; launches that
    // touch the cache read it once in all, whatever of its room they are given.
    private sealed class DecodeWork(double bytesPerSecond, double flopsPerSecond, long cache)
        : ILaunchWatch
    {
        private const double LaunchSeconds = 2e-6;

        private bool _cached;

        public double Seconds { get; private set; } = cache / bytesPerSecond;

        public long Products { get; private set; }

        public long Rest { get; private set; }

        public int Launches { get; private set; }

        public void Operation(Op op, in OpCall call, bool backward) =>
            _cached = op.Name is "attention" or "cache_append";

        public void Begin(in QueuedWork work)
        {
            Launches++;
            bool product = work.Flops > 0;
            long bytes = _cached && !product ? 0 : work.Bytes;
            if (product) Products += bytes;
            else Rest += bytes;
            Seconds += Math.Max(LaunchSeconds,
                Math.Max(bytes / bytesPerSecond, work.Flops / flopsPerSecond));
        }

        public void End()
        {
        }
    }
}
