using System.Text.Json.Nodes;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Export;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using NUnit.Framework;
using static MiniCpmNative.Tests.SafetensorsTests;

namespace MiniCpmNative.Tests;

/// <summary>cpmx merge: against PEFT's merged model, and against the formula in double.</summary>
[TestFixture]
public sealed class MergeTests
{
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void LogitsAreThoseOfPeftsMergedModel()
    {
        string model = ModelOf(V26.Model, DType.F32);
        Merge(model, V26.Adapter("trained_lora_only"));
        using var merged = TunedModel.Open(V26.Full with { ModelNameOrPath = At("merged") });
        Trace trace = Trace.Run(
            merged, V26.Batch(V26.Full, "one", "two-small"), gradients: false);
        double[] expected = ReferenceFile.OpenCommitted("v26/train/merged_logits")
            .Doubles("lora_only.merged_supervised_logits");
        int vocabulary = merged.Spec.Decoder.VocabSize;
        int[] labels = trace.Ints["labels"].Values;
        float[] got = [.. labels.Index().Where(l => l.Item != -100).SelectMany(
            l => trace.Floats["logits"].Values.AsSpan(l.Index * vocabulary, vocabulary).ToArray())];
        Assert.That(V26.LargestError(got, expected), Is.LessThan(1e-5));
    }

    /// <summary>PEFT's logits of the adapter, from the merged weights.</summary>
    [TestCase("dora")]
    [TestCase("patterns")]
    public void MergedModelsAnswerAsTheirAdapters(string name)
    {
        Merge(ModelOf(V26.Model, DType.F32), V26.Adapter("variant_" + name));
        using var merged = TunedModel.Open(V26.Full with { ModelNameOrPath = At("merged") });
        Trace trace = Trace.Run(
            merged, V26.Batch(V26.Full, "one", "two-small"), gradients: false);
        V26.AssertClose("logits", trace.Floats["logits"],
            ReferenceText.Json("v26/lora/variants.json").GetProperty(name).GetProperty("logits"));
    }

    // Alpha / r is 2, 2, 1 and 2; suffixes reaches the vision tower, bias_all every bias.
    [TestCase("trained_lora_only", 8)]
    [TestCase("variant_layer_1", 4)]
    [TestCase("variant_suffixes", 23)]
    [TestCase("variant_bias_all", 45)]
    public void EveryValueIsTheFormulasRoundedOnce(string name, int changed)
    {
        string screen = Merge(V26.Model, V26.Adapter(name));
        Assert.That(screen, Does.StartWith($"the adapter has {changed} of 93 tensors;"));
        using Checkpoint before = Checkpoint.Open(V26.Model), after = Checkpoint.Open(At("merged"));
        using var adapter = AdapterFile.Open(V26.Adapter(name));
        var stored = adapter.Match(V26.Spec.Parameters);
        Assert.That(after.Tensors.Select(t => (t.Name, t.StoredType.Name, t.SizesText)),
            Is.EqualTo(before.Tensors.Select(t => (t.Name, t.StoredType.Name, t.SizesText))));
        int seen = 0;
        foreach (StoredTensor tensor in after.Tensors)
        {
            double[]? expected = Expected(tensor.Name, before, stored, adapter.Config);
            if (expected is null)
            {
                Assert.That(tensor.Span.SequenceEqual(before.Get(tensor.Name).Span), tensor.Name);
                continue;
            }

            seen++;
            float[] got = tensor.ToFloats();
            // Half a last place of BF16, and what F32 loses before.
            for (int i = 0; i < got.Length; i++)
                Assert.That(got[i], Is.EqualTo(expected[i]).Within(
                    (Math.Abs(expected[i]) * (1.0 / 256)) + 1e-6), tensor.Name);
            double error = got.Zip(expected, (g, e) => Math.Abs(g - e)).Sum();
            Assert.That(error, Is.LessThan(expected.Sum(Math.Abs) * (1.0 / 512)), tensor.Name);
        }

        Assert.That(seen, Is.EqualTo(changed));
    }

