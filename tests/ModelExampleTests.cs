using MiniCpmNative.Engine.Config;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>The official scripts' settings for each model, in examples/models.</summary>
[TestFixture]
public sealed class ModelExampleTests
{
    private static readonly string s_folder = Path.GetFullPath(
        Path.Combine(ReferenceFile.Root, "..", "..", "examples", "models"));

    private static IEnumerable<string> Files =>
        Directory.GetFiles(s_folder, "*.json").Select(f => Path.GetFileName(f)!).Order();

    [TestCaseSource(nameof(Files))]
    public void EachIsReadAndIsTheOfficialScripts(string file)
    {
        var notices = new List<string>();
        TrainArguments a = TrainReader.Read([file], s_folder, notices.Add);
        bool lora = file.EndsWith("-lora.json", StringComparison.Ordinal);
        Assert.That(lora || file.EndsWith("-full.json", StringComparison.Ordinal));
        Assert.That(notices, Is.Empty);
        Assert.That((a.UseLora, a.Fp16, a.Bf16), Is.EqualTo((lora, lora, !lora)));
        Assert.That((a.TuneVision, a.TuneLlm, a.OfficialCompat), Is.EqualTo((true, false, true)));
        Assert.That(a.TrainedWhole,
            Is.EqualTo(lora ? (string[])["embed_tokens", "resampler", "vpm"] : []));
        Assert.That((a.LearningRate, a.WeightDecay, a.AdamBeta2), Is.EqualTo((1e-6, 0.1, 0.95)));
        Assert.That((a.MaxSteps, a.WarmupOf(a.MaxSteps), a.MaxSliceNums),
            Is.EqualTo((10000, 100, 9)));
        Assert.That(a.GradientAccumulationSteps * a.PerDeviceTrainBatchSize, Is.EqualTo(8));
        Assert.That((a.LrSchedulerType, a.WeightDecayScope, a.LossNormalization),
            Is.EqualTo((LrSchedule.WarmupLr, DecayScope.All, LossNormalization.MicroBatchMean)));
    }

    [Test]
    public void EachModelHasBoth() => Assert.That(
        Files.Where(f => f.EndsWith("-lora.json")).Select(f => f.Replace("-lora", "-full")),
        Is.EquivalentTo(Files.Where(f => f.EndsWith("-full.json"))).And.Not.Empty);
}
