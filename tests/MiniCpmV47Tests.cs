using System.Text.Json;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Generate;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// What is MiniCPM-V 4.7's own: configuration and prompts, single rows, answers.
/// </summary>
[TestFixture]
public sealed class MiniCpmV47Tests
{
    private static readonly NativeCase s_case = NativeCase.Of("v47");
    private static readonly ModelSpec s_spec = ModelSpec.Read(s_case.Model);
    private static readonly RowFormat s_format = s_spec.Rows();

    [Test]
    public void EveryParameterIsKnownByNameAndShape()
    {
        Assert.That(s_spec.Parameters.All.Select(p => $"{p.Name} {p.Shape}"),
            Is.EquivalentTo(s_case.Json("parameters.json").EnumerateObject().Select(p =>
                $"{p.Name} [{string.Join(", ", ReferenceText.Ints(p.Value))}]")));
        Assert.That(s_spec.Parameters.All.Where(p => !p.Decays).Select(p => p.Name),
            Is.EquivalentTo(s_case.Json("full_steps.json").GetProperty("without_weight_decay")
                .EnumerateArray().Select(n => n.GetString())));
        Assert.That(s_spec.Decoder.TiedHead, Is.False);
    }

    [Test]
    public void PlacesOfPicturesAreTheProcessors()
    {
        JsonElement chat = s_case.Json("chat.json");
        int compared = 0;
        foreach (JsonElement call in chat.GetProperty("processor").EnumerateArray())
        {
            if (call.GetProperty("videos").GetArrayLength() > 0
                || call.GetProperty("options").EnumerateObject().Any()) continue;
            SlicePlan[] plans = [.. call.GetProperty("picture_sizes").EnumerateArray().Select(s =>
                V46.Plan(s_format, new(s[0].GetInt32(), s[1].GetInt32())))];
            int picture = 0;
            foreach (var (text, given) in call.GetProperty("texts").EnumerateArray().Index())
            {
                string[] parts = given.GetString()!.Split("<|image_pad|>");
                string filled = parts[0];
                for (int k = 1; k < parts.Length; k++)
                    filled += s_format.Placeholders.Text(plans[picture++], k - 1) + parts[k];
                Assert.That(call.GetProperty("expanded")[text].GetString(), Does.EndWith(filled));
                compared++;
            }
        }

        Assert.That(compared, Is.GreaterThan(2));
    }

    // With the loss that its positions give, and not that of counted ones.
    [Test]
    public void EveryRowHasItsPositionsAndProbabilities()
    {
        using var model = TunedModel.Open(s_case.Full);
        var still = ReferenceFile.OpenAt(s_case.At("rows"));
        var moving = ReferenceFile.OpenAt(s_case.At("video"));
        int compared = 0;
        foreach (JsonElement row in s_case.Json("rows.json").EnumerateArray()
            .Concat(s_case.Json("video.json").GetProperty("rows").EnumerateArray()))
        {
            string name = row.GetProperty("name").GetString()!;
            ReferenceFile file = moving.Has(name + ".input_ids") ? moving : still;
            int[] ids = Ints(file, name + ".input_ids"), labels = Ints(file, name + ".labels");
            Batch batch = Raw(file, name, ids, [.. ((string[])["_videos", ""])
                .Where(of => file.Has(name + ".pixel_u8" + of)).Select(of => name + "|" + of)]);
            if (batch.Grids.Count > 0)
                Assert.That(batch.Places.Span.ToArray().Select(p => p.Text)
                    .Concat(batch.Places.Span.ToArray().Select(p => p.Row))
                    .Concat(batch.Places.Span.ToArray().Select(p => p.Column)),
                    Is.EqualTo(Ints(file, name + ".position_ids")), name);
            for (int t = 0; t + 1 < ids.Length; t++)
            {
                if (labels[t + 1] == -100) continue;
                batch.LabelRows.Add(t);
                batch.Targets.Add(labels[t + 1]);
            }

            Trace trace = Trace.Run(model, batch, gradients: false);
            double loss = row.GetProperty("loss").GetDouble();
            Assert.That(trace.Floats["loss"].Values[0], Is.EqualTo(loss).Within(1e-5 * loss), name);
            var logits = Fingerprint.Read(row.GetProperty("logits"));
            Assert.That(Fingerprint.Of(trace.Floats["logits"].Values, logits.Shape)
                .ElementError(logits, logits.Max), Is.LessThan(1e-5), name);
            compared++;
        }

        Assert.That(compared, Is.EqualTo(7));
    }

