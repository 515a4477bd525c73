using System.Text.Json;
using System.Text.Json.Nodes;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Whole training runs on the GPU, the emulated one or a real one (CPMX_TEST_GPU=1), against the
/// same runs on the CPU, which are held to PyTorch elsewhere. In F32 losses and norms may differ by
/// 1e-4, as the CPU's may from PyTorch's. In BF16 the GPU keeps activations in it and the CPU does
/// not: a loss may differ by 2^-7 of itself, one step of a BF16 number, the most that PyTorch,
/// whose loss is one, could tell apart.
/// </summary>
[TestFixture]
public sealed class CudaTrainTests
{
    private const double BrainStep = 1.0 / 128;

    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [TestCase("lora", false)]
    [TestCase("lora", true)]
    [TestCase("full", false)]
    [TestCase("full", true)]
    public void TenStepsAreTheCpus(string name, bool bf16)
    {
        TrainArguments arguments = Example(name) with
        {
            Bf16 = bf16,
            EvalDataPath = Rows("eval.json", first: 20, count: 2),
            EvalStrategy = When.Epoch,
        };
        IReadOnlyList<JsonElement> cpu = Log(arguments, DeviceChoice.Cpu), gpu = Log(arguments);
        Assert.That(gpu, Has.Count.EqualTo(cpu.Count).And.Count.EqualTo(10 + 1 + 1));
        double loss = 0, norm = Error("grad_norm", cpu[0], gpu[0]), evaluation = 0;
        for (int i = 0; i < cpu.Count; i++)
        {
            loss = Math.Max(loss, Error("loss", cpu[i], gpu[i]));
            evaluation = Math.Max(evaluation, Error("eval_loss", cpu[i], gpu[i]));
        }

        TestContext.Out.WriteLine($"loss {loss:E2}, norm {norm:E2}, evaluation {evaluation:E2}");
        Assert.That(loss, Is.LessThan(bf16 ? BrainStep : 1e-4), "loss");
        Assert.That(evaluation, Is.LessThan(bf16 ? BrainStep : 1e-4), "evaluation");
        // The first step's parameters are the same. This model is sure of wrong answers, and some
        // later step's norm changes by 2e-5 of itself when the learning rate does by 1e-6 of
        // itself, so that roundings show; norms of several steps, and in BF16,
        // are left to the reference model below.
        if (!bf16) Assert.That(norm, Is.LessThan(1e-4), "norm");
    }

    /// <summary>
    /// The model that PyTorch's numbers are of. Its pictures have a thousand patches, which in F32,
    /// without matrix instructions, take the emulator minutes: those are in BF16 only.
    /// </summary>
    [TestCase(true, false)]
    [TestCase(true, true)]
    [TestCase(false, false)]
    [TestCase(false, true)]
    public void TheReferenceModelIsTheCpus(bool lora, bool bf16)
    {
        TrainArguments arguments = (lora
            ? V26.Lora with { LoraDropout = 0.1, NeftuneNoiseAlpha = 5 } : V26.Full) with
        {
            Bf16 = bf16,
            GradientCheckpointing = lora,
            GradientAccumulationSteps = 2,
        };
        Batch other = V26.Batch(arguments, bf16 ? "one" : "text1");
        Batch text = V26.Batch(arguments, "text0", "text1");
        StepResult[] cpu = Steps(arguments, null), gpu;
        using (var emulated = new CudaSource()) gpu = Steps(arguments, emulated.Source);
        for (int i = 0; i < cpu.Length; i++)
        {
            double loss = Math.Abs(gpu[i].Loss - cpu[i].Loss) / cpu[i].Loss;
            double norm = Math.Abs(gpu[i].GradientNorm - cpu[i].GradientNorm) / cpu[i].GradientNorm;
            TestContext.Out.WriteLine(
                $"step {i + 1}: {cpu[i].Loss:F4}, loss {loss:E2}, norm {norm:E2}");
            Assert.That(loss, Is.LessThan(bf16 ? BrainStep : 1e-4), "loss");
            Assert.That(norm, Is.LessThan(bf16 ? BrainStep : 1e-4), "norm");
        }

        StepResult[] Steps(TrainArguments of, DeviceSource? devices)
        {
            using var model = TunedModel.Open(
                of with { Device = devices is null ? DeviceChoice.Cpu : DeviceChoice.Cuda },
                devices);
            var trainer = new Trainer(of, model);
            Batch[][] order = [[text], [other, text], [text]];
            return [.. order.Select((batches, i) => trainer.Step(i, batches, 1e-3))];
        }
    }

