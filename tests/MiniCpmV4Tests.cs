using System.Text.Json.Nodes;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Text;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// What is MiniCPM-V 4's own: heads of a size of their own, longrope, its tokenizer. Everything
/// that families share is in <see cref="ReferenceModelTests"/>.
/// </summary>
[TestFixture]
public sealed class MiniCpmV4Tests
{
    private static readonly ReferenceModel s_reference = ReferenceModel.Of("v4");

    private string _folder = "";

    [SetUp]
    public void CreateFolder()
    {
        _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;
        foreach (string file in Directory.GetFiles(s_reference.Spec.Directory))
            if (Path.GetFileName(file) != Checkpoint.SingleFile)
                File.WriteAllBytes(
                    Path.Combine(_folder, Path.GetFileName(file)), File.ReadAllBytes(file));
    }

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    // The numbers stand in the reference's description of the tiny model.
    [Test]
    public void TheReferenceModelIsRead()
    {
        ModelSpec spec = s_reference.Spec;
        Assert.That(spec.Family.Name, Is.EqualTo("MiniCPM-V-4"));
        Assert.That(spec.Vision,
            Is.EqualTo(new VisionSpec(144, 192, 2, 2, 3, 14, 70, 1e-6f, false)));
        Assert.That(spec.Resampler, Is.EqualTo(new ResamplerSpec(256, 144, 64)));
        Assert.That(spec.Decoder with { RopeScaling = RopeScaling.None }, Is.EqualTo(
            new DecoderSpec(704, 256, 384, 2, 4, 1, 128, 1e-6f, false, false, 1e4,
                RopeScaling.None, 32768, FinalNormDecays: false)));
        RopeScaling rope = spec.Decoder.RopeScaling;
        Assert.That((rope.Short.Length, rope.Long.Length, rope.ShortPositions, rope.Amplitude),
            Is.EqualTo((64, 0, 32786, 1.0)), "short and long factors are the same");
        Assert.That((rope.Short[0], rope.Short[63]),
            Is.EqualTo((0.9977997200264581, 31.02392307921529)));
    }

    // Sizes of the released model, as far as they are known: 2 layers in the only copy of its
    // config.json, 32 by the published size.
    [Test]
    public void TheReleasedModelHasItsNumberOfParameters()
    {
        Edit(config =>
        {
            foreach (var (key, value) in new (string, int)[]
            {
                ("hidden_size", 2560), ("intermediate_size", 10240), ("num_attention_heads", 32),
                ("num_key_value_heads", 2), ("num_hidden_layers", 32), ("vocab_size", 73448),
            }) config[key] = value;
            JsonNode vision = config["vision_config"]!;
            foreach (var (key, value) in new (string, int)[]
            {
                ("hidden_size", 1152), ("intermediate_size", 4304), ("num_attention_heads", 16),
                ("num_hidden_layers", 27),
            }) vision[key] = value;
        });
        ModelSpec spec = ModelSpec.Read(_folder);
        Assert.That(spec.Parameters.Count, Is.EqualTo(4_059_533_040));
        Assert.That(spec.Parameters.Find("llm.model.layers.31.self_attn.q_proj.weight")!.Shape,
            Is.EqualTo(new Shape(4096, 2560)));
        Assert.That(spec.Resampler.Heads, Is.EqualTo(20));
    }

    // transformers: sqrt(1 + ln(factor) / ln(positions)) where the factor is above 1.
    [TestCase("""{"factor": 4.0, "original_max_position_embeddings": 8192}""", null,
        8192, 1.0741723110591)]
    [TestCase("""{"original_max_position_embeddings": 8192}""", null, 8192, 1.0741723110591)]
    [TestCase("""{"factor": 0.5}""", null, 32768, 1)]
    [TestCase("""{"factor": 4.0, "original_max_position_embeddings": 512}""", 16384,
        16384, 1.0350983390135)]
    [TestCase("""{"factor": 4.0, "attention_factor": 1.25}""", null, 32768, 1.25)]
    public void LongRopeIsReadAsTransformersReadsIt(
        string scaling, int? beside, int positions, double amplitude)
    {
        foreach (string place in (string[])["rope_scaling", "rope_parameters"])
        {
            Edit(config =>
            {
                config.Remove("rope_scaling");
                if (beside is { } number) config["original_max_position_embeddings"] = number;
                JsonObject rope = JsonNode.Parse(scaling)!.AsObject();
                rope["rope_type"] = "longrope";
                rope["short_factor"] = Factors(1);
                rope["long_factor"] = Factors(2);
                config[place] = rope;
            });
            RopeScaling read = ModelSpec.Read(_folder).Decoder.RopeScaling;
            Assert.That(read.ShortPositions, Is.EqualTo(positions));
            Assert.That(read.Amplitude, Is.EqualTo(amplitude).Within(1e-12));
            Assert.That((read.Short.Length, read.Long.Length), Is.EqualTo((64, 64)));
            Assert.That((read.IsLong(positions), read.IsLong(positions + 1)),
                Is.EqualTo((false, true)));
        }
    }

