using System.Text.Json;
using System.Text.Json.Nodes;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using NUnit.Framework;
using static MiniCpmNative.Tests.SafetensorsTests;

namespace MiniCpmNative.Tests;

[TestFixture]
public sealed class AdapterTests
{
    private static readonly string s_committed =
        Path.Combine(ReferenceFile.Root, "v26", "adapters");

    private static readonly ParameterTable s_table =
        ModelSpec.Read(Path.Combine(ReferenceFile.Root, "v26", "model")).Parameters;

    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [TestCase("random_lora_only", 16)]
    [TestCase("trained_lora_only", 16)]
    [TestCase("variant_layer_1", 8)]
    [TestCase("variant_suffixes", 46)]
    [TestCase("variant_bias_all", 53)]
    [TestCase("variant_bias_lora_only", 16)]
    [TestCase("peft021_random_lora_only", 16)]
    public void AdaptersOfPeftAreReadWithAllTheirTensors(string name, int tensors)
    {
        using var adapter = AdapterFile.Open(Adapter(name));
        var stored = adapter.Match(s_table);
        Assert.That(stored, Has.Count.EqualTo(tensors));
        using var file = SafetensorsFile.Open(Path.Combine(Adapter(name), AdapterFile.WeightsName));
        Assert.That(stored.Values.Select(t => t.Name),
            Is.EquivalentTo(file.Tensors.Select(t => t.Name)));
        foreach (var (key, tensor) in stored)
            Assert.That(tensor.Name.Replace(".base_layer.", "."),
                Is.EqualTo("base_model.model." + key));
    }

    [Test]
    public void TensorNamesAndShapesOfModulesToSaveAreThoseOfPeft()
    {
        var config = AdapterConfig.Read(ConfigOf("trained_lora_official"));
        var layout = AdapterLayout.Create(s_table, config, "x");
        using var json = JsonDocument.Parse(
            File.ReadAllBytes(
                Path.Combine(s_committed, "peft021_official", "adapter_model_tensors.json")));
        Assert.That(layout.Tensors.Select(t => $"{t.FileName} {t.Shape}")
            .Order(StringComparer.Ordinal),
            Is.EqualTo(json.RootElement.EnumerateObject().Select(p => p.Name + " ["
                + string.Join(", ",
                    p.Value.GetProperty("shape").EnumerateArray().Select(e => e.GetInt32())) + "]")
                .Order(StringComparer.Ordinal)));
        Assert.That(layout.Saved.Sum(t => t.Shape.Count)
            + layout.Targets.Sum(t => 8L * (t.Inputs + t.Outputs)),
            Is.EqualTo(1852736), "trainable parameters that PEFT counts");
    }

    [TestCase("layer_1")]
    [TestCase("suffixes")]
    [TestCase("bias_all")]
    [TestCase("bias_lora_only")]
    [TestCase("rslora")]
    [TestCase("patterns")]
    public void TargetsAreThoseOfPeft(string variant)
    {
        var config = AdapterConfig.Read(ConfigOf("variant_" + variant));
        var layout = AdapterLayout.Create(s_table, config, "x");
        using var json =
            JsonDocument.Parse(File.ReadAllBytes(Path.Combine(s_committed, "modules.json")));
        var expected = json.RootElement.GetProperty(variant).EnumerateObject()
            .Select(p => $"{p.Name} {p.Value[0]} {p.Value[1]} {p.Value[2].GetDouble()}").ToList();
        Assert.That(
            layout.Targets.Select(t => $"{t.Name} {config.RankOf(t.Name)} "
                + $"{config.AlphaPattern.OfModule(t.Name) ?? config.Alpha} "
                + $"{config.ScaleOf(t.Name)}"),
            Is.EquivalentTo(expected));
    }

