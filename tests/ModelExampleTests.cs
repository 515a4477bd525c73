using System.Globalization;
using System.Text.Json;
using System.Text.Json.Nodes;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// examples/models: the official scripts' settings for each real model, and the memory that
/// docs/models.md says they take.
/// </summary>
[TestFixture]
public sealed class ModelExampleTests
{
    // What of V-2_6 is for cards that its official settings do not fit.
    private static readonly string[] s_smallCards = ["qlora", "lora-8gb", "full-24gb"];

    private const string Mixture = "MiniCPM-V-4_7-35B-A3B";

    // No official script trains them.
    private static readonly string[] s_unofficial =
        ["MiniCPM-V-4_6", "MiniCPM-V-4_7", "MiniCPM-OCR"];

    // What both official scripts pass and, of DeepSpeed's file, what wins over it; eight processes
    // of one row each as eight rows here.
    private const string Both = """
        {"official_compat": true, "tune_vision": true, "tune_llm": false,
         "gradient_checkpointing": true,
         "model_max_length": 2048, "max_slice_nums": 9, "max_steps": 10000,
         "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
         "gradient_accumulation_steps": 8, "loss_normalization": "micro_batch_mean",
         "learning_rate": 1e-6, "weight_decay": 0.1, "weight_decay_scope": "all",
         "adam_beta2": 0.95, "warmup_ratio": 0.01, "lr_scheduler_type": "warmup_lr",
         "eval_strategy": "steps", "eval_steps": 1000, "save_strategy": "steps",
         "save_steps": 1000, "save_total_limit": 10, "logging_steps": 1,
         "report_to": "tensorboard"
        """;

    private static readonly Dictionary<string, string> s_settings = new()
    {
        ["lora"] = Both + """
            , "fp16": true, "use_lora": true, "lora_r": 64, "lora_alpha": 64,
            "lora_dropout": 0.05, "lora_target_modules":
            "llm\\..*layers\\.\\d+\\.self_attn\\.(q_proj|k_proj|v_proj|o_proj)"}
            """,
        ["full"] = Both + """, "bf16": true}""",
    };

    private static readonly string s_examples =
        Path.Combine(ArchitectureTests.Root, "examples", "models");

    private string _folder = "";

    private static IEnumerable<string> Models => ReleasedModels.All.Keys;

    private static IEnumerable<string> Official => Models.Except(s_unofficial);

    [SetUp]
    public void MakeFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-").FullName;

    [TearDown]
    public void RemoveFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void EveryFamilyHasItsExamples()
    {
        Assert.That(Models, Is.EquivalentTo(Families.All.Select(f => f.Name)));
        Assert.That(Directory.GetFiles(s_examples).Select(Path.GetFileName), Is.EquivalentTo(
            Models.SelectMany(m => new[] { FileOf(m, "lora"), FileOf(m, "full") })
                .Concat(s_smallCards.Select(kind => FileOf("MiniCPM-V-2_6", kind)))
                .Append(FileOf(Mixture, "lora"))));
    }

