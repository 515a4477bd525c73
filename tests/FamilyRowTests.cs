using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Data.Text;
using NUnit.Framework;
using static MiniCpmNative.Tests.FamilyFormats;

namespace MiniCpmNative.Tests;

/// <summary>
/// Rows of every family's reference model, against what the official data set made of them.
/// </summary>
[TestFixture]
public class FamilyRowTests
{
    private static IEnumerable<(JsonElement Line, SlicePlan[] Plans)> OwnRows(string family)
    {
        var images = ReferenceText.Json($"families/{family}/images.json");
        foreach (var line in ReferenceText.Json($"families/{family}/rows.json").EnumerateArray())
        {
            var slices = line.GetProperty("slice_config");
            var slicing = new SlicingSpec(Number("max_slice_nums"), Number("scale_resolution"),
                Number("patch_size"));
            var image = line.GetProperty("raw").GetProperty("image");
            string[] paths = image.ValueKind == JsonValueKind.String ? [image.GetString()!]
                : [.. image.EnumerateObject().Select(item => item.Value.GetString()!)];
            yield return (line, [.. paths.Select(p => Plan(images.GetProperty(p), slicing))]);

            int Number(string name) => slices.GetProperty(name).GetInt32();
        }
    }

    // The rows and pictures of V-4 and V-4_5 are V-2_6's.
    private static IEnumerable<(Row Row, SlicePlan[] Plans, JsonElement Line)> SharedRows(
        string family)
    {
        var sizes = ReferenceText.Json("v26/data/images.json").EnumerateArray().ToDictionary(
            item => Path.GetFileName(item.GetProperty("file").GetString()!));
        var rows = RowFile.Parse("rows.json", ReferenceText.Bytes("v26/data/rows.json")).Rows;
        foreach (var line in ReferenceText.Json($"families/{family}/rows.json").EnumerateArray())
        {
            var row = rows.Single(item => item.Id == line.GetProperty("id").GetString());
            yield return (row, [.. row.Pictures.Select(picture =>
                SharedPlan(sizes[Path.GetFileName(picture.Path)]))], line);
        }
    }

    [TestCase("v2")]
    [TestCase("l3")]
    public void OfficialRowsOfTheOldScheme(string family)
    {
        int seen = 0, refused = 0;
        foreach (var (line, plans) in OwnRows(family))
        {
            string name = line.GetProperty("name").GetString()!;
            var builder = new SampleBuilder(
                Of(family), line.GetProperty("max_length").GetInt32(), official: true);
            Sample Build() => builder.Build(Row(line.GetProperty("raw")), plans);
            if (line.TryGetProperty("error", out _))
            {
                Assert.Throws<BadRowException>(() => Build(), name);
                refused++;
                continue;
            }

            AssertEqual(Build(), line, name);
            var pictures = line.GetProperty("pictures").EnumerateArray()
                .Select(p => new PictureSize(p.GetProperty("width").GetInt32(),
                    p.GetProperty("height").GetInt32()));
            Assert.That(Views(plans), Is.EqualTo(pictures), name);
            if (family == "l3") AssertGrids(plans, line, name);
            seen++;
        }

        Assert.That((seen, refused), Is.EqualTo((12, 6)));
    }

    [TestCase("v4")]
    [TestCase("v45")]
    public void OfficialRowsOfTheNewScheme(string family)
    {
        int seen = 0;
        var builder = new SampleBuilder(Of(family), 2048, official: true);
        foreach (var (row, plans, line) in SharedRows(family))
        {
            AssertEqual(builder.Build(row, plans), line, row.Id!);
            AssertGrids(plans, line, row.Id!);
            seen++;
        }

        Assert.That(seen, Is.EqualTo(16));
    }

    [Test]
    public void OfficialRowsOfO45()
    {
        var format = Of("o45");
        var builder = new SampleBuilder(format, 2048, official: true);
        foreach (var line in ReferenceText.Json("families/o45/rows.json").EnumerateArray())
        {
            var images = line.GetProperty("images").EnumerateObject().ToArray();
            SlicePlan[] plans = [.. images.Select(image => Plan(image.Value, format.Slicing))];
            object named = images is [{ Name: "<image>" }] ? "p"
                : images.ToDictionary(image => image.Name, _ => "p");
            var row = Row(JsonSerializer.SerializeToElement(new
            {
                image = named,
                conversations = line.GetProperty("conversations"),
            }));
            var sample = builder.Build(row, plans);
            // The two samples are one batch, padded on the right.
            int[] ids = ReferenceText.Ints(line.GetProperty("input_ids"));
            int[] labels = ReferenceText.Ints(line.GetProperty("labels"));
            int length = sample.InputIds.Length;
            Assert.That(sample.InputIds, Is.EqualTo(ids[..length]));
            Assert.That(sample.Labels, Is.EqualTo(labels[..length]));
            Assert.That(ids[length..], Is.All.Zero);
            Assert.That(labels[length..], Is.All.EqualTo(PromptFormat.Ignored));
            AssertBounds(sample.Bounds, line.GetProperty("image_bound"), row.Id ?? "");
            AssertGrids(plans, line, row.Id ?? "");
        }
    }

