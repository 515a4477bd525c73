using System.Text.Json;
using MiniCpmNative.Cli;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Whole runs of `cpmx train` on reference models of families, against PyTorch with the official
/// loss and PEFT's files.
/// </summary>
[TestFixture("v4")]
[TestFixture("v45")]
[TestFixture("o45")]
public sealed class ReferenceTrainTests(string name)
{
    private readonly ReferenceModel _reference = ReferenceModel.Of(name);
    private string _folder = "";

    // One model's reference trains on a row after the other, the other's on case a throughout.
    private string[] Rows => name == "o45" ? _reference.CaseA : ["one", "turns", "wide"];

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void TenStepsOfAdaptersAreEqual()
    {
        var expected = _reference.Json("train/runs.json").GetProperty("lora_only");
        TrainArguments arguments = TenSteps(
            _reference.Lora with { LoraWeightPath = _reference.Adapter("initial") });
        Runs.Train(arguments);
        AssertSteps(expected, Runs.History(arguments)
            .Where(e => e.TryGetProperty("loss", out _)).Select(e => (
                e.GetProperty("learning_rate").GetDouble(), e.GetProperty("loss").GetDouble(),
                e.GetProperty("grad_norm").GetDouble())));
        using var written = SafetensorsFile.Open(
            Path.Combine(arguments.OutputDir, AdapterFile.WeightsName));
        var peft = ReferenceFile.OpenCommitted($"{name}/adapters/trained_lora_only/adapter_model");
        Assert.That(written.Tensors.Select(t => t.Name), Is.EquivalentTo(peft.Names));
        foreach (string tensor in peft.Names)
            Assert.That(
                V26.NormError(written.Get(tensor).ToFloats(), peft.Doubles(tensor)),
                Is.LessThan(1e-4), tensor);
    }

    [Test]
    public void TenStepsOfEverythingAreEqual()
    {
        var expected = _reference.Json("train/runs.json").GetProperty("full");
        TrainArguments arguments = TenSteps(_reference.Full);
        using var model = TunedModel.Open(arguments);
        string[] decay = [.. model.ParameterRanges.List.Where(t => t.Decays).Select(t => t.Name)];
        string[] without = [.. expected.GetProperty("not_decayed").EnumerateArray()
            .Select(n => n.GetString()!)];
        // The Trainer's groups, or those of a loop that exempts every norm.
        string[] exempt = [.. decay.Where(without.Contains)];
        Assert.That(exempt, Is.EquivalentTo(
            name == "o45" ? decay.Where(n => n.EndsWith("norm.weight")) : []));
        Assert.That(model.ParameterRanges.List.Where(t => !t.Decays).Select(t => t.Name),
            Is.EquivalentTo(without.Except(exempt)));

        var trainer = new Trainer(arguments, model);
        var log = new List<(double, double, double)>();
        foreach (var step in expected.GetProperty("steps").EnumerateArray())
        {
            double rate = step.GetProperty("lr").GetDouble();
            var before = exempt.ToDictionary(
                n => n, n => model.Device.ReadFloats(model.ParameterRanges.Value(n)));
            Batch batch = name == "o45" ? _reference.Batch(arguments, _reference.CaseA)
                : _reference.Batch(arguments, step.GetProperty("row").GetString()!);
            StepResult result = trainer.Step(log.Count, [batch], rate);
            log.Add((rate, result.Loss, result.GradientNorm));
            // What the decay took is given back.
            foreach (var (tensor, values) in before)
                model.ParameterRanges.Write(tensor, [.. values
                    .Zip(model.Device.ReadFloats(model.ParameterRanges.Value(tensor)), (old, now) =>
                        (float)(now + (rate * arguments.WeightDecay * old)))]);
        }

        AssertSteps(expected, log);
        double worst = 0;
        foreach (var tensor in expected.GetProperty("final").EnumerateObject())
        {
            if (FamilyCase.HasNoise(tensor.Name)) continue;
            var wanted = Fingerprint.Read(tensor.Value);
            double error = Fingerprint.Of(
                model.Device.ReadFloats(model.ParameterRanges.Value(tensor.Name)), wanted.Shape)
                .NormError(wanted);
            worst = Math.Max(worst, error);
            Assert.That(error, Is.LessThan(1e-4), tensor.Name);
        }

        TestContext.Out.WriteLine($"worst final tensor {worst:E2} of its norm");
    }

