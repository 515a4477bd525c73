using System.Text.Json;
using System.Text.Json.Nodes;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Whole runs of `cpmx train`, from rows and pictures to the files they leave, against PyTorch with
/// the official loss, the Hugging Face Trainer's parameter groups and PEFT's files.
/// </summary>
[TestFixture]
public sealed class TrainTests
{
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [TestCase("lora_only")]
    [TestCase("lora_official")]
    [TestCase("full")]
    [TestCase("full_decay_all")]
    [TestCase("resampler_only")]
    [TestCase("vision_and_resampler_decay_all")]
    public void TenStepsAreEqual(string name)
    {
        var expected = ReferenceText.Json("v26/train/runs.json").GetProperty(name);
        TrainArguments arguments = TenSteps(name);
        Runs.Train(arguments);

        JsonElement[] steps = [.. expected.GetProperty("steps").EnumerateArray()];
        JsonElement[] log =
            [.. Runs.History(arguments).Where(e => e.TryGetProperty("loss", out _))];
        Assert.That(log, Has.Length.EqualTo(steps.Length));
        double worst = 0;
        for (int i = 0; i < steps.Length; i++)
        {
            foreach (string value in (string[])["loss", "grad_norm"])
                worst = Math.Max(worst, Error(log[i], steps[i], value));
            double rate = steps[i].GetProperty("lr").GetDouble();
            Assert.That(log[i].GetProperty("learning_rate").GetDouble(),
                Is.EqualTo(rate).Within(1e-12));
        }

        TestContext.Out.WriteLine($"worst loss or norm {worst:E2}");
        Assert.That(worst, Is.LessThan(1e-4));
        AssertFinal(arguments, expected);
        AssertAfter(arguments, expected.GetProperty("case_a_after"));
    }

    [TestCase("lora_only")]
    [TestCase("lora_official")]
    public void AdaptersAreWrittenAsPeftWritesThem(string name)
    {
        TrainArguments arguments = TenSteps(name) with { MaxSteps = 1 };
        Runs.Train(arguments);
        JsonElement wanted =
            Json(Path.Combine(V26.Adapter("trained_" + name), AdapterConfig.FileName));
        JsonElement config = Json(Path.Combine(arguments.OutputDir, AdapterConfig.FileName));
        Assert.That(config.EnumerateObject().Select(p => p.Name),
            Is.SupersetOf(wanted.EnumerateObject().Select(p => p.Name)));
        foreach (string key
            in (string[])["r", "lora_alpha", "lora_dropout", "target_modules", "bias",
            "modules_to_save", "peft_type", "task_type", "inference_mode"])
            Assert.That(
                JsonElement.DeepEquals(config.GetProperty(key), wanted.GetProperty(key)), key);

        using var written = SafetensorsFile.Open(
            Path.Combine(arguments.OutputDir, AdapterFile.WeightsName));
        var tensors =
            Json(Path.Combine(V26.Adapter("peft021_official"), "adapter_model_tensors.json"))
            .EnumerateObject().Where(p => name == "lora_official" || p.Name.Contains(".lora_"));
        Assert.That(written.Metadata["format"], Is.EqualTo("pt"));
        Assert.That(written.Tensors.Select(t => $"{t.Name} {t.StoredType.Name} {t.Shape}"),
            Is.EquivalentTo(tensors.Select(p => $"{p.Name} F32 "
                + $"[{string.Join(", ", ReferenceText.Ints(p.Value.GetProperty("shape")))}]")));
    }