    /// <summary>
    /// Checkpoints, evaluations and what the hardware is free to choose leave every bit as it is.
    /// </summary>
    [Test]
    public void NoOrderOfWorkChangesABit()
    {
        TrainArguments arguments = Example("lora") with
        {
            Bf16 = true,
            Optim = OptimizerKind.AdamwBf16,
            MaxSteps = 4,
        };
        TrainArguments busy = arguments with
        {
            SaveStrategy = When.Steps,
            SaveSteps = new Interval(2),
            EvalDataPath = Rows("eval.json", first: 20, count: 2),
            EvalStrategy = When.Steps,
            EvalSteps = new Interval(1),
        };
        double[] losses = Losses(Log(arguments, seed: 1));
        byte[] adapter = Adapter(arguments.OutputDir);
        Assert.That(Losses(Log(busy, seed: 2)), Is.EqualTo(losses));
        Assert.That(Adapter(busy.OutputDir), Is.EqualTo(adapter));
        TrainArguments resumed = busy with
        {
            OutputDir = Path.Combine(_folder, "resumed"),
            ResumeFromCheckpoint = new ResumePoint(RunFolder.Checkpoint(busy.OutputDir, 2)),
        };
        Assert.That(Losses(Log(resumed, seed: 3)), Is.EqualTo(losses));
        Assert.That(Adapter(resumed.OutputDir), Is.EqualTo(adapter));

        static byte[] Adapter(string folder) =>
            File.ReadAllBytes(Path.Combine(folder, "adapter_model.safetensors"));
    }

    /// <summary>
    /// The device decides about a step before the host knows; the host learns it in time for the
    /// next one's bias corrections.
    /// </summary>
    [Test]
    public void AStepThatIsNotFiniteIsSkippedOnTheDevice()
    {
        TrainArguments arguments = Example("lora");
        Batch good = First(arguments), bad = First(arguments);
        bad.Patches.Clear();
        bad.Patches.Extend(good.Patches.Count).Fill(float.NaN);
        using var gpu = new CudaSource();
        using var model =
            TunedModel.Open(arguments with { Device = DeviceChoice.Cuda }, gpu.Source);
        using var cpu = TunedModel.Open(arguments with { Device = DeviceChoice.Cpu });
        var trainer = new Trainer(arguments, model);
        var reference = new Trainer(arguments, cpu);
        Batch[] order = [good, bad, good, bad, bad, good];
        var results = new List<StepResult>();
        for (int i = 0; i < order.Length; i++)
        {
            trainer.Queue(i, [order[i]], 1e-2);
            while (trainer.TryTake(wait: i == order.Length - 1, out StepResult result))
                results.Add(result);
        }

        for (int i = 0; i < order.Length; i++)
        {
            StepResult expected = reference.Step(i, [order[i]], 1e-2);
            Assert.That(results[i].Step, Is.EqualTo(i + 1));
            Assert.That(results[i].Skipped, Is.EqualTo(order[i] == bad));
            if (order[i] == bad) Assert.That(results[i].Loss, Is.NaN);
            else Assert.That(results[i].Loss,
                Is.EqualTo(expected.Loss).Within(1e-4 * expected.Loss));
        }

        Assert.That(results[2].Loss, Is.Not.EqualTo(results[0].Loss));
        Assert.That(trainer.Optimizer.Updates, Is.EqualTo(3));
    }

