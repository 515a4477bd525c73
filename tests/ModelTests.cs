using System.Text.Json;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// The model against the official code under PyTorch (F32): activations, logits, loss, and every
/// gradient of full fine-tuning, of adapters and of modules trained whole beside them.
/// </summary>
[TestFixture]
public sealed class ModelTests
{
    private static readonly string[] s_caseA = ["one", "two-small"];

    [Test]
    public void CaseAIsEqual()
    {
        var expected = ReferenceText.Json("v26/forward/case_a.json");
        Batch batch = V26.Batch(V26.Full, s_caseA);
        using var model = TunedModel.Open(V26.Full);
        Trace trace = Trace.Run(model, batch, gradients: true);
        AssertLoss(trace.Floats["loss"].Values[0], expected.GetProperty("loss"));
        Assert.That(trace.Ints["tgt_sizes"].Values, Is.EqualTo(
            expected.GetProperty("tgt_sizes").EnumerateArray().SelectMany(ReferenceText.Ints)));
        if (V26.IsFull) AssertCaseAWhole(model, trace);
        else
        {
            var activations = ReferenceText.Json("v26/forward/case_a_activations.json");
            foreach (var tensor in activations.EnumerateObject())
                V26.AssertClose(tensor.Name, trace.Floats[tensor.Name], tensor.Value,
                    tensor.Name.StartsWith("grad.", StringComparison.Ordinal) ? 1e-4 : 1e-5);
            Assert.That(activations.EnumerateObject().Count(), Is.EqualTo(13));
        }

        V26.AssertGradients(model, expected.GetProperty("gradients"));
    }

    [TestCase("mixed")]
    [TestCase("many")]
    [TestCase("few_slices")]
    [TestCase("order")]
    [TestCase("unused_forward")]
    [TestCase("text_only_batch_training")]
    public void CaseBIsEqual(string name)
    {
        var expected = ReferenceText.Json("v26/forward/case_b.json").GetProperty(name);
        bool trains = expected.TryGetProperty("gradients", out var gradients);
        TrainArguments arguments = V26.Full with
        {
            MaxSliceNums = trains ? expected.GetProperty("max_slice_nums").GetInt32() : 9,
        };
        string[] ids =
            [.. expected.GetProperty("samples").EnumerateArray().Select(s => s.GetString()!)];
        Batch batch = V26.Batch(arguments, ids);
        int[] lengths = ReferenceText.Ints(expected.GetProperty("lengths"));
        Assert.That(batch.SequenceStarts.Span.ToArray(), Is.EqualTo(
            lengths.Aggregate(new List<int> { 0 }, (starts, n) => [.. starts, starts[^1] + n])));
        Assert.That(batch.Grids.Count / 2,
            Is.EqualTo(ReferenceText.Ints(expected.GetProperty("pictures")).Sum()));
        using var model = TunedModel.Open(arguments);
        Trace trace = Trace.Run(model, batch, trains);
        AssertLoss(trace.Floats["loss"].Values[0], expected.GetProperty("loss"));
        V26.AssertClose("logits", trace.Floats["logits"], expected.GetProperty("logits"));
        AssertLastLogits(name, trace, lengths);
        if (trains) V26.AssertGradients(model, gradients);
    }

    [Test]
    public void TextAloneTeachesPictureFeaturesNothing()
    {
        TrainArguments arguments = V26.Full with { TuneLlm = false };
        using var model = TunedModel.Open(arguments);
        Batch text = V26.Batch(arguments, "text0", "text1");
        Trace trace = Trace.Run(model, text, gradients: true);
        var expected = ReferenceText.Json("v26/forward/case_b.json")
            .GetProperty("text_only_batch_eval");
        AssertLoss(trace.Floats["loss"].Values[0], expected.GetProperty("loss"));
        StepResult result = V26.Gradients(model, arguments, text);
        AssertLoss(result.Loss, expected.GetProperty("loss"));
        Assert.That(result.GradientNorm, Is.Zero);
        Assert.That(result.Skipped, Is.False);
    }

    [TestCase(LossNormalization.Tokens, "tokens")]
    [TestCase(LossNormalization.MicroBatchMean, "mean_of_means")]
    public void AccumulatedGradientsAreEqual(LossNormalization normalization, string part)
    {
        var all = ReferenceText.Json("v26/forward/accumulation.json");
        var expected = all.GetProperty(part);
        TrainArguments arguments = V26.Full with
        {
            GradientAccumulationSteps = 4,
            LossNormalization = normalization,
        };
        using var model = TunedModel.Open(arguments);
        Batch[] batches = [.. all.GetProperty("samples").EnumerateArray().Select(
            id => V26.Batch(arguments, id.GetString()!))];
        StepResult result = V26.Gradients(model, arguments, batches);
        AssertLoss(result.Loss, expected.GetProperty("loss"));
        double norm = expected.GetProperty("gradient_norm").GetDouble();
        Assert.That(result.GradientNorm, Is.EqualTo(norm).Within(1e-4 * norm));
        V26.AssertGradients(model, expected.GetProperty("gradients"));
    }

