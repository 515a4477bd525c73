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
/// bits as with resident ones, whatever order streams and blocks take, and only the buffers'
/// memory.
/// </summary>
[TestFixture]
public sealed class StreamedWeightTests
{
    private static readonly TrainArguments s_lora = V26.Lora with
    {
        Bf16 = true,
        Device = DeviceChoice.Cuda,
        LoraDropout = 0.1,
        InitLoraWeights = new("false"),
        GradientAccumulationSteps = 2,
    };

    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void OnTheCpuItIsSaidToHaveNoEffect()
    {
        var said = new List<string>();
        DeviceSource.Default.Open(
            s_lora with { Device = DeviceChoice.Cpu, StreamWeights = StreamedWeights.Embeddings },
            said.Add).Dispose();
        Assert.That(said, Is.EqualTo(
            ["stream_weights: on the CPU weights are in the machine's memory anyway"]));
    }

    /// <summary>
    /// Steps of five decoder layers and three of the tower, with an evaluation between: of one
    /// micro-batch, or of two that go through the layers together, in the last step a picture's.
    /// </summary>
    [TestCase("lora", 10, false)]
    [TestCase("nf4", 2, true)]
    public void StepsHaveTheBitsOfResidentWeights(string name, int count, bool picture)
    {
        const int Layers = 5;
        TrainArguments arguments = s_lora with
        {
            ModelNameOrPath = MadeModel.OfLayers(_folder, Layers),
            QLora = name == "nf4",
            LlmInt8SkipModules = name == "nf4" ? ["resampler", "lm_head"] : null,
        };
        TrainArguments streams = arguments with { StreamWeights = StreamedWeights.True };
        using var gpu = new CudaUnderTest();
        Steps resident = Run(gpu, arguments, count, together: 1, picture);
        Steps streamed = Run(gpu, streams, count, together: 2, picture);
        Assert.That(streamed.Losses, Is.EqualTo(resident.Losses));
        Assert.That(streamed.Norms, Is.EqualTo(resident.Norms));
        Assert.That(streamed.Values, Is.EqualTo(resident.Values));
        Assert.That(resident.Losses, Has.Count.EqualTo(count + 1));
        Assert.That(resident.Losses.Distinct(), Has.Exactly(count + 1).Items);
        Assert.That((resident.Bytes, resident.Copied), Is.EqualTo((0L, 0L)));
        // A pass finds two layers there: three come in forward, three in backward. The first step
        // finds the last two, as an evaluation leaves them, and brings those before and the first.
        if (picture)
        {
            Steps beside = Run(gpu, arguments with { StreamWeights = StreamedWeights.Embeddings },
                count, together: 1, picture);
            Assert.That(beside.Losses, Is.EqualTo(resident.Losses));
            Assert.That(beside.Values, Is.EqualTo(resident.Values));
            Assert.That((beside.Bytes, beside.Host, resident.Host),
                Is.EqualTo((0L, streamed.Host, 0L)));
            Assert.That(beside.Host, Is.Positive);
            return;
        }

        long layer = streamed.Decoder / Layers;
        Assert.That(streamed.Copied, Is.EqualTo(layer * ((6 * count) + 2 + 3 + 2)));
    }

    /// <summary>Every order of work that events allow, one micro-batch after the other.</summary>
    [Test]
    public void NoOrderOfWorkChangesABit()
    {
        TrainArguments streams = s_lora with
        {
            ModelNameOrPath = MadeModel.OfLayers(_folder, 3),
            StreamWeights = StreamedWeights.True,
        };
        var found = new List<Steps>();
        foreach (int seed in (int[])[0, 7])
        {
            using var gpu = new CudaUnderTest(new EmulatorOptions { Seed = seed });
            found.Add(Run(gpu, streams, 1, together: 1, picture: false));
        }

        foreach (Steps steps in found)
        {
            Assert.That(steps.Losses, Is.EqualTo(found[0].Losses));
            Assert.That(steps.Values, Is.EqualTo(found[0].Values));
            Assert.That(steps.Copied, Is.Positive);
        }
    }