    [Test]
    public void TablesHaveTheDivisorsAndTheAmplitude()
    {
        DecoderSpec decoder = s_reference.Spec.Decoder with
        {
            RopeScaling = new RopeScaling(
                [.. Enumerable.Repeat(1.5, 64)], [.. Enumerable.Repeat(4.0, 64)], 100, 1.25),
        };
        foreach (bool isLong in (bool[])[false, true])
        {
            var (cos, sin) = decoder.RopeTable(200, isLong);
            for (int i = 0; i < cos.Length; i++)
            {
                double angle = i / 64 * Math.Pow(1e4, -(i % 64) / 64.0) / (isLong ? 4 : 1.5);
                double tolerance = 1e-6 * (1 + angle);
                Assert.That(cos[i], Is.EqualTo(1.25 * Math.Cos(angle)).Within(tolerance));
                Assert.That(sin[i], Is.EqualTo(1.25 * Math.Sin(angle)).Within(tolerance));
            }
        }
    }

    /// <summary>
    /// Rows of a batch follow its longest one: with a model that switches at the short row's
    /// length, the short row alone is as with short factors only, beside the long row as with long
    /// ones only; and back again.
    /// </summary>
    [Test]
    public void TheLongestRowOfABatchChoosesTheFactors()
    {
        int length = s_reference.Batch(s_reference.Lora, "text0").Tokens.Count;
        float[] First(int near, int far, int positions, params string[][] batches)
        {
            string folder = Scaled(near, far, positions);
            using var model =
                TunedModel.Open(s_reference.Lora with { ModelNameOrPath = folder });
            float[] logits = [];
            foreach (string[] rows in batches)
                logits = Trace.Run(
                    model, s_reference.Batch(s_reference.Lora, rows), gradients: false)
                    .Floats["logits"].Values;
            return logits[..(length * 704)];
        }

        string[] alone = ["text0"], beside = ["text0", "one"];
        float[] near = First(1, 1, length, alone), far = First(3, 3, length, alone);
        Assert.That(V26.LargestError(near, Array.ConvertAll(far, v => (double)v)),
            Is.GreaterThan(1e-3));
        Assert.That(First(1, 3, length, alone), Is.EqualTo(near));
        Assert.That(First(1, 3, length - 1, alone), Is.EqualTo(far));
        Assert.That(First(1, 3, length, beside), Is.EqualTo(First(3, 3, length, beside)));
        Assert.That(First(1, 3, length, alone, beside, alone), Is.EqualTo(near));
    }

    [Test]
    public void OtherSizesHaveTheGradientsOfTheirLoss()
    {
        // Six heads of 32, three query heads per key head, 16 queries, a tied head, a dropped
        // vision layer, angles that turn by the long factors and are 1.2 times as large.
        Edit(config =>
        {
            foreach (var (key, value) in new Dictionary<string, JsonNode>
            {
                ["hidden_size"] = 260,
                ["num_attention_heads"] = 6,
                ["num_key_value_heads"] = 2,
                ["head_dim"] = 32,
                ["intermediate_size"] = 333,
                ["vocab_size"] = 711,
                ["query_num"] = 16,
                ["tie_word_embeddings"] = true,
                ["drop_vision_last_layer"] = true,
            })
                config[key] = value;
            JsonNode rope = config["rope_scaling"]!;
            rope["short_factor"] = Factors([.. Enumerable.Repeat(1.0, 16)]);
            rope["long_factor"] = Factors([.. Enumerable.Range(1, 16).Select(v => (double)v)]);
            rope["original_max_position_embeddings"] = 40;
            rope["attention_factor"] = 1.2;
            (config["vision_config"]!["hidden_size"], config["vision_config"]!["image_size"]) =
                (128, 448);
        });
        ModelSpec spec = ModelSpec.Read(_folder);
        Assert.That(spec.Vision.Layers, Is.EqualTo(1));
        MadeModel.Write(_folder, spec, seed: 5);
        TrainArguments arguments = s_reference.Full with { ModelNameOrPath = _folder };
        using var model = TunedModel.Open(arguments);
        Assert.That(model.ParameterRanges.Count, Is.EqualTo(model.TotalParameters));
        Batch batch = V26.Batch(spec.Rows(), arguments, ["tall", "text0"]);
        double loss = V26.Gradients(model, arguments, batch).Loss;
        Assert.That(loss, Is.InRange(0.5 * Math.Log(711), 3 * Math.Log(711)));
        foreach (string part in (string[])["vpm.", "resampler.", "llm.model.layers.0.",
            "llm.model.layers.1.", "llm.model.embed_tokens"])
            MadeModel.AssertSlope(model, batch, part);
    }