    [Test]
    public void RunsInBf16KeepMastersAndSaveTheirType()
    {
        TrainArguments arguments = TenSteps("full") with { Bf16 = true };
        double bf16 = ReferenceText.Json("v26/forward/case_a.json").GetProperty("loss_bf16")
            .GetDouble();
        using (var model = TunedModel.Open(arguments))
        {
            Batch batch = V26.Batch(V26.Full, "one", "two-small");
            // The reference keeps activations in bf16 too, whose step near 6.6 is 1/32.
            Assert.That(V26.Gradients(model, arguments, batch).Loss,
                Is.EqualTo(bf16).Within(1.0 / 32));
        }

        Runs.Train(arguments);
        using var saved = Checkpoint.Open(arguments.OutputDir);
        Assert.That(V26.Spec.Parameters.All.Select(p => saved.Get(p.Name).Type),
            Is.All.EqualTo(DType.BF16));
        Assert.That(Json(Path.Combine(arguments.OutputDir, "config.json"))
            .GetProperty("torch_dtype").GetString(), Is.EqualTo("bfloat16"));
        // What is saved is the master, rounded: a step of AdamW is mostly far below bf16's.
        using var state = SafetensorsFile.Open(
            Path.Combine(RunFolder.Checkpoint(arguments.OutputDir, 10), RunState.OptimizerFile));
        int lost = 0;
        foreach (string name in (string[])["llm.model.norm.weight", "vpm.post_layernorm.weight",
            "vpm.embeddings.position_embedding.weight"])
        {
            float[] masters = state.Get("master." + name).ToFloats(),
                values = saved.Get(name).ToFloats();
            for (int i = 0; i < values.Length; i++)
            {
                Assert.That(values[i], Is.EqualTo(Rounded(masters[i])));
                if (values[i] != masters[i]) lost++;
            }
        }

        Assert.That(lost, Is.GreaterThan(1000), "masters hold what bf16 cannot");
        double[] losses = [.. Runs.Losses(arguments)];
        double[] wanted = [.. ReferenceText.Json("v26/train/runs.json").GetProperty("full")
            .GetProperty("steps").EnumerateArray().Select(s => s.GetProperty("loss").GetDouble())];
        for (int i = 0; i < wanted.Length; i++)
            Assert.That(losses[i], Is.EqualTo(wanted[i]).Within(0.02 * wanted[0]), $"step {i + 1}");
    }

    [TestCase(false)]
    [TestCase(true)]
    public void FrozenWeightsComeThroughExactly(bool bf16)
    {
        // The files hold bf16, which both types of run represent.
        TrainArguments arguments = TenSteps("resampler_only") with { MaxSteps = 2, Bf16 = bf16 };
        Runs.Train(arguments);
        using var before = Checkpoint.Open(V26.Model);
        using var after = Checkpoint.Open(arguments.OutputDir);
        int changed = 0;
        foreach (ExpectedTensor parameter in V26.Spec.Parameters.All)
        {
            StoredTensor stored = after.Get(parameter.Name);
            Assert.That(stored.Type, Is.EqualTo(bf16 ? DType.BF16 : DType.F32), parameter.Name);
            bool same = stored.ToFloats().AsSpan()
                .SequenceEqual(before.Get(parameter.Name).ToFloats());
            if (!same) changed++;
            Assert.That(same || parameter.Name.StartsWith("resampler.", StringComparison.Ordinal),
                parameter.Name);
        }

        // Weights of norms are near 1, where one small step is lost to bf16 (masters keep it).
        Assert.That(changed, bf16 ? Is.InRange(10, 13) : Is.EqualTo(13));
        foreach (string file
            in (string[])["tokenizer.json", "preprocessor_config.json", "merges.txt"])
            Assert.That(File.ReadAllBytes(Path.Combine(arguments.OutputDir, file)),
                Is.EqualTo(File.ReadAllBytes(Path.Combine(V26.Model, file))));
    }

    private TrainArguments TenSteps(string name)
    {
        bool lora = name.StartsWith("lora", StringComparison.Ordinal);
        TrainArguments arguments = (lora ? V26.Lora : V26.Full) with
        {
            DataPath = Runs.Data(_folder, "one", "turns", "wide"),
            OutputDir = Path.Combine(_folder, "out"),
            TrainSamplingStrategy = SamplingStrategy.Sequential,
            MaxSteps = 10,
            LearningRate = 1e-3,
            LrSchedulerType = LrSchedule.Cosine,
            WarmupSteps = 2,
            AdamBeta2 = 0.95,
            WeightDecay = 0.1,
            WeightDecayScope = name.EndsWith("decay_all", StringComparison.Ordinal)
                ? DecayScope.All : DecayScope.Hf,
            LoggingSteps = new Interval(1),
        };
        return name switch
        {
            "lora_only" => arguments with { LoraWeightPath = Initial(arguments) },
            // Null leaves the choice to official_compat: embed_tokens, resampler and vpm.
            "lora_official" => arguments with
            {
                ModulesToSave = null,
                LoraWeightPath = Initial(arguments with { ModulesToSave = null }),
            },
            "resampler_only" => arguments with { TuneVision = false, TuneLlm = false },
            "vision_and_resampler_decay_all" => arguments with { TuneLlm = false },
            _ => arguments,
        };
    }

