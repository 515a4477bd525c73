using System.Text.Json.Nodes;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using NUnit.Framework;
using static MiniCpmNative.Tests.SafetensorsTests;

namespace MiniCpmNative.Tests;

/// <summary>What MiniCPM-V-2 has of its own.</summary>
[TestFixture]
public sealed class MiniCpmV2Tests
{
    private static readonly FamilyCase s_family = FamilyCase.Of("v2");

    private string _folder = "";

    [SetUp]
    public void CreateFolder()
    {
        _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;
        foreach (string file in Directory.GetFiles(s_family.Model))
            if (Path.GetFileName(file) != Checkpoint.SingleFile)
                File.WriteAllBytes(
                    Path.Combine(_folder, Path.GetFileName(file)), File.ReadAllBytes(file));
    }

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    // The numbers stand in the reference's description of the tiny model.
    [Test]
    public void SizesComeFromTheConfigurationAndTheTensors()
    {
        ModelSpec spec = s_family.Spec;
        Assert.That(spec.Family.Name, Is.EqualTo("MiniCPM-V-2"));
        Assert.That(spec.Vision,
            Is.EqualTo(new VisionSpec(144, 538, 3, 2, 3, 14, 27, 1e-6f, true)));
        Assert.That(spec.Resampler, Is.EqualTo(new ResamplerSpec(256, 144, 64, true, false)));
        Assert.That(spec.Slicing, Is.EqualTo(new SlicingSpec(9, 112, 14)));
        DecoderSpec decoder = spec.Decoder;
        Assert.That(
            (decoder.EmbeddingScale, decoder.ResidualScale, decoder.OutputScale),
            Is.EqualTo((12.0, 1.4 / Math.Sqrt(2), 0.25)));
        Assert.That((decoder.VocabSize, decoder.Heads, decoder.HeadDim, decoder.RmsNormEpsilon),
            Is.EqualTo((800, 4, 64, 1e-5f)));
        Assert.That(spec.Parameters.Names.SkipWhile(n => n != "llm.lm_head.weight").Skip(1).Take(3),
            Is.EqualTo((string[])[
                "vpm.pos_embed", "vpm.patch_embed.proj.weight", "vpm.patch_embed.proj.bias"]));
        Assert.That(spec.Parameters.All.Where(p => p.Fixed).Select(p => p.Name),
            Is.EqualTo((string[])["resampler.pos_embed"]));
    }

    // The released config.json, and the published total.
    [Test]
    public void TheReleasedModelHasItsPublishedNumberOfParameters()
    {
        Edit(c =>
        {
            foreach (var (key, value) in new (string, int)[]
            {
                ("dim_model_base", 256), ("hidden_size", 2304), ("intermediate_size", 5760),
                ("num_attention_heads", 36), ("num_hidden_layers", 40),
                ("num_key_value_heads", 36), ("scale_resolution", 448), ("vocab_size", 122753),
            }) c[key] = value;
        });
        ModelSpec spec = ModelSpec.Read(_folder);
        Assert.That(spec.Parameters.Count, Is.EqualTo(3_434_965_792));
        Assert.That(spec.Vision,
            Is.EqualTo(new VisionSpec(1152, 4304, 26, 16, 3, 14, 27, 1e-6f, true)));
        Assert.That(spec.Resampler.Heads, Is.EqualTo(18));
        Assert.That(spec.Decoder.ResidualScale, Is.EqualTo(0.22135943621178655).Within(1e-15));
        Assert.That(1 / spec.Decoder.OutputScale, Is.EqualTo(9));
        Edit(c => c["drop_vision_last_layer"] = false);
        Assert.That(ModelSpec.Read(_folder).Vision.Layers, Is.EqualTo(27));
    }

    [TestCase("vision_encoder", "\"vit_base_patch16_224\"",
        "key \"vision_encoder\" is \"vit_base_patch16_224\", expected \"vit_so400m")]
    [TestCase("scale_emb", "null", "key \"scale_emb\" is missing")]
    [TestCase("scale_depth", "0", "key \"scale_depth\" is 0")]
    [TestCase("dim_model_base", "\"a\"", "key \"dim_model_base\" is \"a\"")]
    [TestCase("max_slice_nums", "null", "key \"max_slice_nums\" is missing")]
    [TestCase("scale_resolution", "null", "key \"scale_resolution\" is missing")]
    [TestCase("patch_size", "16", "patch_size is 16, expected 14 as the vision tower's")]
    [TestCase("hidden_act", "\"gelu\"", "key \"hidden_act\" is \"gelu\", expected \"silu\"")]
    [TestCase("rope_scaling", """{"type": "linear", "factor": 2}""", "which is not supported")]
    public void WhatItCannotBeIsRefused(string key, string value, string expected)
    {
        Edit(c => c[key] = JsonNode.Parse(value));
        Assert.That(() => ModelSpec.Read(_folder), Refuses(expected));
    }

