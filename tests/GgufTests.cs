using System.Text.Json.Nodes;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Export;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using NUnit.Framework;
using static MiniCpmNative.Tests.SafetensorsTests;

namespace MiniCpmNative.Tests;

/// <summary>
/// cpmx export gguf: blocks against those of ggml, whole models by running them in llama.cpp. Its
/// logits and picture rows must be ours up to the rounding of the files' type.
/// </summary>
[TestFixture]
public sealed class GgufTests
{
    // Four roundings to F16 and to BF16, relative; quantised ones keep about so much.
    private const double F16 = 4.0 / 2048, BF16 = 4.0 / 256, Q8 = 0.03, Q4 = 0.25;

    // Twice as many with weights that are made up: every layer weighs as much as the embedding,
    // where those of the reference models, as they were first drawn, hardly count.
    private const double MadeUp = 2 * F16;

    private static readonly string[] s_texts =
    [
        "What is in this picture? A star and 12 moons.", "  two  spaces\n\nand lines\t",
        "\u4f60\u597d, \u00e9t\u00e9 \U0001f600!", "<image></image>x", "I'll, we'd: 3.14159 (x+y)",
    ];

    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [TestCase("f16", "F16")]
    [TestCase("bf16", "BF16")]
    [TestCase("q8_0", "Q8_0")]
    [TestCase("q4_0", "Q4_0")]
    public void BlocksAreThoseOfGgml(string name, string reference)
    {
        using var file = SafetensorsFile.Open(
            Path.Combine(ReferenceFile.Root, "gguf", "quant.safetensors"));
        float[] rows = file.Get("rows").ToFloats();
        GgufType type = GgufType.Choices.Single(t => t.Name == name);
        var bytes = new byte[type.Bytes(rows.Length)];
        type.Encode(rows, bytes);
        Assert.That(bytes, Is.EqualTo(file.Get(reference + ".bytes").Span.ToArray()));
    }

    [TestCase("v2", "MiniCPM-V-2")]
    [TestCase("l3", "MiniCPM-Llama3-V-2_5")]
    [TestCase("v26", "MiniCPM-V-2_6")]
    [TestCase("v4", "MiniCPM-V-4")]
    [TestCase("v45", "MiniCPM-V-4_5")]
    [TestCase("o45", "MiniCPM-o-4_5")]
    public void LlamaCppSaysWhatTheModelSays(string name, string family)
    {
        string model = Path.Combine(ReferenceFile.Root, name, "model");
        Export(model);
        using var llama = new LlamaCpp(At($"out/{family}-f16.gguf"));
        using var ours = new Model(model);
        foreach (string text in s_texts)
            Assert.That(llama.Tokenize(text), Is.EqualTo(ours.Tokens(text)), text);
        AssertGreedy(llama, ours, F16);
    }

    // Layers of gated delta rule, with several heads of values to one of keys, and one without.
    [TestCase(2, 4)]
    [TestCase(2, 2)]
    public void LlamaCppSaysWhatModelsWithStatesSay(int keyHeads, int valueHeads)
    {
        string model = Native(text => (text["linear_num_key_heads"],
            text["linear_num_value_heads"]) = (keyHeads, valueHeads));
        Export(model);
        using var llama = new LlamaCpp(At("out/MiniCPM-V-4_6-f16.gguf"));
        using var ours = new Model(model);
        foreach (string text in s_texts)
            Assert.That(llama.Tokenize(text), Is.EqualTo(ours.Tokens(text)), text);
        AssertGreedy(llama, ours, MadeUp);
    }

    [Test]
    public void ALongRopeHasItsFactors()
    {
        string model = Copy(Path.Combine(ReferenceFile.Root, "v4", "model"));
        Edit(Path.Combine(model, "config.json"), json =>
        {
            JsonNode scaling = json["rope_scaling"]!;
            scaling["attention_factor"] = 1.3;
            scaling["short_factor"] =
                new JsonArray([.. Enumerable.Range(0, 64).Select(i => (JsonNode)(1 + (i * 0.02)))]);
        });
        Export(model);
        using var llama = new LlamaCpp(At("out/MiniCPM-V-4-f16.gguf"));
        using var ours = new Model(model);
        AssertGreedy(llama, ours, F16);
        using var plain = new Model(Path.Combine(ReferenceFile.Root, "v4", "model"));
        int[] tokens = ours.Tokens(s_texts[0]);
        Assert.That(V26.LargestError(ours.Logits(tokens), Doubles(plain.Logits(tokens))),
            Is.GreaterThan(10 * F16), "they matter");
    }