    [Test]
    public void MicroBatchesByTokensAreOneBatch()
    {
        string[] ids = ["one", "turns", "tall", "text1"];
        using var model = TunedModel.Open(V26.Full);
        StepResult parts = V26.Gradients(
            model, V26.Full, [.. ids.Select(id => V26.Batch(V26.Full, id))]);
        var accumulated = model.ParameterRanges.List.ToDictionary(
            t => t.Name, t => V26.Gradient(model, t.Name));
        StepResult whole = V26.Gradients(model, V26.Full, V26.Batch(V26.Full, ids));
        Assert.That(parts.Loss, Is.EqualTo(whole.Loss).Within(1e-6 * whole.Loss));
        Assert.That(parts.SupervisedTokens, Is.EqualTo(whole.SupervisedTokens));
        foreach (var (name, gradient) in accumulated)
        {
            if (V26.IsKeyBias(name)) continue;
            double[] one = Array.ConvertAll(V26.Gradient(model, name), v => (double)v);
            Assert.That(V26.NormError(gradient, one), Is.LessThan(1e-5), name);
        }
    }

    [TestCase("lora_only")]
    [TestCase("official_frozen_vision")]
    [TestCase("official_tuned_vision")]
    public void AdaptersAreEqual(string name)
    {
        var expected = ReferenceText.Json("v26/lora/cases.json").GetProperty(name);
        TrainArguments arguments = V26.Lora with
        {
            TuneVision = name == "official_tuned_vision",
            // Null leaves the choice to official_compat: the script's modules.
            ModulesToSave = name == "lora_only" ? [] : null,
        };
        using var model = Open(arguments, "random_lora_only");
        long trainable = expected.GetProperty("trainable").GetInt64();
        Assert.That(model.ParameterRanges.Count, Is.EqualTo(trainable));
        // PEFT's total has the modules that are trained whole twice: the copy and the original.
        // A and B of q, k, v, o in two layers: 8 * (256 + outputs), outputs 256, 128, 128, 256.
        const long adapters = 2 * 8 * ((4 * 256) + 256 + 128 + 128 + 256);
        Assert.That(model.TotalParameters,
            Is.EqualTo(expected.GetProperty("total").GetInt64() - (trainable - adapters)));
        AssertCase(model, expected);
        if (name == "lora_only" || V26.IsFull)
            AssertGradientsWhole(model, $"v26/lora/{name}_gradients");
    }

    [TestCase("bias_all", 53)]
    [TestCase("bias_lora_only", 22)]
    [TestCase("layer_1", 8)]
    [TestCase("suffixes", 46)]
    [TestCase("rslora", 16)]
    [TestCase("patterns", 16)]
    [TestCase("dora", 24)]
    public void VariantsOfAdaptersAreEqual(string name, int tensors)
    {
        var expected = ReferenceText.Json("v26/lora/variants.json").GetProperty(name);
        // PEFT does not save the biases that bias_lora_only trains: the adapter is the random one,
        // as that of rslora.
        using var model = name is "bias_lora_only" or "rslora"
            ? OpenRandom(V26.Lora with
            {
                LoraBias = name == "rslora" ? LoraBias.None : LoraBias.LoraOnly,
                UseRslora = name == "rslora",
            })
            : TunedModel.Open(AdapterSettings.Complete(
                V26.Lora with { LoraWeightPath = V26.Adapter("variant_" + name) }, _ => false));
        Assert.That(model.ParameterRanges.List, Has.Count.EqualTo(tensors));
        AssertCase(model, expected);
        if (V26.IsFull) AssertGradientsWhole(model, $"v26/adapters/variant_{name}/gradients");
    }

