using System.Text.Json.Nodes;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// lora_weight_path beside the settings of adapters: each is used or refused, and what ran is
/// recorded.
/// </summary>
[TestFixture]
public sealed class AdapterStartTests
{
    private const string All = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj";

    // Rank 4, alpha 4, dropout 0, seven suffixes, nothing trained whole.
    private static readonly string s_suffixes = V26.Adapter("variant_suffixes");

    private string _folder = "";

    [SetUp]
    public void CreateFolder()
    {
        _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;
        File.WriteAllText(Path.Combine(_folder, "rows.json"), """
            [{"conversations": [{"role": "user", "content": "Count."},
              {"role": "assistant", "content": "One, two."}]}]
            """);
    }

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [TestCase("--lora_r 16", "lora_r is 16, the adapter's is 4")]
    [TestCase("--lora_r 64", "lora_r is 64, the adapter's is 4")]
    [TestCase("--lora_alpha 64.5", "lora_alpha is 64.5, the adapter's is 4")]
    [TestCase("--lora_bias all", "lora_bias is all, the adapter's is none")]
    [TestCase("--lora_target_modules [\"v_proj\"]",
        "lora_target_modules is [v_proj], the adapter's is [gate_proj, v_proj,")]
    [TestCase("--lora_r 16 --lora_target_modules v_proj",
        "lora_r is 16, the adapter's is 4; lora_target_modules is \"v_proj\", the adapter's is "
            + "[gate_")]
    [TestCase("--lora_target_modules q_proj v_proj", "lora_target_modules is [q_proj, v_proj]")]
    [TestCase("--lora_target_modules " + All + " --lora_layers_to_transform 1",
        "in layers 1, the adapter's is [gate_proj")]
    [TestCase("--lora_r 8 --lora_alpha 8", "lora_r is 8, the adapter's is 4; lora_alpha is 8")]
    public void WhatTheAdapterCannotChangeIsRefusedWithBothValues(string given, string expected)
    {
        TrainArguments arguments = Read(s_suffixes, given);
        Assert.That(() => BaseModel.Open(arguments).Dispose(), Throws.TypeOf<InputException>()
            .With.Message.StartsWith($"lora_weight_path {s_suffixes}: ")
            .And.Message.Contains(expected).And.Message.Not.Contains("\n"));
    }

    [Test]
    public void EqualValuesAndOtherSpellingsAreFine()
    {
        foreach (string given in (string[])["", "--lora_r 4 --lora_alpha 4.0 --lora_bias none",
            "--lora_target_modules " + All,
            @"--lora_target_modules (llm|vpm)\..*layers\.\d+\.(self_attn|mlp)\."
                + "(q|k|v|o|gate|up|down)_proj"])
        {
            using var source = BaseModel.Open(Read(s_suffixes, given));
            Assert.That(source.Parts.Adapters.List[0].Rank, Is.EqualTo(4));
        }

        // One of layer 1 alone: layers that are not given are the adapter's.
        string layer = V26.Adapter("variant_layer_1");
        AdapterConfig its = AdapterConfig.Read(Path.Combine(layer, AdapterConfig.FileName));
        string names = string.Join(' ', its.Targets.Suffixes);
        using var one = BaseModel.Open(Read(layer, "--lora_target_modules " + names));
        Assert.That(one.Parts.Adapters.List.Select(a => a.Module),
            Is.All.Contains(".layers.1."));
    }

    [Test]
    public void WhatCanChangeIsUsedAndWhatRanIsRecorded()
    {
        TrainArguments arguments = Read(s_suffixes,
            "--lora_dropout 0.25 --modules_to_save resampler --max_steps 1 --save_strategy no "
            + "--report_to none");
        string said = Runs.Train(arguments);
        Assert.That(said, Does.Contain($"starting from adapter {s_suffixes}: lora_r 4, "
            + "lora_alpha 4, lora_dropout 0.25, modules_to_save resampler"));
        JsonNode ran = JsonNode.Parse(
            File.ReadAllText(Path.Combine(arguments.OutputDir, TrainWriter.FileName)))!;
        Assert.That((int?)ran["lora_r"], Is.EqualTo(4));
        Assert.That((double?)ran["lora_alpha"], Is.EqualTo(4));
        Assert.That((double?)ran["lora_dropout"], Is.EqualTo(0.25));
        Assert.That(ran["lora_target_modules"]!.AsArray(), Has.Count.EqualTo(7));
        AdapterConfig saved = AdapterConfig.Read(
            Path.Combine(arguments.OutputDir, AdapterConfig.FileName));
        Assert.That((saved.Rank, saved.Dropout), Is.EqualTo((4, 0.25)));
        Assert.That(saved.ModulesToSave, Is.EqualTo(["resampler"]));
        // Before the first step: the adapter's own values, and the model's in what is new.
        using var model = TunedModel.Open(arguments);
        using var start = AdapterFile.Open(s_suffixes);
        foreach (var (name, stored) in start.Match(V26.Spec.Parameters))
            Assert.That(model.Device.ReadFloats(model.ParameterRanges.Value(name)),
                Is.EqualTo(stored.ToFloats()), name);
        using var weights = Checkpoint.Open(V26.Model);
        string query = "resampler.query";
        Assert.That(model.Device.ReadFloats(model.ParameterRanges.Value(query)),
            Is.EqualTo(weights.Get(query).ToFloats()));
        // What was recorded does the same again, and a result with more goes on as it is.
        string recorded = Path.Combine(arguments.OutputDir, TrainWriter.FileName);
        Assert.That(TrainReader.Read([recorded], "/").LoraDropout, Is.EqualTo(0.25));
        using var more = BaseModel.Open(Read(arguments.OutputDir, ""));
        Assert.That(more.Parts.Layout!.Saved, Has.Count.EqualTo(13));
        Assert.That(() => BaseModel.Open(Read(arguments.OutputDir, "--modules_to_save "
            + "embed_tokens")),
            Throws.TypeOf<InputException>().With.Message.Contains(
                "modules_to_save leaves out (resampler.query,").And.Message.EndsWith(
                "name its modules resampler too"));
    }

    [Test]
    public void ADropoutThatDropsEverythingMustBeReplaced()
    {
        string copy = Directory.CreateDirectory(Path.Combine(_folder, "adapter")).FullName;
        string text = File.ReadAllText(Path.Combine(s_suffixes, AdapterConfig.FileName));
        File.WriteAllText(Path.Combine(copy, AdapterConfig.FileName),
            text.Replace("\"lora_dropout\": 0.0", "\"lora_dropout\": 1"));
        Assert.That(() => Read(copy, ""),
            SafetensorsTests.Refuses("key \"lora_dropout\" is 1, which drops everything"));
        Assert.That(Read(copy, "--lora_dropout 0.5").LoraDropout, Is.EqualTo(0.5));
        Assert.That(() => Read(Path.Combine(_folder, "none"), ""),
            SafetensorsTests.Refuses("none: there is no such folder"));
    }

    private TrainArguments Read(string adapter, string given) => TrainReader.Read(
        [.. $"--model_name_or_path {V26.Model} --data_path rows.json --output_dir out --device cpu "
            .Split(' ', StringSplitOptions.RemoveEmptyEntries),
            "--use_lora", "--tune_llm", "false", "--lora_weight_path", adapter,
            .. given.Split(' ', StringSplitOptions.RemoveEmptyEntries)], _folder);
}
