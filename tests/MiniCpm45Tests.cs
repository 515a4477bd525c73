using System.Text.Json.Nodes;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using NUnit.Framework;
using static MiniCpmNative.Tests.SafetensorsTests;

namespace MiniCpmNative.Tests;

/// <summary>
/// What MiniCPM-V 4.5 and MiniCPM-o 4.5 have of their own: configurations, normalised queries and
/// keys at other sizes than those of their reference models.
/// </summary>
[TestFixture("v45", "MiniCPM-V-4_5")]
[TestFixture("o45", "MiniCPM-o-4_5")]
public sealed class MiniCpm45Tests(string name, string family)
{
    private readonly ReferenceModel _reference = ReferenceModel.Of(name);
    private string _folder = "";

    [SetUp]
    public void CreateFolder()
    {
        _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;
        foreach (string file in Directory.GetFiles(_reference.Spec.Directory, "*.json"))
            File.WriteAllBytes(
                Path.Combine(_folder, Path.GetFileName(file)), File.ReadAllBytes(file));
    }

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    // The decoder's numbers of the released models (specification of the family); the tower's are
    // its class defaults.
    [Test]
    public void TheReleasedModelHasItsPublishedNumberOfParameters()
    {
        Edit("config.json", config =>
        {
            foreach (var (key, value) in new (string, int)[]
            {
                ("hidden_size", 4096), ("num_hidden_layers", 36), ("num_attention_heads", 32),
                ("num_key_value_heads", 8), ("head_dim", 128), ("intermediate_size", 12288),
                ("vocab_size", 151748), ("max_position_embeddings", 40960), ("query_num", 64),
            }) config[key] = value;
            config.Remove("vision_config");
        });
        Edit("preprocessor_config.json", json => json["image_feature_size"] = 64);
        ModelSpec spec = ModelSpec.Read(_folder);
        Assert.That(spec.Parameters.Count, Is.EqualTo(8_695_895_280));
        Assert.That(spec.Decoder, Is.EqualTo(new DecoderSpec(151748, 4096, 12288, 36, 32, 8, 128,
            1e-6f, QkvBias: false, TiedHead: false, 1e6, RopeScaling.None, 40960, QkNorm: true)));
    }

    [Test]
    public void KeysOfVideoAudioAndSpeechAreLeftAlone()
    {
        Edit("config.json", config =>
        {
            config["batch_3d_resampler"] = true;
            config["max_temporal_ids"] = 72000;
            config["temporal_ids"] = new JsonArray(-1);
            config["audio_config"] = new JsonObject { ["d_model"] = 384, ["hidden_act"] = "gelu" };
            config["tts_config"] = new JsonObject { ["num_attention_heads"] = 7 };
            (config["init_audio"], config["init_tts"]) = (true, true);
            config["version"] = "4.5";
        });
        Edit("preprocessor_config.json", json =>
        {
            json["feature_extractor_type"] = "MiniCPMAAudioProcessor";
            (json["packing"], json["temporal_ids"]) = (3, null);
        });
        ModelSpec spec = ModelSpec.Read(_folder);
        Assert.That(spec.Family.Name, Is.EqualTo(family));
        ModelSpec plain = _reference.Spec;
        Assert.That((spec.Vision, spec.Resampler, spec.Decoder, spec.Slicing),
            Is.EqualTo((plain.Vision, plain.Resampler, plain.Decoder, plain.Slicing)));
        Assert.That(spec.Processor.Tokens, Is.EqualTo(plain.Processor.Tokens));
        foreach (string part in (string[])[
            "apm.conv1.weight", "audio_projection_layer.linear1.bias", "tts.head_code.0"])
            Assert.That(spec.Parameters.IsUntouched(part), Is.EqualTo(name == "o45"), part);
    }

    [Test]
    public void WithoutNormsOfQueriesAndKeysItIsNoneOfThem()
    {
        var tensors = _reference.Spec.Parameters.All
            .Where(p => !p.Name.EndsWith("layers.1.self_attn.k_norm.weight"))
            .Select(p => new TensorToSave(p.Name, DType.BF16, p.Shape,
                stream => stream.Write(new byte[p.Shape.Count * 2])));
        CheckpointWriter.Write(_folder, [.. tensors]);
        Assert.That(
            () => TunedModel.Open(_reference.Full with { ModelNameOrPath = _folder }),
            Refuses("1 missing: llm.model.layers.1.self_attn.k_norm.weight"));
    }

    [Test]
    public void OtherSizesHaveTheGradientsOfTheirLoss()
    {
        // Heads of 40 whose sum is not the width, three query heads per key head, another base of
        // the positions and of the norms, a tied head.
        Edit("config.json", config =>
        {
            foreach (var (key, value) in new Dictionary<string, JsonNode>
            {
                ["num_attention_heads"] = 6,
                ["num_key_value_heads"] = 2,
                ["head_dim"] = 40,
                ["intermediate_size"] = 333,
                ["vocab_size"] = 711,
                ["query_num"] = 9,
                ["tie_word_embeddings"] = true,
                ["rope_theta"] = 10000,
                ["rms_norm_eps"] = 1e-3,
                ["drop_vision_last_layer"] = true,
            }) config[key] = value;
        });
        Edit("preprocessor_config.json", json => json["image_feature_size"] = 9);
        ModelSpec spec = ModelSpec.Read(_folder);
        MadeModel.Write(_folder, spec, seed: 5);
        TrainArguments arguments = _reference.Full with { ModelNameOrPath = _folder };
        using var model = TunedModel.Open(arguments);
        Assert.That(model.ParameterRanges.Count, Is.EqualTo(model.TotalParameters));
        Batch batch = V26.Batch(
            spec.Rows(), arguments, [name == "o45" ? "sliced" : "turns", "text0"]);
        double loss = V26.Gradients(model, arguments, batch).Loss;
        Assert.That(loss, Is.InRange(0.5 * Math.Log(711), 3 * Math.Log(711)));
        foreach (string part in (string[])["resampler.", "llm.model.layers.0.self_attn.q_norm",
            "llm.model.layers.0.self_attn.k_norm", "llm.model.layers.1.", "llm.model.embed_tokens"])
            MadeModel.AssertSlope(model, batch, part);
    }

    private void Edit(string file, Action<JsonObject> change)
    {
        string path = Path.Combine(_folder, file);
        JsonObject json = JsonNode.Parse(File.ReadAllBytes(path))!.AsObject();
        change(json);
        File.WriteAllText(path, json.ToJsonString());
    }
}
