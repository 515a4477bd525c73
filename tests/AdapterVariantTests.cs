using System.Text.Json;
using System.Text.Json.Nodes;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Adapters beyond plain LoRA, against PEFT 0.14 and 0.21 (tests/reference/adapters): which modules
/// a setting reaches, and ten steps of each kind.
/// </summary>
[TestFixture]
public sealed class AdapterVariantTests
{
    private static readonly string s_initial =
        Path.Combine(ReferenceFile.Root, "adapters", "initial.safetensors");

    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [TestCase("v26")]
    [TestCase("v4")]
    [TestCase("v45")]
    public void SettingsReachTheModulesThatPeftGivesAdapters(string family)
    {
        ParameterTable table = family == "v26"
            ? V26.Spec.Parameters : ReferenceModel.Of(family).Spec.Parameters;
        foreach (var setting in ReferenceText.Json("adapters/names.json").GetProperty(family)
            .GetProperty("cases").EnumerateObject())
        {
            JsonElement wanted = setting.Value.TryGetProperty("both", out var both)
                ? both : setting.Value.GetProperty("0.21");
            AdapterConfig config;
            AdapterLayout layout;
            try
            {
                config = Config(setting.Value.GetProperty("options"));
                layout = AdapterLayout.Create(table, config, "x");
            }
            catch (InputException failure)
            {
                // Names that PEFT passes over, and adapters inside what is trained whole where the
                // name is no whole word of the path ("attn"), are refused here.
                Assert.That(wanted.TryGetProperty("error", out _)
                    || setting.Name is "save_absent" or "save_attn", Is.True,
                    $"{setting.Name}: {failure.Message}");
                continue;
            }

            Assert.That(wanted.TryGetProperty("modules", out var modules), Is.True, setting.Name);
            Assert.That(
                layout.Targets.Select(t => $"{t.Name} {config.RankOf(t.Name)} "
                    + $"{config.ScaleOf(t.Name):G12}"),
                Is.EquivalentTo(modules.EnumerateObject().Select(m =>
                    $"{m.Name} {m.Value[0]} {m.Value[2].GetDouble():G12}")), setting.Name);
            if (wanted.TryGetProperty("target_modules_after", out var after))
                Assert.That(layout.Config.Targets.Suffixes,
                    Is.EquivalentTo(after.EnumerateArray().Select(n => n.GetString())),
                    setting.Name);
        }
    }

    [TestCase("train_rslora")]
    [TestCase("train_dora")]
    [TestCase("train_groups")]
    [TestCase("loraplus")]
    public void TenStepsAreEqual(string name)
    {
        var expected = ReferenceText.Json("adapters/cases.json").GetProperty(name);
        TrainArguments arguments = TenSteps(name);
        using var model = TunedModel.Open(arguments);
        using (var initial = SafetensorsFile.Open(s_initial))
            foreach (StoredTensor a in initial.Tensors)
                model.ParameterRanges.Write(V26.Name(a.Name), a.ToFloats());
        AssertSteps(model, arguments, expected);
        AssertFinal(model, expected);
        AssertTheSavedAdapterIsTheSame(model, arguments, expected.GetProperty("case_a_after"));
    }

    [Test]
    public void RatesFollowPartsAndNames()
    {
        TrainArguments arguments = V26.Lora with
        {
            ModulesToSave = ["resampler", "embed_tokens"],
            LearningRate = 1e-3,
            LoraplusLrRatio = 4,
            WeightDecay = 0.5,
            LearningRates = new NumbersByName(
                [("embeddings", 1e-5), ("joiner", 2e-3), (@"layers\.1\..*q_proj", 3e-3)]),
            WeightDecays = new NumbersByName([("decoder", 0.1)]),
        };
        using var source = BaseModel.Open(arguments);
        (double Rate, double Decay, bool Decays) Of(string name)
        {
            TunedTensor found = source.Parts.Tensors.Single(t => t.Name == name);
            return (Math.Round(found.Rate, 9), found.Decay, found.Decays);
        }

        const string layer = "llm.model.layers.1.self_attn.";
        Assert.That(Of("llm.model.embed_tokens.weight"), Is.EqualTo((0.01, 0.1, true)));
        Assert.That(Of("resampler.proj"), Is.EqualTo((2.0, 0.5, true)));
        Assert.That(Of("resampler.ln_q.weight"), Is.EqualTo((8.0, 0.0, false)), "a vector");
        Assert.That(Of(layer + "q_proj.lora_A.weight"), Is.EqualTo((3.0, 0.1, true)));
        Assert.That(Of(layer + "q_proj.lora_B.weight"), Is.EqualTo((12.0, 0.1, true)));
        Assert.That(Of(layer + "k_proj.lora_B.weight"), Is.EqualTo((4.0, 0.1, true)));
        Assert.That(() => BaseModel.Open(arguments with
        {
            LearningRates = new NumbersByName([("decoder", 1e-5), ("vision", 1), ("q_proj", 1)]),
        }), Throws.TypeOf<InputException>().With.Message.StartsWith(
            "learning_rates \"vision\", \"q_proj\": matches nothing that is trained"));
    }