    [Test]
    public void AnswersAreThoseOfGenerate()
    {
        using var model = TunedModel.Open(s_case.Full);
        var generator = new Generator(model.Loaded);
        var file = ReferenceFile.OpenAt(s_case.At("rows"));
        int compared = 0;
        foreach (JsonElement call in s_case.Json("generate.json").EnumerateArray())
        {
            string[] rows = [.. call.GetProperty("pixels_of_rows").EnumerateArray()
                .Select(r => r.GetString()!)];
            if (rows.Contains("video")) continue;
            JsonElement tokens = call.GetProperty("new_tokens");
            var inputs = new List<GenerationInput>();
            int picture = 0;
            for (int i = 0; i < tokens.GetArrayLength(); i++)
            {
                int padding = ReferenceText.Ints(call.GetProperty("attention_mask")[i])
                    .Count(m => m == 0);
                int[] ids = ReferenceText.Ints(call.GetProperty("input_ids")[i])[padding..];
                string[] shown = ids.Contains(s_format.Placeholders.UnknownId)
                    ? [rows[picture++] + "|"] : [];
                inputs.Add(new GenerationInput(
                    ids.Length, batch => Append(batch, file, ids, shown))
                {
                    Ids = ids,
                });
            }

            int count = tokens[0].GetArrayLength();
            GeneratedTokens[] answers = generator.Run(inputs, new GenerationSettings
            {
                MaxNewTokens = count,
                MinNewTokens = count,
                StopIds = [600, 602],
            });
            foreach (var (i, answer) in answers.Index())
            {
                Assert.That(answer.Ids, Is.EqualTo(ReferenceText.Ints(tokens[i])));
                compared++;
            }
        }

        Assert.That(compared, Is.EqualTo(6));
    }

    private static Batch Raw(ReferenceFile file, string name, int[] ids, string[] shown)
    {
        var batch = new Batch();
        batch.Clear();
        Append(batch, file, ids, shown);
        return batch;
    }

    // A row with the pixels of others, as the processor left them.
    private static void Append(Batch batch, ReferenceFile file, int[] ids, string[] shown)
    {
        var grids = new List<PatchGrid>();
        foreach (string[] parts in shown.Select(s => s.Split('|')))
        {
            (string name, string of) = (parts[0], parts[1]);
            int[] sizes = Ints(file, name + ".target_sizes" + of);
            double[] pixels = file.Doubles(name + ".pixel_u8" + of);
            int patches = pixels.Length / (3 * 196);
            for (int i = 0; i < sizes.Length; i += 2)
            {
                grids.Add(new PatchGrid(sizes[i] / 4, sizes[i + 1] / 4));
                batch.Grids.Add(sizes[i]);
                batch.Grids.Add(sizes[i + 1]);
                batch.PictureStarts.Add(
                    batch.PictureStarts[batch.PictureStarts.Count - 1] + (sizes[i] * sizes[i + 1]));
            }

            // Channels, then 14 rows of all patches' pixels.
            for (int n = 0; n < patches; n++)
                for (int c = 0; c < 3; c++)
                    for (int y = 0; y < 14; y++)
                        for (int x = 0; x < 14; x++)
                            batch.Patches.Add((float)((pixels[
                                (((c * 14) + y) * patches * 14) + (n * 14) + x] / 127.5) - 1));
        }

        batch.AddRow(ids, s_format.Placeholders.Bounds(ids) is { } bounds
            && bounds.Length == grids.Count ? bounds : [],
            places: s_format.Canvas!.Places(ids, grids));
    }

    private static int[] Ints(ReferenceFile file, string name) =>
        [.. file.Doubles(name).Select(v => (int)v)];
}
