using System.Runtime.InteropServices;
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
/// Adapters as other tools leave them hold the same values in the same places as PEFT's own file
/// of that adapter, and are saved again as PEFT takes them.
/// </summary>
[TestFixture]
public sealed class ForeignAdapterTests
{
    private static readonly ParameterTable s_table =
        ModelSpec.Read(Path.Combine(ReferenceFile.Root, "v26", "model")).Parameters;

    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void KeysWithTheAdaptersNameAreRead()
    {
        // With magnitudes, and a module that is trained whole.
        AdapterConfig config = AdapterConfig.Read(
            Path.Combine(V26.Adapter("variant_dora"), AdapterConfig.FileName)) with
        { ModulesToSave = ["resampler"] };
        var layout = AdapterLayout.Create(s_table, config, "x");
        int made = 0;
        string peft = Path.Combine(_folder, "peft");
        AdapterFile.Write(peft, config, layout, layout.Tensors.Select(t =>
        {
            float[] values =
                [.. Enumerable.Range(made++, (int)t.Shape.Count).Select(i => i * 0.5f)];
            return new TensorToSave(t.Name, DType.F32, t.Shape, stream =>
                stream.Write(MemoryMarshal.AsBytes(values.AsSpan())));
        }));
        Same(peft, Rewritten(peft, key => key.Replace(".lora_A.", ".lora_A.default.")
            .Replace(".lora_B.", ".lora_B.default.")
            .Replace(".lora_magnitude_vector", ".lora_magnitude_vector.default.weight")
            .Replace(".resampler.", ".resampler.modules_to_save.default.")));
    }

    [Test]
    public void AnAdapterOfTheDecoderAloneIsPutIntoTheModel()
    {
        // Its list of names would match the vision tower's layers too.
        string bare = Rewritten(V26.Adapter("random_lora_only"),
            key => key.Replace("base_model.model.llm.", "base_model.model."),
            config => config["target_modules"] =
                new JsonArray("q_proj", "k_proj", "v_proj", "o_proj"));
        Same(V26.Adapter("random_lora_only"), bare);
        TrainArguments arguments = AdapterSettings.Complete(
            V26.Lora with { DataPath = "rows.json", LoraWeightPath = bare }, _ => false);
        using var source = BaseModel.Open(arguments);
        Assert.That(source.Parts.Adapters.List.Select(a => a.Module), Is.EquivalentTo(
            s_table.Linears.Select(l => l.Name).Where(n => n.StartsWith("llm.") && n[^6..] is
                "q_proj" or "k_proj" or "v_proj" or "o_proj")));
    }

    [Test]
    public void TheFileOfSeveralAdaptersIsRefused()
    {
        int count = 0;
        string several = Rewritten(V26.Adapter("random_lora_only"), key => count++ < 2
            ? "base_model.model.llm.model.layers.0.self_attn.q_proj.lora_A." + $"a{count}.weight"
            : key);
        Assert.That(() => AdapterFile.Open(several), Throws.TypeOf<InputException>()
            .With.Message.Contains("of several adapters"));
    }

    // ms-swift's patterns match what stands around the layers, which it passes over.
    [TestCase("(?!^(resampler))^(llm)(?!.*(lm_head|output|emb|wte|shared)).*", "llm.model.")]
    [TestCase(@"^(llm.model.layers)(?!.*(lm_head|emb)).*", "llm.model.")]
    [TestCase(@"^(llm.*\.layers\.1\b).*", "llm.model.layers.1.")]
    [TestCase(@".*mlp\..*", "mlp.")]
    public void PatternsTakeTheLinearLayersAmongWhatTheyMatch(string pattern, string inside)
    {
        var config =
            new AdapterConfig { Rank = 1, Alpha = 1, Targets = new TargetModules(pattern) };
        var layout = AdapterLayout.Create(s_table, config, "x");
        string[] wanted = [.. s_table.Linears.Select(l => l.Name)
            .Where(n => n.Contains(inside) && !n.Contains("lm_head") && !n.Contains("embed"))];
        Assert.That(wanted, Is.Not.Empty);
        Assert.That(layout.Targets.Select(t => t.Name), Is.EqualTo(wanted));
        // What is saved is a pattern that PEFT takes: of linear layers alone.
        Assert.That(s_table.Modules.Where(layout.Config.Targets.Matches), Is.EquivalentTo(wanted));
        Assert.That(AdapterLayout.Create(s_table, layout.Config, "x").Config.Targets.Pattern,
            Is.EqualTo(layout.Config.Targets.Pattern), "a pattern of linear layers stays");
    }

    private static void Same(string peft, string foreign)
    {
        using var expected = AdapterFile.Open(peft, s_table);
        using var read = AdapterFile.Open(foreign, s_table);
        var values = read.Match(s_table);
        var wanted = expected.Match(s_table);
        Assert.That(values.Keys, Is.EquivalentTo(wanted.Keys));
        foreach (var (name, tensor) in wanted)
            Assert.That(values[name].ToFloats(), Is.EqualTo(tensor.ToFloats()), name);
    }

    private string Rewritten(
        string from, Func<string, string> key, Action<JsonObject>? change = null)
    {
        string to = Path.Combine(_folder, "foreign");
        Directory.CreateDirectory(to);
        using (var file = SafetensorsFile.Open(Path.Combine(from, AdapterFile.WeightsName)))
            SafetensorsWriter.Write(Path.Combine(to, AdapterFile.WeightsName), [.. file.Tensors
                .OrderBy(t => t.Name, StringComparer.Ordinal)
                .Select(t => t.ToSave(t.Type) with { Name = key(t.Name) })]);
        var config = (JsonObject)JsonNode.Parse(
            File.ReadAllText(Path.Combine(from, AdapterConfig.FileName)))!;
        change?.Invoke(config);
        File.WriteAllText(Path.Combine(to, AdapterConfig.FileName), config.ToJsonString());
        return to;
    }
}
