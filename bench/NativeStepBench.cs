using System.Diagnostics;
using System.Runtime.Intrinsics;
using System.Text.Json;
using MiniCpmNative.Bench.Real;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels.Cpu;

namespace MiniCpmNative.Bench;

/// <summary>
/// bench step --v46: LoRA steps of rank 16 on a model of MiniCPM-V-4_6's published shape with
/// random weights, on the CPU: 512 tokens, half of them supervised, 64 of them the features of one
/// picture of 448 x 448. Prints the seconds of a step, the share of the rate of fused multiply-adds
/// that the same threads reach between the steps, and the most memory that the process had.
/// Options: --threads N, --steps N, --folder DIR (2.6 GB, made once and left), --layers N and
/// --vision-layers N for rehearsals.
/// </summary>
internal static class NativeStepBench
{
    private const int Width = 1024, Vocabulary = 248094, Tokens = 512, Features = 64, Side = 32;
    private const int PictureToken = 248056, Rank = 16;
    private const int Insert = 6, VisionHeads = 16, VisionWidth = 1152;

    public static void Run(string[] args)
    {
        int Option(string name, int otherwise) => StepBench.Option(args, name, otherwise);
        int threads = Option("--threads", Environment.ProcessorCount), steps = Option("--steps", 5);
        int layers = Option("--layers", 24), visionLayers = Option("--vision-layers", 27);
        int at = Array.IndexOf(args, "--folder");
        string folder = Path.GetFullPath(at >= 0 ? args[at + 1] : "bench-v46");
        ModelSpec spec = Model(folder, layers, visionLayers);
        var arguments = new TrainArguments
        {
            ModelNameOrPath = folder,
            Device = DeviceChoice.Cpu,
            Threads = threads,
            UseLora = true,
            TuneVision = false,
            TuneLlm = false,
            LoraR = Rank,
            LoraAlpha = 2 * Rank,
            LoraDropout = 0,
            ReportTo = ReportTo.None,
        };
        using TunedModel model = TunedModel.Open(arguments);
        var trainer = new Trainer(arguments, model);
        Batch batch = Rows(spec);
        double work = Flops(spec, model.Parts.Adapters);
        using var workers = new Workers(threads);
        var shares = new List<double>();
        var seconds = new List<double>();
        double before = FmaRate(workers);
        for (int i = 0; i <= steps; i++)
        {
            var clock = Stopwatch.StartNew();
            StepResult result = trainer.Step(i, [batch], 1e-4);
            double taken = clock.Elapsed.TotalSeconds, after = FmaRate(workers);
            double rate = (before + after) / 2;
            before = after;
            Console.WriteLine($"step {i} loss {result.Loss:F4} {taken:F2} s, FMA "
                + $"{rate / 1e9:F0} GFLOP/s, share {work / taken / rate:P0}");
            // The first makes pages and compiles.
            if (i == 0) continue;
            seconds.Add(taken);
            shares.Add(work / taken / rate);
        }

        seconds.Sort();
        shares.Sort();
        using var self = Process.GetCurrentProcess();
        Console.WriteLine($"{threads} threads, {spec.Parameters.Count:N0} parameters, "
            + $"{work / 1e12:F2} TFLOP a step: best {seconds[0]:F2} s, median "
            + $"{seconds[steps / 2]:F2} s, {shares[steps / 2]:P1} of the FMA rate (median), peak "
            + $"{self.PeakWorkingSet64 / (double)(1 << 30):F2} GiB");
    }