    // The old scheme has no numbers: only rows with several pictures differ, whose tags the
    // official script puts line ends around, and rows whose pictures are cut.
    [TestCase("v2")]
    [TestCase("l3")]
    public void StrictRowsAreTheOfficialOnesInTheOldScheme(string family)
    {
        var builder = new SampleBuilder(Of(family), 2048);
        int seen = 0;
        foreach (var (line, plans) in OwnRows(family))
        {
            if (line.TryGetProperty("error", out _) || plans.Length > 1) continue;
            AssertEqual(builder.Build(Row(line.GetProperty("raw")), plans), line,
                line.GetProperty("name").GetString()!);
            seen++;
        }

        Assert.That(seen, Is.EqualTo(8));
    }

    [TestCase("v4", 6)]
    [TestCase("v45", 6)]
    public void StrictRowsAreTheOfficialOnesWithoutNumbers(string family, int least)
    {
        var builder = new SampleBuilder(Of(family) with { Numbered = false }, 2048);
        int seen = 0;
        foreach (var (row, plans, line) in SharedRows(family))
        {
            if (plans is not [{ Sliced: false }] || row.Id == "empty-answer") continue;
            AssertEqual(builder.Build(row, plans), line, row.Id!);
            seen++;
        }

        Assert.That(seen, Is.GreaterThanOrEqualTo(least));
    }

    [TestCase("v2", "What is this?", "A star.")]
    [TestCase("l3", "What is this?", "A star.")]
    public void RowsWithoutPictures(string family, string question, string answer)
    {
        var expected = ReferenceText.Json($"families/{family}/text_only.json");
        var sample = new SampleBuilder(Of(family), 2048).Build(Row(Talk(question, answer)), []);
        Assert.That(sample.InputIds,
            Is.EqualTo(ReferenceText.Ints(expected.GetProperty("input_ids")[0])));
        Assert.That(sample.Labels,
            Is.EqualTo(ReferenceText.Ints(expected.GetProperty("labels")[0])));
        Assert.That(sample.Bounds, Is.Empty);
    }

    // A whole batch on V-2_6's pictures: what the model gets has the format's own sizes.
    [TestCase("v2", 64)]
    [TestCase("l3", 96)]
    [TestCase("v45", 64)]
    public void BatchesHoldAPlaceForEveryFeature(string family, int queries)
    {
        var rows = DataRows.Read(
            V26.Rows, V26.Full with { OfficialCompat = false }, Of(family));
        var batch = new Batch();
        batch.Clear();
        foreach (string id in (string[])["two-small", "wide"]) rows.Append(rows.Find(id), batch);
        int views = batch.Grids.Count / 2;
        Assert.That(views, Is.GreaterThan(4));
        Assert.That(batch.ImageBounds.Count, Is.EqualTo(2 * views));
        Assert.That(batch.SlotFeatures.Span.ToArray(),
            Is.EqualTo(Enumerable.Range(0, views * queries)));
        int unknown = Of(family).Placeholders.UnknownId;
        foreach (int slot in batch.Slots.Span)
            Assert.That(batch.Tokens[slot], Is.EqualTo(unknown));
    }

    [TestCase("v2", "minicpm")]
    [TestCase("l3", "llama3")]
    [TestCase("v4", "qwen")]
    [TestCase("v45", "qwen")]
    [TestCase("o45", "qwen")]
    public void TheOfficialNamesOfPromptsAreTaken(string family, string llmType)
    {
        var format = Of(family);
        foreach (bool official in (bool[])[false, true])
        {
            format.RequireLlmType(null, official);
            format.RequireLlmType(llmType, official);
            foreach (string other in (string[])["minicpm", "llama3", "qwen", "llama", ""])
            {
                if (other == llmType || (family == "v4" && other == "llama")) continue;
                var failure = Assert.Throws<InputException>(
                    () => format.RequireLlmType(other, official))!;
                Assert.That(failure.Message, Does.StartWith($"llm_type is \"{other}\"")
                    .And.Contain($"\"{llmType}\""));
            }
        }
    }

