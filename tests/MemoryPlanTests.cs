using System.Text.Json.Nodes;
using MiniCpmNative.Cli;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// What a run takes of a GPU is known before it begins, and what is computed again in backward
/// changes memory and no bit of the results.
/// </summary>
[TestFixture]
public sealed class MemoryPlanTests
{
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [TestCase("lora")]
    [TestCase("lora_mlp")]
    [TestCase("full")]
    public void RecomputationGivesTheSameBits(string name)
    {
        using var model = TunedModel.Open(Arguments(name));
        var trainer = new Trainer(Arguments(name), model);
        // Of a picture a frozen tower would set the peak.
        Batch batch = name == "full" ? V26.Batch(V26.Lora, "one", "text1")
            : V26.Batch(V26.Lora, "text0", "text1");
        Recomputation recomputation = model.Recomputation;
        float[]? kept = null;
        double loss = 0;
        var needed = new List<long>();
        foreach (int amount in Enumerable.Range(0, recomputation.Most + 1))
        {
            recomputation.Amount = amount;
            model.Device.Step.ResetNeeded();
            StepResult result = trainer.Step(3, [batch], learningRate: 0);
            needed.Add(model.Device.Step.Needed);
            float[] gradients = V26.AllGradients(model);
            (kept, loss) = amount == 0 ? (gradients, result.Loss) : (kept, loss);
            Assert.That(gradients, Is.EqualTo(kept), $"{recomputation}");
            Assert.That(result.Loss, Is.EqualTo(loss), $"{recomputation}");
        }

        Assert.That(kept, Has.Some.Not.Zero);
        TestContext.Out.WriteLine(string.Join(" ", needed));
        Assert.That(needed[^1], Is.LessThan(needed[0]));
    }

    [Test]
    public void OnTheGpuTooAndWhatIsTakenIsWhatWasPlanned()
    {
        using var gpu = new CudaUnderTest();
        TrainArguments arguments = Arguments("lora_mlp") with
        {
            Bf16 = true,
            Device = DeviceChoice.Cuda,
        };
        DeviceSource devices = gpu.Devices;
        using var model = TunedModel.Open(arguments, devices);
        var trainer = new Trainer(arguments, model);
        using var dry = new DryRun(arguments, model.Base.Planned, ((CudaDevice)model.Device).Card);
        Batch batch = V26.Batch(arguments, "text0", "text1");
        float[]? kept = null;
        int layers = V26.Spec.Decoder.Layers;
        foreach (int amount in (int[])[0, layers, 2 * layers, dry.Recomputation.Most])
        {
            model.Recomputation.Amount = dry.Recomputation.Amount = amount;
            model.Device.Step.ResetNeeded();
            trainer.Step(3, [batch], learningRate: 0);
            float[] gradients = V26.AllGradients(model);
            kept ??= gradients;
            Assert.That(gradients, Is.EqualTo(kept), $"{model.Recomputation}");
            Assert.That(dry.Train(batch), Is.EqualTo(model.Device.Step.Needed),
                $"{model.Recomputation}");
        }

        Assert.That(kept, Has.Some.Not.Zero);
        long taken = model.Device.MemoryInUse, planned = dry.Parts(model.Device.Step.Needed).Total;
        Assert.That(planned, Is.InRange(taken * 0.98, taken * 1.02));
    }

    /// <summary>
    /// MiniCPM-V-2_6 with adapters on q, k and v, one row of 2,048 tokens, all supervised, all
    /// kept: a layer keeps, of each token, the norm that the adapters read, q, k, v as attention
    /// reads them, its output, two sums, gate and up, in bf16; and in float two norms' factors and,
    /// for each head, attention's. Everything else is at most one layer's and the loss's.
    /// </summary>
    [TestCase(Recompute.Nothing)]
    [TestCase(Recompute.Norms)]
    [TestCase(Recompute.Mlp)]
    public void TheRealModelTakesWhatItsShapesSay(Recompute kind)
    {
        const long Tokens = 2048, Width = 3584, Inner = 18944, Keys = 512, Layers = 28, Rank = 64;
        const long Parameters = 8_099_175_152;
        TrainArguments arguments = RealModel.Lora with { Recompute = kind };
        using DryRun dry = Dry(arguments);
        long step = dry.Train(RealModel.Row((int)Tokens));
        MemoryParts parts = dry.Parts(step);
        long perToken = (2 * (((kind == Recompute.Nothing ? 5 : 4) * Width) + (2 * Keys)
            + (3 * Rank) + (kind == Recompute.Mlp ? 0 : 2 * Inner))) + (4 * (2 + 28));
        long kept = Layers * Tokens * perToken;
        TestContext.Out.WriteLine(
            $"{step:N0} of which {kept:N0} are kept by layers; {parts}, {dry.Fullest}");
        long adapters = Layers * Rank * ((3 * Width) + Width + (2 * Keys));
        Assert.Multiple(() =>
        {
            Assert.That(parts.Weights, Is.InRange(1.999 * Parameters, 2.01 * Parameters));
            // With the copies in bf16 that products take.
            Assert.That(parts.Trained, Is.InRange(6 * adapters, 6.01 * adapters));
            Assert.That(parts.Gradients, Is.InRange(4 * adapters, 4.01 * adapters));
            Assert.That(parts.Moments, Is.InRange(8 * adapters, 8.01 * adapters));
            // The logits of a chunk, two gradients of the MLP, some of the width.
            Assert.That(step - kept, Is.InRange(0, 1L << 30));
        });
    }

