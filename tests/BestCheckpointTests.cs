using System.Text.Json;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Train;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>load_best_model_at_end: which checkpoint the result is, and that it is kept.</summary>
[TestFixture]
public sealed class BestCheckpointTests
{
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    // The rows are those trained on: their loss falls, so the highest is the first checkpoint's.
    [TestCase(null, null, 3)]
    [TestCase("eval_loss", true, 1)]
    public void TheResultIsTheBestCheckpoint(string? metric, bool? greater, int best)
    {
        string data = Runs.Data(_folder, "one");
        var arguments = V26.Lora with
        {
            DataPath = data,
            EvalDataPath = data,
            OutputDir = Path.Combine(_folder, "run"),
            MaxSteps = 3,
            LearningRate = 1e-3,
            EvalStrategy = When.Steps,
            EvalSteps = new Interval(1),
            SaveSteps = new Interval(1),
            SaveTotalLimit = 1,
            LoadBestModelAtEnd = true,
            MetricForBestModel = metric,
            GreaterIsBetter = greater,
        };
        Runs.Train(arguments);
        double[] losses = [.. Runs.History(arguments)
            .Where(entry => entry.TryGetProperty("eval_loss", out _))
            .Select(entry => entry.GetProperty("eval_loss").GetDouble())];
        Assert.That(losses, Is.Ordered.Descending.And.Length.EqualTo(3));
        Assert.That(RunFolder.Checkpoints(arguments.OutputDir).Select(c => c.Step),
            Is.EqualTo(best == 3 ? [3] : new[] { best, 3 }), "the best one is kept beside the "
                + "newest");
        string Adapter(string folder) => Path.Combine(folder, "adapter_model.safetensors");
        string folder = RunFolder.Checkpoint(arguments.OutputDir, best);
        Assert.That(File.ReadAllBytes(Adapter(arguments.OutputDir)),
            Is.EqualTo(File.ReadAllBytes(Adapter(folder))));
        using var state = JsonDocument.Parse(
            File.ReadAllBytes(Path.Combine(arguments.OutputDir, "trainer_state.json")));
        Assert.That(state.RootElement.GetProperty("best_global_step").GetInt32(), Is.EqualTo(best));
        Assert.That(state.RootElement.GetProperty("best_metric").GetDouble(),
            Is.EqualTo(losses[best - 1]));
        Assert.That(state.RootElement.GetProperty("best_model_checkpoint").GetString(),
            Is.EqualTo(folder));
    }

    [Test]
    public void ARunThatGoesOnKnowsTheBestCheckpoint()
    {
        string data = Runs.Data(_folder, "one");
        var arguments = V26.Lora with
        {
            DataPath = data,
            EvalDataPath = data,
            OutputDir = Path.Combine(_folder, "run"),
            MaxSteps = 1,
            LearningRate = 1e-3,
            LrSchedulerType = LrSchedule.Constant,
            EvalStrategy = When.Steps,
            EvalSteps = new Interval(1),
            SaveSteps = new Interval(1),
            LoadBestModelAtEnd = true,
            MetricForBestModel = "loss",
            GreaterIsBetter = true,
        };
        Runs.Train(arguments);
        Runs.Train(arguments with { MaxSteps = 2, ResumeFromCheckpoint = new ResumePoint(null) });
        string Adapter(string folder) => Path.Combine(folder, "adapter_model.safetensors");
        Assert.That(File.ReadAllBytes(Adapter(arguments.OutputDir)),
            Is.EqualTo(File.ReadAllBytes(Adapter(RunFolder.Checkpoint(arguments.OutputDir, 1))))
            .And.Not.EqualTo(
                File.ReadAllBytes(Adapter(RunFolder.Checkpoint(arguments.OutputDir, 2)))));
    }
}