    [Test]
    public void TheDocumentedNameOfV4IsChatMlButNoOfficialFormat()
    {
        Of("v4").RequireLlmType("llama", officialCompat: false);
        var failure = Assert.Throws<InputException>(
            () => Of("v4").RequireLlmType("llama", officialCompat: true))!;
        Assert.That(failure.Message, Does.Contain("the official script has no such format")
            .And.Contain("\"qwen\"").And.Not.Contain("\n"));
    }

    [TestCase("v2", "<AI>")]
    [TestCase("v2", "<用户>")]
    [TestCase("v2", "</s>")]
    [TestCase("v2", "<slice>")]
    [TestCase("l3", "<|eot_id|>")]
    [TestCase("l3", "<|begin_of_text|>")]
    [TestCase("l3", "<|start_header_id|>")]
    [TestCase("l3", "</image>")]
    [TestCase("v4", "<|im_end|>")]
    [TestCase("v4", "<image_id>")]
    public void TextsThatHoldTheFormatsOwnTokensAreRefused(string family, string token)
    {
        var builder = new SampleBuilder(Of(family), 2048);
        var failure = Assert.Throws<BadRowException>(
            () => builder.Build(Row(Talk($"a{token}b", "c")), []))!;
        Assert.That(failure.Message, Does.Contain("turn 1: the text holds the special token "
            + $"{token}"));
    }

    [TestCase("<image>")]
    [TestCase("<|im_end|>")]
    public void ThePlaceOfAFeatureIsNoTagOfItsOwn(string unknown)
    {
        var prompts = Of("v4").Prompts;
        var placeholders = PlaceholderScheme.New(
            prompts.Tokenizer, RowFormats.Tokens with { Unknown = unknown }, 64);
        var failure = Assert.Throws<InputException>(() => new RowFormat(prompts, placeholders,
            true, new SlicingSpec(9, 448, 14), true, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], 576))!;
        Assert.That(failure.Message, Does.StartWith(Folder("v4")).And.Contain(
            $"one token for \"{unknown}\" and \"{unknown}\"").And.Not.Contain("\n"));
    }

    [TestCase("<image_id>")]
    [TestCase("</slice>")]
    [TestCase("<unk>")]
    public void TokenizersMustHaveTheSchemesTokens(string missing)
    {
        // A token of that name that the tokenizer does not cut out of texts.
        string text = System.Text.Encoding.UTF8.GetString(
            ReferenceText.Bytes("families/v45/tokenizer.json"));
        string other = text.Replace($"\"content\": \"{missing}\"", "\"content\": \"<none>\"",
            StringComparison.Ordinal);
        Assert.That(other, Is.Not.EqualTo(text));
        var tokenizer = Tokenizer.Parse(System.Text.Encoding.UTF8.GetBytes(other), null);
        var failure = Assert.Throws<InputException>(
            () => PlaceholderScheme.New(tokenizer, RowFormats.Tokens, 64, "model"))!;
        Assert.That(failure.Message,
            Does.StartWith($"model: the tokenizer has no special token \"{missing}\""));
    }

    // The official script adds the places of heads' starts and ends as two arrays of one length.
    [TestCase("<|start_header_id|>")]
    [TestCase("<|end_header_id|>")]
    public void HeadsThatDoNotPairUpFailInTheOfficialScript(string token)
    {
        var builder = new SampleBuilder(Of("l3"), 2048, official: true);
        var row = Row(Talk($"a{token}b", "c")) with
        {
            Names = PictureNames.Single,
            Pictures = [new RowPicture("<image>", "p")],
        };
        var failure = Assert.Throws<BadRowException>(
            () => builder.Build(row, [new SlicePlan(new(448, 448), 0, 0, default)]))!;
        Assert.That(failure.Message, Does.StartWith("rows.json row 1: the text has ")
            .And.Contain("<|start_header_id|> and ").And.Contain("official script fails"));
    }

    private static JsonElement Talk(string question, string answer) =>
        JsonSerializer.SerializeToElement(new
        {
            conversations = new[]
            {
                new { role = "user", content = question },
                new { role = "assistant", content = answer },
            },
        });

    private static void AssertEqual(Sample sample, JsonElement expected, string name)
    {
        Assert.That(sample.InputIds,
            Is.EqualTo(ReferenceText.Ints(expected.GetProperty("input_ids"))), name);
        Assert.That(sample.Labels,
            Is.EqualTo(ReferenceText.Ints(expected.GetProperty("labels"))), name);
        AssertBounds(sample.Bounds, expected.GetProperty("image_bound"), name);
    }

    private static void AssertGrids(SlicePlan[] plans, JsonElement expected, string name) =>
        Assert.That(Grids(plans), Is.EqualTo(expected.GetProperty("tgt_sizes").EnumerateArray()
            .SelectMany(ReferenceText.Ints)), name);
}