    /// <summary>The adapter the reference runs started from, as a folder.</summary>
    private string Initial(TrainArguments arguments)
    {
        string folder = Path.Combine(_folder, "initial");
        using var model = TunedModel.Open(arguments);
        var file = ReferenceFile.Open("v26/train/lora_initial");
        foreach (string name in file.Names)
            model.ParameterRanges.Write(V26.Name(name), file.Floats(name));
        ModelFiles.Save(folder, model, arguments);
        return folder;
    }

    private static void AssertFinal(TrainArguments arguments, JsonElement expected)
    {
        using var files = SafetensorsFile.Open(Path.Combine(
            arguments.OutputDir,
            arguments.UseLora ? AdapterFile.WeightsName : "model.safetensors"));
        var final = expected.GetProperty("final");
        Assert.That(final.EnumerateObject().Count(),
            Is.EqualTo(expected.GetProperty("parameters").GetInt32()));
        double worst = 0;
        foreach (var tensor in final.EnumerateObject())
        {
            var wanted = Fingerprint.Read(tensor.Value);
            var got = Fingerprint.Of(files.Get(tensor.Name).ToFloats(), wanted.Shape);
            double error = got.NormError(wanted);
            if (error > worst) TestContext.Out.WriteLine($"{tensor.Name} {error:E2}");
            worst = Math.Max(worst, error);
            Assert.That(error, Is.LessThan(1e-4), tensor.Name);
        }

        bool only = arguments.ModulesToSave is { Count: 0 };
        if (!arguments.UseLora || (!only && !V26.IsFull)) return;
        string name = only ? "trained_lora_only" : "trained_lora_official";
        var whole = ReferenceFile.Open($"v26/adapters/{name}/adapter_model");
        foreach (string tensor in whole.Names)
        {
            double error = V26.NormError(files.Get(tensor).ToFloats(), whole.Doubles(tensor));
            Assert.That(error, Is.LessThan(1e-4), tensor);
        }
    }

    /// <summary>Loss and logits of case a with what the run has left.</summary>
    private static void AssertAfter(TrainArguments run, JsonElement expected)
    {
        TrainArguments arguments = run.UseLora
            ? run with { LoraWeightPath = run.OutputDir }
            : run with { ModelNameOrPath = run.OutputDir };
        using var model = TunedModel.Open(arguments);
        Trace trace = Trace.Run(model, V26.Batch(V26.Full, "one", "two-small"), gradients: false);
        double loss = expected.GetProperty("loss").GetDouble();
        Assert.That(trace.Floats["loss"].Values[0], Is.EqualTo(loss).Within(1e-4 * loss));
        var logits = expected.GetProperty(run.UseLora ? "reloaded" : "logits");
        V26.AssertClose("logits", trace.Floats["logits"], logits, 1e-4);
    }

    private static double Error(JsonElement got, JsonElement expected, string name)
    {
        double value = expected.GetProperty(name).GetDouble();
        return Math.Abs(got.GetProperty(name).GetDouble() - value) / value;
    }

    private static float Rounded(float value)
    {
        uint bits = BitConverter.SingleToUInt32Bits(value);
        return BitConverter.UInt32BitsToSingle((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000);
    }

    private static JsonElement Json(string path)
    {
        using var json = JsonDocument.Parse(File.ReadAllBytes(path));
        return json.RootElement.Clone();
    }
}
