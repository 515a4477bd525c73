using System.Text.Json;
using MiniCpmNative.Cli;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Whole runs of `cpmx train` on reference models of families, against their released code with the
/// Trainer's parameter groups and PEFT's files.
/// </summary>
[TestFixture("v2")]
[TestFixture("l3")]
public sealed class FamilyTrainTests(string name)
{
    private readonly FamilyCase _family = FamilyCase.Of(name);
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [TestCase("lora_only")]
    [TestCase("full")]
    public void TenStepsAreEqual(string name)
    {
        var expected = _family.Json("training.json").GetProperty(name);
        TrainArguments arguments = TenSteps(name == "full" ? _family.Full : _family.Lora with
        {
            LoraWeightPath = Path.Combine(_family.Folder, "adapter_init"),
        });
        AssertDecays(arguments, expected);
        Runs.Train(arguments);
        JsonElement[] steps = [.. expected.GetProperty("steps").EnumerateArray()];
        JsonElement[] log =
            [.. Runs.History(arguments).Where(e => e.TryGetProperty("loss", out _))];
        Assert.That(log, Has.Length.EqualTo(steps.Length).And.Length.EqualTo(10));
        double loss = 0, norm = 0;
        for (int i = 0; i < steps.Length; i++)
        {
            Assert.That(log[i].GetProperty("learning_rate").GetDouble(),
                Is.EqualTo(steps[i].GetProperty("lr").GetDouble()).Within(1e-12));
            loss = Math.Max(loss, Error(log[i], "loss", steps[i], "loss"));
            // PyTorch adds the squares up in F32; in F64 the norm is right.
            norm = Math.Max(norm, Error(log[i], "grad_norm", steps[i], "grad_norm_f64_run"));
        }

        TestContext.Out.WriteLine($"worst loss {loss:E2}, norm {norm:E2}");
        Assert.That(Math.Max(loss, norm), Is.LessThan(1e-4));
        AssertFinal(arguments, expected.GetProperty("final"));
        if (name == "lora_only") AssertFinalAdapter(arguments);
    }

    [Test]
    public void AdaptersAreWrittenAsPeftWritesThemAndReadBack()
    {
        TrainArguments arguments = TenSteps(_family.Lora with { ModulesToSave = null }) with
        {
            MaxSteps = 3,
        };
        Runs.Train(arguments);
        using (var written = SafetensorsFile.Open(
            Path.Combine(arguments.OutputDir, AdapterFile.WeightsName)))
        {
            var gradients =
                _family.Results.GetProperty("lora_official").GetProperty("gradients");
            Assert.That(written.Tensors.Select(t => $"{t.Name} {t.Shape}"),
                Is.EquivalentTo(gradients.EnumerateObject().Select(p => $"{p.Name} "
                    + $"[{string.Join(", ", ReferenceText.Ints(p.Value.GetProperty("shape")))}]")));
        }

        AssertLossFell(arguments with { LoraWeightPath = arguments.OutputDir }, arguments);
    }

    [Test]
    public void TheSavedModelHasTheFamilysOwnLayout()
    {
        TrainArguments arguments = TenSteps(_family.Full) with { MaxSteps = 3 };
        Runs.Train(arguments);
        using (Checkpoint before = Checkpoint.Open(_family.Model),
            after = Checkpoint.Open(arguments.OutputDir))
        {
            Assert.That(after.Tensors.Select(t => $"{t.Name} {t.Shape}"),
                Is.EquivalentTo(before.Tensors.Select(t => $"{t.Name} {t.Shape}")));
            foreach (var parameter in _family.Spec.Parameters.All.Where(p => p.Fixed))
                Assert.That(after.Get(parameter.Name).ToFloats(),
                    Is.EqualTo(before.Get(parameter.Name).ToFloats()), parameter.Name);
        }

        foreach (string path in Directory.GetFiles(_family.Model))
        {
            string file = Path.GetFileName(path);
            // These two say what the run trained with.
            if (file is "config.json" or "preprocessor_config.json" or Checkpoint.SingleFile)
                continue;
            Assert.That(File.ReadAllBytes(Path.Combine(arguments.OutputDir, file)),
                Is.EqualTo(File.ReadAllBytes(path)), file);
        }

        Assert.That(File.Exists(Path.Combine(arguments.OutputDir, "preprocessor_config.json")),
            Is.EqualTo(File.Exists(Path.Combine(_family.Model, "preprocessor_config.json"))));
        Assert.That(ModelSpec.Read(arguments.OutputDir).Slicing,
            Is.EqualTo(_family.Spec.Slicing));
        AssertLossFell(arguments with { ModelNameOrPath = arguments.OutputDir }, arguments);
    }