    /// <summary>Also what is trained whole, in the order in which gradients add up.</summary>
    [TestCase("lora", false)]
    [TestCase("lora", true)]
    [TestCase("official", true)]
    [TestCase("full", true)]
    public void MicroBatchesTogetherHaveTheBitsOfThoseApart(string name, bool checkpointing)
    {
        TrainArguments arguments = (name == "full" ? V26.Full : V26.Lora with
        {
            LoraDropout = 0.1,
            ModulesToSave = name == "lora" ? [] : ["embed_tokens", "resampler", "vpm"],
        }) with
        { GradientCheckpointing = checkpointing, GradientAccumulationSteps = 3 };
        Batch text = V26.Batch(arguments, "text0"), picture = V26.Batch(arguments, "one");
        Batch[] batches = [text, picture, V26.Batch(arguments, "text1")];
        var found = new List<(double, double, float[])>();
        foreach (int together in (int[])[1, 2, 3])
        {
            using var model = TunedModel.Open(arguments);
            var trainer = new Trainer(arguments, model) { Together = together };
            trainer.Step(0, batches, 1e-2);
            StepResult result = trainer.Step(1, batches, 1e-2);
            found.Add((result.Loss, result.GradientNorm,
                V26.AllGradients(model)));
            Assert.That(model.Device.Step.IsEmpty);
        }

        Assert.That(found[0].Item3, Has.Some.Not.Zero);
        for (int i = 1; i < found.Count; i++)
        {
            Assert.That(found[i].Item1, Is.EqualTo(found[0].Item1));
            Assert.That(found[i].Item2, Is.EqualTo(found[0].Item2));
            Assert.That(found[i].Item3, Is.EqualTo(found[0].Item3));
        }
    }

    /// <summary>
    /// MiniCPM-V-2_6 on a device that counts: two layers of the decoder and of the vision tower,
    /// the embeddings, the head, the joiner, what is trained, and a step that keeps inputs of
    /// layers.
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
            StreamWeights = StreamedWeights.True,
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

    /// <summary>
    /// Boundaries of layers are what more micro-batches take; fewer go together where that many do
    /// not fit.
    /// </summary>
    [Test]
    public void AsManyMicroBatchesGoTogetherAsFit()
    {
        const long Boundary = 28L * 2048 * 3584 * 2;
        TrainArguments arguments = RealModel.Lora with { StreamWeights = StreamedWeights.True };
        PlannedModel model = RealModel.Planned(_folder, arguments);
        Batch row = RealModel.Row(2048);
        long one, four, copiedByOne, copiedByFour;
        using (var dry = new DryRun(arguments, model, RealModel.Card))
        {
            one = dry.Train(row);
            dry.Train(row, row, row, row);
            copiedByOne = dry.StreamedSoFar;
        }

        using (var dry = new DryRun(arguments, model, RealModel.Card, together: 4))
        {
            four = dry.Train(row, row, row, row);
            dry.Train(row);
            copiedByFour = dry.StreamedSoFar;
        }

        TestContext.Out.WriteLine($"{one:N0} and {four:N0} bytes of a step; {copiedByOne:N0} "
            + $"and {copiedByFour:N0} over the bus");
        Assert.That(four - one, Is.InRange(3 * Boundary, 3 * (Boundary + (4 * 2048 * 3584 * 2))));
        // A pass finds two layers of 28 there in either direction, the first one none.
        const double Warm = 26 + 26, First = 28 + 26;
        Assert.That(copiedByOne / (double)copiedByFour,
            Is.EqualTo((First + (4 * Warm)) / (First + Warm)).Within(1e-9));
    }

    private sealed record Steps(List<double> Losses, List<double> Norms, float[] Values,
        long Bytes, long Decoder, long Copied, long Host);

    private static Steps Run(CudaUnderTest gpu, TrainArguments arguments, int steps, int together,
        bool picture)
    {
        using TunedModel model = TunedModel.Open(arguments, gpu.Devices);
        var trainer = new Trainer(arguments, model) { Together = together };
        Batch text = V26.Batch(arguments, "text0"), other = V26.Batch(arguments, "text1");
        List<double> losses = [], norms = [];
        var device = (CudaDevice)model.Device;
        for (int step = 0; step < steps; step++)
        {
            StepResult result = trainer.Step(step, !picture ? [text]
                : step == steps - 1 ? [V26.Batch(arguments, "one"), text] : [text, other], 1e-2);
            losses.Add(result.Loss);
            norms.Add(result.GradientNorm);
            if (step == 0) losses.Add(Evaluated(model, other));
        }

        return new(losses, norms, [.. model.ParameterRanges.List
            .SelectMany(t => device.ReadFloats(model.ParameterRanges.Value(t.Name)))],
            device.StreamedBytes, device.StreamedBytesOf((int)ModelPart.Decoder),
            device.StreamedSoFar, device.HostBytes);
    }

    internal static double Evaluated(TunedModel model, Batch batch)
    {
        model.Graph.Recording = false;
        float[] loss = model.Device.ReadFloats(model.Loss(batch));
        model.Graph.EndStep();
        model.Graph.Recording = true;
        return loss[0];
    }
}
