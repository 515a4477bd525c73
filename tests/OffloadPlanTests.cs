using System.Text.Json.Nodes;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// What full-size trainings take of a GPU when parts of them lie in the machine's memory, counted
/// by the run's own code, and which parts a memory_limit picks.
/// </summary>
[TestFixture]
public sealed class OffloadPlanTests
{
    private const double Gib = 1 << 30;
    private const long Parameters = 8_099_175_152, Embedding = 151666L * 3584;

    // As the official finetune_lora.sh has them, q, k, v and o, in bfloat16.
    private static readonly TrainArguments s_official = RealModel.Lora with
    {
        LoraTargetModules = new TargetModules(
            @"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)"),
        ModulesToSave = ["embed_tokens", "resampler", "vpm"],
        GradientCheckpointing = true,
    };

    private static readonly TrainArguments s_full = V26.Full with
    {
        Bf16 = true,
        GradientCheckpointing = true,
    };

    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    /// <summary>A row of 2,048 tokens with a picture of ten views.</summary>
    [Test]
    public void TheOfficialTrainablesTakeLessThanEightGib()
    {
        MemoryParts all = Count(s_official with
        {
            OffloadOptimizer = true,
            OffloadParam = true,
        }, views: 10, out long host);
        MemoryParts streamed = Count(
            s_official with { OffloadOptimizer = true, StreamWeights = StreamedWeights.True },
            views: 10, out _);
        Assert.That(all.Total / Gib, Is.LessThan(8));
        // The embeddings' values and gradients are what makes the difference, and the tower's.
        Assert.That(streamed.Total - all.Total, Is.GreaterThan(6 * Embedding));
        Assert.That(host, Is.GreaterThan((2 + 4 + 4 + 8) * Embedding));
    }

    /// <summary>All 8.1 billion: values in two bytes, gradients in four, stay on the GPU.</summary>
    [TestCase(OptimizerKind.AdamwBf16, true)]
    [TestCase(OptimizerKind.PagedAdamw8bit, false)]
    public void FullTrainingRunsOnOneCardOf80Gb(OptimizerKind optim, bool offloads)
    {
        MemoryParts parts = Count(
            s_full with { Optim = optim, OffloadOptimizer = offloads }, views: 10, out long host);
        Assert.That(parts.Trained + parts.Gradients, Is.InRange(6 * Parameters, 6.01 * Parameters));
        Assert.That(parts.Moments, Is.LessThan(1 << 20));
        Assert.That(parts.Total / Gib, Is.LessThan(70));
        Assert.That(host, Is.InRange(
            (4 + (optim == OptimizerKind.AdamwBf16 ? 4 : 2)) * Parameters, 9 * Parameters));
    }

    /// <summary>Two layers of values and gradients, the head's, what is outside of
    /// layers.</summary>
    [Test]
    public void FullTrainingWithAllOffloadedTakesLessThan24Gib()
    {
        MemoryParts parts = Count(s_full with
        {
            Optim = OptimizerKind.AdamwBf16,
            OffloadOptimizer = true,
            OffloadParam = true,
        }, views: 10, out long host);
        Assert.That(parts.Total / Gib, Is.LessThan(24));
        Assert.That(parts.Trained, Is.InRange(2 * Embedding, (2 * Embedding) + (2 * 150e6)));
        const double Layer = 3584.0 * ((2 * 3584) + (2 * 512) + (3 * 18944));
        Assert.That(parts.Weights, Is.InRange(2 * 6 * Layer, (2 * 6 * Layer) + 400e6));
        Assert.That(host, Is.InRange(13 * (Parameters - 700e6), 14 * Parameters));
    }