    [TestCase("lora")]
    [TestCase("full")]
    public void ARunGoesOnBitForBit(string kind)
    {
        TrainArguments arguments = TenSteps(kind == "full"
            ? _family.Full with { Bf16 = true }
            : _family.Lora with { ModulesToSave = null, LoraDropout = 0.2 }) with
        {
            MaxSteps = 4,
            SaveSteps = new Interval(2),
            Threads = 1,
        };
        Runs.Train(arguments);
        TrainArguments resumed = arguments with
        {
            OutputDir = Path.Combine(_folder, "resumed"),
            ResumeFromCheckpoint =
                new ResumePoint(RunFolder.Checkpoint(arguments.OutputDir, 2)),
            Threads = 2,
        };
        Runs.Train(resumed);
        string[] files = Directory.GetFiles(RunFolder.Checkpoint(arguments.OutputDir, 4),
            "*.safetensors");
        Assert.That(files, Has.Length.EqualTo(2));
        foreach (string file in files)
            Assert.That(File.ReadAllBytes(file).AsSpan().SequenceEqual(File.ReadAllBytes(
                Path.Combine(RunFolder.Checkpoint(resumed.OutputDir, 4), Path.GetFileName(file)))),
                Is.True, file);
    }

    [Test]
    public void TheCommandsTakeTheModel()
    {
        string rows = _family.Data(_folder, "one", "sliced", "text");
        string trace = Path.Combine(_folder, "trace.safetensors");
        string[] model = ["--model_name_or_path", _family.Model, "--data_path", rows];
        string said = Run(["data", "check", .. model]);
        Assert.That(said, Does.Contain(": 3 rows, 0 bad"));
        Run(["trace", "--rows", "one,2", "--out", trace, "--gradients", .. model]);
        using var file = SafetensorsFile.Open(trace);
        Assert.That(file.Tensors.Select(t => t.Name), Is.SupersetOf(
            _family.Json("activations.json").EnumerateObject().Select(p => p.Name)));
        Assert.That(file.Tensors.Select(t => t.Name), Is.SupersetOf(
            _family.Spec.Parameters.All.Where(p => !p.Fixed).Select(p => "grad." + p.Name)));
    }

    private static string Run(string[] arguments)
    {
        var (output, error) = (new StringWriter(), new StringWriter());
        int code = new CommandLine(output, error, new Runners()).Run(arguments);
        Assert.That(code, Is.Zero, error.ToString());
        return output.ToString();
    }

    // Rows in turn, as the reference's loop takes them.
    private TrainArguments TenSteps(TrainArguments arguments) => arguments with
    {
        DataPath = _family.Data(_folder, [.. _family.Json("training.json").GetProperty("rows")
            .EnumerateArray().Select(r => r.GetString()!)]),
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

    private static void AssertDecays(TrainArguments arguments, JsonElement expected)
    {
        using var model = TunedModel.Open(arguments);
        foreach (bool decays in (bool[])[false, true])
            Assert.That(
                model.ParameterRanges.List.Where(t => t.Decays == decays).Select(t => t.Name),
                Is.EquivalentTo(expected.GetProperty(decays ? "weight_decay" : "no_weight_decay")
                    .EnumerateArray().Select(n => V26.Name(n.GetString()!))));
    }

    private static void AssertFinal(TrainArguments arguments, JsonElement final)
    {
        using var files = SafetensorsFile.Open(Path.Combine(arguments.OutputDir,
            arguments.UseLora ? AdapterFile.WeightsName : Checkpoint.SingleFile));
        double worst = 0;
        foreach (var tensor in final.EnumerateObject())
        {
            if (FamilyCase.HasNoise(tensor.Name)) continue;
            var wanted = Fingerprint.Read(tensor.Value);
            double error = Fingerprint.Of(files.Get(tensor.Name).ToFloats(), wanted.Shape)
                .NormError(wanted);
            worst = Math.Max(worst, error);
            Assert.That(error, Is.LessThan(1e-4), tensor.Name);
        }

        TestContext.Out.WriteLine($"worst final tensor {worst:E2} of its norm");
    }

    private void AssertFinalAdapter(TrainArguments arguments)
    {
        using var files = SafetensorsFile.Open(
            Path.Combine(arguments.OutputDir, AdapterFile.WeightsName));
        var whole = ReferenceFile.Open($"{_family.Name}/lora_only_final");
        Assert.That(whole.Names.Count(), Is.EqualTo(16));
        foreach (string tensor in whole.Names)
            Assert.That(V26.NormError(files.Get(tensor).ToFloats(), whole.Doubles(tensor)),
                Is.LessThan(1e-4), tensor);
    }

    // What a run has left is read again, and has learned.
    private void AssertLossFell(TrainArguments after, TrainArguments before)
    {
        double Loss(TrainArguments arguments)
        {
            using var model = TunedModel.Open(arguments);
            return Trace.Run(model, _family.Batch(_family.Full, "one"), gradients: false)
                .Floats["loss"].Values[0];
        }

        Assert.That(Loss(after), Is.LessThan(Loss(before) - 0.01));
    }

    private static double Error(JsonElement got, string name, JsonElement expected, string wanted)
    {
        double value = expected.GetProperty(wanted).GetDouble();
        return Math.Abs(got.GetProperty(name).GetDouble() - value) / value;
    }
}