    [Test]
    public void WhatStandsBesideTheWeightsIsCopied()
    {
        File.WriteAllText(Path.Combine(ModelOf(V26.Model, DType.BF16), "modeling.py"), "# code");
        File.WriteAllText(At("model/optimizer.pt"), "not of the model");
        string adapter = CopyOf(V26.Adapter("trained_lora_only"), "adapter");
        Merge(At("model"), adapter);
        string[] expected = [.. Directory.GetFiles(At("model")).Select(Path.GetFileName)
            .Where(n => n != "optimizer.pt")!];
        Assert.That(Directory.GetFiles(At("merged")).Select(Path.GetFileName),
            Is.EquivalentTo(expected));
        foreach (string name in expected.Where(n => n != Checkpoint.SingleFile))
            Assert.That(File.ReadAllBytes(At("merged/" + name)),
                Is.EqualTo(File.ReadAllBytes(At("model/" + name))), name);
        Assert.That(Directory.GetFileSystemEntries(_folder), Has.Length.EqualTo(3));

        // With the run's configuration beside it, pictures are cut as in training.
        File.WriteAllText(Path.Combine(adapter, "train_args.json"), """{"max_slice_nums": 4}""");
        Merge(At("model"), adapter, "again");
        JsonNode config = JsonNode.Parse(File.ReadAllBytes(At("again/config.json")))!;
        Assert.That((int)config["slice_config"]!["max_slice_nums"]!, Is.EqualTo(4));
        Assert.That((string)config["torch_dtype"]!, Is.EqualTo("bfloat16"));
    }

    [Test]
    public void ATiedHeadKeepsTheOriginalEmbedding()
    {
        string model = ModelOf(V26.Model, DType.F32, "llm.lm_head.weight");
        Edit(At("model/config.json"), c => c["tie_word_embeddings"] = true);
        ModelSpec spec = ModelSpec.Read(model);
        var config = new AdapterConfig
        {
            Rank = 4,
            Alpha = 4,
            Targets = new(["q_proj"]),
            ModulesToSave = ["embed_tokens"],
        };
        WriteAdapter(At("adapter"), spec, config, t => MadeModel.Values(
            new ExpectedTensor(t.Name, t.Shape), new Random(t.Name.Length)));
        Merge(model, At("adapter"));
        using Checkpoint before = Checkpoint.Open(model), after = Checkpoint.Open(At("merged"));
        Assert.That(ModelSpec.Read(At("merged")).Decoder.TiedHead, Is.False);
        Assert.That(after.Get("llm.lm_head.weight").Span.SequenceEqual(
            before.Get("llm.model.embed_tokens.weight").Span));
    }

    [Test]
    public void WhatCannotBeMergedIsRefusedAndLeavesNothing()
    {
        string trained = V26.Adapter("trained_lora_only");
        var config = new AdapterConfig { Rank = 4, Alpha = 4, Targets = new(["q_proj"]) };
        WriteAdapter(At("adapter"), V26.Spec, config, t => new float[t.Shape.Count]);
        Assert.That(() => Merge(V26.Model, At("adapter")),
            Refuses("changes no value of").And.Message.Contain("was it trained?"));
        string other = Path.Combine(ReferenceFile.Root, "v2", "model");
        Assert.That(() => Merge(other, trained), Refuses("the tensors do not fit"));
        Assert.That(() => Merge(V26.Model, At("none")), Refuses("there is no such directory"));
        Assert.That(() => Merge(V26.Model, trained, "adapter"), Refuses("is not empty"));
        WriteAdapter(At("adapter"), V26.Spec, config,
            t => [.. Enumerable.Repeat(float.NaN, (int)t.Shape.Count)]);
        Assert.That(() => Merge(V26.Model, At("adapter")), Refuses("NaN"));
        Assert.That(Directory.GetFileSystemEntries(_folder), Has.Length.EqualTo(1));
    }

    [Test]
    public void AModelThatDoesSomethingElseIsNoticed()
    {
        string adapter = V26.Adapter("trained_lora_only");
        Assert.That(() => LogitCheck.Run(V26.Model, adapter, V26.Model),
            Throws.TypeOf<RunException>().With.Message.Contains("100 % of the adapter's effect"));
        // Twice the adapter is as far away as none.
        string twice = CopyOf(adapter, "adapter");
        Edit(At("adapter/adapter_config.json"), c => c["lora_alpha"] = 32);
        Merge(V26.Model, twice);
        Assert.That(() => LogitCheck.Run(V26.Model, adapter, At("merged")),
            Throws.TypeOf<RunException>());
    }