    [Test]
    public void BiasesOfAdaptedLayersMayBeAbsentAndAreSavedUnderTheNamePeftLoads()
    {
        var config = AdapterConfig.Read(ConfigOf("variant_bias_lora_only"));
        var layout = AdapterLayout.Create(s_table, config, "x");
        string[] expected = [.. from layer in new[] { 0, 1 } from part in new[] { "q", "k", "v" }
            select $"llm.model.layers.{layer}.self_attn.{part}_proj"];
        Assert.That(layout.Biases.Select(b => b.Name),
            Is.EqualTo(expected.Select(m => m + ".bias")));
        AdapterFile.Write(At("a"), config, layout, layout.Tensors.Select(Zeros));
        using var written = AdapterFile.Open(At("a"));
        var stored = written.Match(s_table);
        Assert.That(stored, Has.Count.EqualTo(22));
        Assert.That(stored[expected[0] + ".bias"].Name,
            Is.EqualTo($"base_model.model.{expected[0]}.base_layer.bias"));
    }

    [TestCase("variant_pissa", "init_lora_weights")]
    public void UnsupportedVariantsAreRefusedByTheirKey(string name, string key) =>
        Assert.That(() => AdapterFile.Open(Adapter(name)),
            Refuses($"adapter_config.json: key \"{key}\" ").And.Message.Contain("not supported"));

    [TestCase("fan_in_fan_out", "true")]
    [TestCase("use_qalora", "true")]
    [TestCase("use_bdlora", "{\"nblocks\": 2}")]
    [TestCase("ensure_weight_tying", "true")]
    [TestCase("loftq_config", """{"loftq_bits": 4}""")]
    [TestCase("eva_config", """{"rho": 2.0}""")]
    [TestCase("corda_config", """{"x": 1}""")]
    [TestCase("arrow_config", """{"x": 1}""")]
    [TestCase("megatron_config", """{"x": 1}""")]
    [TestCase("alora_invocation_tokens", "[1]")]
    [TestCase("invented_key", "1")]
    [TestCase("init_lora_weights", "\"pissa_niter_4\"")]
    [TestCase("init_lora_weights", "\"olora\"")]
    [TestCase("init_lora_weights", "\"eva\"")]
    [TestCase("init_lora_weights", "\"loftq\"")]
    public void WhatIsNotSupportedIsRefusedByItsKey(string key, string value) =>
        Assert.That(() => ReadEdited(c => c[key] = JsonNode.Parse(value)),
            Refuses($"adapter_config.json: key \"{key}\" ").And.Message.Contain("not supported"));

    [TestCase("peft_type", "\"LOHA\"", "is \"LOHA\", expected \"LORA\"")]
    [TestCase("peft_type", "null", "key \"peft_type\" is missing")]
    [TestCase("r", "0", "key \"r\" is 0, expected a whole number from 1 to 65,536")]
    [TestCase("lora_alpha", "\"x\"", "key \"lora_alpha\" is \"x\", expected a number from 0")]
    [TestCase("lora_dropout", "2", "key \"lora_dropout\" is 2, expected a number from 0 to 1")]
    [TestCase("bias", "\"some\"", "expected \"none\", \"all\" or \"lora_only\"")]
    [TestCase("target_modules", "null", "key \"target_modules\" is missing")]
    [TestCase("target_modules", "[]", "key \"target_modules\" names no module")]
    [TestCase("target_modules", "[\"\"]", "key \"target_modules\" names no module")]
    [TestCase("target_modules", "\"(\"", "target_modules: \"(\" is not a regular expression")]
    [TestCase("trainable_token_indices", "[1, 1]",
        "key \"trainable_token_indices\" is no token ids, of embed_tokens, as")]
    [TestCase("lora_bias", "1", "key \"lora_bias\" is 1, expected true or false")]
    [TestCase("layers_to_transform", "1",
        "key \"layers_to_transform\" cannot go with a regular expression")]
    [TestCase("layers_to_transform", "[-1]", "key \"layers_to_transform[0]\" is -1")]
    [TestCase("modules_to_save", "[1]", "key \"modules_to_save[0]\" is 1, expected text")]
    public void WrongValuesAreRefused(string key, string value, string expected) =>
        Assert.That(() => ReadEdited(c => c[key] = JsonNode.Parse(value)), Refuses(expected));