    // Counted without weights, as `cpmx plan` does: the large model's sizes, rows of the small one.
    [Test]
    public void TheMixtureOfExpertsHasOneWhosePlanFitsOneCard()
    {
        foreach (string file in Directory.GetFiles(V47Experts.Model))
            if (!file.EndsWith(".safetensors", StringComparison.Ordinal))
                File.Copy(file, Path.Combine(_folder, Path.GetFileName(file)));
        string path = Path.Combine(_folder, "config.json");
        JsonNode config = JsonNode.Parse(File.ReadAllText(path))!;
        config["insert_layer_id"] = 6;
        config["tie_word_embeddings"] = false;
        JsonNode native = JsonNode.Parse($"{{{ReleasedModels.Native}}}")!;
        config["vision_config"] = native["vision_config"]!.DeepClone();
        config["text_config"] = JsonNode.Parse("""
            {"model_type": "qwen3_5_moe_text", "vocab_size": 248094, "hidden_size": 2048,
             "num_hidden_layers": 40, "num_attention_heads": 16, "num_key_value_heads": 2}
            """);
        File.WriteAllText(path, config.ToJsonString());
        var notices = new List<string>();
        string rows = V46.Data(_folder);
        TrainArguments arguments = TrainReader.Read(
            [Path.Combine(s_examples, FileOf(Mixture, "lora")), "--model_name_or_path", _folder,
                "--data_path", rows, "--eval_data_path", rows], _folder, notices.Add);
        Assert.That(notices, Is.Empty);
        ModelSpec spec = ModelSpec.Read(_folder);
        TunedParts parts = TunedParts.Choose(
            spec, arguments, TunedParts.AdapterOf(arguments, spec), DType.BF16);
        Assert.That(parts.Adapters.List, Has.Count.EqualTo((10 * 4) + (30 * 5) + (40 * 3)));
        var output = new StringWriter();
        Assert.That(PlanRun.Run(arguments, new PlanRequest("H100"), output), Is.True, $"{output}");
        // Two bytes a parameter; norms and biases have four.
        string weights = (2 * 35_212_671_024 / (double)(1 << 30)).ToString(
            "0.00", CultureInfo.InvariantCulture);
        Assert.That($"{output}", Does.Contain("35,212,671,024 parameters")
            .And.Match($@"(?m)^  weights +{weights} GiB$").And.Contain("fits into H100"));
    }

    [Test]
    public void AdaptersInFourBitsHaveOneToo()
    {
        var notices = new List<string>();
        TrainArguments arguments = TrainReader.Read(
            [Path.Combine(s_examples, FileOf("MiniCPM-V-2_6", "qlora"))], _folder, notices.Add);
        Assert.That(notices, Is.Empty);
        Assert.That(arguments.Quantises && arguments.Bf16 && arguments.GradientCheckpointing);
        Assert.That(arguments.TrainedWhole, Is.Empty);
    }

    // By the run's own code, a row of 2,048 tokens with a sliced picture, on a card as its driver
    // shows it and without what its libraries take.
    [TestCase("qlora", 8)]
    [TestCase("lora-8gb", 8)]
    [TestCase("full-24gb", 24)]
    public void ThoseOfSmallCardsFitThem(string kind, int gigabytes)
    {
        const int Tokens = 2048;
        var notices = new List<string>();
        TrainArguments arguments = TrainReader.Read(
            [Path.Combine(s_examples, FileOf("MiniCPM-V-2_6", kind))], _folder, notices.Add);
        Assert.That(notices, Is.Empty);
        long card = (long)(((gigabytes * 0.985) - 0.6) * (1L << 30));
        string path = Runs.Data(_folder, "one");
        JsonNode row = JsonNode.Parse(File.ReadAllText(path))![0]!.DeepClone();
        row["conversations"]![1]!["content"] =
            string.Concat(Enumerable.Repeat("word ", 4 * Tokens));
        File.WriteAllText(path, new JsonArray(row).ToJsonString());
        arguments = arguments with { DataPath = path, EvalStrategy = When.No };
        PlannedModel model = RealModel.Planned(_folder, arguments);
        var rows = DataRows.Open(path, arguments, model.Spec.Rows(), _ => { });
        MemoryPlan plan = MemoryPlan.Make(arguments, model, RealModel.Card, rows, null,
            new StepPlan(arguments, rows.Count), arguments.MemoryLimit?.Bytes(card) ?? card);
        TestContext.Out.WriteLine(plan);
        Assert.That(plan.Size.Tokens, Is.EqualTo(Tokens));
        Assert.That(plan.Size.Views, Is.Positive);
        Assert.That(plan.Parts.Total, Is.LessThanOrEqualTo(card));
    }

