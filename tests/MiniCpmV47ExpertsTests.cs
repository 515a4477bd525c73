using System.Numerics.Tensors;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Export;
using MiniCpmNative.Engine.Generate;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// MiniCPM-V 4.7's mixture of experts against transformers (F32): the choice of experts, the loss,
/// logits and every gradient; experts on disk one by one and joined; adapters beside frozen
/// experts.
/// </summary>
[TestFixture]
public sealed class MiniCpmV47ExpertsTests
{
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    // Of the router's logits as transformers has them, also on rows of padding.
    [Test]
    public void TheChoiceOfExpertsAndTheirWeightsAreEqual([Range(0, 3)] int layer)
    {
        const int Chosen = 2;
        string name = $"layer.{layer}.";
        int[] shape = V47Experts.Case.Shape(name + "router_logits");
        int rows = shape[0], experts = shape[1];
        using var device = new CpuDevice(1, 1L << 24);
        using var run = new OpRun(device, new Experts(Chosen),
        [
            Value.Float("x", [rows, 1], new double[rows]),
            Value.Float("logits", shape, V47Experts.Case.Doubles(name + "router_logits")),
            Value.Float("w", [experts * 2, 1], new double[experts * 2]),
            Value.Float("w1", [experts, 1], new double[experts]),
        ]);
        run.Forward();
        int first = new Routing(experts, rows, Chosen).ExpertOf;
        Assert.That(run.Saved(0)[first..(first + (rows * Chosen))],
            Is.EqualTo(V47Experts.Case.Doubles(name + "experts")));
        OpTests.AreClose(
            run.Saved(1), V47Experts.Case.Doubles(name + "weights"), 1e-6, name + "weights");
    }

    [TestCase(false)]
    [TestCase(true)]
    public void TheForwardPassAndEveryGradientAreEqual(bool joined)
    {
        using var model = TunedModel.Open(
            V47Experts.Full with { ModelNameOrPath = joined ? Joined() : V47Experts.Model });
        Trace trace = Trace.Run(model, V47Experts.Batch(model.Loaded.Rows), gradients: true);
        AssertOutputs(trace);
        V26.AssertGradients(model, V47Experts.Gradients);
    }

    [Test]
    public void RoutersAndExpertsDecay()
    {
        ModelParameter[] all = [.. ModelSpec.Read(V47Experts.Model).Parameters.All.Where(p =>
            p.Name.Contains(".mlp.") && p.Name.Contains("language_model"))];
        Assert.That(all, Has.Length.EqualTo(4 * 7));
        Assert.That(all.Select(p => p.Decays), Is.All.True);
    }

    // Default sizes of the library's text model, the released vision tower: counted by the library.
    [Test]
    public void TheLargeModelHasItsParameters()
    {
        ModelSpec spec = V47Experts.Large(_folder);
        Assert.That(spec.Parameters.Count, Is.EqualTo(35_212_671_024));
    }

    [TestCase("model_type", "mamba",
        "key \"text_config.model_type\" is \"mamba\", expected \"qwen3_5_text\" or "
        + "\"qwen3_5_moe_text\"")]
    [TestCase("num_experts_per_tok", 7, "key \"text_config.num_experts_per_tok\" is 7, expected no "
        + "more experts of a token than num_experts (6)")]
    public void WrongSettingsAreNamed(string key, object value, string message)
    {
        Copy(_folder);
        string path = Path.Combine(_folder, "config.json");
        var config = System.Text.Json.Nodes.JsonNode.Parse(File.ReadAllText(path))!;
        config["text_config"]![key] = System.Text.Json.Nodes.JsonValue.Create(value);
        File.WriteAllText(path, config.ToJsonString());
        Assert.That(() => ModelSpec.Read(_folder), Throws.TypeOf<InputException>()
            .With.Message.EqualTo($"{path}: {message}"));
    }