    [Test]
    public void UnknownKeysMayBeNeutral() => Assert.DoesNotThrow(() => ReadEdited(c =>
    {
        c["later_a"] = null;
        c["later_b"] = false;
        c["later_c"] = new JsonObject();
        c["later_d"] = new JsonArray();
        c["init_lora_weights"] = "gaussian";
    }));

    // The file that PEFT 0.14 wrote, byte for byte, from what was read of it.
    [TestCase("random_lora_only")]
    [TestCase("trained_lora_only")]
    [TestCase("trained_lora_official")]
    [TestCase("variant_layer_1")]
    [TestCase("variant_suffixes")]
    [TestCase("variant_bias_all")]
    [TestCase("variant_bias_lora_only")]
    public void ConfigurationsAreWrittenAsPeftWritesThem(string name) =>
        Assert.That(AdapterConfig.Read(ConfigOf(name)).ToJson(),
            Is.EqualTo(File.ReadAllText(ConfigOf(name))));

    [Test]
    public void FractionsAreWrittenAsPythonDoes()
    {
        var config =
            AdapterConfig.Read(ConfigOf("trained_lora_only")) with { Dropout = 0.05, Alpha = 2.5 };
        Assert.That(config.ToJson(),
            Does.Contain("\"lora_dropout\": 0.05,").And.Contain("\"lora_alpha\": 2.5,"));
        Assert.That((config with { Dropout = 1e-5 }).ToJson(),
            Does.Contain("\"lora_dropout\": 1e-05,"));
    }

    [Test]
    public void AWrittenAdapterEqualsTheOneItWasReadFrom()
    {
        using var adapter = AdapterFile.Open(Adapter("trained_lora_only"));
        var stored = adapter.Match(s_table);
        var layout = AdapterLayout.Create(s_table, adapter.Config, "x");
        AdapterFile.Write(At("copy"), adapter.Config, layout, layout.Tensors.Select(t =>
            stored[t.Name].ToSave(DType.F32) with { Name = t.Name }));
        foreach (string file in new[] { AdapterFile.WeightsName, AdapterConfig.FileName })
            Assert.That(File.ReadAllBytes(Path.Combine(At("copy"), file)),
                Is.EqualTo(File.ReadAllBytes(
                    Path.Combine(s_committed, "trained_lora_only", file))));
        Assert.That(() =>
            AdapterFile.Write(At("copy"), adapter.Config, layout, []), Throws.ArgumentException);
        Assert.That(() => AdapterFile.Write(At("copy"), adapter.Config, layout,
            layout.Tensors.Select(Zeros).Append(Zeros(new AdapterTensor("x", "x", new Shape(1))))),
            Throws.ArgumentException);
    }

    [Test]
    public void TensorsThatDoNotFitAreListed()
    {
        var config = AdapterConfig.Read(ConfigOf("trained_lora_only"));
        var layout = AdapterLayout.Create(s_table, config, "x");
        AdapterFile.Write(At("a"), config, layout, layout.Tensors.Select(Zeros));
        var tensors = layout.Tensors.Select(t => Zeros(t) with { Name = t.FileName }).ToList();
        tensors[0] = tensors[0] with
        {
            Name =
            "base_model.model.llm.model.layers.7.self_attn.q_proj.lora_A.weight"
        };
        tensors[1] = Zeros(new AdapterTensor(tensors[1].Name, "", new Shape(256, 7)));
        tensors.Add(
            Zeros(new AdapterTensor("base_model.model.resampler.query", "", new Shape(64, 256))));
        SafetensorsWriter.Write(Path.Combine(At("a"), AdapterFile.WeightsName), tensors);
        using var adapter = AdapterFile.Open(At("a"));
        Assert.That(() =>
            adapter.Match(s_table), Refuses("adapter_model.safetensors: the tensors do not fit:"
            + " 1 missing: base_model.model.llm.model.layers.0.self_attn.q_proj.lora_A.weight; 2 "
            + "unmatched:"
            + " base_model.model.llm.model.layers.7.self_attn.q_proj.lora_A.weight (not among "
            + "target_modules),"
            + " base_model.model.resampler.query (not among modules_to_save); 1 misshaped:"
            + " base_model.model.llm.model.layers.0.self_attn.q_proj.lora_B.weight [256, 7] "
            + "(expected [256, 8])"));
    }