    /// <summary>The host's own work, counted where the driver does nothing.</summary>
    [TestCase(false)]
    [TestCase(true)]
    public void AWarmStepAllocatesNothing(bool lora)
    {
        TrainArguments arguments = (lora
            ? V26.Lora with { LoraDropout = 0.1, NeftuneNoiseAlpha = 5 } : V26.Full) with
        {
            Bf16 = true,
            Device = DeviceChoice.Cuda,
            GradientCheckpointing = lora,
            GradientAccumulationSteps = 2,
        };
        using CudaContext counting = CountingCuda.Context(new("counted", 8, 80, 1 << 30));
        CudaApi nothing = counting.Api;
        var devices = new DeviceSource
        {
            Cuda = () =>
                new(nothing.Driver, CudaTools.Compiler(DeviceCompiler.Nvrtc), nothing.Cublas),
            Cache = CudaUnderTest.Cache,
            Computes = false,
        };
        using var model = TunedModel.Open(arguments, devices);
        var trainer = new Trainer(arguments, model);
        Batch picture = V26.Batch(arguments, "one"), text = V26.Batch(arguments, "text0", "text1");
        Batch[][] steps = [[picture, text], [text], [text, picture], [picture]];
        var bytes = new long[steps.Length];
        Array.Fill(bytes, long.MaxValue);
        // The first round meets every shape. Of the others the best counts: the runtime allocates a
        // little for itself now and then, on whatever thread,
        // but what a step allocates it allocates every time.
        for (int round = 0; round < 4; round++)
        {
            for (int i = 0; i < steps.Length; i++)
            {
                long before = GC.GetAllocatedBytesForCurrentThread();
                trainer.Queue((round * steps.Length) + i, steps[i], 1e-5);
                while (trainer.TryTake(wait: false, out _))
                {
                }

                before = GC.GetAllocatedBytesForCurrentThread() - before;
                if (round > 0) bytes[i] = Math.Min(bytes[i], before);
            }
        }

        Assert.That(bytes, Is.All.Zero);
    }

    // The bundled example: a decoder of four layers, a vision tower of three,
    // pictures of few patches.
    private TrainArguments Example(string name) => new()
    {
        ModelNameOrPath = Path.Combine(Examples, "model"),
        DataPath = Rows("rows.json", first: 0, count: 12),
        OutputDir = Path.Combine(_folder, "out"),
        OverwriteOutputDir = true,
        UseLora = name == "lora",
        TuneLlm = name != "lora",
        LoraR = 16,
        LoraAlpha = 32,
        LoraDropout = 0.1,
        LoraTargetModules = new TargetModules(
            @"llm\..*layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"),
        GradientCheckpointing = name == "lora",
        PerDeviceTrainBatchSize = 1,
        PerDeviceEvalBatchSize = 2,
        MaxSteps = 10,
        LearningRate = name == "lora" ? 1e-3 : 1e-4,
        WeightDecay = 0.1,
        LoggingSteps = new Interval(1),
        SaveStrategy = When.No,
        ReportTo = ReportTo.None,
    };

    private static string Examples { get; } =
        Path.Combine(ReferenceFile.Root, "..", "..", "examples");

    /// <summary>Some of the example's rows, with the full paths of their pictures.</summary>
    private string Rows(string name, int first, int count)
    {
        JsonArray all =
            JsonNode.Parse(File.ReadAllBytes(Path.Combine(Examples, "train.json")))!.AsArray();
        var rows = new JsonArray();
        foreach (JsonNode? row in all.Skip(first).Take(count))
        {
            JsonNode copy = row!.DeepClone(), picture = copy["image"]!;
            if (picture.GetValueKind() == JsonValueKind.String)
                copy["image"] = Path.GetFullPath(Path.Combine(Examples, (string)picture!));
            else
                foreach (string tag in picture.AsObject().Select(p => p.Key).ToList())
                    picture[tag] = Path.GetFullPath(Path.Combine(Examples, (string)picture[tag]!));
            rows.Add(copy);
        }

        string path = Path.Combine(_folder, name);
        File.WriteAllText(path, rows.ToJsonString());
        return path;
    }

    private static Batch First(TrainArguments arguments)
    {
        string model = arguments.ModelNameOrPath!;
        var rows = DataRows.Read(
            arguments.DataPath!, arguments, ModelSpec.Read(model).Rows());
        var batch = new Batch();
        batch.Clear();
        rows.Append(0, batch);
        return batch;
    }

    private static IReadOnlyList<JsonElement> Log(
        TrainArguments arguments, DeviceChoice device = DeviceChoice.Cuda, int seed = 0)
    {
        using CudaSource? gpu = device == DeviceChoice.Cuda ? new CudaSource(seed) : null;
        Runs.Train(arguments with { Device = device }, devices: gpu?.Source);
        return Runs.History(arguments);
    }

    private static double[] Losses(IReadOnlyList<JsonElement> log) =>
        [.. log.Where(e => e.TryGetProperty("loss", out _))
            .Select(e => e.GetProperty("loss").GetDouble())];

    private static double Error(string name, JsonElement expected, JsonElement got)
    {
        if (!expected.TryGetProperty(name, out JsonElement value)) return 0;
        return Math.Abs(got.GetProperty(name).GetDouble() - value.GetDouble()) / value.GetDouble();
    }
}
