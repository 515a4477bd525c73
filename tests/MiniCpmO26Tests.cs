using System.Text.Json.Nodes;
using MiniCpmNative.Cli;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// MiniCPM-o 2.6: V-2_6's reference model as an omni one, with tensors of audio and speech in types
/// and shapes of every kind, which come through training bit for bit.
/// </summary>
[TestFixture]
public sealed class MiniCpmO26Tests
{
    // The decoder's numbers of the released model (specification of the family).
    private static readonly (string Key, int Value)[] s_released =
    [
        ("hidden_size", 3584), ("num_hidden_layers", 28), ("num_attention_heads", 28),
        ("num_key_value_heads", 4), ("intermediate_size", 18944), ("vocab_size", 151700),
    ];

    private static readonly (string Name, string Type, long[] Sizes)[] s_speech =
    [
        ("apm.conv1.weight", "BF16", [4, 3, 3]),
        ("apm.embed_positions.weight", "F16", [30, 4]),
        ("apm.layers.0.self_attn.q_proj.bias", "F32", [4]),
        ("audio_projection_layer.linear1.weight", "BF16", [256, 4]),
        ("tts.dvae.coef", "F64", [1, 100, 1]),
        ("tts.head.norm.num_batches_tracked", "I64", []),
        ("tts.head.mask", "BOOL", [3]),
        ("tts.codes", "I8", [2, 1, 2, 1, 2]),
        ("tts.empty", "F32", [0, 7]),
    ];

    private static readonly long s_numbers =
        s_speech.Sum(t => t.Sizes.Aggregate(1L, (product, size) => product * size));

    private string _folder = "", _model = "";

    private TrainArguments Full => V26.Full with
    {
        ModelNameOrPath = _model,
        DataPath = Runs.Data(_folder, "one", "turns"),
        OutputDir = Path.Combine(_folder, "out"),
        MaxSteps = 2,
        LearningRate = 1e-3,
    };

    [SetUp]
    public void MakeModel()
    {
        _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;
        _model = Directory.CreateDirectory(Path.Combine(_folder, "model")).FullName;
        foreach (string file in Directory.GetFiles(V26.Model))
            if (Path.GetFileName(file) != Checkpoint.SingleFile)
                File.WriteAllBytes(
                    Path.Combine(_model, Path.GetFileName(file)), File.ReadAllBytes(file));
        Edit(config =>
        {
            config["architectures"] = new JsonArray("MiniCPMO");
            config["model_type"] = "minicpmo";
            config["version"] = "2.6";
            config["auto_map"]!["AutoModel"] = "modeling_minicpmo.MiniCPMO";
            (config["init_vision"], config["init_audio"], config["init_tts"]) = (true, true, true);
            (config["audio_pool_step"], config["audio_chunk_length"]) = (2, 1.0);
            config["audio_config"] = new JsonObject { ["d_model"] = 4, ["hidden_act"] = "gelu" };
            config["tts_config"] = new JsonObject { ["model_type"] = "conditional_chattts" };
        });
        WriteWeights();
    }

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void TheReleasedModelHasItsPublishedNumberOfParameters()
    {
        Edit(config =>
        {
            foreach (var (key, value) in s_released) config[key] = value;
            // The tower's class defaults are those of the released model.
            config.Remove("vision_config");
        });
        ModelSpec spec = ModelSpec.Read(_model);
        Assert.That(spec.Family.Name, Is.EqualTo("MiniCPM-o-2_6"));
        Assert.That(spec.Parameters.Count, Is.EqualTo(8_099_418_864));
        Edit(config => config.Remove("version"));
        Assert.That(ModelSpec.Read(_model).Family.Name, Is.EqualTo("MiniCPM-o-2_6"));
    }

    [Test]
    public void AdaptersLearnAsThoseOfTheVisionModel()
    {
        var expected = ReferenceText.Json("v26/lora/cases.json").GetProperty("lora_only");
        using var model = TunedModel.Open(V26.Lora with
        {
            ModelNameOrPath = _model,
            LoraWeightPath = V26.Adapter("random_lora_only"),
        });
        Assert.That(model.TotalParameters,
            Is.EqualTo(expected.GetProperty("total").GetInt64() + s_numbers));
        Assert.That(model.ParameterRanges.Count,
            Is.EqualTo(expected.GetProperty("trainable").GetInt64()));
        Trace trace = Trace.Run(
            model, V26.Batch(model.Spec.Rows(), V26.Lora, ["one", "two-small"]), gradients: true);
        double loss = expected.GetProperty("loss").GetDouble();
        Assert.That(trace.Floats["loss"].Values[0], Is.EqualTo(loss).Within(1e-5 * loss));
        V26.AssertGradients(model, expected.GetProperty("gradients"));
    }