    [TestCase("loraplus_mixed")]
    public void LoraPlusGroupsAreThoseOfPeft(string name)
    {
        var rules = new LearningRules(V26.Spec.Parameters, V26.Lora with
        {
            LearningRate = 1e-3,
            LoraplusLrRatio = 16,
            WeightDecay = 0.1,
        });
        foreach (var tensor in ReferenceText.Json("adapters/cases.json").GetProperty(name)
            .GetProperty("groups").EnumerateObject())
        {
            // PEFT 0.14's groups of embedding adapters differ from 0.21's.
            if (tensor.Name.Contains("lora_embedding", StringComparison.Ordinal)) continue;
            string own = V26.Name(tensor.Name);
            var shape = V26.Spec.Parameters.Find(own)?.Shape ?? new Shape(2, 2);
            TunedTensor got = rules.Apply([(own, shape, DType.F32)])[0];
            Assert.That((Math.Round(1e-3 * got.Rate, 9), got.Decay), Is.EqualTo((
                Math.Round(tensor.Value.GetProperty("lr").GetDouble(), 9),
                tensor.Value.GetProperty("weight_decay").GetDouble())), own);
        }
    }

    [TestCase("gaussian", 1.0 / 8)]
    [TestCase("true", 0.0360843918)]
    public void NewAdaptersAreDrawnAsPeftDrawsThem(string start, double deviation)
    {
        using var model = TunedModel.Open(
            V26.Lora with { InitLoraWeights = LoraStart.Parse(start)! });
        float[] a = [.. model.Parts.Adapters.List.SelectMany(
            adapter => model.Device.ReadFloats(
                model.ParameterRanges.Value(Adapters.NameOfA(adapter.Module))))];
        double mean = a.Average(), variance = a.Average(v => (double)v * v);
        // 16,384 numbers: five standard deviations of the mean and of the variance.
        Assert.That(mean, Is.Zero.Within(5 * deviation / 128));
        Assert.That(variance, Is.EqualTo(deviation * deviation).Within(
            5 * Math.Sqrt(2) / 128 * deviation * deviation));
        Assert.That(a.Max(Math.Abs), start == "gaussian"
            ? Is.GreaterThan(3 * deviation) : Is.LessThan(1.0 / 16));
        Assert.That(model.Device.ReadFloats(model.ParameterRanges.Value(
            Adapters.NameOfB(model.Parts.Adapters.List[0].Module))), Is.All.Zero);
    }

    [TestCase("--rank_pattern {\"q_proj\":0}", "rank_pattern \"q_proj\" is \"0\", expected a "
        + "number at least 1")]
    [TestCase("--rank_pattern {\"q_proj\":1.5}", "rank_pattern \"q_proj\" is 1.5, expected a whole "
        + "number")]
    [TestCase("--rank_pattern q_proj", "rank_pattern is \"q_proj\", expected JSON")]
    [TestCase("--alpha_pattern {\"(\":1}", "alpha_pattern: ")]
    [TestCase("--init_lora_weights eva", "init_lora_weights is \"eva\", expected true, ")]
    [TestCase("--lora_layers_pattern layers", "lora_layers_pattern needs lora_layers_to_transform")]
    [TestCase("--learning_rate 0 --learning_rates {\"vision\":1}", "learning_rates needs a "
        + "learning_rate")]
    public void WrongSettingsAreNamed(string given, string expected) =>
        Assert.That(() => TrainReader.Read(
            ["--use_lora", "--tune_llm", "false", "--model_name_or_path", V26.Model,
                "--data_path", V26.Rows, .. given.Split(' ')], _folder),
            Throws.TypeOf<InputException>().With.Message.Contains(expected));

