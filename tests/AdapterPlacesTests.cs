using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Export;
using MiniCpmNative.Engine.Generate;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Adapters of the embedding, the head, single tokens and the resampler's attention, and biases of
/// B, against PEFT (tests/reference/adapters/more.json).
/// </summary>
[TestFixture]
public sealed class AdapterPlacesTests
{
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [TestCase("tokens")]
    [TestCase("tokens_and_lora")]
    [TestCase("head_and_table")]
    public void LossLogitsAndGradientsAreThoseOfPeft(string name)
    {
        JsonElement expected = Case(name);
        TrainArguments arguments = Started(Adapter(name));
        using var model = TunedModel.Open(arguments);
        var batch = V26.Batch(V26.Full, "one", "two-small");
        StepResult result = V26.Gradients(model, arguments, batch);
        double loss = expected.GetProperty("loss").GetDouble();
        Assert.That(result.Loss, Is.EqualTo(loss).Within(1e-5 * loss));
        double worst = 0;
        var gradients = expected.GetProperty("gradients");
        Assert.That(gradients.EnumerateObject().Select(g => V26.Name(g.Name)),
            Is.EquivalentTo(model.ParameterRanges.List.Select(t => t.Name)));
        foreach (var gradient in gradients.EnumerateObject())
        {
            string own = V26.Name(gradient.Name);
            var wanted = Fingerprint.Read(gradient.Value);
            float[] got = V26.Gradient(model, own);
            if (own.EndsWith("lora_embedding_A", StringComparison.Ordinal))
                got = Turned(got, wanted.Shape[0]);
            double error = Fingerprint.Of(got, wanted.Shape).NormError(wanted);
            worst = Math.Max(worst, error);
            Assert.That(error, Is.LessThan(1e-4), own);
        }

        TestContext.Out.WriteLine($"worst gradient {worst:E2} of its norm");
        Trace trace = Trace.Run(model, batch, gradients: false);
        V26.AssertClose("logits", trace.Floats["logits"], expected.GetProperty("logits"));

        // What is saved is what was read, under PEFT's names; the base's matrices stay out.
        ModelFiles.Save(_folder, model, arguments);
        using var before = SafetensorsFile.Open(
            Path.Combine(Adapter(name), AdapterFile.WeightsName));
        using var after = SafetensorsFile.Open(Path.Combine(_folder, AdapterFile.WeightsName));
        Assert.That(after.Tensors.Select(t => (t.Name, t.SizesText)), Is.EquivalentTo(before.Tensors
            .Where(t => !t.Name.Contains("base_layer")).Select(t => (t.Name, t.SizesText))));
        foreach (StoredTensor tensor in after.Tensors)
            Assert.That(tensor.ToFloats(), Is.EqualTo(before.Get(tensor.Name).ToFloats()),
                tensor.Name);
        Assert.That(Config(_folder, "trainable_token_indices"),
            Is.EqualTo(Config(Adapter(name), "trainable_token_indices")));
    }

    [TestCase("train_tokens", "initial")]
    [TestCase("train_lora_bias", "initial_lora_bias")]
    public void TenStepsAreEqual(string name, string initial)
    {
        JsonElement expected = Case(name);
        TrainArguments arguments = AdapterVariantTests.TenSteps(name) with
        {
            LoraBias = name == "train_lora_bias" ? LoraBias.True : LoraBias.None,
            TrainableTokenIndices = name == "train_tokens"
                ? Tokens("[504, 505, 502, 514, 7, 0]") : null,
        };
        if (name == "train_lora_bias")
            arguments = arguments with
            {
                LoraTargetModules = new TargetModules(@"llm\..*self_attn\.(q_proj|k_proj|v_proj)"),
            };
        using var model = TunedModel.Open(arguments);
        using (var file = SafetensorsFile.Open(
            Path.Combine(ReferenceFile.Root, "adapters", initial + ".safetensors")))
            foreach (StoredTensor a in file.Tensors)
                model.ParameterRanges.Write(V26.Name(a.Name), a.ToFloats());
        AdapterVariantTests.AssertSteps(model, arguments, expected);
        AdapterVariantTests.AssertFinal(model, expected);
        ModelFiles.Save(_folder, model, arguments);
        using var again = TunedModel.Open(Started(_folder));
        Trace trace = Trace.Run(again, V26.Batch(V26.Full, "one", "two-small"), gradients: false);
        V26.AssertClose("logits", trace.Floats["logits"],
            expected.GetProperty("case_a_after").GetProperty("logits"), 1e-4);
    }

