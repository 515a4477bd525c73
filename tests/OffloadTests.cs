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
/// Training whose moments and masters lie in the machine's memory (offload_optimizer), and trained
/// layers and gradients too (offload_param): the bits of a run that is all on the GPU, whatever
/// order streams take, with micro-batches apart and together; and such a run goes on as the other.
/// </summary>
[TestFixture]
public sealed class OffloadTests
{
    private static readonly TrainArguments s_full = V26.Full with
    {
        Bf16 = true,
        Device = DeviceChoice.Cuda,
        GradientAccumulationSteps = 2,
    };

    private static readonly TrainArguments s_official = V26.Lora with
    {
        Bf16 = true,
        Device = DeviceChoice.Cuda,
        LoraDropout = 0.1,
        InitLoraWeights = new("false"),
        ModulesToSave = ["embed_tokens", "resampler", "vpm"],
        GradientAccumulationSteps = 2,
    };

    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    /// <summary>
    /// Three layers: steps of two rows, of which the second pass adds to gradients that went home
    /// or, together, is in the layer still, and of a text after which the tower's are zero.
    /// </summary>
    [TestCase("full", 1, OptimizerKind.AdamwBf16)]
    [TestCase("full", 2, OptimizerKind.Adamw8bit)]
    [TestCase("official", 1, OptimizerKind.AdamwTorch)]
    public void StepsHaveTheBitsOfAllOnTheGpu(string name, int together, OptimizerKind optim)
    {
        TrainArguments arguments = (name == "full" ? s_full : s_official) with
        {
            ModelNameOrPath = MadeModel.OfLayers(_folder, 3),
            TuneVision = name == "official",
            Optim = optim,
            GradientCheckpointing = true,
        };
        using var gpu = new CudaUnderTest();
        Steps resident = Run(gpu, arguments, together: 1);
        Steps optimizer = Run(gpu, arguments with { OffloadOptimizer = true }, together: 1);
        Steps all = Run(
            gpu, arguments with { OffloadOptimizer = true, OffloadParam = true }, together);
        foreach (Steps other in (Steps[])[optimizer, all])
        {
            Assert.That(other.Losses, Is.EqualTo(resident.Losses));
            Assert.That(other.Norms, Is.EqualTo(resident.Norms));
            Assert.That(other.Gradients, Is.EqualTo(resident.Gradients));
            Assert.That(other.Values, Is.EqualTo(resident.Values));
            Assert.That(other.States, Is.EqualTo(resident.States));
        }

        Assert.That(resident.Losses.Distinct().Count(), Is.EqualTo(resident.Losses.Count));
        Assert.That(resident.Gradients, Has.Some.Not.Zero);
        Assert.That((resident.Back, optimizer.Back), Is.EqualTo((0L, 0L)));
        Assert.That(all.Back, Is.Positive);
        Assert.That(optimizer.Held, Is.LessThan(resident.Held));
        Assert.That(all.Held, Is.LessThan(optimizer.Held));
    }

    /// <summary>Every order of work that events allow.</summary>
    [Test]
    public void NoOrderOfWorkChangesABit()
    {
        TrainArguments arguments = s_full with
        {
            ModelNameOrPath = MadeModel.OfLayers(_folder, 3),
            TuneVision = false,
            OffloadOptimizer = true,
            OffloadParam = true,
        };
        var found = new List<Steps>();
        foreach (int seed in (int[])[0, 5])
        {
            using var gpu = new CudaUnderTest(new EmulatorOptions { Seed = seed });
            found.Add(Run(gpu, arguments, together: 1));
        }

        Assert.That(found[1].Losses, Is.EqualTo(found[0].Losses));
        Assert.That(found[1].Values, Is.EqualTo(found[0].Values));
    }

    /// <summary>A checkpoint knows nothing of where its run had what.</summary>
    [TestCase(true)]
    [TestCase(false)]
    public void ARunGoesOnWhereverItsStatesLie(bool offloadsFirst)
    {
        TrainArguments arguments = V26.Lora with
        {
            Bf16 = true,
            Device = DeviceChoice.Cuda,
            ModulesToSave = ["embed_tokens"],
            DataPath = Runs.Data(_folder, "one"),
            OutputDir = Path.Combine(_folder, "out"),
            SaveSteps = new(1),
            MaxSteps = 2,
            OffloadOptimizer = offloadsFirst,
            OffloadParam = offloadsFirst,
            StreamWeights = offloadsFirst ? StreamedWeights.True : StreamedWeights.False,
        };
        using var cuda = new CudaSource();
        Runs.Train(arguments, devices: cuda.Source);
        string weights = Path.Combine(arguments.OutputDir, "adapter_model.safetensors");
        byte[] whole = File.ReadAllBytes(weights);
        Directory.Delete(RunFolder.Checkpoint(arguments.OutputDir, 2), recursive: true);
        string said = Runs.Train(arguments with
        {
            ResumeFromCheckpoint = new ResumePoint(null),
            OffloadOptimizer = !offloadsFirst,
            OffloadParam = !offloadsFirst,
            StreamWeights = offloadsFirst ? StreamedWeights.False : StreamedWeights.True,
        }, devices: cuda.Source);
        Assert.That(File.ReadAllBytes(weights), Is.EqualTo(whole));
        Assert.That(said.Contains("in the machine's memory"), Is.EqualTo(!offloadsFirst));
    }