    [Test]
    public void ATiedHeadIsTheEmbeddingOrItsOriginal()
    {
        string model = Copy(V26.Model);
        Edit(Path.Combine(model, "config.json"), json => json["tie_word_embeddings"] = true);
        using (Checkpoint weights = Checkpoint.Open(V26.Model))
            CheckpointWriter.Write(model, [.. weights.Tensors
                .Where(t => t.Name != "llm.lm_head.weight").Select(t => t.ToSave())]);
        Export(model);
        using (var llama = new LlamaCpp(At("out/MiniCPM-V-2_6-f16.gguf")))
        using (var ours = new Model(model)) AssertGreedy(llama, ours, F16);
        Directory.Delete(At("out"), recursive: true);

        ModelSpec spec = ModelSpec.Read(model);
        MergeTests.WriteAdapter(At("adapter"), spec, new AdapterConfig
        {
            Rank = 4,
            Alpha = 4,
            Targets = new(["q_proj"]),
            ModulesToSave = ["embed_tokens"],
        }, t => MadeModel.Values(
            new ExpectedTensor(t.Name, t.Shape), new Random(t.Name.Length)));
        MergeRun.Run(new MergeRequest(model, At("adapter"), At("merged"), Check: false),
            TextWriter.Null);
        Export(model, At("adapter"));
        using var tuned = new LlamaCpp(At("out/MiniCPM-V-2_6-f16.gguf"));
        using var merged = new Model(At("merged"));
        int[] tokens = merged.Tokens(s_texts[0]);
        Assert.That(V26.LargestError(tuned.Logits(tokens), Doubles(merged.Logits(tokens))),
            Is.LessThan(BF16));
    }

    [TestCase("bf16", BF16)]
    [TestCase("q8_0", Q8)]
    [TestCase("q4_0", Q4)]
    public void OtherTypesKeepWhatTheyCan(string type, double tolerance)
    {
        Export(V26.Model, type: type);
        using var llama = new LlamaCpp(At($"out/MiniCPM-V-2_6-{type}.gguf"));
        using var ours = new Model(V26.Model);
        AssertGreedy(llama, ours, tolerance);
    }

    [Test]
    public void AnAdapterIsPutIn()
    {
        string adapter = V26.Adapter("trained_lora_only");
        MergeRun.Run(new MergeRequest(V26.Model, adapter, At("merged"), Check: false),
            TextWriter.Null);
        Export(V26.Model, adapter);
        using var llama = new LlamaCpp(At("out/MiniCPM-V-2_6-f16.gguf"));
        using var merged = new Model(At("merged"));
        using var without = new Model(V26.Model);
        int[] tokens = merged.Tokens(s_texts[0]);
        float[] got = llama.Logits(tokens);
        // The merged model of the other side is rounded to BF16.
        Assert.That(V26.LargestError(got, Doubles(merged.Logits(tokens))), Is.LessThan(BF16));
        Assert.That(V26.LargestError(got, Doubles(without.Logits(tokens))),
            Is.GreaterThan(2 * BF16));
    }

    [TestCase("l3", "MiniCPM-Llama3-V-2_5", null)]
    [TestCase("v26", "MiniCPM-V-2_6", null)]
    [TestCase("v26", "MiniCPM-o-2_6", "2.6")]
    [TestCase("v4", "MiniCPM-V-4", null)]
    [TestCase("v45", "MiniCPM-V-4_5", null)]
    [TestCase("v45", "MiniCPM-o-4_5", "4.5")]
    [TestCase("v46", "MiniCPM-V-4_6", null)]
    public void LlamaCppSeesWhatTheModelSees(string name, string family, string? omni)
    {
        string model = name == "v46" ? Native() : Path.Combine(ReferenceFile.Root, name, "model");
        if (omni is not null) model = Omni(model, omni);
        Export(model);
        using var llama = new LlamaCpp(At($"out/{family}-f16.gguf"));
        using var ours = new Model(model);
        int side = ours.Spec.Slicing.ScaleResolution;
        // Sizes that need no resizing, which llama.cpp does in its own way: of the wide one
        // the two tiles.
        foreach (var (width, first) in ((int, int)[])[(side, 0), (2 * side, 1)])
        {
            using Picture picture = Made(width, side);
            List<float[]> got =
                llama.Embed(At($"out/mmproj-{family}-f16.gguf"), picture,
                    ours.Spec.Decoder.HiddenSize);
            float[] expected = ours.Embed(picture);
            Assert.That(got.Sum(rows => rows.Length), Is.EqualTo(expected.Length));
            for (int view = 0, at = 0; view < got.Count; at += got[view++].Length)
            {
                if (view < first) continue;
                double error = V26.NormError(
                    got[view], Doubles(expected[at..(at + got[view].Length)]));
                TestContext.Out.WriteLine($"{width} x {side}, view {view}: {error:E2}");
                Assert.That(error, Is.LessThan(F16));
            }
        }
    }

