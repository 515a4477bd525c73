using System.Text.Json;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Reference models of families against their released code under PyTorch (F32): activations,
/// logits, losses, every gradient, adapters. The bars are those of V-2_6's.
/// </summary>
[TestFixture("v2")]
[TestFixture("l3")]
public sealed class FamilyModelTests(string name)
{
    private readonly FamilyCase _family = FamilyCase.Of(name);

    [Test]
    public void TheForwardPassAndEveryGradientAreEqual()
    {
        var expected = _family.Results.GetProperty("full");
        using var model = TunedModel.Open(_family.Full);
        Batch batch = _family.Batch(_family.Full, _family.Pair);
        Trace trace = Trace.Run(model, batch, gradients: true);
        var activations = _family.Json("activations.json");
        foreach (var tensor in activations.EnumerateObject())
            V26.AssertClose(tensor.Name, trace.Floats[tensor.Name], tensor.Value);
        AssertSupervised(trace, "forward");
        if (!V26.IsFull) AssertWhole(trace);
        AssertLoss(trace, expected.GetProperty("loss"));
        V26.AssertGradients(model, expected.GetProperty("gradients"));
        StepResult step = V26.Gradients(model, _family.Full, batch);
        double norm = expected.GetProperty("global_norm").GetDouble();
        Assert.That(step.GradientNorm, Is.EqualTo(norm).Within(1e-4 * norm));
    }

    [Test]
    public void EveryRowAloneHasItsLoss()
    {
        using var model = TunedModel.Open(_family.Lora);
        foreach (var row in _family.Results.GetProperty("losses").EnumerateObject())
        {
            Trace trace = Trace.Run(
                model, _family.Batch(_family.Lora, row.Name), gradients: false);
            AssertLoss(trace, row.Value, row.Name);
        }
    }

    [Test]
    public void TextAloneLeavesVisionAZeroGradient()
    {
        var expected = _family.Results.GetProperty("text_only");
        using var model = TunedModel.Open(_family.Full);
        foreach (var (part, rows) in (IEnumerable<(string, string[])>)[
            ("alone", ["text"]), ("with_row_one", ["text", "one"])])
        {
            var wanted = expected.GetProperty(part);
            Trace trace = Trace.Run(model, _family.Batch(_family.Full, rows), gradients: true);
            int[] ids = ReferenceText.Ints(wanted.GetProperty("input_ids")[0]),
                labels = ReferenceText.Ints(wanted.GetProperty("labels")[0]);
            int length = trace.Ints["sequence_starts"].Values[1];
            Assert.That(trace.Ints["input_ids"].Values[..length], Is.EqualTo(ids[..length]));
            Assert.That(trace.Ints["labels"].Values[..length], Is.EqualTo(labels[..length]));
            AssertLoss(trace, wanted.GetProperty("loss_train"), part);
            double squares = 0;
            foreach (var tensor in model.ParameterRanges.List)
                if (!tensor.Name.StartsWith("llm.", StringComparison.Ordinal))
                    squares += V26.Gradient(model, tensor.Name).Sum(v => (double)v * v);
            double norm = wanted.GetProperty("vision_gradient_norm").GetDouble();
            Assert.That(Math.Sqrt(squares), Is.EqualTo(norm).Within(1e-4 * norm), part);
        }
    }

    [TestCase("lora_only")]
    [TestCase("lora_official")]
    public void AdaptersAreEqual(string name)
    {
        var expected = _family.Results.GetProperty(name);
        // Null leaves the choice to official_compat: the script's modules.
        using var model = _family.OpenAdapted(
            _family.Lora with { ModulesToSave = name == "lora_only" ? [] : null });
        Trace trace = Trace.Run(
            model, _family.Batch(_family.Lora, _family.Pair), gradients: true);
        AssertLoss(trace, expected.GetProperty("loss"));
        V26.AssertGradients(model, expected.GetProperty("gradients"));
        if (name == "lora_only") AssertAdapterGradients(model);
        if (!expected.TryGetProperty("parameters", out var counts)) return;
        // PEFT's total has the modules that are trained whole twice: the copy and the original.
        long trainable = counts.GetProperty("Trainable").GetInt64();
        long adapters = model.Parts.Adapters.List.Sum(a => (long)a.Rank * (a.Inputs + a.Outputs));
        Assert.That(model.ParameterRanges.Count, Is.EqualTo(trainable));
        Assert.That(model.TotalParameters,
            Is.EqualTo(counts.GetProperty("Total").GetInt64() - (trainable - adapters)));
    }