    [Test]
    public void SettingsAreReadBackAsTheyAreWritten()
    {
        string[] given = ["--use_lora", "--tune_llm", "false", "--model_name_or_path", V26.Model,
            "--data_path", V26.Rows, "--use_rslora", "--rank_pattern", """{"q_proj":2,"a|b":4}""",
            "--alpha_pattern", """{"v_proj":0.5}""", "--lora_target_modules", "all-linear",
            "--exclude_modules", "vpm.*", "--init_lora_weights", "gaussian",
            "--learning_rates", """{"decoder":0.001}""", "--loraplus_lr_ratio", "16"];
        TrainArguments read = TrainReader.Read(given, _folder);
        string file = Path.Combine(_folder, "again.json");
        File.WriteAllBytes(file, TrainWriter.ToJson(read));
        TrainArguments again = TrainReader.Read([file], _folder);
        Assert.That(TrainWriter.ToJson(again), Is.EqualTo(File.ReadAllBytes(file)));
        Assert.That(again.RankPattern!.OfModule("llm.b"), Is.EqualTo(4));
        var config = TunedParts.AdapterOf(again, V26.Spec)!;
        var layout = AdapterLayout.Create(V26.Spec.Parameters, config, "x");
        string written = Path.Combine(_folder, AdapterConfig.FileName);
        File.WriteAllText(written, layout.Config.ToJson());
        AdapterLayout back =
            AdapterLayout.Create(V26.Spec.Parameters, AdapterConfig.Read(written), "x");
        Assert.That(back.Tensors, Is.EqualTo(layout.Tensors));
        Assert.That(JsonNode.Parse(File.ReadAllText(written))!["rank_pattern"]!.ToJsonString(),
            Is.EqualTo("""{"q_proj":2,"(a|b)":4}"""), "PEFT 0.14 splits a|b");
    }

    [Test]
    public void RunsGoOnWithTheSameBits()
    {
        TrainArguments arguments = V26.Lora with
        {
            DataPath = Runs.Data(_folder, "one", "turns"),
            OutputDir = Path.Combine(_folder, "out"),
            UseDora = true,
            UseRslora = true,
            LoraDropout = 0.1,
            RankPattern = new NumbersByName([("q_proj", 4)]),
            LoraplusLrRatio = 4,
            LearningRates = new NumbersByName([("lora_A", 2e-3)]),
            LearningRate = 1e-3,
            MaxSteps = 4,
            SaveSteps = new Interval(2),
        };
        Runs.Train(arguments);
        TrainArguments resumed = arguments with
        {
            OutputDir = Path.Combine(_folder, "resumed"),
            ResumeFromCheckpoint = new ResumePoint(RunFolder.Checkpoint(arguments.OutputDir, 2)),
        };
        Runs.Train(resumed);
        foreach (string file in (string[])[AdapterFile.WeightsName, RunState.OptimizerFile])
            Assert.That(
                File.ReadAllBytes(Path.Combine(RunFolder.Checkpoint(resumed.OutputDir, 4), file)),
                Is.EqualTo(File.ReadAllBytes(
                    Path.Combine(RunFolder.Checkpoint(arguments.OutputDir, 4), file))), file);

        // Beside the adapter: what AutoPeftModel needs to find the model, and the tokenizer.
        JsonNode config = JsonNode.Parse(File.ReadAllText(
            Path.Combine(arguments.OutputDir, AdapterConfig.FileName)))!;
        Assert.That((string?)config["auto_mapping"]!["parent_library"],
            Is.EqualTo("transformers_modules.model.modeling_minicpmv"));
        Assert.That(Path.IsPathRooted((string)config["base_model_name_or_path"]!), Is.True);
        foreach (string file in (string[])["tokenizer.json", "tokenizer_config.json",
            "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"])
            Assert.That(File.ReadAllBytes(Path.Combine(arguments.OutputDir, file)),
                Is.EqualTo(File.ReadAllBytes(Path.Combine(V26.Model, file))), file);
        Assert.That(File.Exists(Path.Combine(arguments.OutputDir, "config.json")), Is.False);
    }

    [Test]
    public void BiasesThatNewerPeftDoesNotTrainMayBeAbsent()
    {
        using var file = SafetensorsFile.Open(
            Path.Combine(V26.Adapter("variant_bias_all"), AdapterFile.WeightsName));
        string folder = Path.Combine(_folder, "bias_all");
        Directory.CreateDirectory(folder);
        SafetensorsWriter.Write(Path.Combine(folder, AdapterFile.WeightsName),
            [.. file.Tensors.Where(t =>
                !t.Name.EndsWith("in_proj_bias") && !t.Name.Contains(".o_proj."))
                .Select(t => t.ToSave())]);
        File.Copy(Path.Combine(ReferenceFile.Root, "adapters", "peft021_bias_all.json"),
            Path.Combine(folder, AdapterConfig.FileName));
        using var adapter = AdapterFile.Open(folder);
        Assert.That(adapter.Match(V26.Spec.Parameters).Keys,
            Does.Contain("vpm.post_layernorm.bias")
            .And.Contain("resampler.attn.out_proj.bias")
            .And.Not.Contain("resampler.attn.in_proj_bias"));
    }