    [TestCase("vpm.pos_embed", "1,730,144", "vpm.pos_embed [1, 730, 144] (expected [1, 729, 144])")]
    [TestCase("vpm.pos_embed", "729,144", "vpm.pos_embed [729, 144] (expected [1, 729, 1152])")]
    [TestCase("vpm.blocks.0.mlp.fc1.weight", "1,538,144",
        "vpm.blocks.0.mlp.fc1.weight [1, 538, 144] (expected [4304, 144])")]
    [TestCase("vpm.blocks.1.norm1.weight", null, "1 missing: vpm.blocks.1.norm1.weight")]
    [TestCase("vpm.pos_embed", "1,729,100", "has 100 columns, expected a multiple of 72")]
    [TestCase("vpm.patch_embed.proj.weight", "0,3,1048576,1048576", "misshaped")]
    [TestCase("vpm.patch_embed.proj.weight", "144,3,16,16",
        "patch_size is 14, expected 16 as the vision tower's")]
    public void TensorsThatFitNoTowerAreNamed(string tensor, string? shape, string expected)
    {
        var tensors = new List<TensorToSave>();
        foreach (var parameter in s_family.Spec.Parameters.All)
        {
            int[] sizes = [.. Enumerable.Range(0, parameter.Shape.Rank)
                .Select(axis => parameter.Shape[axis])];
            if (parameter.Name == tensor)
                sizes = shape is null ? [] : [.. shape.Split(',').Select(int.Parse)];
            if (sizes.Length > 0) tensors.Add(Zeros(parameter.Name, new Shape(sizes)));
        }

        CheckpointWriter.Write(_folder, tensors);
        string message = Assert.Throws<InputException>(() =>
        {
            ModelSpec spec = ModelSpec.Read(_folder);
            using var checkpoint = Checkpoint.Open(_folder);
            checkpoint.MustMatch(spec.Parameters, Families.Explain);
        })!.Message;
        Assert.That(message, Does.Contain(expected).And.Not.Contain("\n"));
    }

    // Tables of torch, 16 channels of the model's own table at eight sizes, and that table.
    [Test]
    public void PositionsAreResampledAsTorchDoes()
    {
        var file = ReferenceFile.Open("v2/pos_table");
        using var checkpoint = Checkpoint.Open(s_family.Model);
        float[] table = checkpoint.Get("vpm.pos_embed").ToFloats();
        var resampling = new PositionResampling(27);
        Assert.That(file.Names.Count(), Is.EqualTo(9));
        foreach (string size in file.Names)
        {
            int rows = int.Parse(size.Split('x')[0]), cols = int.Parse(size.Split('x')[1]);
            resampling.Clear();
            resampling.Add(rows, cols);
            Assert.That(resampling.Starts.Length, Is.EqualTo((rows * cols) + 1));
            Assert.That((long)resampling.Ids.Length,
                Is.LessThanOrEqualTo(resampling.MostTerms(rows, cols)));
            var got = new float[rows * cols * 16];
            for (int i = 0; i < got.Length; i++)
            {
                double sum = 0;
                for (int k = resampling.Starts[i / 16]; k < resampling.Starts[(i / 16) + 1]; k++)
                    sum += resampling.Weights[k] * table[(resampling.Ids[k] * 144) + (i % 16)];
                got[i] = (float)sum;
            }

            double[] expected = file.Doubles(size);
            if (size == "27x27")
                Assert.That(got.Select(v => (double)v), Is.EqualTo(expected));
            Assert.That(V26.LargestError(got, expected), Is.LessThan(1e-5), size);
        }
    }

    [Test]
    public void PositionsOfAnyGridSumToOneWithinTheirTable()
    {
        foreach (int side in (int[])[1, 2, 5, 27])
        {
            var resampling = new PositionResampling(side);
            foreach (var (rows, cols) in (IEnumerable<(int, int)>)[
                (1, 1), (1, 90), (side, side), (7, 3), (64, 31)])
            {
                resampling.Clear();
                resampling.Add(rows, cols);
                Assert.That((long)resampling.Ids.Length,
                    Is.LessThanOrEqualTo(resampling.MostTerms(rows, cols)));
                Assert.That(resampling.Ids.ToArray(), Is.All.InRange(0, (side * side) - 1));
                for (int i = 0; i < rows * cols; i++)
                    Assert.That(resampling.Weights[resampling.Starts[i]..resampling.Starts[i + 1]]
                        .ToArray().Sum(), Is.EqualTo(1).Within(1e-5));
            }
        }
    }