    // What PEFT does with each is in the comments of the layout;
    // the names are the official model's.
    [TestCase("""["q_porj"]""",
        "target_modules \"q_porj\" is no module of the model (did you mean \"q_proj\"?)")]
    [TestCase("""["proj"]""", "target_modules \"proj\" is no module")]
    [TestCase("""["self_attn"]""",
        "matches what is no linear layer: llm.model.layers.0.self_attn, ")]
    [TestCase("\"llm.model\"", "matches what is no linear layer: llm.model")]
    [TestCase("\"q_proj\"",
        "target_modules \"q_proj\" matches no linear layer; there are "
            + "llm.model.layers.N.self_attn.q_proj")]
    [TestCase("\"llm.*q_proj.x\"", "matches no linear layer")]
    public void TargetsThatPeftCouldNotUseAreRefused(string targets, string expected) =>
        Assert.That(() =>
            Layout(c => c["target_modules"] = JsonNode.Parse(targets)), Refuses(expected));

    [Test]
    public void ModulesAreTakenByPeftsRules()
    {
        Assert.That(Layout(c => c["target_modules"] = new JsonArray("lm_head", "kv_proj")).Targets
            .Select(t => t.Name), Is.EqualTo(new[] { "llm.lm_head", "resampler.kv_proj" }));
        var both = Layout(c =>
        {
            c["target_modules"] =
                new JsonArray("up_proj", "llm.model.layers.0.mlp.gate_proj", "lm_head");
            c["layers_to_transform"] = 1;
        });
        Assert.That(both.Targets.Select(t => t.Name), Is.EqualTo(new[]
            { "llm.model.layers.0.mlp.gate_proj", "llm.model.layers.1.mlp.up_proj" }),
            "full names skip the layers");
        Assert.That(() => Layout(c =>
        {
            c["target_modules"] = new JsonArray("up_proj");
            c["layers_to_transform"] = new JsonArray(5);
        }), Refuses("\"up_proj\" with layers_to_transform 5 matches no linear layer"));
        Assert.That(() => Layout(c =>
        {
            c["target_modules"] = new JsonArray("up_proj");
            c["layers_to_transform"] = new JsonArray(1);
            c["layers_pattern"] = "blocks";
        }), Refuses("matches no linear layer"));
        Assert.That(() => Layout(c => c["modules_to_save"] = new JsonArray("resampla")),
            Refuses("modules_to_save \"resampla\" is no module of the model (did you mean "
                + "\"resampler\"?)"));
        Assert.That(() => Layout(c =>
        {
            c["target_modules"] = "vpm.*v_proj";
            c["modules_to_save"] = new JsonArray("vpm");
        }), Refuses("matches nothing but layers of modules_to_save, which are trained whole: "
            + "vpm.encoder.layers.0.self_attn.v_proj"));
    }