    /// <summary>
    /// The same with the decoder in 4 bits: its linear layers take 4.127 bits a number, and a step
    /// one matrix of them in bf16 besides, gate's or down's.
    /// </summary>
    [TestCase(64, false, 7.56)]
    [TestCase(8, false, 7.15)]
    [TestCase(64, true, 7.0)]
    [TestCase(8, true, 6.6)]
    public void InFourBitsItTakesWhatItsShapesSay(int rank, bool vision, double most)
    {
        const long Tower = 27 * 1152L * ((4 * 1152) + (2 * 4304));
        const long Width = 3584, Inner = 18944, Keys = 512, Layers = 28;
        const long Linears = Layers * Width * ((2 * Width) + (2 * Keys) + (3 * Inner));
        const long Parameters = 8_099_175_152;
        TrainArguments arguments = RealModel.Lora with
        {
            LoraR = rank,
            GradientCheckpointing = true,
        };
        long dense, packed;
        using (DryRun dry = Dry(arguments)) dense = dry.Train(RealModel.Row(2048));
        using DryRun four = Dry(arguments with
        {
            QLora = true,
            LlmInt8SkipModules = vision ? ["resampler", "lm_head"] : null,
        });
        packed = four.Train(RealModel.Row(2048));
        MemoryParts parts = four.Parts(packed);
        TestContext.Out.WriteLine($"{parts}: {parts.Total / (double)(1 << 30):0.00} GiB; a step "
            + $"{packed:N0}, {dense:N0} with dense weights, {four.Fullest}");
        long quantised = Linears + (vision ? Tower : 0);
        double expected = (2.0 * (Parameters - quantised)) + (quantised * 4.127 / 8);
        Assert.That(parts.Weights, Is.InRange(0.999 * expected, 1.01 * expected));
        // The scratch matrix, unless the peak is elsewhere.
        Assert.That(packed - dense, Is.InRange(0, (2 * Width * Inner) + (1 << 20)));
        Assert.That(parts.Total, Is.LessThan(most * (1 << 30)));
    }

    [Test]
    public void AsLittleIsRecomputedAsFits()
    {
        TrainArguments arguments = RealModel.Lora with
        {
            DataPath = Rows(),
            OfficialCompat = false,
            NumTrainEpochs = 2,
        };
        using DryRun dry = Dry(arguments);
        var rows = DataRows.Open(
            arguments.DataPath!, arguments, ModelSpec.Read(_folder).Rows(), _ => { });
        var batches = PlannedBatches.Of(arguments, rows, null, new(arguments, rows.Count));
        MemoryPlan all = MemoryPlan.Make(arguments, dry, batches, null);
        Assert.That(all.Recomputation.Amount, Is.Zero);
        // The longest row, and the one of most supervised tokens.
        Assert.That((batches.Count, all.Rows), Is.EqualTo((2, "row 3 (id \"c\")")));
        foreach (long gib in (long[])[20, 18, 17])
        {
            MemoryPlan plan = MemoryPlan.Make(arguments, dry, batches, gib << 30);
            int amount = plan.Recomputation.Amount;
            TestContext.Out.WriteLine($"{plan}");
            Assert.That(plan.Parts.Total, Is.LessThanOrEqualTo(gib << 30));
            Assert.That(amount, Is.Positive);
            dry.Recomputation.Amount = amount - 1;
            long less = batches.Max(b => dry.Train(b.Batches));
            Assert.That(dry.Parts(less).Total, Is.GreaterThan(gib << 30), "one less fits too");
            dry.Recomputation.Amount = 0;
        }

        var none = Assert.Throws<RunException>(
            () => MemoryPlan.Make(arguments, dry, batches, 15L << 30))!;
        Assert.That(none.Message, Does.StartWith("out of memory: the run takes 16.")
            .And.Contains("row 3 (id \"c\")").And.Contains("may take 15.0 GiB")
            .And.Contains("optim=paged_adamw_8bit").And.Not.Contains("gradient_checkpointing"));
    }

