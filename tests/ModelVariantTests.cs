using System.Text.Json.Nodes;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Models that the reference does not have, held to what must be equal: other files of the same
/// model, other types, other sizes, other numbers of threads.
/// </summary>
[TestFixture]
public sealed class ModelVariantTests
{
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void ShardsInF32AndADroppedLayerAreTheSameModel()
    {
        using var original = Checkpoint.Open(V26.Model);
        TrainArguments arguments = Variant(
            config =>
            {
                config["drop_vision_last_layer"] = true;
                config["vision_config"]!["num_hidden_layers"] = 4;
            },
            V26.Spec, name => original.Get(name).ToFloats(), DType.F32, shardBytes: 2_000_000);
        Assert.That(
            Directory.GetFiles(arguments.ModelNameOrPath!, "*.safetensors"),
            Has.Length.GreaterThan(4));
        Batch batch = V26.Batch(V26.Full, "two-small");
        Assert.That(Logits(arguments, batch), Is.EqualTo(Logits(V26.Full, batch)));
    }

    [TestCase(false)]
    [TestCase(true)]
    public void ATiedHeadIsTheEmbeddingUsedTwice(bool trained)
    {
        // The same numbers in two tensors, and once in one: its gradient is the sum of theirs.
        using var original = Checkpoint.Open(V26.Model);
        float[] Value(string name) => original.Get(
            name == "llm.lm_head.weight" ? "llm.model.embed_tokens.weight" : name).ToFloats();
        TrainArguments arguments = V26.Full with { TuneLlm = trained };
        var untied = arguments with
        {
            ModelNameOrPath = Variant(_ => { }, V26.Spec, Value, DType.BF16).ModelNameOrPath,
        };
        ModelSpec spec = Spec(config => config["tie_word_embeddings"] = true);
        var tied = arguments with
        {
            ModelNameOrPath = Variant(
                config => config["tie_word_embeddings"] = true, spec, Value,
                DType.BF16).ModelNameOrPath,
        };
        Batch batch = V26.Batch(V26.Full, "one", "text1");
        double[] logits = Array.ConvertAll(Logits(untied, batch), v => (double)v);
        Assert.That(V26.LargestError(Logits(tied, batch), logits), Is.LessThan(1e-6));
        using TunedModel one = TunedModel.Open(tied), two = TunedModel.Open(untied);
        double loss = V26.Gradients(one, tied, batch).Loss;
        Assert.That(V26.Gradients(two, untied, batch).Loss, Is.EqualTo(loss).Within(1e-6 * loss));
        if (!trained) return;
        float[] both = V26.Gradient(one, "llm.model.embed_tokens.weight");
        float[] input = V26.Gradient(two, "llm.model.embed_tokens.weight");
        double[] sum =
            [.. V26.Gradient(two, "llm.lm_head.weight").Zip(input, (a, b) => (double)a + b)];
        Assert.That(V26.NormError(both, sum), Is.LessThan(1e-5));
    }

    [Test]
    public void BesideAdaptersATiedHeadKeepsTheOriginalEmbedding()
    {
        // PEFT trains a copy of embed_tokens; the head goes on with the weight it shared. The same
        // as an untied model of equal numbers whose head is frozen.
        using var original = Checkpoint.Open(V26.Model);
        float[] Value(string name) =>
            original.Get(name.Replace("lm_head", "model.embed_tokens", StringComparison.Ordinal))
                .ToFloats();
        TrainArguments arguments = V26.Lora with { ModulesToSave = ["embed_tokens"] };
        static void Tie(JsonNode config) => config["tie_word_embeddings"] = true;
        using TunedModel tied = TunedModel.Open(arguments with
        {
            ModelNameOrPath = Variant(Tie, Spec(Tie), Value, DType.BF16).ModelNameOrPath,
        });
        using TunedModel untied = TunedModel.Open(arguments with
        {
            ModelNameOrPath = Variant(_ => { }, V26.Spec, Value, DType.BF16).ModelNameOrPath,
        });
        Batch batch = V26.Batch(V26.Full, "text1");
        const string name = "llm.model.embed_tokens.weight";
        Assert.That(V26.Gradients(tied, arguments, batch).Loss,
            Is.EqualTo(V26.Gradients(untied, arguments, batch).Loss));
        Assert.That(V26.Gradient(tied, name), Is.EqualTo(V26.Gradient(untied, name)));
        float[] zeros = new float[V26.Gradient(tied, name).Length];
        foreach (TunedModel model in (TunedModel[])[tied, untied])
            model.ParameterRanges.Write(name, zeros);
        Assert.That(V26.Gradients(tied, arguments, batch).Loss,
            Is.EqualTo(V26.Gradients(untied, arguments, batch).Loss));
    }