    private static ModelSpec Model(string folder, int layers, int visionLayers)
    {
        Directory.CreateDirectory(folder);
        string config = JsonSerializer.Serialize(new
        {
            model_type = "minicpmv4_6",
            tie_word_embeddings = true,
            image_token_id = PictureToken,
            insert_layer_id = Math.Min(Insert, visionLayers - 1),
            text_config = new
            {
                model_type = "qwen3_5_text",
                vocab_size = Vocabulary,
                hidden_size = Width,
                intermediate_size = 3584,
                num_hidden_layers = layers,
                num_attention_heads = 8,
                num_key_value_heads = 2,
                head_dim = 256,
                linear_num_key_heads = 16,
                linear_num_value_heads = 16,
                linear_key_head_dim = 128,
                linear_value_head_dim = 128,
                rope_parameters = new { rope_theta = 1e7, partial_rotary_factor = 0.25 },
            },
            vision_config = new
            {
                hidden_size = VisionWidth,
                intermediate_size = 4304,
                num_hidden_layers = visionLayers,
                num_attention_heads = VisionHeads,
                image_size = 980,
                patch_size = 14,
                hidden_act = "gelu_pytorch_tanh",
            },
        });
        string path = Path.Combine(folder, "config.json");
        bool made = File.Exists(path) && File.ReadAllText(path) == config
            && Checkpoint.IsIn(folder);
        File.WriteAllText(path, config);
        ModelSpec spec = ModelSpec.Read(folder);
        if (!made) ModelSizes.WriteWeights(spec, folder);
        return spec;
    }

    private static Batch Rows(ModelSpec spec)
    {
        var random = new Random(1);
        var ids = new int[Tokens];
        for (int i = 0; i < Tokens; i++)
            ids[i] = i is > 0 and <= Features ? PictureToken : random.Next(PictureToken - 100);
        var batch = new Batch();
        batch.Clear();
        batch.AddRow(ids, [new ImageBound(1, 1 + Features)]);
        for (int t = (Tokens / 2) - 1; t + 1 < Tokens; t++)
        {
            batch.LabelRows.Add(t);
            batch.Targets.Add(ids[t + 1]);
        }

        using var picture = new Picture(14 * Side, 14 * Side);
        random.NextBytes(picture.Rgb);
        var plan = new SlicePlan(picture.Size, 0, 0, default);
        var strips = new PatchStrips([0.5f, 0.5f, 0.5f], [0.5f, 0.5f, 0.5f], 14);
        batch.TryAddPicture(strips, picture, plan, Features);
        return batch;
    }

    // Products of matrices and attention alone: what is frozen forward, and in the decoder to its
    // input; an adapter thrice. Softmax, norms and the delta rule come on top of it.
    private static double Flops(ModelSpec spec, Adapters adapters)
    {
        const double Patches = Side * Side;
        double patch = 2 * Patches * 3 * 14 * 14 * VisionWidth;
        double head = 4.0 * (Tokens / 2) * Width * Vocabulary;
        double sum = patch + head;
        foreach (LinearModule linear in spec.Parameters.Linears)
        {
            double size = 2.0 * linear.Inputs * linear.Outputs;
            if (linear.Name == spec.Parameters.Head) continue;
            sum += size * (RowsOf(linear.Name) ?? (2 * Tokens));
        }

        for (int i = 0; i < spec.Vision.Layers; i++)
            sum += 4 * VisionWidth * Math.Pow(RowsBehind(i), 2);
        // Scores and sums, half of the square, forward once and twice and a half backward.
        sum += spec.Decoder.Delta!.Layers.Count(isDelta => !isDelta)
            * 3.5 * 4 * Tokens * Tokens / 2.0 * spec.Decoder.Heads * spec.Decoder.HeadDim;
        foreach (Adapter adapter in adapters.List)
            sum += 3 * 2.0 * Tokens * adapter.Rank * (adapter.Inputs + adapter.Outputs);
        return sum;

        double RowsBehind(int layer) => layer <= spec.Vision.MergesAfter ? Patches : Patches / 4;

        // Null of the decoder's.
        double? RowsOf(string name)
        {
            const string Layers = ".encoder.layers.";
            int at = name.IndexOf(Layers, StringComparison.Ordinal);
            if (at >= 0)
                return RowsBehind(int.Parse(name[(at + Layers.Length)..].Split('.')[0]));
            return name.Contains("vit_merger.linear", StringComparison.Ordinal) ? Patches / 4
                : name.Contains("vit_merger", StringComparison.Ordinal) ? Patches
                : name.StartsWith("model.merger", StringComparison.Ordinal) ? Patches / 16 : null;
        }
    }