    [Test]
    public void WhatLlamaCppDoesNotReadIsSaid()
    {
        Assert.That(Export(Path.Combine(ReferenceFile.Root, "v2", "model")),
            Does.Contain("pictures are left out: llama.cpp reads no vision tower of this kind"));
        Assert.That(Directory.GetFiles(At("out")), Has.Length.EqualTo(1));
        Directory.Delete(At("out"), recursive: true);
        Assert.That(Export(Path.Combine(ReferenceFile.Root, "o45", "model")),
            Does.Contain("the position table has 20 places a side, llama.cpp reads 70"));
        Directory.Delete(At("out"), recursive: true);
        Assert.That(Export(Native(mode: "4x")), Does.Contain(
            "pictures are left out: llama.cpp reads no vision tower of downsample_mode 4x"));
        Directory.Delete(At("out"), recursive: true);
        Assert.That(() => Export(V46.Model), Refuses(
            "llama.cpp reads heads of as many columns for keys as for values"));
        Assert.That(() => Export(Native(text => text["layer_types"] = new JsonArray(
            "full_attention", "linear_attention", "full_attention", "full_attention"))),
            Refuses("llama.cpp reads layers of attention at regular distances"));
        Assert.That(() => Export(Native(text => text["layer_types"] = new JsonArray(
            [.. Enumerable.Repeat("full_attention", 4).Select(t => (JsonNode)t)]))),
            Refuses("llama.cpp reads this decoder with layers of gated delta rule alone"));
    }

    [Test]
    public void WhatCannotBeWrittenIsRefusedAndLeavesNothing()
    {
        Assert.That(() => Export(V26.Model, type: "q5_k"),
            Refuses("--type is \"q5_k\", expected one of f16, bf16, q8_0, q4_0"));
        ModelParameter[] all = [.. V26.Spec.Parameters.All];
        MadeModel.Write(Copy(V26.Model), V26.Spec, name =>
        {
            var values = new float[all.First(p => p.Name == name).Shape.Count];
            values[^1] = name == "llm.lm_head.weight" ? 7e4f : 1;
            return values;
        }, DType.F32);
        Assert.That(() => Export(At("model")),
            Refuses("llm.lm_head.weight has the value 70000, which F16 does not hold"));
        Assert.That(Directory.GetFileSystemEntries(_folder), Has.Length.EqualTo(1));
        Assert.That(() => Export(At("model"), type: "bf16"), Throws.Nothing);
    }

    private string At(string name) => Path.Combine(_folder, name);

    private string Export(string model, string? adapter = null, string type = "f16")
    {
        var screen = new StringWriter();
        GgufRun.Run(new GgufRequest(model, adapter, At("out"), type), screen);
        return screen.ToString();
    }

    // Ours run from the beginning each time, theirs with its cache.
    private static void AssertGreedy(LlamaCpp llama, Model ours, double tolerance)
    {
        List<int> tokens = [.. ours.Tokens(s_texts[0])];
        float[] got = llama.Logits([.. tokens]);
        for (int step = 0; step < 8; step++)
        {
            float[] expected = ours.Logits([.. tokens]);
            double error = V26.LargestError(got, Doubles(expected));
            TestContext.Out.WriteLine($"step {step}: {error:E2}");
            Assert.That(error, Is.LessThan(tolerance));
            float[] sorted = [.. expected.OrderDescending()];
            double most = expected.Max(Math.Abs);
            if (sorted[0] - sorted[1] < 2 * tolerance * most) return;
            int best = Array.IndexOf(expected, sorted[0]);
            Assert.That(Array.IndexOf(got, got.Max()), Is.EqualTo(best));
            tokens.Add(best);
            got = llama.Logits([best]);
        }
    }

