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
/// MiniCPM-V 4.6's reference model against transformers (F32): activations, logits, loss, every
/// gradient, adapters, ten steps.
/// </summary>
[TestFixture]
public sealed class MiniCpmV46ModelTests
{
    // Our names of what the trace sees, and the reference's.
    private static readonly (string Ours, string Theirs)[] s_names =
    [
        ("vision.embeddings", "vision.embeddings"), ("vision.layer.0", "vision.layer.0"),
        ("vision.layer.1", "vision.layer.1"), ("vision.vit_merger", "vision.vit_merger"),
        ("vision.layer.2", "vision.layer.2"), ("vision.layer.3", "vision.layer.3"),
        ("vision.post_layernorm", "vision.post_layernorm"), ("merger", "image_features"),
        ("inputs_embeds", "inputs_embeds"), ("llm.layer.0", "text.layer.0"),
        ("llm.layer.1", "text.layer.1"), ("llm.layer.2", "text.layer.2"),
        ("llm.layer.3", "text.layer.3"), ("llm.norm", "text.norm"), ("logits", "logits"),
    ];

    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void TheForwardPassAndEveryGradientAreEqual()
    {
        using var model = TunedModel.Open(V46.Full);
        Trace trace = Trace.Run(model, V46.Batch(model.Loaded.Rows), gradients: true);
        Assert.That(trace.Ints["vision.position_ids"].Values.Select(v => (double)v),
            Is.EqualTo(V46.Inputs.Doubles("vision.position_ids")));
        foreach (var (ours, theirs) in s_names) V46.AssertClose(trace, ours, theirs);
        AssertLoss(trace, V46.Expected.GetProperty("activations").GetProperty("loss"));
        V46.AssertClose(trace, "grad.merger", "grad.image_features", 1e-4);
        V46.AssertClose(trace, "grad.inputs_embeds", "grad.inputs_embeds", 1e-4);
        V26.AssertGradients(model, V46.Expected.GetProperty("gradients"));
    }

    [Test]
    public void WithoutTheTowersMergerThereAreFourTimesAsManyFeatures()
    {
        V46.Changed(_folder, (config, processor) =>
        {
            config["downsample_mode"] = "4x";
            processor["downsample_mode"] = "4x";
        });
        File.Copy(Path.Combine(V46.Model, Checkpoint.SingleFile),
            Path.Combine(_folder, Checkpoint.SingleFile));
        using var model = TunedModel.Open(V46.Full with { ModelNameOrPath = _folder });
        Batch sixteen = V46.Batch(ModelSpec.Read(V46.Model).Rows());
        // The same pictures without their text, whose places would be too few.
        var batch = new Batch();
        batch.Clear();
        batch.AddRow([1, 2, 3], []);
        batch.LabelRows.Add(0);
        batch.Targets.Add(2);
        batch.Grids.Add(sixteen.Grids.Span);
        batch.PictureStarts.Clear();
        batch.PictureStarts.Add(sixteen.PictureStarts.Span);
        batch.Patches.Add(sixteen.Patches.Span);
        Trace trace = Trace.Run(model, batch, gradients: true);
        V46.AssertClose(trace, "merger", "image_features_4x");
        Assert.That(model.ParameterRanges.List.Select(t => t.Name),
            Has.None.Contains("vit_merger"));
    }

    [Test]
    public void AdaptersAreEqual()
    {
        var expected = V46.Expected.GetProperty("lora");
        using var model = TunedModel.Open(V46.Lora with
        {
            LoraWeightPath = V46.Adapter("lora_random"),
        });
        Trace trace = Trace.Run(model, V46.Batch(model.Loaded.Rows), gradients: true);
        AssertLoss(trace, expected.GetProperty("loss"));
        var logits = Fingerprint.Read(expected.GetProperty("logits"));
        Assert.That(Fingerprint.Of(trace.Floats["logits"].Values, logits.Shape)
            .ElementError(logits, logits.Max), Is.LessThan(1e-5));
        int compared = 0;
        foreach (JsonProperty tensor in expected.EnumerateObject())
        {
            const string Gradient = "grad.";
            if (!tensor.Name.StartsWith(Gradient, StringComparison.Ordinal)) continue;
            var wanted = Fingerprint.Read(tensor.Value);
            float[] got = trace.Floats[tensor.Name].Values;
            Assert.That(Fingerprint.Of(got, wanted.Shape).NormError(wanted), Is.LessThan(1e-4),
                tensor.Name);
            compared++;
        }

        Assert.That(compared, Is.EqualTo(model.ParameterRanges.List.Count));
    }