    // What is not named has its default: a key too many changes what TrainWriter writes.
    [Test]
    public void TheyHaveTheOfficialSettings(
        [ValueSource(nameof(Official))] string model, [Values("lora", "full")] string kind)
    {
        var notices = new List<string>();
        string name = FileOf(model, kind);
        TrainArguments arguments = TrainReader.Read(
            [Path.Combine(s_examples, name)], _folder, notices.Add);
        if (kind == "lora")
            Assert.That(arguments.TrainedWhole,
                Is.EqualTo((string[])["embed_tokens", "resampler", "vpm"]));
        Assert.That(notices, Is.Empty);
        JsonObject settings = JsonNode.Parse(s_settings[kind])!.AsObject();
        settings["model_name_or_path"] = Path.Combine(s_examples, model);
        settings["data_path"] = Path.Combine(s_examples, "train.json");
        settings["eval_data_path"] = Path.Combine(s_examples, "eval.json");
        settings["output_dir"] = Path.Combine(
            s_examples, "output", Path.GetFileNameWithoutExtension(name));
        settings["llm_type"] = model switch
        {
            "MiniCPM-V-2" => "minicpm",
            "MiniCPM-Llama3-V-2_5" => "llama3",
            _ => "qwen",
        };
        string file = Path.Combine(_folder, "expected.json");
        File.WriteAllText(file, settings.ToJsonString());
        Assert.That(Text(arguments), Is.EqualTo(Text(TrainReader.Read([file], _folder))));

        static string Text(TrainArguments a) => JsonSerializer.Serialize(
            JsonSerializer.Deserialize<JsonElement>(TrainWriter.ToJson(a)));
    }

    // Values, gradients, two moments and the F32 master of what is trained; values of the rest.
    [TestCase(false, false)]
    [TestCase(false, true)]
    [TestCase(true, false)]
    [TestCase(true, true)]
    public void TheFormulaOfTheDocumentationIsTheRunsOwnCount(bool lora, bool narrow)
    {
        using BaseModel source = BaseModel.Open((lora ? V26.Lora : V26.Full) with
        {
            Bf16 = true,
            Optim = narrow ? OptimizerKind.AdamwBf16 : OptimizerKind.AdamwTorch,
        });
        Assert.That(Bytes(source.Spec, source.Parts, narrow), Is.EqualTo(source.DeviceBytes));
    }

    [TestCaseSource(nameof(Models))]
    public void TheDocumentedMemoryIsThatOfTheFormula(string model)
    {
        ModelSpec spec = ReleasedModels.Read(_folder, model);
        Assert.That(spec.Family.Name, Is.EqualTo(model));
        Assert.That(spec.Parameters.Count, Is.EqualTo(ReleasedModels.All[model].Parameters));
        string row = string.Join(" | ", (string[])[
            $"| {model}", spec.Parameters.Count.ToString("N0", CultureInfo.InvariantCulture),
            Gib("lora"),
            Gib("lora", "--modules_to_save",
                s_unofficial.Contains(model) ? "merger" : "resampler"),
            Gib("lora", "--modules_to_save", "[]"), Gib("full"),
            Gib("full", "--tune_llm", "true"),
            Gib("full", "--tune_llm", "true", "--optim", "adamw_bf16") + " |"]);
        string[] documented = [.. File.ReadLines(
            Path.Combine(ArchitectureTests.Root, "docs", "models.md")).Where(
            line => line.StartsWith($"| {model} | ", StringComparison.Ordinal)
                && char.IsAsciiDigit(line[$"| {model} | ".Length]))];
        Assert.That(documented, Is.EqualTo((string[])[row]));

        string Gib(string kind, params string[] over)
        {
            TrainArguments arguments = TrainReader.Read(
                [Path.Combine(s_examples, FileOf(model, kind)), .. over], _folder);
            TunedParts parts = TunedParts.Choose(
                spec, arguments, TunedParts.AdapterOf(arguments, spec), DType.BF16);
            return (Bytes(spec, parts, over.Contains("adamw_bf16")) / (double)(1 << 30))
                .ToString("0.0", CultureInfo.InvariantCulture);
        }
    }

    private static string FileOf(string model, string kind) =>
        $"{model.ToLowerInvariant()}-{kind}.json";

    private static long Bytes(ModelSpec spec, TunedParts parts, bool narrow)
    {
        int moments = narrow ? 2 + 2 : 4 + 4;
        long whole = parts.Tensors.Where(t => t.Type == DType.BF16).Sum(t => t.Shape.Count);
        long adapters = parts.Tensors.Where(t => t.Type == DType.F32).Sum(t => t.Shape.Count);
        return (2 * (spec.Parameters.Count - whole)) + ((2 + 4 + moments + 4) * whole)
            + ((4 + 4 + moments) * adapters);
    }
}