    [TestCase(@"(?P<part>q|k)_proj", "q_proj", true)]
    [TestCase(@"(?P<c>[ab])(?P=c)", "aa", true)]
    [TestCase(@"(?P<c>[ab])(?P=c)", "ab", false)]
    [TestCase(@"a{,2}", "aa", true)]
    [TestCase(@"a{,2}", "aaa", false)]
    [TestCase(@"a|ab", "ab", true)]
    [TestCase(@"^a\Z", "a", true)]
    [TestCase(@"[]a]+", "]a", true)]
    [TestCase(@"[^]a]", "b", true)]
    [TestCase(@"[[a]+", "[a", true)]
    [TestCase(@"(?<=x)?(?<!y)a", "a", true)]
    [TestCase(@"layers\.\d+", "layers.12", true)]
    [TestCase(@"layers\.\d", "layers.12", false)]
    [TestCase(@"a", "a\n", false)]
    public void PythonsExpressionsMatchAsInPython(string pattern, string text, bool matches) =>
        Assert.That(PythonRegex.FullMatch(pattern).IsMatch(text), Is.EqualTo(matches));

    [TestCase(@"\p{L}+", "contains \"\\p\"")]
    [TestCase(@"(?<a>x)", "contains \"(?<\"")]
    [TestCase(@"(?'a'x)", "contains \"(?'\"")]
    [TestCase(@"a**", "is not a regular expression")]
    [TestCase(@"a\", "is not a regular expression")]
    public void ExpressionsThatPythonDoesNotHaveAreRefused(string pattern, string expected) =>
        Assert.That(() => PythonRegex.FullMatch(pattern), Refuses(expected));

    [Test]
    public void SlowExpressionsAreStopped() =>
        Assert.That(() => new TargetModules("(.*.*)*\\.(.*.*)*\\.x{9}")
            .Matches("llm.model.layers.11.self_attn.q_proj"),
            Refuses("takes too long"));

    [Test]
    public void IncompleteDirectoriesAreNamed()
    {
        Assert.That(() =>
            AdapterFile.Open(At("none")), Refuses($"{At("none")}: there is no such directory"));
        Assert.That(() =>
            AdapterFile.Open(_folder), Refuses("adapter_config.json: there is no such file"));
        File.Copy(ConfigOf("random_lora_only"), At(AdapterConfig.FileName));
        Assert.That(() =>
            AdapterFile.Open(_folder), Refuses("adapter_model.safetensors: there is no such file"));
        File.WriteAllText(At("adapter_model.bin"), "");
        Assert.That(() => AdapterFile.Open(_folder), Refuses("has adapter_model.bin only"));
    }

    // PEFT's file of lora_only biases and that of 0.21 hold the tensors of the random adapter.
    private string Adapter(string name)
    {
        string? full = Environment.GetEnvironmentVariable("CPMX_REFERENCE");
        if (!string.IsNullOrEmpty(full)) return Path.Combine(full, "v26", "adapters", name);
        if (File.Exists(Path.Combine(s_committed, name, AdapterFile.WeightsName)))
            return Path.Combine(s_committed, name);
        string folder = At(name);
        if (Directory.CreateDirectory(folder).EnumerateFiles().Any()) return folder;
        File.Copy(ConfigOf(name), Path.Combine(folder, AdapterConfig.FileName));
        File.Copy(Path.Combine(s_committed, "random_lora_only", AdapterFile.WeightsName),
            Path.Combine(folder, AdapterFile.WeightsName));
        return folder;
    }

    private static string ConfigOf(string name) =>
        Path.Combine(s_committed, name, AdapterConfig.FileName);

    private AdapterConfig ReadEdited(Action<JsonObject> change)
    {
        var json = JsonNode.Parse(File.ReadAllText(ConfigOf("peft021_official")))!.AsObject();
        json["modules_to_save"] = null;
        change(json);
        File.WriteAllText(At(AdapterConfig.FileName), json.ToJsonString());
        return AdapterConfig.Read(At(AdapterConfig.FileName));
    }

    private AdapterLayout Layout(Action<JsonObject> change) =>
        AdapterLayout.Create(s_table, ReadEdited(change), "lora.json");

    private static TensorToSave Zeros(AdapterTensor tensor) => new(
        tensor.Name, DType.F32, tensor.Shape, stream =>
            stream.Write(new byte[tensor.Shape.Count * 4]));

    private string At(string name) => Path.Combine(_folder, name);
}
