using System.Text.Json;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Reference models of families against the official code under PyTorch (F32): activations,
/// logits, loss, every gradient, adapters. The bars are those of V-2_6's.
/// </summary>
[TestFixture("v4")]
[TestFixture("v45")]
[TestFixture("o45")]
public sealed class ReferenceModelTests(string name)
{
    private readonly ReferenceModel _reference = ReferenceModel.Of(name);

    [Test]
    public void CaseAIsEqual()
    {
        var expected = _reference.Json("forward/case_a.json");
        Batch batch = _reference.Batch(_reference.Full, _reference.CaseA);
        using var model = TunedModel.Open(_reference.Full);
        Trace trace = Trace.Run(model, batch, gradients: true);
        Assert.That(trace.Ints["sequence_starts"].Values,
            Is.EqualTo(ReferenceText.Ints(expected.GetProperty("lengths")).Aggregate(
                new List<int> { 0 }, (starts, length) => [.. starts, starts[^1] + length])));
        Assert.That(trace.Ints["tgt_sizes"].Values, Is.EqualTo(
            expected.GetProperty("tgt_sizes").EnumerateArray().SelectMany(ReferenceText.Ints)));
        var activations = _reference.Json("forward/case_a_activations.json");
        foreach (var tensor in activations.EnumerateObject())
            V26.AssertClose(tensor.Name,
                trace.Ints.TryGetValue(tensor.Name, out var ids)
                    ? (ids.Shape, Array.ConvertAll(ids.Values, v => (float)v))
                    : trace.Floats[tensor.Name],
                tensor.Value,
                tensor.Name.StartsWith("grad.", StringComparison.Ordinal) ? 1e-4 : 1e-5);
        Assert.That(activations.EnumerateObject().Count(), Is.GreaterThan(12));
        AssertLoss(trace, expected);
        V26.AssertGradients(model, expected.GetProperty("gradients"));
        double norm = expected.GetProperty("gradient_norm").GetDouble();
        Assert.That(V26.Gradients(model, _reference.Full, batch).GradientNorm,
            Is.EqualTo(norm).Within(1e-4 * norm));
    }

    [Test]
    public void AdaptersAreEqual()
    {
        var expected = _reference.Json("lora/cases.json").GetProperty("lora_only");
        using var model = Open("random_lora_only");
        long trainable = expected.GetProperty("trainable").GetInt64();
        Assert.That(model.ParameterRanges.Count, Is.EqualTo(trainable));
        Assert.That(model.TotalParameters, Is.EqualTo(expected.GetProperty("total").GetInt64()));
        Trace trace = Trace.Run(
            model, _reference.Batch(_reference.Lora, _reference.CaseA), gradients: true);
        AssertLoss(trace, expected);
        if (expected.TryGetProperty("logits", out var logits))
            V26.AssertClose("logits", trace.Floats["logits"], logits);
        V26.AssertGradients(model, expected.GetProperty("gradients"));
        var whole = ReferenceFile.OpenCommitted($"{name}/lora/lora_only_gradients");
        Assert.That(whole.Names.Count(), Is.EqualTo(8 * _reference.Spec.Decoder.Layers));
        foreach (string tensor in whole.Names)
            Assert.That(
                V26.NormError(V26.Gradient(model, V26.Name(tensor)), whole.Doubles(tensor)),
                Is.LessThan(1e-4), tensor);
    }

    [Test]
    public void AnAdapterThatPeftSavedGivesItsLoss()
    {
        using var model = Open("trained_lora_only");
        Trace trace = Trace.Run(
            model, _reference.Batch(_reference.Lora, _reference.CaseA), gradients: false);
        var run = _reference.Json("train/runs.json").GetProperty("lora_only");
        AssertLoss(trace, run.TryGetProperty("case_a_after", out var after) ? after : run);
        if (after.ValueKind == JsonValueKind.Object)
            V26.AssertClose("logits", trace.Floats["logits"], after.GetProperty("reloaded"));
    }

    [TestCase(true)]
    [TestCase(false)]
    public void AWarmStepAllocatesNothing(bool lora)
    {
        TrainArguments arguments = lora
            ? _reference.Lora with
            {
                LoraDropout = 0.1,
                GradientCheckpointing = true,
                ModulesToSave = null,
            }
            : _reference.Full with { Bf16 = true };
        ModelChecks.AssertWarmStepsAllocateNothing(arguments,
            [[_reference.Batch(arguments, _reference.CaseA[0])],
            [_reference.Batch(arguments, "text0", _reference.CaseA[1])],
            [_reference.Batch(arguments, "text1")]]);
    }

    [Test]
    public void CheckpointingGivesTheSameBits()
    {
        Batch batch = _reference.Batch(_reference.Full, _reference.CaseA[0], "text0");
        ModelChecks.AssertCheckpointingGivesTheSameBits(_reference.Full, batch);
    }

    private static void AssertLoss(Trace trace, JsonElement expected)
    {
        double loss = (expected.TryGetProperty("loss", out var value)
            ? value : expected.GetProperty("loss_after")).GetDouble();
        Assert.That(
            trace.Floats["loss"].Values[0], Is.EqualTo(loss).Within(1e-5 * loss), "loss");
    }

    private TunedModel Open(string adapter) => TunedModel.Open(
        _reference.Lora with { LoraWeightPath = _reference.Adapter(adapter) });
}