    /// <summary>
    /// A run of 22.1 GiB loses its embeddings of 1.0 to the machine before it computes anything
    /// again; where they must stay, it computes norms again.
    /// </summary>
    [TestCase(23, null, StreamedWeights.False, 0)]
    [TestCase(21, null, StreamedWeights.Embeddings, 0)]
    [TestCase(21, StreamedWeights.False, StreamedWeights.False, 1)]
    [TestCase(20, null, StreamedWeights.Embeddings, 1)]
    public void EmbeddingsGoBeforeAnythingIsComputedAgain(
        int gib, StreamedWeights? given, StreamedWeights picked, int recomputes)
    {
        TrainArguments arguments = RealModel.Lora with
        {
            DataPath = Rows(),
            OfficialCompat = false,
            StreamWeights = given,
        };
        PlannedModel model = RealModel.Planned(_folder, arguments);
        var rows = DataRows.Open(arguments.DataPath!, arguments, model.Spec.Rows(), _ => { });
        MemoryPlan plan = MemoryPlan.Make(arguments, model, RealModel.Card, rows, null,
            new StepPlan(arguments, rows.Count), (long)gib << 30);
        TestContext.Out.WriteLine(plan);
        Assert.That(plan.Of(arguments).StreamWeights, Is.EqualTo(picked));
        Assert.That(Math.Sign(plan.Recomputation.Amount), Is.EqualTo(recomputes));
        Assert.That(plan.Kept, Is.EqualTo(
            picked == StreamedWeights.Embeddings ? 2L * 151_666 * 3584 : 0));
        Assert.That(plan.Parts.Total, Is.LessThanOrEqualTo((long)gib << 30));
    }

    [TestCase("H100", 0, "fits into H100")]
    [TestCase("24GB", 0, "fits into a card of 24GB like the RTX-4090")]
    [TestCase("16GB", 0, "and embeddings (stream_weights)")]
    [TestCase("12GB", 0, "of frozen layers, which pass through two buffers")]
    [TestCase("2GB", 1, "does NOT fit into a card of 2GB like the RTX-3060")]
    public void APlanNeedsNeitherGpuNorWeights(string gpu, int code, string verdict)
    {
        TrainArguments arguments =
            RealModel.Lora with { DataPath = Rows(), OfficialCompat = false };
        Dry(arguments).Dispose();
        using var output = new StringWriter();
        using var error = new StringWriter();
        int got = new CommandLine(output, error, new Runners()).Run(
        [
            "plan", "--model_name_or_path", _folder, "--data_path", arguments.DataPath!,
            "--use_lora", "--tune_llm", "false", "--modules_to_save", "[]", "--bf16",
            "--per_device_train_batch_size", "1", "--gpu", gpu,
        ]);
        TestContext.Out.WriteLine(output);
        Assert.That(got, Is.EqualTo(code), $"{error}");
        Assert.That($"{output}", Does.Contain(verdict).And.Contains("row 3 (id \"c\")")
            .And.Contains(
                gpu is "12GB" or "2GB" ? "optim=paged_adamw_8bit" : "stream_weights=true")
            .And.Contains("estimate, no less than"));
    }

    /// <summary>
    /// The floor of a step of one row of 2,048 tokens, added up by hand from the peaks of an H100:
    /// 66 ms of frozen products, 6.5 of attention, 5 of the vocabulary, some 15 of the rest.
    /// </summary>
    [Test]
    public void TheTimeOfAStepIsThatOfItsParts()
    {
        using DryRun dry = Dry(RealModel.Lora);
        Batch batch = RealModel.Row(2048);
        var work = new StepWork(3.02e12, 785e12);
        work.Begin(batch);
        dry.Watch = work;
        dry.Train(batch);
        Assert.That(work.Seconds, Is.EqualTo(0.093).Within(0.009));
    }