    private static double[] Doubles(float[] values) => Array.ConvertAll(values, v => (double)v);

    private static Picture Made(int width, int height)
    {
        var picture = new Picture(width, height);
        for (int y = 0; y < height; y++)
        {
            Span<byte> row = picture.Row(y);
            for (int x = 0; x < row.Length; x++)
                row[x] = (byte)(127.5
                    + (127.5 * Math.Sin((x * 0.011) + (y * 0.007 * (1 + (x % 3))))));
        }

        return picture;
    }

    private string Copy(string model)
    {
        Directory.CreateDirectory(At("model"));
        foreach (string file in Directory.GetFiles(model))
            File.Copy(file, At(Path.Combine("model", Path.GetFileName(file))));
        return At("model");
    }

    // A model of MiniCPM-V 4.6's kind as llama.cpp reads it, with weights made up.
    private string Native(Action<JsonNode>? change = null, string mode = "16x")
    {
        Directory.CreateDirectory(At("model"));
        ModelSpec spec = V46.Changed(At("model"), (config, processor) =>
        {
            JsonNode text = config["text_config"]!;
            text["linear_value_head_dim"] = 32;
            config["vision_config"]!["image_size"] = 980;
            (config["downsample_mode"], processor["downsample_mode"]) = (mode, mode);
            change?.Invoke(text);
        });
        var random = new Random(5);
        var values = spec.Parameters.All.ToDictionary(
            p => p.Name, p => MadeModel.Values(p, random));
        // As those of other models here, most of them are the same in F16.
        MadeModel.Write(At("model"), spec, name => values[name], DType.BF16);
        return At("model");
    }

    // The omni members have the modules of these, under the same names.
    private string Omni(string model, string version)
    {
        Edit(Path.Combine(Copy(model), "config.json"), json =>
        {
            (json["model_type"], json["version"]) = ("minicpmo", version);
            json["architectures"] = new JsonArray("MiniCPMO");
        });
        return At("model");
    }

    private static void Edit(string file, Action<JsonNode> change)
    {
        JsonNode json = JsonNode.Parse(File.ReadAllBytes(file))!;
        change(json);
        File.WriteAllText(file, json.ToJsonString());
    }

    /// <summary>This project's model, in F32 on the CPU.</summary>
    private sealed class Model : IDisposable, ITensorProbe
    {
        private readonly LoadedModel _model;
        private float[] _rows = [];

        public Model(string folder)
        {
            ModelSpec spec = ModelSpec.Read(folder);
            // As llama.cpp lays out the pictures of every member; see the note on version 2.5.
            Spec = spec.Joiner is ResamplerSpec
                ? spec with { Vision = spec.Vision with { Layout = new GridLayout() } } : spec;
            using Checkpoint weights = Checkpoint.Open(folder);
            _model = LoadedModel.Load(
                DeviceSource.Default.Open(new TrainArguments { Device = DeviceChoice.Cpu }), Spec,
                weights, DType.F32);
            _model.Graph.Recording = false;
        }

        public ModelSpec Spec { get; }

        public int[] Tokens(string text) => _model.Tokenizer.Encode(text, special: true);

        public float[] Logits(int[] tokens)
        {
            var batch = new Batch();
            batch.Clear();
            batch.AddRow(tokens, []);
            Tensor hidden = _model.Hidden(batch);
            float[] all = _model.Device.ReadFloats(_model.Model.Logits(_model.Graph, hidden));
            _model.Graph.EndStep();
            return all[^Spec.Decoder.VocabSize..];
        }

        // The rows of all views.
        public float[] Embed(Picture picture)
        {
            SlicingSpec slicing = Spec.Slicing;
            SlicePlan plan = slicing.Plan(picture.Size, () => picture);
            Prompt prompt = new SampleBuilder(_model.Rows, int.MaxValue).BuildPrompt(
                [new PromptTurn("user", [0, "What?"])], [plan]);
            var batch = new Batch();
            batch.Clear();
            batch.AddRow(prompt.InputIds, prompt.Bounds);
            batch.TryAddPicture(_model.Rows.NewStrips(), picture, plan,
                _model.Rows.Placeholders.Features(plan));
            _model.Hidden(batch, this);
            _model.Graph.EndStep();
            return _rows;
        }

        public void Visit(string name, Tensor tensor)
        {
            if (name is "resampler" or "merger") _rows = _model.Device.ReadFloats(tensor);
        }

        public void Dispose() => _model.Dispose();
    }
}
