using System.Text.Json;
using MiniCpmNative.Cli;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Replicated layers against PEFT's on model.llm (tests/reference/adapters): three layers, of which
/// the last two have the weights of one.
/// </summary>
[TestFixture]
public sealed class ReplicationTests
{
    private static readonly string s_adapter =
        Path.Combine(ReferenceFile.Root, "adapters", "replication_whole");

    private static readonly TrainArguments s_replicated = V26.Lora with
    {
        LoraTargetModules = new TargetModules(@"llm\..*self_attn\.(q_proj|v_proj)"),
        LoraLayerReplication = LayerRanges.Of(
            JsonDocument.Parse("[[0, 2], [1, 2]]").RootElement),
    };

    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void LogitsAndGradientsAreThoseOfPeft()
    {
        JsonElement expected = ReferenceText.Json("adapters/replication.json");
        using var model = TunedModel.Open(AdapterSettings.Complete(
            V26.Lora with { LoraWeightPath = s_adapter }, key => key == "modules_to_save"));
        Assert.That(model.Parts.Config!.LayerReplication!.Layers, Is.EqualTo(
            ReferenceText.Ints(expected.GetProperty("layers"))));
        Trace trace = Trace.Run(model, V26.Batch(V26.Full, "one", "two-small"), gradients: true);
        JsonElement whole = expected.GetProperty("whole"), text = expected.GetProperty("text");
        double loss = whole.GetProperty("loss").GetDouble();
        Assert.That(trace.Floats["loss"].Values[0], Is.EqualTo(loss).Within(1e-5 * loss));
        V26.AssertClose("logits", trace.Floats["logits"], whole.GetProperty("logits"));
        foreach (var tensor in text.GetProperty("gradients").EnumerateObject())
        {
            string name = V26.Name(tensor.Name).Replace("model.layers", "llm.model.layers");
            var wanted = Fingerprint.Read(tensor.Value);
            Assert.That(Fingerprint.Of(V26.Gradient(model, name), wanted.Shape).NormError(wanted),
                Is.LessThan(1e-4), name);
        }

        // The file that is saved is PEFT's.
        ModelFiles.Save(_folder, model, s_replicated);
        using var saved = SafetensorsFile.Open(Path.Combine(_folder, AdapterFile.WeightsName));
        using var theirs = SafetensorsFile.Open(Path.Combine(s_adapter, AdapterFile.WeightsName));
        Assert.That(saved.Tensors.Select(t => t.Name), Is.EquivalentTo(
            theirs.Tensors.Select(t => t.Name)));
        foreach (StoredTensor tensor in theirs.Tensors)
            Assert.That(saved.Get(tensor.Name).ToFloats(), Is.EqualTo(tensor.ToFloats()));
        Assert.That(
            AdapterConfig.Read(Path.Combine(_folder, AdapterConfig.FileName)).ToJson(),
            Is.EqualTo(File.ReadAllText(Path.Combine(_folder, AdapterConfig.FileName))));
    }

    [Test]
    public void NewAdaptersLeaveTheReplicatedModelAsItIs()
    {
        using var model = TunedModel.Open(s_replicated);
        Assert.That(model.Parts.Adapters.List.Select(a => a.Module),
            Has.Exactly(2).StartsWith("llm.model.layers.2."));
        Trace trace = Trace.Run(model, V26.Batch(V26.Full, "one", "two-small"), gradients: false);
        V26.AssertClose("logits", trace.Floats["logits"],
            ReferenceText.Json("adapters/replication.json").GetProperty("base"));
    }

    [Test]
    public void MergedLayersAreWrittenOneByOne()
    {
        string merged = Path.Combine(_folder, "merged");
        var output = new StringWriter();
        // Its own check compares the logits.
        Assert.That(new CommandLine(output, output, new Runners()).Run(
            ["merge", V26.Model, "--adapter", s_adapter, "--out", merged]), Is.Zero,
            $"{output}");
        using var model = TunedModel.Open(V26.Full with { ModelNameOrPath = merged });
        Assert.That(model.Spec.Decoder.Layers, Is.EqualTo(3));
        Trace trace = Trace.Run(model, V26.Batch(V26.Full, "one", "two-small"), gradients: false);
        V26.AssertClose("logits", trace.Floats["logits"], ReferenceText.Json(
            "adapters/replication.json").GetProperty("whole").GetProperty("logits"), 1e-3);
    }

    [TestCase("[[0, 3]]", "the decoder has 2 layers, expected ends up to that")]
    [TestCase("[[1, 1]]", "expected ranges of layers as [[0, 3], [2, 4]]")]
    [TestCase("1", "expected ranges of layers as")]
    public void WrongRangesAreNamed(string ranges, string expected) => Assert.That(
        () => BaseModel.Open(TrainReader.Read(
            ["--use_lora", "--tune_llm", "false", "--model_name_or_path", V26.Model,
                "--data_path", V26.Rows, "--lora_layer_replication", ranges], _folder)).Dispose(),
        SafetensorsTests.Refuses(expected));
}