    [Test]
    public void ACopyOfATiedHeadThatCouldNotBeTrainedIsRefused()
    {
        using var original = Checkpoint.Open(V26.Model);
        static void Tie(JsonNode config) => config["tie_word_embeddings"] = true;
        string folder = Variant(Tie, Spec(Tie), name => original.Get(name).ToFloats(), DType.BF16)
            .ModelNameOrPath!;
        Assert.That(
            () => TunedModel.Open(
                V26.Lora with { ModelNameOrPath = folder, ModulesToSave = ["lm_head"] }),
            Throws.TypeOf<InputException>().With.Message.StartsWith(
                "modules_to_save \"lm_head\": "));
    }

    [Test]
    public void TokensBeyondTheModelsVocabularyAreTheRowsFault()
    {
        using var original = Checkpoint.Open(V26.Model);
        static void Edit(JsonNode config) => config["vocab_size"] = 512;
        TrainArguments arguments = Variant(
            Edit, Spec(Edit), name => name.StartsWith("llm.", StringComparison.Ordinal)
                && (name.Contains("embed_tokens", StringComparison.Ordinal)
                    || name.Contains("lm_head", StringComparison.Ordinal))
                ? original.Get(name).ToFloats()[..(512 * 256)] : original.Get(name).ToFloats(),
            DType.BF16) with
        {
            DataPath = Runs.Data(_folder, "one"),
            OutputDir = Path.Combine(_folder, "out"),
            // The picture's number is written with the tokens 516 and 517.
            OfficialCompat = false,
        };
        Assert.That(() =>
            Runs.Train(arguments), Throws.TypeOf<InputException>().With.Message.Contains(
            "row 1 (id \"one\")").And.Message.Contains(
                "the model has 512 (vocab_size in config.json)"));
    }