    /// <summary>
    /// With nothing said but a limit: what costs the least of the bus first, everything last.
    /// </summary>
    [TestCase("official", 40, false, StreamedWeights.False, false)]
    [TestCase("official", 24, true, StreamedWeights.False, false)]
    [TestCase("official", 16, true, StreamedWeights.True, false)]
    [TestCase("official", 8, true, StreamedWeights.True, true)]
    [TestCase("lora", 17, false, StreamedWeights.False, false)]
    [TestCase("lora", 15, false, StreamedWeights.Embeddings, false)]
    [TestCase("lora", 8, false, StreamedWeights.True, false)]
    [TestCase("full", 70, true, StreamedWeights.False, false)]
    [TestCase("full", 24, true, StreamedWeights.True, true)]
    public void ALimitPicksWhatLiesInTheMachine(
        string name, int gib, bool optimizer, StreamedWeights streams, bool param)
    {
        TrainArguments arguments = name switch
        {
            "full" => s_full with { Optim = OptimizerKind.AdamwBf16 },
            "lora" => RealModel.Lora,
            _ => s_official,
        };
        arguments = arguments with { DataPath = Runs.Data(_folder, "one"), OfficialCompat = false };
        PlannedModel model = RealModel.Planned(_folder, arguments);
        var rows = DataRows.Open(arguments.DataPath!, arguments, model.Spec.Rows(), _ => { });
        MemoryPlan plan = MemoryPlan.Make(arguments, model, RealModel.Card, rows, null,
            new StepPlan(arguments, rows.Count), (long)gib << 30);
        TrainArguments picked = plan.Of(arguments);
        TestContext.Out.WriteLine(plan);
        Assert.That((picked.OffloadOptimizer, picked.StreamWeights, picked.OffloadParam),
            Is.EqualTo(((bool?)optimizer, (StreamedWeights?)streams, (bool?)param)));
        Assert.That(plan.Parts.Total, Is.LessThanOrEqualTo((long)gib << 30));
        string said = plan.ToString();
        Assert.That(said.Contains("offload_optimizer"), Is.EqualTo(optimizer));
        Assert.That(said.Contains("offload_param"), Is.EqualTo(param));
        Assert.That(said.Contains("stream_weights"),
            Is.EqualTo(streams != StreamedWeights.False && name != "full"));
    }

    /// <summary>
    /// The 35 billion of MiniCPM-V-4_7's mixture of experts in the library's default sizes: experts
    /// stream with their layers, two of which the GPU holds.
    /// </summary>
    [Test]
    public void ExpertsAreStreamedWithTheirLayers()
    {
        TrainArguments arguments = V47Experts.Lora with
        {
            Bf16 = true,
            StreamWeights = StreamedWeights.True,
        };
        ModelSpec spec = V47Experts.Large(_folder);
        TunedParts parts = TunedParts.Choose(
            spec, arguments, TunedParts.AdapterOf(arguments, spec), DType.BF16);
        using var dry = new DryRun(
            arguments, new PlannedModel(spec, parts, _ => DType.BF16), RealModel.Card);
        MemoryParts taken = dry.Parts(dry.Train(RealModel.Row(2048)));
        TestContext.Out.WriteLine($"{taken}: {taken.Total / Gib:0.00} GiB of the GPU, "
            + $"{dry.StreamedBytes / Gib:0.00} streamed, {dry.HostBytes / Gib:0.00} beside");
        const double Experts = 256.0 * 3 * 2048 * 512;
        Assert.That(dry.StreamedBytes / (40 * 2 * Experts), Is.InRange(1, 1.1));
        Assert.That(dry.HostBytes, Is.EqualTo(2L * 248094 * 2048));
        Assert.That(taken.Weights,
            Is.LessThan((2 * 2 * Experts) * 1.1 + (2.0 * 248094 * 2048) + 2e9));
        Assert.That(taken.Total / Gib, Is.LessThan(9));
    }

    private MemoryParts Count(TrainArguments arguments, int views, out long host)
    {
        using DryRun dry = RealModel.Dry(_folder, arguments);
        MemoryParts parts = dry.Parts(dry.Train(RealModel.Row(2048, views)));
        host = dry.HostBytes;
        TestContext.Out.WriteLine($"{parts}, {dry.Fullest}: {parts.Total / Gib:0.00} GiB; in the "
            + $"machine {dry.StreamedBytes / Gib:0.00} GiB streamed, {host / Gib:0.00} beside");
        return parts;
    }
}