    [TestCase(false)]
    [TestCase(true)]
    public void AQuantisedModelIsMadeWhole(bool adapted)
    {
        Directory.CreateDirectory(At("int4"));
        QuantisedModel.Write(
            At("int4"), QuantisedModel.Int4(), """{"quant_method": "bitsandbytes"}""");
        string? adapter = adapted ? V26.Adapter("random_lora_only") : null;
        Assert.That(
            () => MergeRun.Run(new(At("int4"), adapter, At("merged")), TextWriter.Null),
            Throws.TypeOf<InputException>().With.Message.Contains("--dequantize writes the model"));
        Assert.That(Directory.Exists(At("merged")), Is.False);
        var screen = new StringWriter();
        MergeRun.Run(new(At("int4"), adapter, At("merged"), Dequantize: true), screen);
        Assert.That($"{screen}", Does.Contain("29 quantised tensors are written as F16"));
        Assert.That(File.ReadAllText(At("merged/config.json")),
            Does.Not.Contain("quantization_config").And.Contain("float16"));
        using Checkpoint packed = Checkpoint.Open(At("int4")),
            whole = Checkpoint.Open(At("merged"));
        Assert.That(whole.Tensors.Select(t => t.Type), Is.All.EqualTo(DType.F16));
        foreach (StoredTensor tensor in whole.Tensors)
        {
            bool changed = adapted
                && tensor.Name.Contains(".self_attn.", StringComparison.Ordinal)
                && tensor.Name.StartsWith("llm.", StringComparison.Ordinal)
                && tensor.Name.EndsWith("weight", StringComparison.Ordinal);
            float[] rounded = Array.ConvertAll(
                packed.Get(tensor.Name).ToFloats(), v => (float)(Half)v);
            Assert.That(tensor.ToFloats(),
                changed ? Is.Not.EqualTo(rounded) : Is.EqualTo(rounded), tensor.Name);
        }

        Assert.That(
            () => MergeRun.Run(
                new(At("merged"), adapter, At("again"), Dequantize: true), TextWriter.Null),
            Throws.TypeOf<InputException>().With.Message.Contains("nothing is quantised"));
    }

    private string At(string name) => Path.Combine(_folder, name);

    private string Merge(string model, string adapter, string to = "merged")
    {
        var screen = new StringWriter();
        MergeRun.Run(new MergeRequest(model, adapter, At(to)), screen);
        return screen.ToString();
    }

    // W + alpha / r B A in double; null where the adapter has nothing.
    private static double[]? Expected(
        string name, Checkpoint model, IReadOnlyDictionary<string, StoredTensor> adapter,
        AdapterConfig config)
    {
        if (adapter.TryGetValue(name, out var whole))
            return Array.ConvertAll(whole.ToFloats(), v => (double)v);
        string module = name[..name.LastIndexOf('.')];
        if (!name.EndsWith(".weight", StringComparison.Ordinal)
            || !adapter.TryGetValue(module + ".lora_A.weight", out var stored)) return null;
        float[] a = stored.ToFloats(), b = adapter[module + ".lora_B.weight"].ToFloats();
        double[] w = Array.ConvertAll(model.Get(name).ToFloats(), v => (double)v);
        int inputs = a.Length / config.Rank;
        for (int i = 0; i < w.Length; i++)
            for (int k = 0; k < config.Rank; k++)
                w[i] += config.Alpha / config.Rank * b[(i / inputs * config.Rank) + k]
                    * a[(k * inputs) + (i % inputs)];
        return w;
    }

    private string ModelOf(string source, DType type, params string[] without)
    {
        CopyOf(source, "model");
        using Checkpoint weights = Checkpoint.Open(source);
        CheckpointWriter.Write(At("model"), [.. weights.Tensors
            .Where(t => !without.Contains(t.Name)).Select(t => t.ToSave(type))]);
        return At("model");
    }

    private string CopyOf(string folder, string name)
    {
        Directory.CreateDirectory(At(name));
        foreach (string file in Directory.GetFiles(folder))
            File.Copy(file, At(Path.Combine(name, Path.GetFileName(file))));
        return At(name);
    }

    /// <summary>An adapter of made-up values.</summary>
    internal static unsafe void WriteAdapter(
        string folder, ModelSpec spec, AdapterConfig config, Func<AdapterTensor, float[]> values)
    {
        AdapterLayout layout = AdapterLayout.Create(spec.Parameters, config, "x");
        AdapterFile.Write(folder, config, layout, layout.Tensors.Select(t =>
            new TensorToSave(t.Name, DType.F32, t.Shape, stream =>
            {
                fixed (float* data = values(t))
                    TensorToSave.Floats(t.Name, DType.F32, t.Shape, (nint)data).Write(stream);
            })));
    }

    private static void Edit(string file, Action<JsonNode> change)
    {
        JsonNode json = JsonNode.Parse(File.ReadAllBytes(file))!;
        change(json);
        File.WriteAllText(file, json.ToJsonString());
    }
}