    // The gradients of the full run are transformers' (above): those of an adapter whose second
    // matrix is 0 are scale dW A^T of them, through frozen experts.
    [Test]
    public void AdaptersLearnThroughFrozenExperts()
    {
        using var full = TunedModel.Open(V47Experts.Full);
        Trace.Run(full, V47Experts.Batch(full.Loaded.Rows), gradients: true);
        using var model = TunedModel.Open(V47Experts.Lora);
        Trace trace = Trace.Run(model, V47Experts.Batch(model.Loaded.Rows), gradients: true);
        AssertOutputs(trace);
        Assert.That(model.Parts.Adapters.List, Has.Count.EqualTo((4 * 3) + (3 * 2) + 2));
        foreach (Adapter adapter in model.Parts.Adapters.List)
        {
            double[] dw =
                [.. V26.Gradient(full, adapter.Module + ".weight").Select(v => (double)v)];
            float[] a = model.Device.ReadFloats(
                model.ParameterRanges.Value(Adapters.NameOfA(adapter.Module)));
            double[] across = RoundedLora.Transposed(
                [.. a.Select(v => (double)v)], adapter.Rank, adapter.Inputs);
            double[] expected = [.. RoundedLora.Product(dw, across, adapter.Outputs, adapter.Rank)
                .Select(v => adapter.Scale * v)];
            Assert.That(V26.NormError(
                V26.Gradient(model, Adapters.NameOfB(adapter.Module)), expected),
                Is.LessThan(1e-4), adapter.Module);
        }
    }

    [TestCase(false)]
    [TestCase(true)]
    public void ExpertsAreSavedInTheFormTheyWereReadIn(bool joined)
    {
        string from = joined ? Joined() : V47Experts.Model, to = Path.Combine(_folder, "saved");
        TrainArguments arguments = V47Experts.Full with { ModelNameOrPath = from, Bf16 = true };
        // The decoder trained, the vision tower not; and the other way round.
        foreach (bool decoder in (bool[])[true, false])
        {
            Directory.CreateDirectory(to);
            TrainArguments part = arguments with { TuneLlm = decoder, TuneVision = !decoder };
            using (var model = TunedModel.Open(part)) ModelFiles.Save(to, model, part);
            using (var before = SafetensorsFile.Open(Path.Combine(from, Checkpoint.SingleFile)))
            using (var after = SafetensorsFile.Open(Path.Combine(to, Checkpoint.SingleFile)))
            {
                Assert.That(after.Tensors.Select(t => t.Name),
                    Is.EquivalentTo(before.Tensors.Select(t => t.Name)));
                foreach (StoredTensor tensor in before.Tensors)
                    Assert.That(
                        after.Get(tensor.Name).Span.SequenceEqual(tensor.Span), tensor.Name);
            }

            Directory.Delete(to, recursive: true);
        }
    }

    // Experts that an adapter holds whole (modules_to_save) come into the model in its form too.
    [Test]
    public void MergingKeepsTheFormOfExperts()
    {
        string adapter = Path.Combine(_folder, "adapter"), to = Path.Combine(_folder, "merged");
        Directory.CreateDirectory(adapter);
        TrainArguments arguments =
            V47Experts.Lora with { ModulesToSave = ["layers.1.mlp.experts"] };
        using (var model = TunedModel.Open(arguments))
        {
            string name = "model.language_model.layers.1.mlp.experts.gate_up_proj";
            float[] values = model.Device.ReadFloats(model.ParameterRanges.Value(name));
            model.ParameterRanges.Write(name, [.. values.Select((_, i) => i % 251 / 256f)]);
            ModelFiles.Save(adapter, model, arguments);
        }

        MergeRun.Run(new MergeRequest(V47Experts.Model, adapter, to), TextWriter.Null);
        using var before =
            SafetensorsFile.Open(Path.Combine(V47Experts.Model, Checkpoint.SingleFile));
        using var after = SafetensorsFile.Open(Path.Combine(to, Checkpoint.SingleFile));
        Assert.That(after.Tensors.Select(t => t.Name),
            Is.EquivalentTo(before.Tensors.Select(t => t.Name)));
        const int Inner = 24, Width = 64;
        for (int e = 0; e < 6; e++)
            foreach (string part in (string[])["gate_proj", "up_proj", "down_proj"])
            {
                string name = $"model.language_model.layers.1.mlp.experts.{e}.{part}.weight";
                int first = ((2 * e) + (part == "up_proj" ? 1 : 0)) * Inner * Width;
                Assert.That(after.Get(name).ToFloats(), Is.EqualTo(part == "down_proj"
                    ? before.Get(name).ToFloats()
                    : [.. Enumerable.Range(first, Inner * Width).Select(i => i % 251 / 256f)]),
                    name);
            }
    }

