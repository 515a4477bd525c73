using System.Text.Json.Nodes;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using NUnit.Framework;
using static MiniCpmNative.Tests.SafetensorsTests;

namespace MiniCpmNative.Tests;

[TestFixture]
public sealed class ModelSpecTests
{
    private static readonly string s_model = Path.Combine(ReferenceFile.Root, "v26", "model");

    private string _folder = "";

    [SetUp]
    public void CreateFolder()
    {
        _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;
        foreach (string name
            in new[] { "config.json", "preprocessor_config.json", "generation_config.json" })
            File.WriteAllBytes(At(name), File.ReadAllBytes(Path.Combine(s_model, name)));
    }

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    // The numbers stand in the reference's description of the tiny model.
    [Test]
    public void TheReferenceModelIsRead()
    {
        var spec = ModelSpec.Read(s_model);
        Assert.That(spec.Family.Name, Is.EqualTo("MiniCPM-V-2_6"));
        Assert.That(spec.Vision,
            Is.EqualTo(new VisionSpec(144, 288, 3, 2, 3, 14, 70, 1e-6f, false)));
        Assert.That(spec.Vision.HeadDim, Is.EqualTo(72));
        Assert.That(spec.Resampler, Is.EqualTo(new ResamplerSpec(256, 144, 64)));
        Assert.That((spec.Resampler.Heads, spec.Resampler.HeadDim), Is.EqualTo((2, 128)));
        Assert.That(spec.Decoder, Is.EqualTo(
            new DecoderSpec(576, 256, 512, 2, 2, 1, 128, 1e-6f, true, false, 1e6,
                RopeScaling.None, 32768)));
        Assert.That(spec.Slicing, Is.EqualTo(new SlicingSpec(9, 448, 14)));
        Assert.That((spec.UseImageId, spec.SliceMode), Is.EqualTo((true, true)));
        Assert.That(spec.Processor.Slicing, Is.EqualTo(new SlicingSpec(9, 448, 14)));
        Assert.That(spec.Processor.UseImageId, Is.True);
        Assert.That(spec.Processor.Mean, Is.EqualTo(new[] { 0.5, 0.5, 0.5 }));
        Assert.That(spec.Processor.Std, Is.EqualTo(new[] { 0.5, 0.5, 0.5 }));
        Assert.That(spec.Processor.Tokens, Is.EqualTo(new PlaceholderTokens(
            "<image>", "</image>", "<slice>", "</slice>", "<unk>", "<image_id>", "</image_id>")));
        Assert.That(spec.Generation.BosTokenId, Is.EqualTo(500));
        Assert.That(spec.Generation.EosTokenIds, Is.EqualTo(new[] { 502 }));
        Assert.That(spec.ModelClass, Is.EqualTo(new ModelClass("MiniCPMV", "modeling_minicpmv")));
    }

    [Test]
    public void ItsParametersAreThoseOfItsFile()
    {
        var spec = ModelSpec.Read(s_model);
        using var checkpoint = Checkpoint.Open(s_model);
        var matched = checkpoint.MustMatch(spec.Parameters);
        Assert.That(matched.Select(t => t.Name), Is.EqualTo(spec.Parameters.Names));
        Assert.That(matched, Has.Count.EqualTo(93));
        foreach (var linear in spec.Parameters.Linears)
        {
            Assert.That(checkpoint.Get(linear.Name + ".weight").Shape,
                Is.EqualTo(new Shape(linear.Outputs, linear.Inputs)));
            Assert.That(checkpoint.Find(linear.Name + ".bias") is not null,
                Is.EqualTo(linear.HasBias));
        }
    }

    // Sizes of the released model (spec of the family); 8,099,175,152 is the published total.
    [Test]
    public void TheReleasedModelHasItsPublishedNumberOfParameters()
    {
        Edit("config.json", c =>
        {
            foreach (var (key, value) in new (string, int)[]
            {
                ("hidden_size", 3584),
                ("num_hidden_layers", 28),
                ("num_attention_heads", 28),
                ("num_key_value_heads", 4),
                ("intermediate_size", 18944),
                ("vocab_size", 151666),
            }) c[key] = value;
            c["sliding_window"] = 131072;
            c["vision_config"] = new JsonObject
            {
                ["hidden_size"] = 1152,
                ["image_size"] = 980,
                ["intermediate_size"] = 4304,
                ["model_type"] = "siglip",
                ["num_attention_heads"] = 16,
                ["num_hidden_layers"] = 27,
                ["patch_size"] = 14,
            };
        });
        var spec = ModelSpec.Read(_folder);
        Assert.That(spec.Parameters.All.Sum(t => t.Shape.Count), Is.EqualTo(8_099_175_152));
        Assert.That(spec.Resampler.Heads, Is.EqualTo(28));

        Edit("config.json", c => c.Remove("vision_config"));
        Assert.That(ModelSpec.Read(_folder).Vision, Is.EqualTo(spec.Vision));
    }

