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
        using var model = TrainingModel.Open(V46.Full);
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
        using var model = TrainingModel.Open(V46.Full with { ModelNameOrPath = _folder });
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
        Assert.That(model.Trainables.List.Select(t => t.Name), Has.None.Contains("vit_merger"));
    }

    [Test]
    public void AdaptersAreEqual()
    {
        var expected = V46.Expected.GetProperty("lora");
        using var model = TrainingModel.Open(V46.Lora with
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

        Assert.That(compared, Is.EqualTo(model.Trainables.List.Count));
    }

    // Adam makes steps of full size of the smallest gradients, so rounding grows from step to step:
    // in the full run, whose loss falls from 7 to 0.01, tenfold in each. A tensor or a loss may
    // differ by 1e-4, or by a few times what a run differs by that starts with the last bits of all
    // weights changed; in the first two steps by 1e-4 alone.
    [TestCase("full", "parameters")]
    [TestCase("lora", "adapter")]
    public void TenStepsAreEqual(string kind, string what)
    {
        const double Bar = 1e-4, Times = 4;
        JsonElement expected = V46.Json(kind + "_steps.json");
        TrainArguments arguments = kind == "full" ? V46.Full
            : V46.Lora with { LoraWeightPath = V46.Adapter("lora_init") };
        var run = Run(0);
        var other = Run(1e-7);
        Assert.That(run.Steps[^1].Loss, Is.LessThan(0.7 * run.Steps[0].Loss));
        foreach (JsonElement step in expected.GetProperty("steps").EnumerateArray())
        {
            int i = step.GetProperty("step").GetInt32();
            Assert.That(run.Steps[i].Loss, Is.EqualTo(step.GetProperty("loss").GetDouble())
                .Within(Allowed(i, run.Steps[i].Loss, other.Steps[i].Loss)), $"loss {i}");
            Assert.That(run.Steps[i].Norm, Is.EqualTo(step.GetProperty("grad_norm").GetDouble())
                .Within(Allowed(i, run.Steps[i].Norm, other.Steps[i].Norm)), $"norm {i}");
        }

        AssertTensors(run.After2, null, expected.GetProperty(what + "_after_2"));
        AssertTensors(run.After10, other.After10, expected.GetProperty(what + "_after_10"));

        double Allowed(int step, double value, double moved) => step <= 2
            ? Bar * value : Math.Max(Bar * value, Times * Math.Abs(value - moved));

        void AssertTensors(Dictionary<string, float[]> got, Dictionary<string, float[]>? moved,
            JsonElement tensors)
        {
            double worst = 0;
            int strict = 0;
            foreach (JsonProperty tensor in tensors.EnumerateObject())
            {
                string name = V26.Name(tensor.Name);
                if (V26.IsKeyBias(name)) continue;
                var wanted = Fingerprint.Read(tensor.Value);
                double error = Fingerprint.Of(got[name], wanted.Shape).NormError(wanted);
                double noise = moved is null ? 0
                    : V26.NormError(moved[name], [.. got[name].Select(v => (double)v)]);
                worst = Math.Max(worst, error);
                if (error < Bar) strict++;
                Assert.That(error, Is.LessThan(Math.Max(Bar, Times * noise)), name);
            }

            TestContext.Out.WriteLine($"worst tensor {worst:E2}, {strict} within {Bar}");
        }

        (List<(double Loss, double Norm)> Steps, Dictionary<string, float[]> After2,
            Dictionary<string, float[]> After10) Run(double shift)
        {
            using var model = TrainingModel.Open(arguments);
            Batch batch = V46.Batch(model.Loaded.Rows);
            if (shift > 0)
                foreach (Trainable tensor in model.Trainables.List)
                    model.Trainables.Write(tensor.Name,
                        [.. Values(model, tensor.Name).Select((v, i) =>
                            (float)(v * (1 + (i % 2 == 0 ? shift : -shift))))]);
            var trainer = new Trainer(arguments, model);
            var steps = new List<(double, double)>();
            var after2 = new Dictionary<string, float[]>();
            foreach (JsonElement step in expected.GetProperty("steps").EnumerateArray())
            {
                int i = step.GetProperty("step").GetInt32();
                StepResult result =
                    trainer.Step(i, [batch], step.GetProperty("lr").GetDouble());
                steps.Add((result.Loss, result.GradientNorm));
                if (i == 1) after2 = All(model);
            }

            return (steps, after2, All(model));
        }

        static Dictionary<string, float[]> All(TrainingModel model) => model.Trainables.List
            .ToDictionary(t => t.Name, t => Values(model, t.Name));
        static float[] Values(TrainingModel model, string name) =>
            model.Device.ReadFloats(model.Trainables.Value(name));
    }

    [Test]
    public void ATextDoesNotSeeItsNeighbourInTheBatch()
    {
        using var model = TrainingModel.Open(V46.Lora);
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