    /// <summary>Merged, and the adapter on top of the model to be asked, which merge
    /// compares.</summary>
    [TestCase("tokens")]
    [TestCase("head_and_table")]
    [TestCase("attention")]
    public void MergedModelsAnswerAsPeftsAdapters(string name)
    {
        string merged = Merged(V26.Model, Adapter(name));
        using var model = TunedModel.Open(V26.Full with { ModelNameOrPath = merged });
        Trace trace = Trace.Run(model, V26.Batch(V26.Full, "one", "two-small"), gradients: false);
        V26.AssertClose("logits", trace.Floats["logits"], Case(name).GetProperty("logits"));
    }

    [Test]
    public void TheBaseOfAnAskedModelIsTheModel()
    {
        double[] Logits(string? adapter, bool isAdapted)
        {
            using var model = AskedModel.Open(V26.Full, adapter);
            if (!isAdapted) model.IsAdapted = false;
            var batch = V26.Batch(V26.Full, "text0");
            Tensor hidden = model.Model.Hidden(batch);
            float[] logits = model.Model.Device.ReadFloats(
                model.Model.Model.LabelLogits(model.Model.Graph, hidden));
            model.Model.Graph.EndStep();
            return [.. logits.Select(v => (double)v)];
        }

        double[] plain = Logits(null, isAdapted: true);
        foreach (string name in (string[])["tokens", "head_and_table", "attention"])
        {
            Assert.That(V26.LargestError([.. Logits(Adapter(name), false).Select(v => (float)v)],
                plain), Is.LessThan(1e-6), name);
            Assert.That(V26.LargestError([.. Logits(Adapter(name), true).Select(v => (float)v)],
                plain), name == "attention" ? Is.Zero : Is.GreaterThan(1e-3), name);
        }
    }

    [Test]
    public void RowsOfATiedMatrixAreTheEmbeddingsAndTheHeads()
    {
        const string Matrix = "model.language_model.embed_tokens";
        using var full = TunedModel.Open(V46.Full);
        var batch = V46.Batch(full.Loaded.Rows, 0);
        V26.Gradients(full, V46.Full, batch);
        int width = full.Spec.Decoder.HiddenSize;
        float[] all = V26.Gradient(full, Matrix + ".weight");
        int[] ids = [.. batch.Tokens.Span.ToArray().Distinct().Take(2), 5];
        TrainArguments arguments = Tied(Tokens($"[{string.Join(",", ids)}]"));
        using var model = TunedModel.Open(arguments);
        Assert.That(model.Model.RunsTogether, Is.False);
        V26.Gradients(model, arguments, batch);
        float[] got = V26.Gradient(model, Matrix + AdapterLayout.TokensEnd);
        Assert.That(V26.NormError(got, [.. ids.SelectMany(
            id => all.AsSpan(id * width, width).ToArray()).Select(v => (double)v)]),
                Is.LessThan(1e-5));
        Assert.That(got, Has.Some.Not.Zero);

        // Merged it is one matrix still.
        float[] rows = model.Device.ReadFloats(
            model.ParameterRanges.Value(Matrix + AdapterLayout.TokensEnd));
        model.ParameterRanges.Write(
            Matrix + AdapterLayout.TokensEnd, [.. rows.Select((v, i) => v + (0.05f * (i % 3)))]);
        ModelFiles.Save(_folder, model, arguments);
        string merged = Merged(V46.Model, _folder);
        using Checkpoint after = Checkpoint.Open(merged);
        Assert.That(after.Find("lm_head.weight"), Is.Null);
    }