    // With adapters all ten losses and norms. In the full run, whose loss falls from 7 to 0.01 by
    // gradients of norm 100, differences grow about tenfold in a step, from 7e-9 on: its first
    // three losses and norms, the parameters after two steps, and where it ends.
    [TestCase("full", "parameters", 3)]
    [TestCase("lora", "adapter", 10)]
    public void StepsAreEqual(string kind, string what, int comparable)
    {
        const double Bar = 1e-4;
        JsonElement expected = V46.Json(kind + "_steps.json");
        JsonElement[] steps = [.. expected.GetProperty("steps").EnumerateArray()];
        TrainArguments arguments = kind == "full" ? V46.Full
            : V46.Lora with { LoraWeightPath = V46.Adapter("lora_init") };
        using var model = TunedModel.Open(arguments);
        Batch batch = V46.Batch(model.Loaded.Rows);
        var trainer = new Trainer(arguments, model);
        Dictionary<string, float[]> first = [];
        double error = 0, last = 0;
        for (int i = 0; i < steps.Length; i++)
        {
            StepResult result =
                trainer.Step(i, [batch], steps[i].GetProperty("lr").GetDouble());
            last = result.Loss;
            if (i < comparable)
                error = Math.Max(error, Math.Max(
                    Error(result.Loss, steps[i].GetProperty("loss")),
                    Error(result.GradientNorm, steps[i].GetProperty("grad_norm"))));
            // The rate of the first step is 0, so both have the same gradients.
            if (i == 0)
                first = model.ParameterRanges.List.ToDictionary(t => t.Name, t => Array.ConvertAll(
                    V26.Gradient(model, t.Name), g => (float)(g / result.GradientNorm)));
            if (i == 1)
                AssertTensors(model, expected.GetProperty(what + "_after_2"),
                    name => steps[1].GetProperty("lr").GetDouble() * Doubt(first[name]));
        }

        TestContext.Out.WriteLine($"worst loss or norm {error:E2}");
        Assert.That(error, Is.LessThan(Bar));
        Assert.That(last, Is.EqualTo(steps[^1].GetProperty("loss").GetDouble()).Within(0.01));
        if (kind != "lora") return;
        int within = expected.GetProperty("adapter_after_10").EnumerateObject().Count(tensor =>
            Distance(model, tensor) < Bar * Fingerprint.Read(tensor.Value).Norm);
        TestContext.Out.WriteLine($"{within} of {first.Count} tensors within {Bar} at the end");
        Assert.That(within, Is.GreaterThanOrEqualTo(0.89 * first.Count));

        static void AssertTensors(
            TunedModel model, JsonElement tensors, Func<string, double> doubt)
        {
            int strict = 0, all = 0;
            foreach (JsonProperty tensor in tensors.EnumerateObject())
            {
                if (V26.IsKeyBias(tensor.Name)) continue;
                double distance = Distance(model, tensor);
                double bar = Bar * Fingerprint.Read(tensor.Value).Norm;
                all++;
                if (distance < bar) strict++;
                Assert.That(distance, Is.LessThan(bar + doubt(V26.Name(tensor.Name))),
                    tensor.Name);
            }

            TestContext.Out.WriteLine($"{strict} of {all} tensors within {Bar} after two steps");
            Assert.That(strict, Is.GreaterThanOrEqualTo(0.9 * all));
        }

        static double Distance(TunedModel model, JsonProperty tensor)
        {
            var wanted = Fingerprint.Read(tensor.Value);
            return wanted.Norm * Fingerprint.Of(model.Device.ReadFloats(
                model.ParameterRanges.Value(V26.Name(tensor.Name))),
                    wanted.Shape).NormError(wanted);
        }
    }

    // Adam's first step g / (|g| + 1e-8) of clipped gradients that are wrong by the library's own
    // rounding, 4.8e-5 of their norm: where they are next to 0, the step may be any. Fingerprints
    // tell distances up to a factor of about two.
    internal static double Doubt(float[] gradients)
    {
        const double Rounding = 4.8e-5, Epsilon = 1e-8;
        double error = Rounding
            * Math.Sqrt(gradients.Sum(g => (double)g * g) / gradients.Length);
        return 2 * Math.Sqrt(gradients.Sum(g => Math.Pow(Step(g + error) - Step(g - error), 2)));

        static double Step(double g) => g / (Math.Abs(g) + Epsilon);
    }

    private static double Error(double got, JsonElement expected) =>
        Math.Abs(got - expected.GetDouble()) / expected.GetDouble();

    [Test]
    public void ATextDoesNotSeeItsNeighbourInTheBatch()
    {
        using var model = TunedModel.Open(V46.Lora);
        RowFormat format = model.Loaded.Rows;
        float[] alone = Logits(0), other = Logits(1), both = Logits(0, 1);
        Assert.That(both[..alone.Length], Is.EqualTo(alone));
        Assert.That(V26.LargestError(both[alone.Length..], [.. other.Select(v => (double)v)]),
            Is.LessThan(1e-6));

        float[] Logits(params int[] rows) =>
            Trace.Run(model, V46.Batch(format, rows), gradients: false).Floats["logits"].Values;
    }

    [Test]
    public void CheckpointingGivesTheSameBits() => ModelChecks.AssertCheckpointingGivesTheSameBits(
        V46.Full, V46.Batch(ModelSpec.Read(V46.Model).Rows()));

    [TestCase(false)]
    [TestCase(true)]
    public void AWarmStepAllocatesNothing(bool lora)
    {
        RowFormat format = ModelSpec.Read(V46.Model).Rows();
        ModelChecks.AssertWarmStepsAllocateNothing(lora ? V46.Lora : V46.Full,
            [[V46.Batch(format)], [V46.Batch(format, 0)]]);
    }

    private static void AssertLoss(Trace trace, JsonElement expected) => Assert.That(
        trace.Floats["loss"].Values[0],
        Is.EqualTo(expected.GetDouble()).Within(1e-5 * expected.GetDouble()));
}
