using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Training with frozen layers in host memory, which pass through two buffers of the GPU: the same
/// bits as with resident ones, whatever order streams and blocks take, and only the buffers' memory.
/// </summary>
[TestFixture]
public sealed class StreamedWeightTests
{
    private static readonly TrainArguments s_lora = V26.Lora with
    {
        Bf16 = true,
        Device = DeviceChoice.Cuda,
        GradientCheckpointing = true,
        LoraDropout = 0.1,
        GradientAccumulationSteps = 2,
    };

    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    /// <summary>Ten steps, two of them of a micro-batch with a picture, and an evaluation between.
    /// </summary>
    [TestCase("lora")]
    [TestCase("nf4")]
    public void TenStepsHaveTheBitsOfResidentWeights(string name)
    {
        TrainArguments arguments = s_lora with
        {
            QLora = name == "nf4",
            LlmInt8SkipModules = name == "nf4" ? ["resampler", "lm_head"] : null,
        };
        Steps resident = Run(arguments), streamed = Run(arguments with { StreamWeights = true });
        // Every order that events allow.
        Steps shuffled = Run(
            arguments with { StreamWeights = true }, new EmulatorOptions { Seed = 7 }, steps: 3);
        Assert.That(streamed.Losses, Is.EqualTo(resident.Losses));
        Assert.That(streamed.Norms, Is.EqualTo(resident.Norms));
        Assert.That(streamed.Values, Is.EqualTo(resident.Values));
        Assert.That(shuffled.Losses, Is.EqualTo(resident.Losses.Take(shuffled.Losses.Count)));
        Assert.That(resident.Losses, Has.Count.EqualTo(11));
        Assert.That(resident.Values, Has.Some.Not.Zero);
        Assert.That(resident.Streamed, Is.Zero);
        Assert.That(streamed.Streamed, Is.Positive);
    }

    /// <summary>
    /// MiniCPM-V-2_6 on a device that counts: two layers of the decoder and of the vision tower, the
    /// embeddings, the head, the joiner, what is trained, and a step that keeps inputs of layers.
    /// </summary>
    [TestCase(false, 4.9)]
    [TestCase(true, 4.0)]
    public void TheRealModelTakesTwoLayers(bool quantised, double most)
    {
        const double Gib = 1 << 30;
        TrainArguments arguments = RealModel.Lora with
        {
            QLora = quantised,
            LlmInt8SkipModules = quantised ? ["resampler", "lm_head"] : null,
            StreamWeights = true,
        };
        using DryRun dry = RealModel.Dry(_folder, arguments);
        MemoryParts parts = dry.Parts(dry.Train(RealModel.Row(2048)));
        TestContext.Out.WriteLine($"{parts}, {dry.Fullest}; {parts.Total / Gib:0.00} GiB and "
            + $"{dry.StreamedBytes / Gib:0.00} GiB in host memory");
        const double Layer = 3584.0 * ((2 * 3584) + (2 * 512) + (3 * 18944));
        const double Vision = 1152.0 * ((4 * 1152) + (2 * 4304));
        double each = quantised ? 4.127 / 8 : 2;
        Assert.That(dry.StreamedBytes, Is.InRange(
            each * ((28 * Layer) + (27 * Vision)), 1.01 * each * ((28 * Layer) + (27 * Vision))));
        const double Outside = 2.0 * ((2 * 151666 * 3584) + 110e6);
        Assert.That(parts.Weights, Is.LessThan(
            Outside + (2 * each * (Layer + Vision)) + (4 * (4 << 20))));
        Assert.That(parts.Total / Gib, Is.LessThan(most));
    }

    private sealed record Steps(
        List<double> Losses, List<double> Norms, float[] Values, long Streamed);

    private static Steps Run(
        TrainArguments arguments, EmulatorOptions? options = null, int steps = 10)
    {
        using var gpu = new CudaUnderTest(options);
        using TunedModel model = TunedModel.Open(arguments, Devices(gpu));
        using (var adapter = AdapterFile.Open(V26.Adapter("random_lora_only")))
            model.CopyFrom(adapter);
        var trainer = new Trainer(arguments, model);
        Batch text = V26.Batch(arguments, "text0"), other = V26.Batch(arguments, "text1");
        Batch picture = V26.Batch(arguments, "one");
        List<double> losses = [], norms = [];
        for (int step = 0; step < steps; step++)
        {
            StepResult result = trainer.Step(
                step, step is 1 ? [text, picture] : [text, other], 1e-3);
            losses.Add(result.Loss);
            norms.Add(result.GradientNorm);
            if (step == 4) losses.Add(Evaluated(model, other));
        }

        var device = (CudaDevice)model.Device;
        return new(losses, norms, model.ParameterRanges.List
            .SelectMany(t => device.ReadFloats(model.ParameterRanges.Value(t.Name))).ToArray(),
            device.StreamedBytes);
    }

    private static double Evaluated(TunedModel model, Batch batch)
    {
        model.Graph.Recording = false;
        float[] loss = model.Device.ReadFloats(model.Loss(batch));
        model.Graph.EndStep();
        model.Graph.Recording = true;
        return loss[0];
    }

    private static DeviceSource Devices(CudaUnderTest gpu) => new()
    {
        Cuda = () => new(
            gpu.Context.Api.Driver, CudaTools.Compiler(DeviceCompiler.Nvrtc),
            gpu.Context.Api.Cublas),
        Cache = CudaUnderTest.Cache,
    };
}