    [Test]
    public void RunsGoOnWithTheSameBits()
    {
        TrainArguments arguments = V26.Lora with
        {
            DataPath = Runs.Data(_folder, "one", "turns"),
            OutputDir = Path.Combine(_folder, "out"),
            LoraTargetModules = new TargetModules(["embed_tokens", "q_proj"]),
            TrainableTokenIndices = Tokens("""{"lm_head": [504, 7]}"""),
            LoraBias = LoraBias.None,
            LoraDropout = 0.1,
            Optim = OptimizerKind.Adamw8bit,
            LearningRate = 1e-3,
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
        foreach (string file in (string[])[AdapterFile.WeightsName, RunState.OptimizerFile])
            Assert.That(
                File.ReadAllBytes(Path.Combine(RunFolder.Checkpoint(resumed.OutputDir, 4), file)),
                Is.EqualTo(File.ReadAllBytes(
                    Path.Combine(RunFolder.Checkpoint(arguments.OutputDir, 4), file))), file);
        using var saved = SafetensorsFile.Open(Path.Combine(
            arguments.OutputDir, AdapterFile.WeightsName));
        Assert.That(
            saved.Get("base_model.model.llm.model.embed_tokens.lora_embedding_A").ToFloats(),
            Has.Some.Not.Zero, "it learns");
    }

    // One after the other: of the embedding, which the head does not follow, and of the head.
    [TestCase("embed_tokens", "embed_tokens.lora_embedding_A")]
    [TestCase("lm_head", "lm_head.lora_B.weight")]
    public void AnAdapterOnATiedMatrixIsOneModulesAlone(string target, string zero)
    {
        var said = new List<string>();
        TrainArguments arguments = Tied(null) with
        {
            LoraTargetModules = new TargetModules([target]),
        };
        using var model = TunedModel.Open(arguments, say: said.Add);
        Assert.That(said, Has.Some.Contains("are one matrix (tie_word_embeddings)"));
        string name = model.ParameterRanges.List.Single(t => t.Name.EndsWith(zero)).Name;
        float[] values = model.Device.ReadFloats(model.ParameterRanges.Value(name));
        Assert.That(values, Is.All.Zero, "an adapter begins as nothing");
        model.ParameterRanges.Write(name, [.. values.Select((_, i) => 0.01f * (i % 7))]);
        ModelFiles.Save(_folder, model, arguments);
        string merged = Merged(V46.Model, _folder);
        using Checkpoint before = Checkpoint.Open(V46.Model), after = Checkpoint.Open(merged);
        string other = target == "lm_head" ? "model.language_model.embed_tokens.weight"
            : "lm_head.weight";
        Assert.That(after.Get(other).ToFloats(), Is.EqualTo(
            before.Get("model.language_model.embed_tokens.weight").ToFloats()));
        Assert.That(after.Get(other).ToFloats(), Is.Not.EqualTo(
            after.Get(target == "lm_head" ? "lm_head.weight"
                : "model.language_model.embed_tokens.weight").ToFloats()));
    }

    [TestCase("""["resampler.attn"]""", "", "lora_target_modules matches resampler.attn: PEFT 0.21 counts")]
    [TestCase("""["lm_head"]""", "use_dora", "target_modules matches llm.lm_head, on which use_dora is not")]
    [TestCase("""["embed_tokens"]""", "use_dora", "target_modules matches llm.model.embed_tokens, on which")]
    [TestCase("""["embed_tokens"]""", "init_lora_weights pissa", "on which init_lora_weights=pissa is not")]
    [TestCase("""["lm_head"]""", "lora_bias true", "on which lora_bias=true is not")]
    [TestCase("""["q_proj"]""", "lora_bias true --use_dora", "lora_bias=true and use_dora")]
    [TestCase("""["q_proj"]""", "trainable_token_indices 576", "576 is no token of llm.model.embed_tokens, expected 0 to 575")]
    [TestCase("""["q_proj"]""", "trainable_token_indices 5 5", "trainable_token_indices is \"5 5\", expected token ids")]
    [TestCase("""["q_proj"]""", "trainable_token_indices {\"q_proj\":[1]}", "\"q_proj\" has no rows of tokens; expected llm.model.embed_tokens or llm.lm_head")]
    [TestCase("""["q_proj"]""", "rank_pattern {\"k_porj\":4}", "rank_pattern \"k_porj\": matches no module with an adapter")]
    [TestCase("[]", "", "lora_target_modules is \"[]\", expected a regular expression or a list of "
        + "names")]
    [TestCase("""["embed_tokens"]""", "trainable_token_indices 5", "which target_modules trains too")]
    [TestCase("""["q_proj"]""", "trainable_token_indices 5 --modules_to_save embed_tokens", "which modules_to_save trains too")]
    public void WhatCannotBeIsNamed(string targets, string given, string expected) =>
        Assert.That(() => BaseModel.Open(TrainReader.Read(
            ["--use_lora", "--tune_llm", "false", "--model_name_or_path", V26.Model, "--data_path",
                V26.Rows, "--lora_target_modules", targets,
                .. given.Length == 0 ? [] : $"--{given}".Split(' ')], _folder)),
            Throws.TypeOf<InputException>().With.Message.Contains(expected));

    [Test]
    public void AMatrixBesideTheAdapterMustBeTheModels()
    {
        using (var file = SafetensorsFile.Open(
            Path.Combine(Adapter("head_and_table"), AdapterFile.WeightsName)))
        using (Checkpoint model = Checkpoint.Open(V26.Model))
        {
            const string Name = "llm.lm_head.weight";
            float[] values = model.Get(Name).ToFloats();
            Write("same", values);
            values[^1] += 1;
            Write("other", values);

            void Write(string folder, float[] copy)
            {
                string path = Directory.CreateDirectory(Path.Combine(_folder, folder)).FullName;
                SafetensorsWriter.Write(Path.Combine(path, AdapterFile.WeightsName),
                    [.. file.Tensors.Select(t => t.ToSave()), new TensorToSave(
                        "base_model.model.llm.lm_head.base_layer.weight", DType.F32,
                        model.Get(Name).Shape, stream => stream.Write(
                            System.Runtime.InteropServices.MemoryMarshal.AsBytes<float>(copy)))]);
                File.Copy(Path.Combine(Adapter("head_and_table"), AdapterConfig.FileName),
                    Path.Combine(path, AdapterConfig.FileName));
            }
        }

        using (AskedModel.Open(V26.Full, Path.Combine(_folder, "same")))
        {
        }

        Assert.That(() => AskedModel.Open(V26.Full, Path.Combine(_folder, "other")),
            Throws.TypeOf<InputException>().With.Message.Contains(
                "base_layer.weight").And.Message.Contains("is not the model's llm.lm_head.weight"));
    }

    private static JsonElement Case(string name) =>
        ReferenceText.Json("adapters/more.json").GetProperty(name);

    private static string Adapter(string name) =>
        Path.Combine(ReferenceFile.Root, "adapters", name);

    private static TokenIndices Tokens(string json) =>
        TokenIndices.Of(JsonElement.Parse(System.Text.Encoding.UTF8.GetBytes(json)))!;

    private static TrainArguments Started(string adapter) => AdapterSettings.Complete(
        V26.Lora with { LoraWeightPath = adapter }, _ => false);

    private static TrainArguments Tied(TokenIndices? tokens) => V46.Full with
    {
        UseLora = true,
        TuneLlm = false,
        LoraR = 4,
        LoraDropout = 0,
        LoraTargetModules = new TargetModules(["q_proj"]),
        TrainableTokenIndices = tokens,
        ModulesToSave = [],
    };

    private static string Config(string folder, string key)
    {
        using var json = JsonDocument.Parse(
            File.ReadAllText(Path.Combine(folder, AdapterConfig.FileName)));
        return json.RootElement.TryGetProperty(key, out var value)
            ? JsonSerializer.Serialize(value) : "null";
    }

    private static float[] Turned(float[] values, int rows) =>
        [.. Enumerable.Range(0, values.Length)
        .Select(i => values[(i % (values.Length / rows) * rows) + (i / (values.Length / rows))])];

    // In F32, so that nothing is rounded.
    private string Merged(string model, string adapter)
    {
        string wide = Path.Combine(_folder, "wide"), merged = Path.Combine(_folder, "merged");
        Directory.CreateDirectory(wide);
        foreach (string file in Directory.GetFiles(model))
            if (!file.EndsWith(".safetensors", StringComparison.Ordinal))
                File.Copy(file, Path.Combine(wide, Path.GetFileName(file)));
        using (Checkpoint checkpoint = Checkpoint.Open(model))
            SafetensorsWriter.Write(Path.Combine(wide, Checkpoint.SingleFile),
                [.. checkpoint.Tensors.Select(t => t.ToSave(DType.F32))]);
        MergeRun.Run(new MergeRequest(wide, adapter, merged), TestContext.Out);
        return merged;
    }
}
