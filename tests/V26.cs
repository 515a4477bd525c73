using System.Text.Json;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// The reference model of tests/reference/v26 (README there), its rows, and comparison with what
/// PyTorch computed from them.
/// </summary>
internal static class V26
{
    private const string Targets = @"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)";

    // Two conversations without a picture, as the reference has them;
    // the official data set has none.
    private const string TextRows = """
        [{"id": "text0", "conversations": [
          {"role": "user", "content": "How many is 12 * 34?"},
          {"role": "assistant", "content": "408, I'd say."}]},
         {"id": "text1", "conversations": [
          {"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Red."},
          {"role": "user", "content": "Another one!"},
          {"role": "assistant", "content": "Green, blue or yellow."}]}]
        """;

    public static string Folder { get; } = Path.Combine(ReferenceText.Root, "v26");

    public static string Model { get; } = Path.Combine(Folder, "model");

    public static string Rows { get; } = Path.Combine(Folder, "data", "rows.json");

    public static ModelSpec Spec { get; } = ModelSpec.Read(Model);

    public static RowFormat Format { get; } = Spec.Rows();

    /// <summary>
    /// Whether CPMX_REFERENCE names the full set, whose tensors are compared whole.
    /// </summary>
    public static bool IsFull { get; } = ReferenceText.Root != ReferenceFile.Root;

    /// <summary>Everything is trained, on rows as the official script makes them.</summary>
    public static TrainArguments Full { get; } = new()
    {
        ModelNameOrPath = Model,
        DataPath = Rows,
        OfficialCompat = true,
        PerDeviceTrainBatchSize = 1,
        ReportTo = ReportTo.None,
        Device = DeviceChoice.Cpu,
    };

    /// <summary>Adapters on the decoder's attention, as the reference has them.</summary>
    public static TrainArguments Lora { get; } = Full with
    {
        UseLora = true,
        TuneLlm = false,
        LoraR = 8,
        LoraAlpha = 16,
        LoraDropout = 0,
        LoraTargetModules = new TargetModules(Targets),
        ModulesToSave = [],
    };

    public static string Adapter(string name) => Path.Combine(Folder, "adapters", name);

    /// <summary>Rows by their id, those without a picture included, as one batch.</summary>
    public static Batch Batch(TrainArguments arguments, params string[] ids) =>
        Batch(Format, arguments, ids);

    /// <summary>The same in another model's format.</summary>
    public static Batch Batch(RowFormat format, TrainArguments arguments, string[] ids)
    {
        var rows = DataRows.Read(arguments.DataPath!, arguments, format);
        var text = ids.Any(id => id.StartsWith("text", StringComparison.Ordinal))
            ? Text(format, arguments) : null;
        var batch = new Batch();
        batch.Clear();
        foreach (string id in ids)
        {
            int row = rows.Find(id);
            if (row >= 0) rows.Append(row, batch);
            else text!.Append(text.Find(id), batch);
        }

        return batch;
    }

    /// <summary>
    /// Loss and gradients of a batch as one optimizer step has them, nothing changed.
    /// </summary>
    public static StepResult Gradients(
        TunedModel model, TrainArguments arguments, params Batch[] batches) =>
        new Trainer(arguments, model).Step(0, batches, learningRate: 0);

    public static float[] Gradient(TunedModel model, string name) =>
        model.Device.ReadFloats(model.ParameterRanges.Gradient(name));

    /// <summary>Those of all that is trained, in the order of the ranges.</summary>
    public static float[] AllGradients(TunedModel model) =>
    [
        .. model.ParameterRanges.List.SelectMany(
            t => model.Device.ReadFloats(model.ParameterRanges.Gradient(t.Name))),
    ];

    /// <summary>The engine's name of a tensor that PEFT names.</summary>
    public static string Name(string peft) => peft
        .Replace("base_model.model.", "", StringComparison.Ordinal)
        .Replace(".base_layer.", ".", StringComparison.Ordinal)
        .Replace("_magnitude_vector.weight", "_magnitude_vector", StringComparison.Ordinal);