    [Test]
    public void AbsentKeysHaveTheDefaultsOfTheOfficialClasses()
    {
        string[] absent =
        [
            "drop_vision_last_layer", "query_num", "use_image_id", "vision_batch_size",
            "slice_config",
            "slice_mode", "tie_word_embeddings", "rms_norm_eps", "rope_theta", "version",
        ];
        foreach (string key in absent)
            Edit("config.json", c => c.Remove(key));
        File.Delete(At("preprocessor_config.json"));
        File.Delete(At("generation_config.json"));
        var spec = ModelSpec.Read(_folder);
        Assert.That(spec.Vision.Layers, Is.EqualTo(2));
        Assert.That(spec.Vision.DropsLastLayer);
        Assert.That(spec.Parameters.Find("vpm.encoder.layers.1.mlp.fc1.bias"), Is.Not.Null);
        Assert.That(spec.Parameters.Find("vpm.encoder.layers.2.mlp.fc1.bias"), Is.Null);
        Assert.That(spec.Resampler.Queries, Is.EqualTo(64));
        Assert.That(spec.Slicing, Is.EqualTo(new SlicingSpec(1, 448, 14)));
        Assert.That((spec.UseImageId, spec.SliceMode, spec.Decoder.TiedHead),
            Is.EqualTo((true, true, false)));
        Assert.That((spec.Decoder.RmsNormEpsilon, spec.Decoder.RopeTheta),
            Is.EqualTo((1e-6f, 1e4)));
        Assert.That(spec.Processor.UseImageId,
            "config.json decides without a preprocessor_config.json");
        Assert.That(spec.Generation.EosTokenIds, Is.EqualTo(new[] { 502 }), "from config.json");

        File.WriteAllText(At("preprocessor_config.json"), "{}");
        var bare = ModelSpec.Read(_folder).Processor;
        Assert.That(bare.UseImageId, Is.False);
        Assert.That(bare.Slicing, Is.EqualTo(new SlicingSpec(9, 448, 14)));
        Assert.That(bare.Tokens, Is.EqualTo(ModelSpec.Read(s_model).Processor.Tokens));
    }

    [Test]
    public void NumbersComeFromTheFiles()
    {
        Edit("config.json", c =>
        {
            c["query_num"] = 16;
            c["rope_theta"] = 5e5;
            c["head_dim"] = 64;
            c["tie_word_embeddings"] = true;
            c["rope_scaling"] = new JsonObject { ["rope_type"] = "default" };
            c["slice_config"] = new JsonObject { ["scale_resolution"] = 112 };
            c["vision_config"]!["image_size"] = 448;
            c["vision_config"]!["layer_norm_eps"] = 1e-5;
        });
        Edit("preprocessor_config.json", c =>
        {
            c["image_feature_size"] = 16;
            c["norm_mean"] = new JsonArray(0.1, 0.2, 0.3);
            c["im_start"] = "<pic>";
        });
        Edit("generation_config.json", c => c["eos_token_id"] = new JsonArray(7, 8));
        var spec = ModelSpec.Read(_folder);
        Assert.That(spec.Resampler.Queries, Is.EqualTo(16));
        Assert.That((spec.Decoder.HeadDim, spec.Decoder.RopeTheta), Is.EqualTo((64, 5e5)));
        Assert.That(spec.Parameters.Find("llm.model.layers.0.self_attn.o_proj.weight")!.Shape,
            Is.EqualTo(new Shape(256, 128)));
        Assert.That(spec.Parameters.Find("llm.lm_head.weight"), Is.Null);
        Assert.That(spec.Slicing, Is.EqualTo(new SlicingSpec(9, 112, 14)));
        Assert.That(spec.Vision.PositionsPerSide, Is.EqualTo(32));
        Assert.That(spec.Vision.LayerNormEpsilon, Is.EqualTo(1e-5f));
        Assert.That(spec.Processor.Mean, Is.EqualTo(new[] { 0.1, 0.2, 0.3 }));
        Assert.That(spec.Processor.Tokens.ImageStart, Is.EqualTo("<pic>"));
        Assert.That(spec.Generation.EosTokenIds, Is.EqualTo(new[] { 7, 8 }));
    }

