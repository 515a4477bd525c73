using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Generate;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;

namespace MiniCpmNative.Engine.Export;

/// <summary>
/// A merged model against its parts, on a question about a small made-up picture: the logits of
/// base and adapter must come out of it, up to rounding.
/// </summary>
internal static class LogitCheck
{
    private const string Question = "What is in this picture?";

    // Of 8 x 8 patches: enough to reach the vision tower and the resampler.
    private const int Side = 8;

    // Shares of the adapter's own effect that may be missing. F32 loses its rounding only; 16 bits
    // swallow what is far below a weight's last place.
    private const double MostF32 = 0.01, MostRounded = 0.5;

    // Share of the logits that rounding to 16 bits may move.
    private const double MostWhole = 0.02;

    /// <returns>A line that says what was found.</returns>
    /// <exception cref="RunException">The merged model does something else.</exception>
    public static string Run(string model, string? adapter, string merged)
    {
        float[] before = Logits(model, null), after = Logits(merged, null);
        if (adapter is null) return Whole(before, after);
        float[] tuned = Logits(model, adapter);
        var (effect, largestEffect) = Distance(before, tuned);
        var (error, largestError) = Distance(tuned, after);
        string found = FormattableString.Invariant(
            $"logits of a small prompt: the adapter moves them by up to {largestEffect:0.000e+0}, ")
            + FormattableString.Invariant(
                $"the merged model differs from base and adapter by up to {largestError:0.000e+0}");
        using var weights = Checkpoint.Open(merged);
        bool isExact = weights.Tensors.Where(t => t.StoredType.Kernel?.IsFloat() == true)
            .All(t => t.StoredType.Size >= sizeof(float));
        // An adapter without an effect here leaves the rounding alone to be compared.
        double scale = Math.Max(effect, 1e-5 * Norm(before));
        double share = error / scale, most = isExact ? MostF32 : MostRounded;
        if (share <= most) return found;
        throw new RunException(FormattableString.Invariant(
            $"{found}: {100 * share:0} % of the adapter's effect, expected at most {100 * most:0} %")
            + (isExact ? "" : ": the weights' 16 bits may be too few for so small changes")
            + "; nothing is written (--no-check writes it all the same)");
    }

    // Of a quantised model and the one that it became: only its 16 bits differ.
    private static string Whole(float[] before, float[] after)
    {
        var (error, largest) = Distance(before, after);
        string found = FormattableString.Invariant(
            $"logits of a small prompt: differ by up to {largest:0.000e+0} from the quantised model's");
        return error <= MostWhole * Norm(before) ? found : throw new RunException(
            FormattableString.Invariant($"{found}, {100 * error / Norm(before):0.0} % of their norm, ")
            + FormattableString.Invariant($"expected at most {100 * MostWhole:0} %; nothing is ")
            + "written (--no-check writes it all the same)");
    }

    /// <summary>Logits of all tokens of the prompt, computed in F32.</summary>
    private static float[] Logits(string model, string? adapter)
    {
        var arguments = new TrainArguments { ModelNameOrPath = model, Device = DeviceChoice.Cpu };
        if (adapter is null)
        {
            ModelSpec spec = ModelSpec.Read(model);
            using Checkpoint weights = Checkpoint.Open(model);
            using LoadedModel loaded = LoadedModel.Load(
                DeviceSource.Default.Open(arguments), spec, weights, DType.F32);
            loaded.Graph.Recording = false;
            Tensor hidden = loaded.Hidden(Prompt(spec));
            return loaded.Device.ReadFloats(loaded.Model.Logits(loaded.Graph, hidden));
        }

        // As it is asked, not as it is trained: some adapters are only read.
        using var asked = AskedModel.Open(arguments, adapter);
        LoadedModel tuned = asked.Model;
        tuned.Graph.Recording = false;
        return tuned.Device.ReadFloats(
            tuned.Model.Logits(tuned.Graph, tuned.Hidden(Prompt(tuned.Spec))));
    }

    private static Batch Prompt(ModelSpec spec)
    {
        RowFormat format = spec.Rows();
        int side = Side * spec.Vision.PatchSize;
        var plan = new SlicePlan(new PictureSize(side, side), 0, 0, default);
        Prompt prompt = new SampleBuilder(format, int.MaxValue).BuildPrompt(
            [new PromptTurn("user", [0, Question])], [plan]);
        using var picture = new Picture(side, side);
        for (int y = 0; y < side; y++)
        {
            Span<byte> row = picture.Row(y);
            for (int x = 0; x < row.Length; x++)
                row[x] = (byte)(127.5 + (127.5 * Math.Sin((x * 0.11) + (y * 0.07 * (x % 3)))));
        }

        var batch = new Batch();
        batch.Clear();
        batch.AddRow(prompt.InputIds, prompt.Bounds,
            places: format.Places(prompt.InputIds, [plan]));
        batch.TryAddPicture(
            format.NewStrips(), picture, plan, format.Placeholders.Features(plan));
        return batch;
    }

    private static (double Norm, double Largest) Distance(float[] a, float[] b)
    {
        double squares = 0, largest = 0;
        for (int i = 0; i < a.Length; i++)
        {
            double difference = Math.Abs((double)a[i] - b[i]);
            squares += difference * difference;
            largest = Math.Max(largest, difference);
        }

        return (Math.Sqrt(squares), largest);
    }

    private static double Norm(float[] values) => Math.Sqrt(values.Sum(v => (double)v * v));
}
