using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Weights of 4 bits that are unpacked once where memory allows, with the same bits, and what that
/// saves: for the second forward and the gradients of a layer that runs again in backward, or for
/// the whole run.
/// </summary>
[TestFixture]
public sealed class UnpackedOnceTests
{
    private const long Width = 3584, Inner = 18944, Keys = 512, Layers = 28;

    // Of a layer, down's not, whose product no second forward needs.
    private const long Again = Width * ((2 * Width) + (2 * Keys) + (2 * Inner));
    private const long Down = Width * Inner;

    // Bytes that an H100 was measured to copy in a second, read and written.
    private const double Rate = 3.02e12;

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
            StreamWeights = streams ? StreamedWeights.True : StreamedWeights.False,
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

        // The first step fills the room, of all or of nearly half of them, from the last layer on.
        long each = device.UnpackedWanted / 2;
        foreach (var (room, first, later) in ((long, int, int)[])[
            (2 * each, (2 * 7) + (2 * 7), 0), (each, (2 * 7) + 7 + 6 + 1, 7 + 6 + 1)])
        {
            device.HoldUnpacked(room);
            foreach (int launches in (int[])[first, later])
            {
                gpu.Emulator?.ClearLaunches();
                StepResult result = trainer.Step(3, [batch], learningRate: 0);
                found.Add((result.Loss, V26.AllGradients(model)));
                if (gpu.Emulator is { } emulator)
                    Assert.That(emulator.Launches.Count(l => l.Kernel == "unpack_4bit"),
                        Is.EqualTo(launches), $"{room} bytes");
            }
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
    /// A memory_limit says what a run may take, so that what it leaves holds unpacked weights: all
    /// of them above 20 GiB. Counted as below, each of two unpackings a step that a held number
    /// needs no more saves its bytes.
    /// </summary>
    [TestCase(0, 24, 0, 0.912)]
    [TestCase(8, 24, 0.05, 0.916)]
    [TestCase(10, 24, 0.2, 0.931)]
    [TestCase(21, 24, 1, 0.999)]
    [TestCase(21, 16, 0.6, 0.96)]
    public void WhatALimitLeavesHoldsThemUnpacked(int limit, int free, double share, double least)
    {
        TrainArguments arguments = s_real with
        {
            MemoryLimit = limit == 0 ? null : MemoryLimit.Parse($"{limit}GiB"),
        };
        using DryRun dry = RealModel.Dry(_folder, arguments);
        PlannedBatches.Planned[] rows = [new([RealModel.Row(2048)], true, default, "the row")];
        long allowed = (long)(limit == 0 ? free : Math.Min(limit, free)) << 30;
        MemoryPlan plan = MemoryPlan.Make(arguments, dry, rows, allowed);
        TestContext.Out.WriteLine(plan);
        const long All = 2 * Layers * (Again + Down);
        Assert.That(plan.Parts.Total, Is.LessThanOrEqualTo(allowed));
        Assert.That(plan.Held, Is.InRange(share * All, Math.Min(1, share + 0.15) * All));
        Assert.That(plan.Unpacked, share < 1 ? Is.EqualTo(2 * Again) : Is.Zero);
        Assert.That($"{plan}".Contains("stay unpacked"), Is.EqualTo(share > 0));
        if (share < 1 && limit > 0)
            Assert.That(allowed - plan.Parts.Total, Is.LessThan(2 * Down), "one more fits");

        double four = Seconds(dry), held = plan.Held / (double)All;
        using DryRun dense = RealModel.Dry(
            _folder, s_real with { QLora = false, LlmInt8SkipModules = null });
        double times = 2 * (1 - held) * (Again + Down);
        double other = Seconds(dense);
        Assert.That(four - other,
            Is.EqualTo(Layers * times * (2 + (4.127 / 8)) / Rate).Within(0.0005));
        Assert.That(other / four, Is.InRange(least, least + 0.035));
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
            return UnpackedOnceTests.Seconds(dry, tokens);
        }
    }

    // Of a step after the first.
    private static double Seconds(DryRun dry, int tokens = 2048)
    {
        Batch batch = RealModel.Row(tokens);
        dry.Train(batch);
        var work = new StepWork(Rate, 785e12);
        work.Begin(batch);
        dry.Watch = work;
        dry.Train(batch);
        dry.Watch = null;
        return work.Seconds;
    }
}
