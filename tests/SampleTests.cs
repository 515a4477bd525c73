using System.Text;
using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Data.Text;
using NUnit.Framework;
using static MiniCpmNative.Tests.FamilyFormats;

namespace MiniCpmNative.Tests;

/// <summary>
/// Samples against the official finetune/dataset.py (official_compat) and the official chat(); the
/// strict samples against both where these agree with it, and against the whole text's own ids.
/// </summary>
[TestFixture]
public class SampleTests
{
    // What these cases change is configuration, which is checked before any row is read.
    private static readonly string[] s_configuration =
        ["no-slice-config", "no-slice-config-multi", "bad-slice-config"];

    private sealed record Case(
        string Name, JsonElement Line, RowSet Rows, SlicePlan[] Plans, SampleBuilder Builder)
    {
        public Sample Build() => Rows.Rows is [var row] ? Builder.Build(row, Plans)
            : throw new BadRowException(Rows.Bad[0]);

        /// <summary>Past the reader of data files, which knows two roles only.</summary>
        public Sample BuildAnyRole() => Builder.Build(new Row("x", 1, null, PictureNames.Single,
            [new RowPicture("<image>", "picture")],
            [.. Line.GetProperty("conversations").EnumerateArray().Select(turn => new ChatTurn(
                turn.GetProperty("role").GetString()!,
                turn.GetProperty("content").GetString()!))]), Plans);

        public bool HasOutput => Line.TryGetProperty("out", out _);

        public JsonElement Out => Line.GetProperty("out");
    }

    private static IEnumerable<Case> Cases(string tokenizer, bool official, bool numbered = true)
    {
        foreach (var line in ReferenceText.Lines("templates/samples.jsonl"))
        {
            string name = line.GetProperty("name").GetString()!;
            if (line.GetProperty("tokenizer").GetString() != tokenizer
                || s_configuration.Contains(name)) continue;
            int slices = line.GetProperty("slice_config").GetProperty("max_slice_nums").GetInt32();
            var images = line.GetProperty("images").EnumerateObject().ToArray();
            byte[] row = JsonSerializer.SerializeToUtf8Bytes(new object[]
            {
                new
                {
                    id = name, image = images.ToDictionary(item => item.Name, _ => "picture"),
                    conversations = line.GetProperty("conversations"),
                },
            });
            int queries = line.GetProperty("query_nums").GetInt32();
            yield return new Case(name, line, RowFile.Parse("rows.json", row),
                [.. images.Select(item => ReferenceSlices.Of(item.Value, slices))],
                new SampleBuilder(RowFormats.Of(tokenizer, queries, numbered),
                    line.GetProperty("max_length").GetInt32(), official));
        }
    }

    [TestCase("tiny-qwen", 50)]
    [TestCase("tiny-qwen3", 50)]
    [TestCase("o-4_5", 7)]
    [TestCase("tiny-llama3", 50)]
    [TestCase("tiny-sp", 50)]
    [TestCase("tiny-sp-noprefix", 50)]
    public void OfficialSamplesAreEqual(string tokenizer, int least)
    {
        int seen = 0;
        // The script numbers sliced pictures whatever the processor's use_image_id says.
        foreach (var sample in Cases(tokenizer, official: true, numbered: false))
        {
            seen++;
            // A content that is no text is refused by the reader; Llama 3's template prints it.
            bool refused = !sample.HasOutput || sample.Name == "content-number";
            if (refused)
                Assert.Throws<BadRowException>(() => sample.Build(), sample.Name);
            else
                AssertEqual(sample.Name == "system-later" ? sample.BuildAnyRole() : sample.Build(),
                    sample.Out, "target", sample.Name);
        }
        Assert.That(seen, Is.GreaterThanOrEqualTo(least));
    }