    [TestCase(false)]
    [TestCase(true)]
    public void AudioAndSpeechAreWrittenBackBitForBit(bool shards)
    {
        if (shards) WriteWeights(1_500_000);
        TrainArguments arguments = Full with { Bf16 = shards };
        string said = Runs.Train(arguments);
        using Checkpoint before = Checkpoint.Open(_model), after =
            Checkpoint.Open(arguments.OutputDir);
        Assert.That(before.Files, shards ? Has.Count.GreaterThan(3) : Has.Count.EqualTo(1));
        Assert.That(after.Tensors.Select(t => t.Name),
            Is.EquivalentTo(before.Tensors.Select(t => t.Name)));
        foreach (var (name, type, sizes) in s_speech)
        {
            StoredTensor saved = after.Get(name);
            Assert.That((saved.StoredType.Name, saved.SizesText),
                Is.EqualTo((type, $"[{string.Join(", ", sizes)}]")));
            Assert.That(saved.Span.SequenceEqual(before.Get(name).Span), Is.True, name);
        }

        long all = V26.Spec.Parameters.Count;
        Assert.That(said.Replace(",", ""),
            Does.Contain($"{all}").And.Contains($"{all + s_numbers}"));
        Assert.That(after.Get("llm.model.norm.weight").ToFloats(),
            Is.Not.EqualTo(before.Get("llm.model.norm.weight").ToFloats()));
        Assert.That(ModelSpec.Read(arguments.OutputDir).Family.Name, Is.EqualTo("MiniCPM-o-2_6"));
    }

    [Test]
    public void WhereNothingButTheJoinerIsTrainedTheyAreWrittenBackToo()
    {
        TrainArguments arguments = Full with
        {
            TuneLlm = false,
            TuneVision = false,
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
        Assert.That(File.ReadAllBytes(Path.Combine(resumed.OutputDir, Checkpoint.SingleFile))
            .AsSpan().SequenceEqual(File.ReadAllBytes(
                Path.Combine(arguments.OutputDir, Checkpoint.SingleFile))), Is.True);
        using Checkpoint before = Checkpoint.Open(_model), after =
            Checkpoint.Open(arguments.OutputDir);
        foreach (var (name, _, _) in s_speech)
            Assert.That(after.Get(name).Span.SequenceEqual(before.Get(name).Span), Is.True, name);
    }

    [Test]
    public void TheCommandsTakeTheModel()
    {
        string trace = Path.Combine(_folder, "trace.safetensors");
        string[] model =
            ["--model_name_or_path", _model, "--data_path", Runs.Data(_folder, "one", "turns")];
        Run(["data", "check", .. model]);
        Run(["trace", "--rows", "one", "--out", trace, "--gradients", .. model]);
        using var file = SafetensorsFile.Open(trace);
        string[] gradients =
            [.. file.Tensors.Select(t => t.Name).Where(n => n.StartsWith("grad."))];
        Assert.That(gradients, Is.SupersetOf(V26.Spec.Parameters.Names.Select(n => "grad." + n)));
        Assert.That(gradients, Has.None.Contains("apm").And.None.Contains("tts"));
    }

    private static void Run(string[] arguments)
    {
        var (output, error) = (new StringWriter(), new StringWriter());
        int code = new CommandLine(output, error, new Runners()).Run(arguments);
        Assert.That(code, Is.Zero, error.ToString());
    }

    // Random bytes: numbers that are none among them.
    private void WriteWeights(long shardBytes = CheckpointWriter.DefaultShardBytes)
    {
        var random = new Random(7);
        using var original = Checkpoint.Open(V26.Model);
        CheckpointWriter.Write(_model,
            [.. original.Tensors.Select(t => t.ToSave()), .. s_speech.Select(speech =>
            {
                StoredType type = StoredType.Find(speech.Type)!;
                var bytes = new byte[type.Size * speech.Sizes.Aggregate(1L, (n, size) => n * size)];
                random.NextBytes(bytes);
                if (type.Name == "BOOL") bytes = [1, 0, 1];
                return new TensorToSave(
                    speech.Name, type, [.. speech.Sizes], stream => stream.Write(bytes));
            })], shardBytes);
    }

    private void Edit(Action<JsonObject> change)
    {
        string path = Path.Combine(_model, "config.json");
        JsonObject json = JsonNode.Parse(File.ReadAllBytes(path))!.AsObject();
        change(json);
        File.WriteAllText(path, json.ToJsonString());
    }
}