    private static AdapterConfig Config(JsonElement options)
    {
        var json = new JsonObject { ["peft_type"] = "LORA", ["r"] = 8, ["lora_alpha"] = 16 };
        foreach (var option in options.EnumerateObject())
            json[option.Name] = JsonNode.Parse(option.Value.GetRawText());
        string file = Path.GetTempFileName();
        try
        {
            File.WriteAllText(file, json.ToJsonString());
            return AdapterConfig.Read(file);
        }
        finally
        {
            File.Delete(file);
        }
    }

    /// <summary>Losses and norms of the reference's steps.</summary>
    internal static void AssertSteps(
        TunedModel model, TrainArguments arguments, JsonElement expected)
    {
        Schedule schedule = Schedule.Of(arguments, 10);
        var trainer = new Trainer(arguments, model);
        double worst = 0;
        foreach (var step in expected.GetProperty("steps").EnumerateArray())
        {
            int at = step.GetProperty("step").GetInt32() - 1;
            Batch batch = V26.Batch(arguments, step.GetProperty("row").GetString()!);
            StepResult result = trainer.Step(at, [batch], schedule.At(at));
            worst = Math.Max(worst, Error(result.Loss, step.GetProperty("loss")));
            worst = Math.Max(worst, Error(result.GradientNorm, step.GetProperty("grad_norm")));
        }

        TestContext.Out.WriteLine($"worst loss or norm {worst:E2}");
        Assert.That(worst, Is.LessThan(1e-4));
    }

    internal static void AssertFinal(TunedModel model, JsonElement expected)
    {
        double worst = 0;
        foreach (var tensor in expected.GetProperty("final").EnumerateObject())
        {
            string own = V26.Name(tensor.Name);
            if (V26.IsKeyBias(own) || own.EndsWith("in_proj_bias", StringComparison.Ordinal))
                continue;
            var wanted = Fingerprint.Read(tensor.Value);
            double error = Fingerprint.Of(
                model.Device.ReadFloats(model.ParameterRanges.Value(own)), wanted.Shape)
                .NormError(wanted);
            // What is added to all keys alike moves nothing but by their rotation, and hardly that
            // where it is slow: what rounding leaves of such gradients AdamW makes steps of.
            if (own.EndsWith("k_proj.lora_B.bias", StringComparison.Ordinal))
            {
                Assert.That(error, Is.LessThan(0.02), own);
                continue;
            }

            worst = Math.Max(worst, error);
            Assert.That(error, Is.LessThan(1e-4), own);
        }

        TestContext.Out.WriteLine($"worst final tensor {worst:E2} of its norm");
    }

    private void AssertTheSavedAdapterIsTheSame(
        TunedModel model, TrainArguments arguments, JsonElement after)
    {
        string saved = Path.Combine(_folder, "saved");
        Directory.CreateDirectory(saved);
        ModelFiles.Save(saved, model, arguments);
        using var reread = TunedModel.Open(AdapterSettings.Complete(
            V26.Lora with { ModulesToSave = arguments.ModulesToSave, LoraWeightPath = saved },
            key => key == "modules_to_save"));
        Trace trace = Trace.Run(reread, V26.Batch(V26.Full, "one", "two-small"), gradients: false);
        V26.AssertClose("logits", trace.Floats["logits"], after.GetProperty("logits"), 1e-4);
    }

    internal static TrainArguments TenSteps(string name)
    {
        TrainArguments plain = V26.Lora with
        {
            MaxSteps = 10,
            LearningRate = 1e-3,
            LrSchedulerType = LrSchedule.Cosine,
            WarmupSteps = 2,
            AdamBeta2 = 0.95,
            WeightDecay = 0.1,
        };
        return name switch
        {
            "train_rslora" => plain with { UseRslora = true, LoraAlpha = 4 },
            "train_dora" => plain with { UseDora = true },
            "loraplus" => plain with { LoraplusLrRatio = 16 },
            "train_groups" => plain with
            {
                ModulesToSave = ["embed_tokens", "resampler"],
                WeightDecayScope = DecayScope.All,
                LearningRates = new NumbersByName([("resampler", 2e-4), ("embed_tokens", 5e-5),
                    (@"layers\.0\..*lora_B", 3e-3), (".", 1e-3)]),
                WeightDecays = new NumbersByName([("joiner", 0.05), ("embeddings", 0),
                    (@"layers\.0\..*lora_B", 0.1), (".", 0)]),
            },
            _ => plain,
        };
    }

    private static double Error(double got, JsonElement expected) =>
        Math.Abs(got - expected.GetDouble()) / expected.GetDouble();
}