    // Heads of 128, four to a key head, and scaled angles; pictures go through V-2_6's modules.
    [TestCase(false)]
    [TestCase(true)]
    public void ItsDecoderOnTheGpuHasTheCpusNumbers(bool bf16)
    {
        Batch batch = s_reference.Batch(s_reference.Full, "text0");
        using var cpu = TunedModel.Open(s_reference.Full);
        Trace expected = Trace.Run(cpu, batch, gradients: true);
        using var gpu = new CudaSource();
        using var model = TunedModel.Open(
            s_reference.Full with { Bf16 = bf16, Device = DeviceChoice.Cuda }, gpu.Source);
        Trace got = Trace.Run(model, batch, gradients: true);
        foreach (string name in (string[])["llm.layer.0", "llm.layer.1", "llm.norm", "logits"])
            Assert.That(Error(got.Floats[name].Values, expected.Floats[name].Values),
                Is.LessThan(bf16 ? 4.0 / 256 : 1e-5), name);
        foreach (var tensor in cpu.ParameterRanges.List)
            if (tensor.Name.StartsWith("llm.", StringComparison.Ordinal))
                Assert.That(
                    Error(V26.Gradient(model, tensor.Name), V26.Gradient(cpu, tensor.Name)),
                    Is.LessThan(bf16 ? 8.0 / 256 : 1e-4), tensor.Name);

        static double Error(float[] got, float[] expected) =>
            V26.NormError(got, Array.ConvertAll(expected, v => (double)v));
    }

    // The released tokenizer is SentencePiece's with byte fallback; TokenizerTests has its ids.
    [Test]
    public void ItsKindOfTokenizerMakesItsRows()
    {
        foreach (string file in (string[])["added_tokens.json", "merges.txt", "vocab.json",
            "special_tokens_map.json"])
            File.Delete(Path.Combine(_folder, file));
        foreach (string file in (string[])["tokenizer.json", "tokenizer_config.json"])
            File.WriteAllBytes(Path.Combine(_folder, file),
                ReferenceText.Bytes($"tokenizers/tiny-v4/{file}"));
        Edit(config => config["vocab_size"] = 1024);
        RowFormat format = ModelSpec.Read(_folder).Rows();
        Batch batch = V26.Batch(format, s_reference.Lora, ["text0"]);
        var tokenizer = Tokenizer.Load(_folder);
        Assert.That(batch.Tokens.Span.ToArray(), Is.EqualTo(tokenizer.Encode(
            "<|im_start|>user\nHow many is 12 * 34?<|im_end|>\n"
            + "<|im_start|>assistant\n408, I'd say.<|im_end|>\n")));
    }

    [Test]
    public void TheDocumentedLlmTypeIsTakenAndTheScriptsRefused()
    {
        RowFormat format = s_reference.Format;
        format.RequireLlmType("llama", officialCompat: false);
        format.RequireLlmType("qwen", officialCompat: true);
        Assert.That(() => format.RequireLlmType("llama", officialCompat: true),
            Throws.TypeOf<InputException>());
    }

    private static JsonArray Factors(double value) =>
        Factors([.. Enumerable.Repeat(value, 64)]);

    private static JsonArray Factors(double[] values) => new([.. values.Select(v => (JsonNode)v)]);

    /// <summary>The reference model with these factors.</summary>
    private string Scaled(double near, double far, int positions)
    {
        string folder =
            Directory.CreateDirectory(Path.Combine(_folder, Path.GetRandomFileName())).FullName;
        foreach (string file in Directory.GetFiles(s_reference.Spec.Directory))
            File.Copy(file, Path.Combine(folder, Path.GetFileName(file)));
        Edit(config =>
        {
            JsonNode rope = config["rope_scaling"]!;
            (rope["short_factor"], rope["long_factor"]) = (Factors(near), Factors(far));
            rope["original_max_position_embeddings"] = positions;
        }, folder);
        return folder;
    }

    private void Edit(Action<JsonObject> change, string? folder = null)
    {
        JsonObject config = Change("config.json", change);
        Change("preprocessor_config.json",
            json => json["image_feature_size"] = (int)config["query_num"]!);

        JsonObject Change(string name, Action<JsonObject> edit)
        {
            string path = Path.Combine(folder ?? _folder, name);
            JsonObject json = JsonNode.Parse(File.ReadAllBytes(path))!.AsObject();
            edit(json);
            File.WriteAllText(path, json.ToJsonString());
            return json;
        }
    }
}
