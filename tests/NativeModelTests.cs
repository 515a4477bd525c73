using System.Text.Json;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Reference models of members of transformers itself against transformers (F32): activations,
/// logits, loss, every gradient, adapters, ten steps. The bars are V-2_6's.
/// </summary>
[TestFixture("v47")]
[TestFixture("ocr")]
public sealed class NativeModelTests(string name)
{
    private readonly NativeCase _case = NativeCase.Of(name);

    [Test]
    public void TheForwardPassAndEveryGradientAreEqual()
    {
        using var model = TunedModel.Open(_case.Full);
        Batch batch = _case.Batch(model.Loaded.Rows);
        Trace trace = Trace.Run(model, batch, gradients: true);
        Assert.That(batch.Grids.Span.ToArray(), Is.EqualTo(_case.Ints("target_sizes")));
        JsonElement activations = _case.Expected.GetProperty("activations");
        int compared = 0;
        foreach (JsonProperty tensor in activations.EnumerateObject())
        {
            string ours = tensor.Name.Replace("text.", "llm.", StringComparison.Ordinal)
                .Replace("image_features", "merger", StringComparison.Ordinal);
            if (tensor.Name == "loss" || !trace.Floats.ContainsKey(ours)) continue;
            NativeCase.AssertClose(trace, ours, tensor.Value,
                ours.StartsWith("grad.", StringComparison.Ordinal) ? 1e-4 : 1e-5);
            compared++;
        }

        Assert.That(compared, Is.GreaterThanOrEqualTo(13));
        AssertLoss(trace, activations.GetProperty("loss"));
        V26.AssertGradients(model, Present(_case.Expected.GetProperty("gradients")));
    }

    [Test]
    public void AdaptersAreEqual()
    {
        JsonElement expected = _case.Expected.GetProperty("lora");
        using var model = TunedModel.Open(
            _case.Lora with { LoraWeightPath = _case.Adapter("lora_random") });
        Trace trace = Trace.Run(model, _case.Batch(model.Loaded.Rows), gradients: true);
        AssertLoss(trace, expected.GetProperty("loss"));
        int compared = 0;
        foreach (JsonProperty tensor in expected.EnumerateObject())
        {
            if (!tensor.Name.StartsWith("grad.", StringComparison.Ordinal)) continue;
            NativeCase.AssertClose(trace, tensor.Name, tensor.Value, 1e-4);
            compared++;
        }

        Assert.That(compared, Is.EqualTo(model.ParameterRanges.List.Count));
    }

    // As in MiniCpmV46ModelTests: differences grow from step to step in the full run.
    [TestCase("full", "parameters", 3)]
    [TestCase("lora", "adapter", 10)]
    public void StepsAreEqual(string kind, string what, int comparable)
    {
        const double Bar = 1e-4;
        JsonElement expected = _case.Json(kind + "_steps.json");
        JsonElement[] steps = [.. expected.GetProperty("steps").EnumerateArray()];
        TrainArguments arguments = kind == "full" ? _case.Full
            : _case.Lora with { LoraWeightPath = _case.Adapter("lora_init") };
        using var model = TunedModel.Open(arguments);
        Batch batch = _case.Batch(model.Loaded.Rows);
        var trainer = new Trainer(arguments, model);
        Dictionary<string, float[]> first = [];
        double error = 0;
        for (int i = 0; i < comparable; i++)
        {
            StepResult result =
                trainer.Step(i, [batch], steps[i].GetProperty("lr").GetDouble());
            error = Math.Max(error, Math.Max(
                Error(result.Loss, steps[i].GetProperty("loss")),
                Error(result.GradientNorm, steps[i].GetProperty("grad_norm"))));
            // The rate of the first step is 0, so both have the same gradients.
            if (i == 0)
                first = model.ParameterRanges.List.ToDictionary(t => t.Name, t => Array.ConvertAll(
                    V26.Gradient(model, t.Name), g => (float)(g / result.GradientNorm)));
            if (i == 1)
                AssertTensors(model, expected.GetProperty(what + "_after_2"), name =>
                    steps[1].GetProperty("lr").GetDouble()
                    * MiniCpmV46ModelTests.Doubt(first[name]));
        }

        TestContext.Out.WriteLine($"worst loss or norm {error:E2}");
        Assert.That(error, Is.LessThan(Bar));

        static void AssertTensors(
            TunedModel model, JsonElement tensors, Func<string, double> doubt)
        {
            int strict = 0, all = 0;
            foreach (JsonProperty tensor in tensors.EnumerateObject())
            {
                string name = V26.Name(tensor.Name);
                // What is not trained is where it was.
                if (V26.IsKeyBias(name) || !model.ParameterRanges.List.Any(t => t.Name == name))
                    continue;
                var wanted = Fingerprint.Read(tensor.Value);
                double distance = Fingerprint.Of(model.Device.ReadFloats(
                    model.ParameterRanges.Value(name)), wanted.Shape).NormError(wanted);
                all++;
                if (distance < Bar) strict++;
                Assert.That(distance * wanted.Norm,
                    Is.LessThan((Bar * wanted.Norm) + doubt(name)), name);
            }

            TestContext.Out.WriteLine($"{strict} of {all} tensors within {Bar} after two steps");
            Assert.That(all, Is.GreaterThan(20));
            Assert.That(strict, Is.GreaterThanOrEqualTo(0.9 * all));
        }

        static double Error(double got, JsonElement wanted) =>
            Math.Abs(got - wanted.GetDouble()) / wanted.GetDouble();
    }

    [Test]
    public void ATextDoesNotSeeItsNeighbourInTheBatch()
    {
        using var model = TunedModel.Open(_case.Lora);
        RowFormat format = model.Loaded.Rows;
        float[] alone = Logits(0), other = Logits(1), both = Logits(0, 1);
        Assert.That(both[..alone.Length], Is.EqualTo(alone));
        Assert.That(V26.LargestError(both[alone.Length..], [.. other.Select(v => (double)v)]),
            Is.LessThan(1e-6));

        float[] Logits(params int[] rows) =>
            Trace.Run(model, _case.Batch(format, rows), gradients: false).Floats["logits"].Values;
    }

    [Test]
    public void CheckpointingGivesTheSameBits() => ModelChecks.AssertCheckpointingGivesTheSameBits(
        _case.Full, _case.Batch(ModelSpec.Read(_case.Model).Rows()));

    [Test]
    public void AWarmStepAllocatesNothing()
    {
        RowFormat format = ModelSpec.Read(_case.Model).Rows();
        ModelChecks.AssertWarmStepsAllocateNothing(
            _case.Full, [[_case.Batch(format)], [_case.Batch(format, 0)]]);
    }

    // Of what is not trained nothing is there; the reference has null.
    private static JsonElement Present(JsonElement gradients) =>
        JsonSerializer.SerializeToElement(gradients.EnumerateObject()
            .Where(p => p.Value.ValueKind != JsonValueKind.Null)
            .ToDictionary(p => p.Name, p => p.Value));

    private static void AssertLoss(Trace trace, JsonElement expected) => Assert.That(
        trace.Floats["loss"].Values[0],
        Is.EqualTo(expected.GetDouble()).Within(1e-5 * expected.GetDouble()));
}