    [TestCase("v2", "MiniCPM-V-2")]
    [TestCase("l3", "MiniCPM-Llama3-V-2_5")]
    [TestCase("v4", "MiniCPM-V-4")]
    [TestCase("v45", "MiniCPM-V-4_5")]
    [TestCase("o45", "MiniCPM-o-4_5")]
    [TestCase("v46", "MiniCPM-V-4_6")]
    public void FamiliesAreToldApart(string file, string name)
    {
        File.Copy(Path.Combine(ReferenceFile.Root, "families", file + ".json"),
            At("config.json"), true);
        Assert.That(Families.Require(ModelConfig.Open(_folder)).Name, Is.EqualTo(name));
    }

    [TestCase("""{"model_type": "minicpmo", "version": "3.1"}""",
        "MiniCPM-o-3_1 is not supported yet")]
    [TestCase("""{"model_type": "minicpmv", "version": 9}""", "MiniCPM-V-9 is not supported yet")]
    [TestCase("""{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}""",
        "model type \"qwen2\" (architecture \"Qwen2ForCausalLM\") is not supported yet")]
    [TestCase("""{"model_type": "minicpmv4_8"}""",
        "config.json: MiniCPM-V-4_8 is not supported yet; supported: MiniCPM-V-2")]
    [TestCase("{}", "model type \"\" (architecture \"\") is not supported yet")]
    public void ForeignModelsAreRefusedByName(string config, string expected)
    {
        File.WriteAllText(At("config.json"), config);
        Assert.That(() => ModelSpec.Read(_folder), Refuses(expected));
    }

    [TestCase("hidden_size", "null", "key \"hidden_size\" is missing")]
    [TestCase("hidden_size", "0",
        "key \"hidden_size\" is 0, expected a whole number from 1 to 131,072")]
    [TestCase("hidden_size", "9999999999", "expected a whole number from 1 to 131,072")]
    [TestCase("hidden_size", "255", "expected a multiple of num_attention_heads (2)")]
    [TestCase("hidden_size", "388", "is 388, expected a multiple of 4")]
    [TestCase("hidden_size", "4096",
        "an even number up to 1024 for each of the num_attention_heads")]
    [TestCase("hidden_size", "\"256\"", "key \"hidden_size\" is \"256\", expected a whole number")]
    [TestCase("head_dim", "127", "an even number up to 1024")]
    [TestCase("num_key_value_heads", "3", "expected a multiple of num_key_value_heads (3)")]
    [TestCase("num_hidden_layers", "1001", "expected a whole number from 1 to 1,000")]
    [TestCase("vocab_size", "-1", "key \"vocab_size\" is -1")]
    [TestCase("hidden_act", "\"gelu\"", "key \"hidden_act\" is \"gelu\", expected \"silu\"")]
    [TestCase("attention_dropout", "0.1", "key \"attention_dropout\" is 0.1, expected 0")]
    [TestCase("rms_norm_eps", "0", "key \"rms_norm_eps\" is 0")]
    [TestCase("rope_theta", "0", "key \"rope_theta\" is 0")]
    [TestCase("rope_scaling", """{"type": "yarn", "factor": 4}""",
        "key \"rope_scaling.type\" is \"yarn\", which is not supported")]
    [TestCase("rope_parameters", """{"rope_type": "llama3"}""",
        "\"llama3\", which is not supported for MiniCPM-V-2_6; expected \"default\", \"longrope\"")]
    [TestCase("rope_parameters", """{"rope_type": "longrope"}""",
        "key \"rope_parameters.short_factor\" is missing")]
    [TestCase("rope_scaling", """{"type": "longrope", "short_factor": [1, 2]}""",
        "key \"rope_scaling.short_factor\" is an array, expected 64 numbers, half of head_dim")]
    [TestCase("rope_scaling", """{"type": "longrope", "original_max_position_embeddings": 1}""",
        "key \"rope_scaling.original_max_position_embeddings\" is 1, expected")]
    [TestCase("rope_scaling", """{"type": "longrope", "factor": 0}""",
        "key \"rope_scaling.factor\" is 0, expected")]
    [TestCase("rope_scaling", """{"type": "longrope", "attention_factor": "1"}""",
        "key \"rope_scaling.attention_factor\" is \"1\", expected")]
    [TestCase("rope_scaling", "3", "key \"rope_scaling\" is 3, expected an object")]
    [TestCase("quantization_config", """{"quant_method": "hqq"}""", "of bitsandbytes, awq or gptq")]
    [TestCase("vision_config", "[]", "key \"vision_config\" is an array, expected an object")]
    [TestCase("vision_config.hidden_size", "145", "expected a multiple of num_attention_heads (2)")]
    [TestCase("vision_config.image_size", "13", "expected at least patch_size (14)")]
    [TestCase("vision_config.num_channels", "4",
        "key \"vision_config.num_channels\" is 4, expected 3")]
    [TestCase("vision_config.hidden_act", "\"quick_gelu\"",
        "is \"quick_gelu\", expected \"gelu_pytorch_tanh\"")]
    [TestCase("vision_config.patch_size", "16", "slice_config.patch_size is 14, expected 16")]
    [TestCase("drop_vision_last_layer", "1",
        "key \"drop_vision_last_layer\" is 1, expected true or false")]
    [TestCase("query_num", "32",
        "image_feature_size is 64, expected 32 as config.json's query_num")]
    [TestCase("slice_config", "3", "key \"slice_config\" is 3, expected an object")]
    public void ImpossibleNumbersAreRefused(string path, string value, string expected)
    {
        Edit("config.json", c =>
        {
            string[] keys = path.Split('.');
            var target = keys.Length == 1 ? c : c[keys[0]]!.AsObject();
            target[keys[^1]] = JsonNode.Parse(value);
        });
        Assert.That(() => ModelSpec.Read(_folder), Refuses(expected));
    }

