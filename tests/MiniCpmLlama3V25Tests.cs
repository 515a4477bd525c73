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
/// What is MiniCPM-Llama3-V 2.5's own: pictures as padded strips, F16 shards, its released
/// configuration. Everything that families share is in <see cref="FamilyModelTests"/>.
/// </summary>
[TestFixture]
public sealed class MiniCpmLlama3V25Tests
{
    // config.json of the released model.
    private const string Released = """
        {
          "version": "2.5", "architectures": ["MiniCPMV"], "attention_bias": false,
          "attention_dropout": 0.0, "batch_vision_input": true, "bos_token_id": 128000,
          "drop_vision_last_layer": false, "eos_token_id": 128001, "hidden_act": "silu",
          "hidden_size": 4096, "image_size": 448, "initializer_range": 0.02,
          "intermediate_size": 14336, "max_position_embeddings": 8192,
          "mm_use_im_start_end": true, "model_type": "minicpmv", "num_attention_heads": 32,
          "num_hidden_layers": 32, "num_key_value_heads": 8, "patch_size": 14,
          "pretraining_tp": 1, "query_num": 96, "rms_norm_eps": 1e-05, "rope_scaling": null,
          "rope_theta": 500000.0,
          "slice_config": {"max_slice_nums": 9, "patch_size": 14, "model_type": "minicpmv"},
          "slice_mode": true, "tie_word_embeddings": false, "torch_dtype": "float16",
          "use_cache": false,
          "vision_config": {"hidden_size": 1152, "image_size": 980, "intermediate_size": 4304,
            "model_type": "idefics2", "num_attention_heads": 16, "num_hidden_layers": 27,
            "patch_size": 14},
          "vocab_size": 128256
        }
        """;

    private const int Vocabulary = 624;

    private static readonly FamilyCase s_family = FamilyCase.Of("l3");

    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void TheReleasedModelIsReadAndHasItsPublishedNumberOfParameters()
    {
        File.WriteAllText(Path.Combine(_folder, "config.json"), Released);
        ModelSpec spec = ModelSpec.Read(_folder);
        Assert.That(spec.Family.Name, Is.EqualTo("MiniCPM-Llama3-V-2_5"));
        Assert.That(spec.Parameters.All.Sum(t => t.Shape.Count), Is.EqualTo(8_537_092_336));
        Assert.That(spec.Vision, Is.EqualTo(
            new VisionSpec(1152, 4304, 27, 16, 3, 14, 70, 1e-6f, false)
            {
                Layout = new StripLayout(Padded: true),
            }));
        Assert.That(spec.Resampler,
            Is.EqualTo(new ResamplerSpec(4096, 1152, 96, CallsOutProj: false)));
        Assert.That(spec.Decoder, Is.EqualTo(new DecoderSpec(128256, 4096, 14336, 32, 32, 8, 128,
            1e-5f, false, false, 500000, RopeScaling.None, 8192, FinalNormDecays: false)));
        Assert.That(spec.Slicing, Is.EqualTo(new SlicingSpec(9, 448, 14)));
        Assert.That(spec.Parameters.Find("llm.model.norm.weight")!.Decays, Is.False);
    }

    [Test]
    public void AbsentKeysHaveTheDefaultsOfItsClass()
    {
        JsonNode config = JsonNode.Parse(Released)!;
        foreach (string key in (string[])["batch_vision_input", "drop_vision_last_layer",
            "query_num", "slice_config", "version"])
            config.AsObject().Remove(key);
        // Its class knows no other slice_mode, whatever the file says.
        config["slice_mode"] = false;
        File.WriteAllText(Path.Combine(_folder, "config.json"), config.ToJsonString());
        ModelSpec spec = ModelSpec.Read(_folder);
        Assert.That(spec.Family.Name, Is.EqualTo("MiniCPM-Llama3-V-2_5"));
        Assert.That(spec.Vision.Layout, Is.EqualTo(new StripLayout(Padded: true)));
        Assert.That((spec.Vision.Layers, spec.Resampler.Queries, spec.SliceMode),
            Is.EqualTo((26, 64, true)));
        Assert.That(spec.Slicing, Is.EqualTo(new SlicingSpec(1, 448, 14)));
        foreach (bool official in (bool[])[false, true])
            Assert.That(spec.TrainsImageId(new TrainArguments { OfficialCompat = official }),
                Is.False);
    }