    // Of all threads together, over some tenths of a second.
    private static double FmaRate(Workers workers)
    {
        const int Rounds = 30_000_000;
        var clock = Stopwatch.StartNew();
        workers.For(workers.Count, new Fmas { Rounds = Rounds });
        return workers.Count * 2.0 * Rounds * Fmas.Numbers / clock.Elapsed.TotalSeconds;
    }

    // Chains that do not wait for each other, as many as hide the latency of one.
    private readonly struct Fmas : IRangeBody
    {
        private const int Chains = 10;

        public required int Rounds { get; init; }

        public static int Numbers => Chains * (Vector512.IsHardwareAccelerated
            ? Vector512<float>.Count : Vector256<float>.Count);

        public void Run(int begin, int end, int worker)
        {
            for (int i = begin; i < end; i++)
            {
                float sum = Vector512.IsHardwareAccelerated ? Wide() : Narrow();
                if (float.IsNaN(sum)) throw new ArithmeticException("the sum is not a number");
            }
        }

        private float Wide()
        {
            Vector512<float> m = Vector512.Create(0.999f), c = Vector512.Create(0.001f);
            Vector512<float> x0 = c, x1 = m, x2 = c, x3 = m, x4 = c;
            Vector512<float> x5 = m, x6 = c, x7 = m, x8 = c, x9 = m;
            for (int i = 0; i < Rounds; i++)
            {
                x0 = Vector512.FusedMultiplyAdd(x0, m, c);
                x1 = Vector512.FusedMultiplyAdd(x1, m, c);
                x2 = Vector512.FusedMultiplyAdd(x2, m, c);
                x3 = Vector512.FusedMultiplyAdd(x3, m, c);
                x4 = Vector512.FusedMultiplyAdd(x4, m, c);
                x5 = Vector512.FusedMultiplyAdd(x5, m, c);
                x6 = Vector512.FusedMultiplyAdd(x6, m, c);
                x7 = Vector512.FusedMultiplyAdd(x7, m, c);
                x8 = Vector512.FusedMultiplyAdd(x8, m, c);
                x9 = Vector512.FusedMultiplyAdd(x9, m, c);
            }

            return Vector512.Sum(x0 + x1 + x2 + x3 + x4 + x5 + x6 + x7 + x8 + x9);
        }

        private float Narrow()
        {
            Vector256<float> m = Vector256.Create(0.999f), c = Vector256.Create(0.001f);
            Vector256<float> x0 = c, x1 = m, x2 = c, x3 = m, x4 = c;
            Vector256<float> x5 = m, x6 = c, x7 = m, x8 = c, x9 = m;
            for (int i = 0; i < Rounds; i++)
            {
                x0 = Vector256.FusedMultiplyAdd(x0, m, c);
                x1 = Vector256.FusedMultiplyAdd(x1, m, c);
                x2 = Vector256.FusedMultiplyAdd(x2, m, c);
                x3 = Vector256.FusedMultiplyAdd(x3, m, c);
                x4 = Vector256.FusedMultiplyAdd(x4, m, c);
                x5 = Vector256.FusedMultiplyAdd(x5, m, c);
                x6 = Vector256.FusedMultiplyAdd(x6, m, c);
                x7 = Vector256.FusedMultiplyAdd(x7, m, c);
                x8 = Vector256.FusedMultiplyAdd(x8, m, c);
                x9 = Vector256.FusedMultiplyAdd(x9, m, c);
            }

            return Vector256.Sum(x0 + x1 + x2 + x3 + x4 + x5 + x6 + x7 + x8 + x9);
        }
    }
}