    [TestCase("slices9")]
    [TestCase("slices4")]
    [TestCase("slices1")]
    [TestCase("slices2_short")]
    public void TheOfficialDataSetIsEqual(string setting)
    {
        var expected = ReferenceText.Json("v26/data/dataset.json").GetProperty(setting);
        var rows = RowFile.Parse("rows.json", ReferenceText.Bytes("v26/data/rows.json"));
        Assert.That(rows.Bad, Is.Empty);
        int slices = expected.GetProperty("max_slice_nums").GetInt32();
        var builder = Builder(expected.GetProperty("max_length").GetInt32(), official: true);
        int seen = 0;
        foreach (var line in expected.GetProperty("rows").EnumerateArray())
        {
            var row = rows.Rows.Single(item => item.Id == line.GetProperty("id").GetString());
            if (line.TryGetProperty("error", out _))
                Assert.Throws<BadRowException>(() =>
                    builder.Build(row, Plans(row, slices)), row.Id!);
            else
                AssertEqual(builder.Build(row, Plans(row, slices)), line, "labels", row.Id!);
            seen++;
        }
        Assert.That(seen, Is.EqualTo(rows.Rows.Count));
    }

    [Test]
    public void RowsTheOfficialScriptRefusesAreRefused()
    {
        var rows = RowFile.Parse("rows_bad.json", ReferenceText.Bytes("v26/data/rows_bad.json"));
        var builder = Builder(2048, official: true);
        foreach (var line in
            ReferenceText.Json("v26/data/dataset.json").GetProperty("bad_rows").EnumerateArray())
        {
            string id = line.GetProperty("id").GetString()!;
            if (rows.Bad.Any(bad => bad.Id == id))
            {
                Assert.That(line.TryGetProperty("error", out _), id);
                continue;
            }
            var row = rows.Rows.Single(item => item.Id == id);
            if (line.TryGetProperty("error", out _))
                Assert.Throws<BadRowException>(() => builder.Build(row,
                    [.. row.Pictures.Select(p => Plan(row.Locate(p), 9))]), id);
            else
                Assert.That(builder.Build(row, Plans(row, 9)).Bounds.Length, Is.EqualTo(2), id);
        }
    }

    [Test]
    public void BatchesAreTheSamplesPaddedOnTheRight()
    {
        foreach (var batch in ReferenceText.Lines("templates/batches.jsonl"))
        {
            string tokenizer = batch.GetProperty("tokenizer").GetString()!;
            var all = Cases(tokenizer, official: true).ToDictionary(item => item.Name);
            var samples = batch.GetProperty("names").EnumerateArray()
                .Select(name => all[name.GetString()!].Build()).ToArray();
            int longest = batch.GetProperty("max_length").GetInt32();
            int width = samples.Max(sample => Math.Min(sample.InputIds.Length, longest));
            for (int i = 0; i < samples.Length; i++)
            {
                Assert.That(Padded(samples[i].InputIds, 0), Is.EqualTo(
                    ReferenceText.Ints(batch.GetProperty("input_ids")[i])));
                Assert.That(Padded(samples[i].Labels, -100), Is.EqualTo(
                    ReferenceText.Ints(batch.GetProperty("labels")[i])));
            }

            IEnumerable<int> Padded(int[] values, int pad) =>
                values.Concat(Enumerable.Repeat(pad, width)).Take(width).Select(
                    (value, i) => i < Math.Min(values.Length, longest) ? value : pad);
        }
    }

    [TestCase("tiny-qwen", 12)]
    [TestCase("tiny-qwen3", 12)]
    [TestCase("o-4_5", 4)]
    [TestCase("tiny-llama3", 20)]
    [TestCase("tiny-sp", 20)]
    [TestCase("tiny-sp-noprefix", 20)]
    public void StrictSamplesAreTheOfficialOnesWhereNothingIsOdd(string tokenizer, int least)
    {
        // Without numbers and with the tags of one picture or of none, both write the same text;
        // the old scheme has no numbers.
        string[] same =
        [
            "small", "three-small", "tag-start", "tag-middle", "tag-end", "no-image",
            "no-image-three",
            "empty-question", "spaces", "think", "two-users", "ends-with-user", "long-answer",
            "max-1",
            "query-64", "query-96", "not-batched", "cut-answer", "cut-second-turn",
            "wide", "big", "tall", "three-big", "max-4", "max-16",
        ];
        int seen = 0;
        foreach (var sample in Cases(tokenizer, official: false, numbered: false))
        {
            if (!same.Contains(sample.Name)
                || (!RowFormats.IsOld(tokenizer)
                    && sample.Plans.Any(plan => plan.Sliced))) continue;
            AssertEqual(sample.Build(), sample.Out, "target", sample.Name);
            seen++;
        }
        Assert.That(seen, Is.GreaterThanOrEqualTo(least));
    }