    [Test]
    public void OtherSizesHaveTheGradientsOfTheirLoss()
    {
        // Three query heads per key head, 16 queries, three vision heads, positions of 5 x 5, no
        // size a multiple of the vectors' lengths where that may be, a picture of one row.
        TrainArguments arguments = s_family.Full with { ModelNameOrPath = Made() };
        using var model = TunedModel.Open(arguments);
        Batch batch = s_family.Batch(arguments, "tall_two_turns", "very_long", "two_images");
        double loss = V26.Gradients(model, arguments, batch).Loss;
        Assert.That(loss, Is.InRange(0.5 * Math.Log(811), 3 * Math.Log(811)));
        foreach (string part in (string[])["vpm.pos_embed", "vpm.blocks.0.attn.qkv", "vpm.",
            "resampler.", "llm.model.layers.0.", "llm.model.layers.2.", "llm.model.embed_tokens",
            "llm.lm_head"])
            MadeModel.AssertSlope(model, batch, part);
    }

    [Test]
    public void TheFusedQkvTakesAnAdapterAsOneModule()
    {
        TrainArguments arguments = s_family.Lora with
        {
            ModelNameOrPath = Made(),
            LoraTargetModules = new TargetModules(["qkv", "fc1", "q_proj"]),
            ModulesToSave = ["resampler"],
        };
        using var model = TunedModel.Open(arguments);
        Assert.That(model.ParameterRanges.Value("vpm.blocks.1.attn.qkv.lora_A.weight").Shape,
            Is.EqualTo(new Shape(8, 216)));
        Assert.That(model.ParameterRanges.Value("vpm.blocks.1.attn.qkv.lora_B.weight").Shape,
            Is.EqualTo(new Shape(648, 8)));
        var random = new Random(5);
        foreach (TunedTensor tensor in model.ParameterRanges.List.Where(t =>
            t.Name.Contains("lora_B")))
            model.ParameterRanges.Write(
                tensor.Name, [.. Enumerable.Range(0, (int)tensor.Shape.Count)
                    .Select(_ => (float)(0.1 * (random.NextDouble() - 0.5)))]);
        Batch batch = s_family.Batch(arguments, "one", "very_long");
        // The stored positions of the queries are trained with their module.
        foreach (string part in (string[])["vpm.blocks.0.attn.qkv", "vpm.", "llm.",
            "resampler.pos_embed", "resampler."])
            MadeModel.AssertSlope(model, batch, part);
    }

    [Test]
    public void AConvolutionTakesNoAdapter() => Assert.That(
        () => TunedModel.Open(s_family.Lora with
        {
            LoraTargetModules = new TargetModules(["qkv", "proj"]),
        }),
        Refuses("target_modules matches what is no linear layer: vpm.patch_embed.proj"));

    [Test]
    public void TheTrainedNumberOfSlicesIsSavedWhereTheModelLooksForIt()
    {
        TrainArguments arguments = s_family.Full with
        {
            TuneLlm = false,
            TuneVision = false,
            MaxSliceNums = 4,
            MaxSteps = 1,
            DataPath = s_family.Data(_folder, "one"),
            OutputDir = Path.Combine(_folder, "out"),
        };
        Runs.Train(arguments);
        Assert.That(ModelSpec.Read(arguments.OutputDir).Slicing,
            Is.EqualTo(new SlicingSpec(4, 112, 14)));
        JsonNode config =
            JsonNode.Parse(File.ReadAllText(Path.Combine(arguments.OutputDir, "config.json")))!;
        Assert.That(config["slice_config"], Is.Null);
    }

    // A model of other sizes; its vision tower's are told by the tensors alone.
    private string Made()
    {
        Edit(c =>
        {
            foreach (var (key, value) in new Dictionary<string, JsonNode>
            {
                ["hidden_size"] = 384,
                ["num_attention_heads"] = 6,
                ["num_key_value_heads"] = 2,
                ["intermediate_size"] = 333,
                ["num_hidden_layers"] = 3,
                ["vocab_size"] = 811,
                ["query_num"] = 16,
                ["scale_emb"] = 5,
                ["scale_depth"] = 0.9,
                ["dim_model_base"] = 128,
                ["drop_vision_last_layer"] = false,
            }) c[key] = value;
        });
        ModelConfig config = ModelConfig.Open(_folder);
        ModelSpec spec = Families.Require(config).Read(config);
        spec = spec with
        {
            Vision = new VisionSpec(216, 301, 2, 3, 3, 14, 5, 1e-6f, false),
            Resampler = spec.Resampler with { VisionSize = 216 },
        };
        MadeModel.Write(_folder, spec, seed: 3);
        Assert.That(ModelSpec.Read(_folder).Vision, Is.EqualTo(spec.Vision));
        return _folder;
    }

    private void Edit(Action<JsonObject> change)
    {
        string path = Path.Combine(_folder, "config.json");
        JsonObject json = JsonNode.Parse(File.ReadAllText(path))!.AsObject();
        change(json);
        foreach (string key in json.Where(p => p.Value is null).Select(p => p.Key).ToList())
            json.Remove(key);
        File.WriteAllText(path, json.ToJsonString());
    }

    private static TensorToSave Zeros(string name, Shape shape) =>
        new(name, DType.BF16, shape, stream => stream.Write(new byte[shape.Count * 2]));
}