    [Test]
    public void TheSavedModelHasTheFamilysOwnLayoutAndARunGoesOnFromIt()
    {
        TrainArguments arguments = TenSteps(_reference.Full with { Bf16 = true }) with
        {
            MaxSteps = 4,
            SaveSteps = new Interval(2),
        };
        Runs.Train(arguments);
        using (Checkpoint before = Checkpoint.Open(_reference.Spec.Directory),
            after = Checkpoint.Open(arguments.OutputDir))
            Assert.That(after.Tensors.Select(t => $"{t.Name} {t.StoredType.Name} {t.SizesText}"),
                Is.EquivalentTo(
                    before.Tensors.Select(t => $"{t.Name} {t.StoredType.Name} {t.SizesText}")));
        foreach (string path in Directory.GetFiles(_reference.Spec.Directory))
        {
            string file = Path.GetFileName(path);
            if (file is "config.json" or Checkpoint.SingleFile) continue;
            Assert.That(File.ReadAllBytes(Path.Combine(arguments.OutputDir, file)),
                Is.EqualTo(File.ReadAllBytes(path)), file);
        }

        Assert.That(ModelSpec.Read(arguments.OutputDir).Family, Is.EqualTo(_reference.Spec.Family));
        Assert.That(Loss(arguments.OutputDir), Is.LessThan(Loss(_reference.Spec.Directory) - 0.1));
        TrainArguments resumed = arguments with
        {
            OutputDir = Path.Combine(_folder, "resumed"),
            ResumeFromCheckpoint = new ResumePoint(RunFolder.Checkpoint(arguments.OutputDir, 2)),
        };
        Runs.Train(resumed);
        foreach (string file in (string[])[Checkpoint.SingleFile, RunState.OptimizerFile])
            Assert.That(
                File.ReadAllBytes(Path.Combine(RunFolder.Checkpoint(resumed.OutputDir, 4), file))
                    .AsSpan().SequenceEqual(File.ReadAllBytes(
                        Path.Combine(RunFolder.Checkpoint(arguments.OutputDir, 4), file))),
                Is.True, file);
    }

    [Test]
    public void TheCommandsTakeTheModel()
    {
        string trace = Path.Combine(_folder, "trace.safetensors");
        string[] model = ["--model_name_or_path", _reference.Spec.Directory, "--data_path",
            Runs.DataOf(_reference.RowFile, _folder, Rows)];
        Assert.That(Run(["data", "check", .. model]), Does.Contain($"{Rows.Length}"));
        Run(["trace", "--rows", Rows[0], "--out", trace, "--gradients", .. model]);
        using var file = SafetensorsFile.Open(trace);
        Assert.That(file.Tensors.Select(t => t.Name), Is.SupersetOf(
            _reference.Json("forward/case_a_activations.json").EnumerateObject()
                .Select(p => p.Name)));
        Assert.That(file.Tensors.Select(t => t.Name), Is.SupersetOf(
            _reference.Spec.Parameters.All.Select(p => "grad." + p.Name)));
    }

    private static string Run(string[] arguments)
    {
        var (output, error) = (new StringWriter(), new StringWriter());
        int code = new CommandLine(output, error, new Runners()).Run(arguments);
        Assert.That(code, Is.Zero, error.ToString());
        return output.ToString();
    }

    private static void AssertSteps(
        JsonElement expected, IEnumerable<(double Rate, double Loss, double Norm)> log)
    {
        double worst = 0;
        JsonElement[] steps = [.. expected.GetProperty("steps").EnumerateArray()];
        Assert.That(log.Count(), Is.EqualTo(steps.Length).And.EqualTo(10));
        foreach (var (step, (rate, loss, norm)) in steps.Zip(log))
        {
            Assert.That(rate, Is.EqualTo(step.GetProperty("lr").GetDouble()).Within(1e-12));
            worst = Math.Max(worst, Error(loss, step.GetProperty("loss")));
            worst = Math.Max(worst, Error(norm, step.GetProperty("grad_norm")));
        }

        TestContext.Out.WriteLine($"worst loss or norm {worst:E2}");
        Assert.That(worst, Is.LessThan(1e-4));
    }

    private static double Error(double got, JsonElement expected) =>
        Math.Abs(got - expected.GetDouble()) / expected.GetDouble();

    private double Loss(string folder)
    {
        TrainArguments arguments = _reference.Full with { ModelNameOrPath = folder };
        using var model = TunedModel.Open(arguments);
        return Trace.Run(model, _reference.Batch(arguments, Rows[0]), gradients: false)
            .Floats["loss"].Values[0];
    }

    private TrainArguments TenSteps(TrainArguments arguments) => arguments with
    {
        DataPath = Runs.DataOf(_reference.RowFile, _folder, Rows),
        PerDeviceTrainBatchSize = name == "o45" ? 2 : 1,
        OutputDir = Path.Combine(_folder, "out"),
        TrainSamplingStrategy = SamplingStrategy.Sequential,
        MaxSteps = 10,
        LearningRate = 1e-3,
        LrSchedulerType = LrSchedule.Cosine,
        WarmupSteps = 2,
        AdamBeta2 = 0.95,
        WeightDecay = 0.1,
        LoggingSteps = new Interval(1),
    };
}