    [TestCase(false)]
    [TestCase(true)]
    public void CheckpointingGivesTheSameBits(bool lora)
    {
        TrainArguments arguments = lora ? V26.Lora with { LoraDropout = 0.3 } : V26.Full;
        Batch batch = V26.Batch(arguments, "two-small", "text0");
        var results = new List<(StepResult Result, float[] Gradients, long Peak)>();
        foreach (bool checkpointing in (bool[])[false, true])
        {
            using var model = TunedModel.Open(
                arguments with { GradientCheckpointing = checkpointing });
            if (lora) Load(model, "random_lora_only");
            StepResult result = V26.Gradients(model, arguments, batch);
            results.Add((result, V26.AllGradients(model),
                model.Graph.PeakBytes));
        }

        Assert.That(results[1].Result.Loss, Is.EqualTo(results[0].Result.Loss));
        Assert.That(results[1].Gradients.AsSpan().SequenceEqual(results[0].Gradients), Is.True);
        // With adapters the frozen vision tower is the peak,
        // which keeps nothing for backward anyway.
        if (!lora) Assert.That(results[1].Peak, Is.LessThan(results[0].Peak), "bytes");
    }

    [Test]
    public void DropoutChangesOnlyAdaptersAndFollowsTheSeed()
    {
        TrainArguments arguments = V26.Lora with { LoraDropout = 0.5 };
        Batch batch = V26.Batch(arguments, "one");
        using var model = Open(arguments, "random_lora_only");
        double Loss(long seed, int step) =>
            new Trainer(arguments with { Seed = seed }, model).Step(step, [batch], 0).Loss;
        double first = Loss(1, 0);
        Assert.That(Loss(1, 0), Is.EqualTo(first));
        Assert.That(Loss(2, 0), Is.Not.EqualTo(first));
        Assert.That(Loss(1, 1), Is.Not.EqualTo(first));
    }

    private static void AssertCase(TunedModel model, JsonElement expected)
    {
        Trace trace = Trace.Run(model, V26.Batch(V26.Full, s_caseA), gradients: true);
        AssertLoss(trace.Floats["loss"].Values[0], expected.GetProperty("loss"));
        V26.AssertClose("logits", trace.Floats["logits"], expected.GetProperty("logits"));
        V26.AssertGradients(model, expected.GetProperty("gradients"));
    }

    private static void AssertLoss(double loss, JsonElement expected) =>
        Assert.That(loss, Is.EqualTo(expected.GetDouble()).Within(1e-5 * expected.GetDouble()),
            "loss");

    private static void AssertLastLogits(string name, Trace trace, int[] lengths)
    {
        double[] expected = ReferenceFile.Open("v26/forward/case_b").Doubles(name + ".last_logits");
        var (shape, logits) = trace.Floats["logits"];
        int last = -1, cols = shape.Cols;
        var got = new List<float>();
        foreach (int length in lengths)
        {
            last += length;
            got.AddRange(logits.AsSpan(last * cols, cols));
        }

        Assert.That(V26.LargestError(got.ToArray(), expected), Is.LessThan(1e-5));
    }

    private static void AssertCaseAWhole(TunedModel model, Trace trace)
    {
        var file = ReferenceFile.Open("v26/forward/case_a");
        Assert.That(trace.Ints["vision.position_ids"].Values,
            Is.EqualTo(file.Ints("vision.position_ids")));
        foreach (string name in file.Names.Where(n => n != "vision.position_ids"))
        {
            double error = V26.LargestError(trace.Floats[name].Values, file.Doubles(name));
            TestContext.Out.WriteLine($"{name}: {error:E2}");
            bool gradient = name.StartsWith("grad.", StringComparison.Ordinal);
            Assert.That(error, Is.LessThan(gradient ? 1e-4 : 1e-5), name);
        }

        AssertGradientsWhole(model, "v26/forward/case_a_gradients");
    }

    private static void AssertGradientsWhole(TunedModel model, string path)
    {
        var file = ReferenceFile.Open(path);
        foreach (string name in file.Names)
        {
            if (V26.IsKeyBias(V26.Name(name))) continue;
            float[] got = V26.Gradient(model, V26.Name(name));
            Assert.That(V26.NormError(got, file.Doubles(name)), Is.LessThan(1e-4), name);
        }
    }

    private static TunedModel Open(TrainArguments arguments, string adapter)
    {
        var model = TunedModel.Open(arguments);
        Load(model, adapter);
        return model;
    }

    // The random adapter's tensors under another configuration.
    private static TunedModel OpenRandom(TrainArguments arguments)
    {
        var model = TunedModel.Open(arguments);
        using var file = SafetensorsFile.Open(
            Path.Combine(V26.Adapter("random_lora_only"), AdapterFile.WeightsName));
        foreach (StoredTensor tensor in file.Tensors)
            model.ParameterRanges.Write(V26.Name(tensor.Name), tensor.ToFloats());
        return model;
    }

    private static void Load(TunedModel model, string adapter)
    {
        using var file = AdapterFile.Open(V26.Adapter(adapter));
        model.CopyFrom(file);
    }
}