    /// <summary>
    /// Gradients against the reference's, all of them, by relative norm. Softmax ignores what all
    /// keys share, so the gradient of a bias of keys is zero without rotary positions: PyTorch has
    /// noise there, which is only held to be small. In the resampler's in_proj_bias such noise is a
    /// third of the elements and far below the tolerance.
    /// </summary>
    public static void AssertGradients(TunedModel model, JsonElement expected,
        double tolerance = 1e-4)
    {
        Assert.That(expected.EnumerateObject().Select(p => Name(p.Name)),
            Is.EquivalentTo(model.ParameterRanges.List.Select(t => t.Name)), "what is trained");
        double worst = 0;
        foreach (var property in expected.EnumerateObject())
        {
            string name = Name(property.Name);
            float[] got = Gradient(model, name);
            var wanted = Fingerprint.Read(property.Value);
            var found = Fingerprint.Of(got, wanted.Shape);
            if (IsKeyBias(name) || wanted.Norm == 0)
            {
                Assert.That(found.Norm, Is.LessThanOrEqualTo(wanted.Norm == 0 ? 0 : 1e-7), name);
                continue;
            }

            double error = found.NormError(wanted);
            worst = Math.Max(worst, error);
            Assert.That(error, Is.LessThan(tolerance), name);
        }

        TestContext.Out.WriteLine($"worst gradient error {worst:E2} of the norm");
    }

    /// <summary>Whether the gradient is zero in exact arithmetic.</summary>
    public static bool IsKeyBias(string name) =>
        name.EndsWith("k_proj.bias", StringComparison.Ordinal)
        && (name.StartsWith("vpm.", StringComparison.Ordinal)
            || name.StartsWith("model.vision_tower.", StringComparison.Ordinal));

    /// <summary>
    /// A tensor against the reference's fingerprint, relative to its largest magnitude.
    /// </summary>
    public static void AssertClose(
        string name, (Shape Shape, float[] Values) got, JsonElement expected,
        double tolerance = 1e-5)
    {
        var wanted = Fingerprint.Read(expected);
        Assert.That($"{got.Shape}", Is.EqualTo($"[{string.Join(", ", wanted.Shape)}]"), name);
        double error = Fingerprint.Of(got.Values, wanted.Shape).ElementError(wanted, wanted.Max);
        TestContext.Out.WriteLine($"{name}: {error:E2}");
        Assert.That(error, Is.LessThan(tolerance), name);
    }

    /// <summary>
    /// Largest difference of two tensors as part of the largest expected magnitude.
    /// </summary>
    public static double LargestError(ReadOnlySpan<float> got, ReadOnlySpan<double> expected)
    {
        Assert.That(got.Length, Is.EqualTo(expected.Length));
        double error = 0, magnitude = 0;
        for (int i = 0; i < got.Length; i++)
        {
            error = Math.Max(error, Math.Abs(got[i] - expected[i]));
            magnitude = Math.Max(magnitude, Math.Abs(expected[i]));
        }

        return error / magnitude;
    }

    /// <summary>Norm of the difference as part of the expected norm.</summary>
    public static double NormError(ReadOnlySpan<float> got, ReadOnlySpan<double> expected)
    {
        Assert.That(got.Length, Is.EqualTo(expected.Length));
        double error = 0, norm = 0;
        for (int i = 0; i < got.Length; i++)
        {
            error += Math.Pow(got[i] - expected[i], 2);
            norm += Math.Pow(expected[i], 2);
        }

        return Math.Sqrt(error / norm);
    }

    private static DataRows Text(RowFormat format, TrainArguments arguments)
    {
        string file = Path.GetTempFileName();
        try
        {
            File.WriteAllText(file, TextRows);
            return DataRows.Read(file, arguments with { OfficialCompat = false }, format);
        }
        finally
        {
            File.Delete(file);
        }
    }
}