    [TestCase("experts.2.up_proj.weight", null, "there is no tensor "
        + "\"model.language_model.layers.1.mlp.experts.2.up_proj.weight\", but one of expert 5")]
    [TestCase("experts.5.up_proj.weight", "experts.5.up_proj.bias", "there is no tensor "
        + "\"model.language_model.layers.1.mlp.experts.5.up_proj.weight\", but one of expert 5")]
    [TestCase("gate.weight", "experts.down_proj", "\"model.language_model.layers.1.mlp.experts"
        + ".down_proj\" is there in two forms, joined and one by one")]
    public void ExpertsThatAreNotThereAreNamed(string name, string? renamed, string message)
    {
        const string Layer = "model.language_model.layers.1.mlp.";
        using (var file = SafetensorsFile.Open(
            Path.Combine(V47Experts.Model, Checkpoint.SingleFile)))
            SafetensorsWriter.Write(Path.Combine(_folder, Checkpoint.SingleFile),
                file.Tensors.Where(t => renamed is not null || t.Name != Layer + name)
                    .Select(t => t.Name == Layer + name
                        ? t.ToSave() with { Name = Layer + renamed } : t.ToSave()).ToList());
        Assert.That(() => Checkpoint.Open(_folder), Throws.TypeOf<InputException>()
            .With.Message.EqualTo($"{_folder}: {message}"));
    }

    [Test]
    public void CopiesOfALayerHaveItsExperts()
    {
        const string Layers = "model.language_model.layers.";
        using var checkpoint = Checkpoint.Open(V47Experts.Model);
        byte[] first = [.. checkpoint.Get(Layers + "1.mlp.experts.gate_up_proj").Span];
        checkpoint.Replicate(Layers, [0, 1, 1, 2, 3]);
        StoredTensor copy = checkpoint.Get(Layers + "2.mlp.experts.gate_up_proj");
        Assert.That(copy.Span.SequenceEqual(first));
        Assert.That(copy.Pieces[3].Name, Is.EqualTo(Layers + "2.mlp.experts.1.up_proj.weight"));
    }

    // Each answer's tokens are the largest logits of the whole text run at once.
    [Test]
    public void AnswersFromACacheAreThoseOfTheWholeText()
    {
        const int Count = 6;
        using var model = TunedModel.Open(V47Experts.Full);
        int length = V47Experts.Case.Shape("input_ids")[1];
        int[] all = V47Experts.Ints("input_ids"), ids = all[length..(length + 9)];
        int[] other = all[(length + 2)..(length + 7)];
        GeneratedTokens[] answers = new Generator(model.Loaded).Run(
            [Input(ids), Input(other)],
            new GenerationSettings { MaxNewTokens = Count, MinNewTokens = Count, StopIds = [600] });
        foreach (var (prompt, answer) in (ReadOnlySpan<(int[], GeneratedTokens)>)
            [(ids, answers[0]), (other, answers[1])])
        {
            int[] text = [.. prompt, .. answer.Ids];
            var batch = new Batch();
            batch.Clear();
            batch.AddRow(text, [], places: [.. text.Select((_, t) => new CanvasPlace(t, t, t))]);
            batch.LabelRows.Add(0);
            batch.Targets.Add(1);
            float[] logits = Trace.Run(model, batch, gradients: false).Floats["logits"].Values;
            int vocabulary = logits.Length / text.Length;
            IEnumerable<int> best = Enumerable.Range(prompt.Length - 1, Count)
                .Select(t => Best(logits.AsSpan(t * vocabulary, vocabulary)));
            Assert.That(answer.Ids, Is.EqualTo(best));
        }

        static GenerationInput Input(int[] ids) => new(ids.Length, batch => batch.AddRow(
            ids, [], places: [.. ids.Select((_, t) => new CanvasPlace(t, t, t))]))
        {
            Ids = ids,
        };

        // 600 ends an answer, and is not chosen.
        static int Best(Span<float> logits)
        {
            logits[600] = float.MinValue;
            return TensorPrimitives.IndexOfMax<float>(logits);
        }
    }