    /// <summary>A picture that has grown since the rows were checked.</summary>
    [Test]
    public void OutOfMemoryInAStepNamesItsRowsAndKeepsWhatWasTrained()
    {
        using var gpu = new CudaUnderTest();
        string picture = Path.Combine(_folder, "picture.png"),
            rows = Path.Combine(_folder, "r.json");
        File.Copy(Picture("test/0000.png"), picture);
        object[] pair =
        [
            new { id = "one", conversations = Turns("") },
            new { id = "two", image = picture, conversations = Turns("<image>\n") },
        ];
        File.WriteAllText(rows, System.Text.Json.JsonSerializer.Serialize(pair));
        var arguments = new TrainArguments
        {
            ModelNameOrPath = Path.GetFullPath(Picture("../model")),
            DataPath = rows,
            OutputDir = Path.Combine(_folder, "out"),
            Bf16 = true,
            UseLora = true,
            TuneLlm = false,
            ModulesToSave = [],
            PerDeviceTrainBatchSize = 1,
            MaxSteps = 2,
            TrainSamplingStrategy = SamplingStrategy.Sequential,
            DataloaderNumWorkers = 1,
            ReportTo = ReportTo.None,
            Device = DeviceChoice.Cuda,
        };
        var log = new Grows(() => Enlarge(picture));
        var failure = Assert.Throws<RunException>(
            () => TrainRun.Run(arguments, log, new StopRequest(), gpu.Devices))!;
        Assert.That(failure.Message, Does.StartWith("step 2, row 2 (id \"two\"): out of memory: ")
            .And.Contains("open are").And.Contains("max_slice_nums"));
        Assert.That(log.Lines, Has.Some.StartsWith("GPU memory: ")
            .And.Some.EqualTo("failed after step 1; go on with --resume_from_checkpoint true"));
        Assert.That(File.Exists(Path.Combine(
            arguments.OutputDir, "checkpoint-1", "adapter_model.safetensors")));

        static object[] Turns(string before) =>
        [
            new { role = "user", content = before + "What is this?" },
            new { role = "assistant", content = "A test." },
        ];
    }

    private static string Picture(string name) => Path.Combine(
        Path.GetDirectoryName(Path.GetDirectoryName(ReferenceFile.Root))!, "examples", "pictures",
        name);

    // Twenty times as large either way: a BMP of 24 bits, whatever its name says.
    private static void Enlarge(string picture)
    {
        const int Side = 1120, Header = 54;
        var bytes = new byte[Header + (3 * Side * Side)];
        (bytes[0], bytes[1]) = ((byte)'B', (byte)'M');
        BitConverter.TryWriteBytes(bytes.AsSpan(2), bytes.Length);
        BitConverter.TryWriteBytes(bytes.AsSpan(10), Header);
        BitConverter.TryWriteBytes(bytes.AsSpan(14), 40);
        BitConverter.TryWriteBytes(bytes.AsSpan(18), Side);
        BitConverter.TryWriteBytes(bytes.AsSpan(22), Side);
        BitConverter.TryWriteBytes(bytes.AsSpan(26), (1 << 0) | (24 << 16));
        File.WriteAllBytes(picture, bytes);
    }

    // Does something when the rows have been checked.
    private sealed class Grows(Action grow) : ITrainLog
    {
        public List<string> Lines { get; } = [];

        public void Start(RunReport run) => grow();

        public void Message(string line) => Lines.Add(line);

        public void Step(in StepReport report)
        {
        }

        public void Skipped(in StepReport report, string what)
        {
        }

        public void Evaluation(in EvaluationReport report)
        {
        }

        public bool HasEvaluation(int step) => false;

        public (int Step, double Value)? Best => null;

        public void SaveState(string folder, int step)
        {
        }

        public void Saved(string folder)
        {
        }

        public void End(int step, StopReason reason)
        {
        }

        public void Dispose()
        {
        }
    }

    // The second row is mostly supervised, the third the longest.
    private string Rows()
    {
        static object Row(string id, int asked, int answered) => new
        {
            id,
            conversations = new[]
            {
                new { role = "user", content = new string('x', asked) },
                new { role = "assistant", content = new string('y', answered) },
            },
        };
        string file = Path.Combine(_folder, "rows.json");
        File.WriteAllText(file, System.Text.Json.JsonSerializer.Serialize(
            new[] { Row("a", 100, 100), Row("b", 10, 900), Row("c", 1500, 300) }));
        return file;
    }

    [TestCase("24GiB", 24L << 30)]
    [TestCase("24 GB", 24_000_000_000)]
    [TestCase("512MiB", 512L << 20)]
    [TestCase("0.5", 40L << 30)]
    [TestCase("25%", 20L << 30)]
    [TestCase("24", null)]
    [TestCase("0", null)]
    [TestCase("-1GiB", null)]
    [TestCase("much", null)]
    [TestCase("NaN", null)]
    public void MemoryLimitsAreReadWithTheirUnit(string text, long? bytes) =>
        Assert.That(MemoryLimit.Parse(text)?.Bytes(80L << 30), Is.EqualTo(bytes));

    private TrainArguments Arguments(string name) => (name == "full" ? V26.Full : V26.Lora with
    {
        LoraDropout = 0.1,
        LoraTargetModules = new TargetModules(name == "lora"
            ? @"llm\..*\.self_attn\.(q_proj|k_proj|v_proj)"
            : @"llm\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"),
    }) with
    { OutputDir = Path.Combine(_folder, "out") };

    private DryRun Dry(TrainArguments arguments) => RealModel.Dry(_folder, arguments);
}