    [TestCase("batch_vision_input", "\"yes\"",
        "key \"batch_vision_input\" is \"yes\", expected true or false")]
    [TestCase("rope_scaling", """{"type": "linear", "factor": 2}""",
        "is \"linear\", which is not supported for MiniCPM-Llama3-V-2_5")]
    public void WhatItCannotBeIsRefused(string key, string value, string expected)
    {
        JsonNode config = JsonNode.Parse(Released)!;
        config[key] = JsonNode.Parse(value);
        File.WriteAllText(Path.Combine(_folder, "config.json"), config.ToJsonString());
        Assert.That(() => ModelSpec.Read(_folder), SafetensorsTests.Refuses(expected));
    }

    [Test]
    public void PatchesArePlacedAlongAStripOfAnyLength()
    {
        if (!ReferenceText.Has("l3/position_ids.safetensors"))
            Assert.Ignore("all lengths are in the full reference only");
        int[] all = ReferenceFile.Open("l3/position_ids").Ints("ids");
        var layout = new StripLayout(Padded: true);
        for (int n = 1, begin = 0; n <= 1200; begin += n++)
        {
            var ids = new int[n];
            layout.Positions(n, 1, 70, ids);
            Assert.That(ids.AsSpan().SequenceEqual(all.AsSpan(begin, n)), Is.True, $"{n}");
        }
    }

    [Test]
    public void APicturesFeaturesDependOnThePicturesBesideIt()
    {
        var quirk = s_family.Results.GetProperty("padding_quirk");
        string[] rows = [.. quirk.GetProperty("batch").EnumerateArray()
            .Select(r => r.GetString()!)];
        string row = quirk.GetProperty("row").GetString()!;
        Assert.That(rows[0], Is.EqualTo(row));
        float[] alone = Logits(s_family.Lora, row), beside = Logits(s_family.Lora, rows);
        // The reference compares logits of the tokens that have a label.
        double largest = 0;
        foreach (int token in s_family.Batch(s_family.Lora, row).LabelRows.Span)
            for (int i = token * Vocabulary; i < (token + 1) * Vocabulary; i++)
                largest = Math.Max(largest, Math.Abs(alone[i] - beside[i]));
        Assert.That(largest, Is.EqualTo(
            quirk.GetProperty("largest_logit_difference").GetDouble()).Within(1e-4));
    }

    [Test]
    public void WithoutBatchVisionInputEachPictureIsEncodedAlone()
    {
        TrainArguments arguments = s_family.Full with
        {
            ModelNameOrPath = Files(config => config["batch_vision_input"] = false),
        };
        File.Copy(Path.Combine(s_family.Model, Checkpoint.SingleFile),
            Path.Combine(arguments.ModelNameOrPath!, Checkpoint.SingleFile));
        using var model = TunedModel.Open(arguments);
        var expected = s_family.Results.GetProperty("batch_vision_input_false");
        double loss = expected.GetProperty("loss").GetDouble();
        Trace trace = Trace.Run(
            model, s_family.Batch(arguments, s_family.Pair), gradients: false);
        Assert.That(trace.Floats["loss"].Values[0], Is.EqualTo(loss).Within(1e-5 * loss));
        Assert.That(trace.Ints["vision.position_ids"].Values,
            Has.Length.EqualTo(63 + 70 + 63 + 63));
    }