    [Test]
    public void TheGpuComputesWhatTheCpuDoes()
    {
        using var gpu = new CudaSource();
        using var cpu = TunedModel.Open(V47Experts.Full);
        using var model = TunedModel.Open(
            V47Experts.Full with { Device = DeviceChoice.Cuda }, gpu.Source);
        Trace expected = Trace.Run(cpu, V47Experts.Batch(cpu.Loaded.Rows, 1), gradients: true);
        Trace trace = Trace.Run(model, V47Experts.Batch(model.Loaded.Rows, 1), gradients: true);
        Assert.That(trace.Floats.Keys, Is.EquivalentTo(expected.Floats.Keys));
        foreach (var (name, (_, values)) in expected.Floats)
        {
            double[] wanted = [.. values.Select(v => (double)v)];
            if (wanted.All(v => v == 0))
                Assert.That(trace.Floats[name].Values, Is.All.Zero, name);
            else if (name.StartsWith("grad.", StringComparison.Ordinal))
                Assert.That(V26.NormError(trace.Floats[name].Values, wanted),
                    Is.LessThan(1e-4), name);
            else
                Assert.That(V26.LargestError(trace.Floats[name].Values, wanted),
                    Is.LessThan(1e-5), name);
        }
    }

    [Test]
    public void RoutersTakeNoAdapter() => Assert.That(
        () => TunedModel.Open(V47Experts.Lora with
        {
            LoraTargetModules = new TargetModules(["q_proj", "gate"]),
        }),
        Throws.TypeOf<InputException>().With.Message.StartsWith(
            "lora_target_modules: target_modules matches what is no linear layer: "
            + "model.language_model.layers.0.mlp.gate"));

    [Test]
    public void CheckpointingGivesTheSameBits() => ModelChecks.AssertCheckpointingGivesTheSameBits(
        V47Experts.Full, V47Experts.Batch(ModelSpec.Read(V47Experts.Model).Rows()));

    [TestCase(false)]
    [TestCase(true)]
    public void AWarmStepAllocatesNothing(bool lora)
    {
        RowFormat format = ModelSpec.Read(V47Experts.Model).Rows();
        ModelChecks.AssertWarmStepsAllocateNothing(lora ? V47Experts.Lora : V47Experts.Full,
            [[V47Experts.Batch(format)], [V47Experts.Batch(format, 0)]]);
    }

    private static void AssertOutputs(Trace trace)
    {
        double loss = V47Experts.Case.Doubles("loss")[0];
        Assert.That(trace.Floats["loss"].Values[0], Is.EqualTo(loss).Within(1e-5 * loss));
        double[] wanted = V47Experts.Case.Doubles("last_logits");
        float[] logits = trace.Floats["logits"].Values;
        int vocabulary = wanted.Length / 2, tokens = logits.Length / vocabulary, first =
            V47Experts.Ints("attention_mask").AsSpan(0, V47Experts.Case.Shape("input_ids")[1])
                .Count(1);
        double error = V26.LargestError(
            [
                .. logits.AsSpan((first - 1) * vocabulary, vocabulary),
                .. logits.AsSpan((tokens - 1) * vocabulary, vocabulary),
            ], wanted);
        TestContext.Out.WriteLine($"logits {error:E2}");
        Assert.That(error, Is.LessThan(1e-5));
    }

    private static void Copy(string folder)
    {
        foreach (string file in Directory.GetFiles(V47Experts.Model))
            if (!file.EndsWith(".safetensors", StringComparison.Ordinal))
                File.Copy(file, Path.Combine(folder, Path.GetFileName(file)));
    }

    // The same model with the experts of a layer in two tensors.
    private string Joined()
    {
        string folder = Path.Combine(_folder, "joined");
        Directory.CreateDirectory(folder);
        Copy(folder);
        using var checkpoint = Checkpoint.Open(V47Experts.Model);
        CheckpointWriter.Write(folder, [.. checkpoint.Tensors.Select(t => t.ToSave())]);
        using var written = SafetensorsFile.Open(Path.Combine(folder, Checkpoint.SingleFile));
        Assert.That(written.Tensors.Count(t => t.Name.Contains(".experts.")), Is.EqualTo(2 * 4));
        return folder;
    }
}