    /// <summary>What the host does not page-lock stays on the GPU, and passes through all the same.
    /// </summary>
    [Test]
    public void WhatCannotBePageLockedStaysOnTheGpu()
    {
        var stub = new StubCuda();
        using OpenDevice opened = stub.Devices.Open(s_full with { Bf16 = false });
        var device = (CudaDevice)opened.Device;
        StubCuda.Break(stub.Driver, nameof(CudaDriverApi.MemHostAlloc), 2);
        TunedTensor[] tensors = [.. Enumerable.Range(0, 4).Select(i => new TunedTensor(
            $"w{i}", new Shape(3), DType.F32, Decays: false, Place: TunedPlace.Block))];
        var ranges = new ParameterRanges(device, tensors, offloads: true);
        Assert.That((ranges.HostBytes, device.RefusedHostBytes), Is.EqualTo((0L, ranges.Bytes
            - ranges.StateBytes)));
        Assert.That(opened.Pageable, Does.Contain("stays on the GPU"));
        var blocks = new StreamedBlock[4];
        var values = new Tensor[4];
        var gradients = new Tensor[4];
        for (int i = 0; i < blocks.Length; i++)
        {
            blocks[i] = device.BeginStreamed(0);
            values[i] = device.Visiting(ranges.Operand($"w{i}"), isGradient: false);
            gradients[i] = device.Visiting(ranges.Gradient($"w{i}"), isGradient: true);
            blocks[i].End();
        }

        for (int i = 0; i < 4; i++) ranges.Write($"w{i}", [i, 10 + i, 20 + i]);
        Assert.That(values[2].Data, Is.EqualTo(values[0].Data).And.Not.EqualTo(values[1].Data));
        device.ForgetGradients();
        var written = new HashSet<int>();
        foreach (int i in (int[])[0, 1, 2, 3, 3, 2, 1, 0, 3])
        {
            blocks[i].Acquire(backward: true);
            float[] read = device.ReadFloats(values[i]);
            Assert.That(read, Is.EqualTo([i, 10f + i, 20f + i]));
            // The first one overwrites what was another's.
            if (!written.Add(i))
                read = [.. read.Zip(device.ReadFloats(gradients[i]), (a, b) => a + b)];
            device.WriteFloats(gradients[i], read);
            blocks[i].Release();
        }

        device.BringGradientsHome();
        Assert.That(device.ReadFloats(ranges.Gradient("w3")), Is.EqualTo([9f, 39, 69]));
        Assert.That(device.ReadFloats(ranges.Value("w1")), Is.EqualTo([1f, 11, 21]));
    }

    private sealed record Steps(List<double> Losses, List<double> Norms, float[] Gradients,
        float[] Values, float[] States, long Back, long Held);

    private static Steps Run(CudaUnderTest gpu, TrainArguments arguments, int together)
    {
        using TunedModel model = TunedModel.Open(arguments, gpu.Devices);
        var trainer = new Trainer(arguments, model) { Together = together };
        Batch text = V26.Batch(arguments, "text0"), other = V26.Batch(arguments, "text1");
        List<double> losses = [], norms = [];
        var device = (CudaDevice)model.Device;
        Batch[][] steps = arguments.TuneVision
            ? [[V26.Batch(arguments, "one"), text], [other]] : [[text, other], [text]];
        for (int i = 0; i < steps.Length; i++)
        {
            StepResult result = trainer.Step(i, steps[i], 1e-2);
            losses.Add(result.Loss);
            norms.Add(result.GradientNorm);
            if (i == 0) losses.Add(StreamedWeightTests.Evaluated(model, other));
        }

        ParameterRanges ranges = model.ParameterRanges;
        return new(losses, norms, V26.AllGradients(model),
            [.. ranges.List.SelectMany(t => device.ReadFloats(ranges.Value(t.Name)))],
            [.. ranges.List.SelectMany(t => ranges.States(t.Name))
                .Where(s => s.Tensor.Type.IsFloat())
                .SelectMany(s => device.ReadFloats(s.Tensor))],
            device.StreamedBack, ranges.Bytes);
    }
}