    [Test]
    public void ShardsInF16AreTheModelWhateverTheIndexSaysOfTheirSize()
    {
        // F16 has more digits than BF16, but smaller numbers are rounded there.
        using var original = Checkpoint.Open(s_family.Model);
        float[] Rounded(string name) => Array.ConvertAll(
            original.Get(name).ToFloats(), v => (float)(Half)v);
        string Make(DType type, long shard)
        {
            string folder = Files(_ => { });
            MadeModel.Write(folder, s_family.Spec, Rounded, type, shard);
            return folder;
        }

        string whole = Make(DType.F32, CheckpointWriter.DefaultShardBytes);
        string shards = Make(DType.F16, 2_000_000);
        Assert.That(Directory.GetFiles(shards, "*.safetensors"), Has.Length.GreaterThan(3));
        string index = Path.Combine(shards, Checkpoint.IndexFile);
        JsonNode json = JsonNode.Parse(File.ReadAllBytes(index))!;
        json["metadata"]!["total_size"] = 4 * s_family.Spec.Parameters.Count;
        File.WriteAllText(index, json.ToJsonString());
        Assert.That(Logits(s_family.Lora with { ModelNameOrPath = shards }, "one"), Is.EqualTo(
            Logits(s_family.Lora with { ModelNameOrPath = whole }, "one")));
    }

    [TestCase(true)]
    [TestCase(false)]
    public void OtherSizesHaveTheGradientsOfTheirLoss(bool padded)
    {
        // Heads of 64, three query heads per key head, 16 queries, a tied head, a dropped vision
        // layer, a position table of 32 x 32; a picture of one row of patches beside others.
        void Edit(JsonObject config)
        {
            foreach (var (key, value) in new Dictionary<string, JsonNode>
            {
                ["batch_vision_input"] = padded,
                ["hidden_size"] = 384,
                ["num_attention_heads"] = 6,
                ["num_key_value_heads"] = 2,
                ["intermediate_size"] = 333,
                ["vocab_size"] = 631,
                ["query_num"] = 16,
                ["tie_word_embeddings"] = true,
                ["rope_theta"] = 10000,
                ["drop_vision_last_layer"] = true,
            })
                config[key] = value;
            var vision = config["vision_config"]!;
            (vision["hidden_size"], vision["intermediate_size"], vision["image_size"]) =
                (128, 201, 448);
        }

        string folder = Files(Edit);
        ModelSpec spec = ModelSpec.Read(folder);
        MadeModel.Write(folder, spec, seed: 5);
        TrainArguments arguments = s_family.Full with { ModelNameOrPath = folder };
        using var model = TunedModel.Open(arguments);
        Assert.That(model.ParameterRanges.Count, Is.EqualTo(model.TotalParameters));
        Batch batch = s_family.Batch(arguments, "very_long", "text", "sliced");
        Assert.That(batch.Grids.Span.ToArray(), Is.EqualTo((int[])[1, 79, 7, 10, 9, 7, 9, 7]));
        double loss = V26.Gradients(model, arguments, batch).Loss;
        Assert.That(loss, Is.InRange(0.5 * Math.Log(631), 3 * Math.Log(631)));
        foreach (string part in (string[])["vpm.", "resampler.", "llm.model.layers.0.",
            "llm.model.layers.1.", "llm.model.embed_tokens"])
            MadeModel.AssertSlope(model, batch, part);
    }

    /// <summary>A new folder with the model's small files, its configuration edited.</summary>
    private string Files(Action<JsonObject> edit)
    {
        string folder =
            Directory.CreateDirectory(Path.Combine(_folder, Path.GetRandomFileName())).FullName;
        foreach (string file in Directory.GetFiles(s_family.Model, "*.json"))
            File.WriteAllBytes(
                Path.Combine(folder, Path.GetFileName(file)), File.ReadAllBytes(file));
        JsonObject config = Edit("config.json", edit);
        Edit("preprocessor_config.json",
            json => json["image_feature_size"] = (int)config["query_num"]!);
        return folder;

        JsonObject Edit(string name, Action<JsonObject> change)
        {
            string path = Path.Combine(folder, name);
            JsonObject json = JsonNode.Parse(File.ReadAllBytes(path))!.AsObject();
            change(json);
            File.WriteAllText(path, json.ToJsonString());
            return json;
        }
    }

    private static float[] Logits(TrainArguments arguments, params string[] rows)
    {
        using var model = TunedModel.Open(arguments);
        return Trace.Run(model, s_family.Batch(arguments, rows), gradients: false)
            .Floats["logits"].Values;
    }
}