    [Test]
    public void ASlidingWindowIsRefusedOnlyWhenItIsUsed()
    {
        Edit("config.json", c => c["use_sliding_window"] = true);
        ModelSpec.Read(_folder);
        Edit("config.json", c => c["max_window_layers"] = 1);
        Assert.That(() => ModelSpec.Read(_folder),
            Refuses("key \"use_sliding_window\" is true for layers 1 to 1"));
    }

    [Test]
    public void MissingFilesAreNamed()
    {
        Assert.That(() =>
            ModelSpec.Read(At("none")), Refuses($"{At("none")}: there is no such directory"));
        File.Delete(At("config.json"));
        Assert.That(() =>
            ModelSpec.Read(_folder), Refuses($"{At("config.json")}: there is no such file"));
    }

    [TestCase("apm.layers.0.fc1.weight", "audio of a MiniCPM-o model")]
    [TestCase("audio_projection_layer.linear1.weight", "audio of a MiniCPM-o model")]
    [TestCase("tts.x", "speech output of a MiniCPM-o model")]
    [TestCase("llm.model.layers.0.self_attn.q_norm.weight", "decoder of MiniCPM-V-4_5")]
    [TestCase("vpm.blocks.0.norm1.weight", "vision tower of MiniCPM-V-2")]
    [TestCase("vpm.encoder.layers.99.mlp.fc1.bias",
        "vision layer that config.json does not have or drops")]
    [TestCase("resampler.pos_embed", "buffer that is not stored")]
    public void TensorsOfRelativesAreExplained(string name, string what)
    {
        var spec = ModelSpec.Read(s_model);
        CheckpointWriter.Write(_folder, [.. spec.Parameters.All.Select(t => Zeros(t.Name, t.Shape)),
            Zeros(name, new Shape(1))]);
        using var checkpoint = Checkpoint.Open(_folder);
        Assert.That(() => checkpoint.MustMatch(spec.Parameters, Families.Explain),
            Refuses($"the tensors do not fit: 1 unmatched: {name} ({what})"));
    }

    // Angles are products of floats: an error of |position| * 2^-23 is theirs.
    [TestCase(128, 1e6)]
    [TestCase(64, 1e4)]
    public void RopeTablesHoldCosAndSinOfTheAngles(int headDim, double theta)
    {
        var decoder = ModelSpec.Read(s_model).Decoder with { HeadDim = headDim, RopeTheta = theta };
        var (cos, sin) = decoder.RopeTable(300);
        Assert.That(cos, Has.Length.EqualTo(300 * headDim / 2));
        for (int i = 0; i < cos.Length; i++)
        {
            int position = i / (headDim / 2), k = i % (headDim / 2);
            double angle = position * Math.Pow(theta, -2.0 * k / headDim);
            Assert.That(cos[i], Is.EqualTo(Math.Cos(angle)).Within(1e-6 + (position * 3e-7)));
            Assert.That(sin[i], Is.EqualTo(Math.Sin(angle)).Within(1e-6 + (position * 3e-7)));
        }

        var scaling = RopeScaling.None with { Short = [.. Enumerable.Repeat(2.0, headDim / 2)] };
        var halved = decoder with { RopeScaling = scaling };
        Assert.That(halved.RopeTable(3).Cos[headDim], Is.EqualTo(cos[headDim / 2]).Within(1e-7));
    }

    private static TensorToSave Zeros(string name, Shape shape) =>
        new(name, DType.BF16, shape, stream => stream.Write(new byte[shape.Count * 2]));

    private void Edit(string file, Action<JsonObject> change)
    {
        var json = JsonNode.Parse(File.ReadAllText(At(file)))!.AsObject();
        change(json);
        File.WriteAllText(At(file), json.ToJsonString());
    }

    private string At(string name) => Path.Combine(_folder, name);
}