    [TestCase("tiny-qwen")]
    [TestCase("tiny-qwen3")]
    [TestCase("tiny-llama3")]
    [TestCase("tiny-v4")]
    public void TurnsEncodeAsTheWholeTextDoes(string tokenizer)
    {
        string[] texts = [.. ReferenceText.Lines("tokenizers/strings.jsonl")
            .Select(line => line.GetProperty("t").GetString()!).Where(text => text.Length < 300)];
        var format = RowFormats.Of(tokenizer, queries: 1);
        var builder = new SampleBuilder(format, 100_000);
        var template = (TemplateFormat)format.Prompts;
        int seen = 0;
        for (int i = 0; i + 3 < texts.Length; i += 4)
        {
            ChatTurn[] turns = [new("user", texts[i]), new("assistant", texts[i + 1]),
                new("user", texts[i + 2]), new("assistant", texts[i + 3])];
            Sample sample;
            try
            {
                sample = builder.Build(new Row("x", i, null, PictureNames.None, [], turns), []);
            }
            catch (BadRowException)
            {
                // Special tokens and empty answers: another test's subject.
                continue;
            }
            Assert.That(sample.InputIds,
                Is.EqualTo(format.Tokenizer.Encode(template.Render(turns))));
            seen++;
        }
        Assert.That(seen, Is.GreaterThan(texts.Length / 10));
    }

    [Test]
    public void PromptsAreThoseOfTheOfficialChat()
    {
        int seen = 0;
        foreach (var line in ReferenceText.Lines("templates/inference.jsonl"))
        {
            string family = line.GetProperty("family").GetString()!;
            // v2new ends its prompts twice; the others' errors are of texts without a picture, or
            // with several in V-2, which knows one.
            if (family == "v2new" || line.TryGetProperty("error", out _)) continue;
            string tokenizer = line.GetProperty("tokenizer").GetString()!;
            var builder = new SampleBuilder(
                RowFormats.Of(tokenizer, line.GetProperty("query_num").GetInt32()), 8192);
            var plans = new List<SlicePlan>();
            var prompt = builder.BuildPrompt(
                Turns(line.GetProperty("messages"), line.GetProperty("image"),
                    size => Added(plans, ReferenceSlices.Of(size, 9))), plans);
            var expected = line.GetProperty("out");
            Assert.That(prompt.InputIds,
                Is.EqualTo(ReferenceText.Ints(expected.GetProperty("input_ids")[0])));
            var bounds = expected.GetProperty("image_bound");
            AssertBounds(prompt.Bounds, family == "v2" ? bounds : bounds[0], family);
            seen++;
        }

        Assert.That(seen, Is.EqualTo(33));
    }

    [Test]
    public void PromptsOfTheV26ModelAreThoseOfItsChat()
    {
        var sizes = ReferenceText.Json("v26/data/images.json");
        foreach (var line in ReferenceText.Json("v26/data/inference.json").EnumerateArray())
        {
            var arguments = line.GetProperty("case");
            int slices = arguments.TryGetProperty("max_slice_nums", out var most)
                ? most.GetInt32() : 9;
            bool numbered = !arguments.TryGetProperty("use_image_id", out var id)
                || id.GetBoolean();
            var builder = new SampleBuilder(V26.Format with { Numbered = numbered }, 8192);
            var messages = arguments.GetProperty("msgs");
            var batch = messages[0].ValueKind == JsonValueKind.Array
                ? messages.EnumerateArray().ToArray() : [messages];
            for (int i = 0; i < batch.Length; i++)
            {
                var plans = new List<SlicePlan>();
                var turns = Turns(batch[i], arguments.TryGetProperty("image", out var image)
                    ? image : default, number => Added(plans, SizePlan(sizes, number, slices)));
                var prompt = builder.BuildPrompt(turns, plans,
                    arguments.TryGetProperty("system_prompt", out var system)
                        ? system.GetString() : null);
                // Batches are padded on the left with id 0.
                int[] ids = ReferenceText.Ints(line.GetProperty("input_ids")[i]);
                int pad = ids.Length - prompt.InputIds.Length;
                Assert.That(ids[pad..], Is.EqualTo(prompt.InputIds));
                Assert.That(ids[..pad], Is.All.Zero);
                AssertBounds(
                    [.. prompt.Bounds.Select(b => new ImageBound(b.Start + pad, b.End + pad))],
                    line.GetProperty("image_bound")[i], line.GetProperty("name").GetString()!);
            }
        }
    }