    [Test]
    public void OtherSizesHaveTheGradientsOfTheirLoss()
    {
        // Heads of 64, three query heads per key head, 16 queries, a tied head, a dropped vision
        // layer, a position table of 32 x 32, no size a multiple of the
        // vectors' lengths where that may be.
        void Edit(JsonNode config)
        {
            foreach (var (key, value) in new Dictionary<string, JsonNode>
            {
                ["hidden_size"] = 384,
                ["num_attention_heads"] = 6,
                ["num_key_value_heads"] = 2,
                ["intermediate_size"] = 333,
                ["vocab_size"] = 531,
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

        var random = new Random(3);
        ModelSpec spec = Spec(Edit);
        var values =
            spec.Parameters.All.ToDictionary(p => p.Name, p => MadeModel.Values(p, random));
        TrainArguments arguments = Variant(Edit, spec, name => values[name], DType.F32) with
        {
            OfficialCompat = true,
        };
        using var model = TunedModel.Open(arguments);
        Assert.That(model.ParameterRanges.Count, Is.EqualTo(model.TotalParameters));
        var batch = Batch(arguments, "turns", "one");
        double loss = V26.Gradients(model, arguments, batch).Loss;
        Assert.That(loss, Is.InRange(0.5 * Math.Log(531), 3 * Math.Log(531)));
        foreach (string part in (string[])["vpm.", "resampler.", "llm.model.layers.0.",
            "llm.model.layers.1.", "llm.model.embed_tokens"])
            MadeModel.AssertSlope(model, batch, part);
    }

    [Test]
    public void ThreadsDoNotChangeABit()
    {
        Batch batch = V26.Batch(V26.Full, "turns", "text0");
        var results = new List<(double Loss, float[] Gradients)>();
        foreach (int threads in (int[])[1, 2, 3, 5])
        {
            TrainArguments arguments = V26.Full with { Threads = threads };
            using var model = TunedModel.Open(arguments);
            double loss = V26.Gradients(model, arguments, batch).Loss;
            results.Add((loss, V26.AllGradients(model)));
        }

        foreach (var (loss, gradients) in results)
        {
            Assert.That(loss, Is.EqualTo(results[0].Loss));
            Assert.That(gradients.AsSpan().SequenceEqual(results[0].Gradients), Is.True);
        }
    }

    [Test]
    public void WeightsInF16AreRoundedOnceAndSavedSo()
    {
        TrainArguments arguments = V26.Full with
        {
            Fp16 = true,
            DataPath = Runs.Data(_folder, "one"),
            OutputDir = Path.Combine(_folder, "out"),
            MaxSteps = 2,
        };
        double exact = ReferenceText.Json("v26/forward/case_a.json").GetProperty("loss")
            .GetDouble();
        using (var model = TunedModel.Open(arguments))
        {
            double loss =
                V26.Gradients(model, arguments, V26.Batch(V26.Full, "one", "two-small")).Loss;
            // Values of bf16 between 6e-5 and 65504 are values of f16 too;
            // only small ones are rounded.
            Assert.That(loss, Is.EqualTo(exact).Within(1e-4 * exact));
        }

        Runs.Train(arguments);
        using var saved = Checkpoint.Open(arguments.OutputDir);
        Assert.That(V26.Spec.Parameters.All.Select(p => saved.Get(p.Name).Type),
            Is.All.EqualTo(DType.F16));
        using var again =
            TunedModel.Open(arguments with { ModelNameOrPath = arguments.OutputDir });
        Assert.That(again.TotalParameters, Is.EqualTo(3153472));
    }

    private static Batch Batch(TrainArguments arguments, params string[] ids)
    {
        string model = arguments.ModelNameOrPath!;
        var rows = DataRows.Read(
            arguments.DataPath!, arguments, ModelSpec.Read(model).Rows());
        var batch = new Batch();
        batch.Clear();
        foreach (string id in ids) rows.Append(rows.Find(id), batch);
        return batch;
    }

    private static float[] Logits(TrainArguments arguments, Batch batch)
    {
        using var model = TunedModel.Open(arguments);
        return Trace.Run(model, batch, gradients: false).Floats["logits"].Values;
    }

    private ModelSpec Spec(Action<JsonNode> edit) => ModelSpec.Read(Files(edit));

    /// <summary>
    /// A folder with the reference's files, its configuration edited, and weights.
    /// </summary>
    private TrainArguments Variant(
        Action<JsonNode> edit, ModelSpec spec, Func<string, float[]> value, DType type,
        long shardBytes = CheckpointWriter.DefaultShardBytes)
    {
        string folder = Files(edit);
        MadeModel.Write(folder, spec, value, type, shardBytes);
        return V26.Full with { ModelNameOrPath = folder };
    }

    private string Files(Action<JsonNode> edit)
    {
        string folder =
            Directory.CreateDirectory(Path.Combine(_folder, Path.GetRandomFileName())).FullName;
        foreach (string file in Directory.GetFiles(V26.Model, "*.json"))
            File.Copy(file, Path.Combine(folder, Path.GetFileName(file)));
        JsonNode config =
            JsonNode.Parse(File.ReadAllBytes(Path.Combine(V26.Model, "config.json")))!;
        edit(config);
        Write("config.json", config);
        JsonNode processor = JsonNode.Parse(
            File.ReadAllBytes(Path.Combine(V26.Model, "preprocessor_config.json")))!;
        processor["image_feature_size"] = config["query_num"]!.DeepClone();
        Write("preprocessor_config.json", processor);
        return folder;

        void Write(string name, JsonNode json)
        {
            string path = Path.Combine(folder, name);
            File.Delete(path);
            File.WriteAllText(path, json.ToJsonString());
        }
    }
}
