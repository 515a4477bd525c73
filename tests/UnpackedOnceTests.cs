using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Weights of 4 bits where layers run again in backward: unpacked once for the second forward and
/// the gradients where memory allows, with the same bits, and what that saves.
/// </summary>
[TestFixture]
public sealed class UnpackedOnceTests
{
    private const long Width = 3584, Inner = 18944, Keys = 512, Layers = 28;

    // Of a layer, down's not, whose product no second forward needs.
    private const long Again = Width * ((2 * Width) + (2 * Keys) + (2 * Inner));
    private const long Down = Width * Inner;

    private static readonly TrainArguments s_real = RealModel.Lora with
    {
        GradientCheckpointing = true,
        QLora = true,
        LlmInt8SkipModules = ["resampler", "lm_head"],
    };

    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    /// <summary>
    /// A decoder of two layers of seven matrices: 7 of a layer forward, all but down's again, and
    /// 7 for gradients, of which all but down's are there already. The first layer's input has no
    /// gradient, which q, k and v would give.
    /// </summary>
    [TestCase(false)]
    [TestCase(true)]
    public void TheBitsAreTheSame(bool streams)
    {
        TrainArguments arguments = V26.Lora with
        {
            Bf16 = true,
            Device = DeviceChoice.Cuda,
            QLora = true,
            LoraDropout = 0.1,
            InitLoraWeights = new("false"),
            GradientCheckpointing = true,
            StreamWeights = streams,
        };
        using var gpu = new CudaUnderTest();
        using var model = TunedModel.Open(arguments, gpu.Devices);
        var device = (CudaDevice)model.Device;
        model.Recomputation.Amount = model.Recomputation.Most;
        var trainer = new Trainer(arguments, model);
        Batch batch = V26.Batch(arguments, "text0");
        var found = new List<(double Loss, float[] Gradients)>();
        foreach (bool keeps in (bool[])[false, true, true])
        {
            device.KeepsUnpacked = keeps;
            gpu.Emulator?.ClearLaunches();
            StepResult result = trainer.Step(3, [batch], learningRate: 0);
            found.Add((result.Loss, V26.AllGradients(model)));
            if (gpu.Emulator is { } emulator)
                Assert.That(emulator.Launches.Count(l => l.Kernel == "unpack_4bit"),
                    Is.EqualTo((2 * (7 + 6)) + (keeps ? 2 : 7 + 4)));
        }

        foreach (var (loss, gradients) in found)
        {
            Assert.That(loss, Is.EqualTo(found[0].Loss));
            Assert.That(gradients, Is.EqualTo(found[0].Gradients));
        }

        Assert.That(found[0].Gradients, Has.Some.Not.Zero);
    }

    /// <summary>A limit decides; dense weights have nothing to unpack.</summary>
    [TestCase(true, 7, false)]
    [TestCase(true, 8, true)]
    [TestCase(false, 80, false)]
    public void AsMuchIsUnpackedOnceAsFits(bool quantised, int gib, bool kept)
    {
        TrainArguments arguments = s_real with
        {
            QLora = quantised,
            LlmInt8SkipModules = quantised ? s_real.LlmInt8SkipModules : null,
        };
        using DryRun dry = RealModel.Dry(_folder, arguments);
        PlannedBatches.Planned[] rows = [new([RealModel.Row(2048)], true, default, "the row")];
        MemoryPlan plan = MemoryPlan.Make(arguments, dry, rows, (long)gib << 30);
        TestContext.Out.WriteLine(plan);
        Assert.That(plan.Unpacked, Is.EqualTo(kept ? 2 * Again : 0));
        Assert.That($"{plan}".Contains("unpacked once"), Is.EqualTo(kept));
        Assert.That(plan.Parts.Total, Is.LessThanOrEqualTo((long)gib << 30));
    }

    /// <summary>
    /// What the weights cost beside dense ones, counted at an H100's measured rates: each time that
    /// they are unpacked their codes are read and two bytes written.
    /// </summary>
    [TestCase(2048, false, 0.885)]
    [TestCase(2048, true, 0.912)]
    [TestCase(8192, true, 0.975)]
    public void TheTimeIsThatOfUnpacking(int tokens, bool keeps, double least)
    {
        const double Rate = 3.02e12;
        double dense = Seconds(s_real with { QLora = false, LlmInt8SkipModules = null }, false);
        double four = Seconds(s_real, keeps);
        double times = (2 * (Again + Down)) + (keeps ? 0 : Again);
        Assert.That(four - dense,
            Is.EqualTo(Layers * times * (2 + (4.127 / 8)) / Rate).Within(4).Percent);
        Assert.That(dense / four, Is.InRange(least, least + 0.01));

        double Seconds(TrainArguments arguments, bool unpacksOnce)
        {
            using DryRun dry = RealModel.Dry(_folder, arguments);
            dry.KeepsUnpacked = unpacksOnce;
            var work = new StepWork(Rate, 785e12);
            Batch batch = RealModel.Row(tokens);
            work.Begin(batch);
            dry.Watch = work;
            dry.Train(batch);
            return work.Seconds;
        }
    }
}