    [Test]
    public void AnAdapterThatPeftSavedGivesItsLogits()
    {
        if (!V26.IsFull) Assert.Ignore("the adapter is in the full reference only");
        string folder = Path.Combine(ReferenceText.Root, _family.Name, "adapter_official");
        using var model = TunedModel.Open(
            _family.Lora with { LoraWeightPath = folder, ModulesToSave = null });
        Trace trace = Trace.Run(
            model, _family.Batch(_family.Lora, _family.Pair), gradients: false);
        AssertLoss(trace,
            _family.Results.GetProperty("adapter_official_loaded").GetProperty("loss"));
        AssertSupervised(trace, "adapter_official_logits");
    }

    [TestCase("lora_checkpointed")]
    [TestCase("full")]
    [TestCase("full_bf16_checkpointed")]
    public void AWarmStepAllocatesNothing(string kind)
    {
        bool lora = kind.StartsWith("lora", StringComparison.Ordinal);
        TrainArguments arguments = (lora
            ? _family.Lora with { LoraDropout = 0.1, ModulesToSave = null } : _family.Full) with
        {
            GradientCheckpointing = kind.EndsWith("checkpointed", StringComparison.Ordinal),
            Bf16 = kind.Contains("bf16"),
        };
        ModelChecks.AssertWarmStepsAllocateNothing(arguments,
            [[_family.Batch(arguments, "one")],
            [_family.Batch(arguments, "text", "very_long", "sliced")],
            [_family.Batch(arguments, "text")]]);
    }

    [Test]
    public void CheckpointingGivesTheSameBits()
    {
        Batch batch = _family.Batch(_family.Full, "sliced", "text");
        ModelChecks.AssertCheckpointingGivesTheSameBits(_family.Full, batch);
    }

    private static void AssertLoss(Trace trace, JsonElement expected, string what = "loss") =>
        Assert.That(trace.Floats["loss"].Values[0],
            Is.EqualTo(expected.GetDouble()).Within(1e-5 * expected.GetDouble()), what);

    private void AssertAdapterGradients(TunedModel model)
    {
        var file = ReferenceFile.Open($"{_family.Name}/lora_only_grads");
        Assert.That(file.Names.Count(), Is.EqualTo(16));
        foreach (string key in file.Names)
            Assert.That(V26.NormError(V26.Gradient(
                model, V26.Name(key.Replace("full.", "", StringComparison.Ordinal))),
                file.Doubles(key)), Is.LessThan(1e-4), key);
    }

    private void AssertWhole(Trace trace)
    {
        var file = ReferenceFile.Open($"{_family.Name}/forward");
        foreach (string key in file.Names.Where(n => n != "supervised_logits"))
            if (trace.Ints.TryGetValue(key, out var ints))
                Assert.That(ints.Values, Is.EqualTo(file.Ints(key)), key);
            else
                Assert.That(V26.LargestError(trace.Floats[key].Values, file.Doubles(key)),
                    Is.LessThan(1e-5), key);
    }

    // Logits of the tokens that have a label.
    private void AssertSupervised(Trace trace, string file)
    {
        var (shape, logits) = trace.Floats["logits"];
        int[] labels = trace.Ints["labels"].Values;
        float[] rows = [.. Enumerable.Range(0, labels.Length).Where(t => labels[t] != -100)
            .SelectMany(t => logits[(t * shape.Cols)..((t + 1) * shape.Cols)])];
        double error = V26.LargestError(
            rows, ReferenceFile.Open($"{_family.Name}/{file}").Doubles("supervised_logits"));
        TestContext.Out.WriteLine($"supervised logits: {error:E2}");
        Assert.That(error, Is.LessThan(1e-5));
    }
}