    [TestCase("tiny-qwen")]
    [TestCase("tiny-qwen3")]
    [TestCase("tiny-llama3")]
    public void TheSupervisedTokensFollowTheirPrompt(string tokenizer)
    {
        int seen = 0;
        foreach (var item in Cases(tokenizer, official: false))
        {
            if (item.Rows.Rows is not [var row]) continue;
            int answer = row.Turns.ToList().FindLastIndex(turn => turn.Role == "assistant");
            string content = row.Turns[answer].Content;
            // White space at the start of an answer joins the line end in front of it into one
            // token. An earlier answer of a thinking model has no think block,
            // its prompt an empty one.
            if (answer < row.Turns.Count - 1) continue;
            if (content.Length == 0 || char.IsWhiteSpace(content[0]) || content.StartsWith('<'))
                continue;
            Sample sample;
            try
            {
                sample = item.Build();
            }
            catch (BadRowException)
            {
                continue;
            }
            if (sample.Cut) continue;
            // chat() leaves it to the tokenizer to put a BOS in front of the template's.
            int[] prompt = item.Builder.BuildPrompt(row, item.Plans, answer).InputIds;
            prompt = prompt[RowFormats.Tokenizer(tokenizer).Prefix.Count..];
            int length = prompt.Length;
            Assert.That(sample.InputIds[..length], Is.EqualTo(prompt), item.Name);
            Assert.That(sample.Labels[length - 1], Is.EqualTo(sample.InputIds[length]), item.Name);
            Assert.That(sample.Labels[length - 2], Is.EqualTo(PromptFormat.Ignored), item.Name);
            seen++;
        }
        Assert.That(seen, Is.GreaterThan(20));
    }

    private static SampleBuilder Builder(int maxLength, bool official) =>
        new(V26.Format, maxLength, official);

    private static SlicePlan[] Plans(Row row, int slices) =>
        [.. row.Pictures.Select(picture => Plan(picture.Path, slices))];

    private static SlicePlan Plan(string path, int slices) =>
        SizePlan(ReferenceText.Json("v26/data/images.json"), Path.GetFileName(path), slices);

    private static SlicePlan SizePlan(JsonElement sizes, JsonElement number, int slices) =>
        SizePlan(sizes, $"p{number.GetInt32()}.", slices);

    private static SlicePlan SizePlan(JsonElement sizes, string file, int slices)
    {
        var picture = sizes.EnumerateArray().Single(item => item.GetProperty("file").GetString()!
            .Contains("/" + file, StringComparison.Ordinal));
        return ReferenceSlices.Of(
            picture.GetProperty("width").GetInt32(), picture.GetProperty("height").GetInt32(),
            slices);
    }

    private static int Added(List<SlicePlan> plans, SlicePlan plan)
    {
        plans.Add(plan);
        return plans.Count - 1;
    }

    // chat(): a picture beside the messages belongs to the first one.
    private static PromptTurn[] Turns(
        JsonElement messages, JsonElement image, Func<JsonElement, int> picture) =>
        [.. messages.EnumerateArray().Select((message, i) =>
        {
            var content = message.GetProperty("content");
            var parts = new List<PromptPart>();
            if (i == 0 && image.ValueKind is not (JsonValueKind.Undefined or JsonValueKind.Null))
                parts.Add(picture(image));
            foreach (var part in content.ValueKind == JsonValueKind.Array
                ? content.EnumerateArray().ToArray() : [content])
                parts.Add(part.ValueKind == JsonValueKind.String
                    ? part.GetString()! : picture(part));
            return new PromptTurn(message.GetProperty("role").GetString()!, parts);
        })];

    private static void AssertEqual(Sample sample, JsonElement expected, string labels, string name)
    {
        Assert.That(sample.InputIds,
            Is.EqualTo(ReferenceText.Ints(expected.GetProperty("input_ids"))), name);
        Assert.That(sample.Labels,
            Is.EqualTo(ReferenceText.Ints(expected.GetProperty(labels))), name);
        AssertBounds(sample.Bounds, expected.GetProperty("image_bound"), name);
    }
}
