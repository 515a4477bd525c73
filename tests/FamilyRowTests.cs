using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Text;
using NUnit.Framework;
using static MiniCpmNative.Tests.FamilyFormats;

namespace MiniCpmNative.Tests;

/// <summary>
/// Rows and prompts of every family's reference model, against what its official data set,
/// processor and chat() made of them.
/// </summary>
[TestFixture]
public class FamilyRowTests
{
    private static IEnumerable<(JsonElement Line, SlicePlan[] Plans)> OwnRows(string family)
    {
        var images = ReferenceText.FamilyJson($"{family}/images.json");
        foreach (var line in ReferenceText.FamilyJson($"{family}/rows.json").EnumerateArray())
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
        foreach (var line in ReferenceText.FamilyJson($"{family}/rows.json").EnumerateArray())
        {
            var row = rows.Single(item => item.Id == line.GetProperty("id").GetString());
            yield return (row, [.. row.Pictures.Select(picture =>
                Picture(sizes[Path.GetFileName(picture.Path)], 9))], line);
        }
    }

    private static SlicePlan Picture(JsonElement picture, int slices) => Engine.Data.Images.Slicer
        .Plan(new PictureSize(picture.GetProperty("width").GetInt32(),
            picture.GetProperty("height").GetInt32()), slices, 448, 14);

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
        foreach (var line in ReferenceText.FamilyJson("o45/rows.json").EnumerateArray())
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
            Assert.That(labels[length..], Is.All.EqualTo(Sample.Ignored));
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
        var expected = ReferenceText.FamilyJson($"{family}/text_only.json");
        var sample = new SampleBuilder(Of(family), 2048).Build(Row(Talk(question, answer)), []);
        Assert.That(sample.InputIds,
            Is.EqualTo(ReferenceText.Ints(expected.GetProperty("input_ids")[0])));
        Assert.That(sample.Labels,
            Is.EqualTo(ReferenceText.Ints(expected.GetProperty("labels")[0])));
        Assert.That(sample.Bounds, Is.Empty);
    }

    [TestCase("v2", 4)]
    [TestCase("l3", 4)]
    public void PromptsOfTheOldScheme(string family, int least)
    {
        var format = Of(family);
        var images = ReferenceText.FamilyJson($"{family}/images.json");
        int seen = 0;
        foreach (var line in ReferenceText.FamilyJson($"{family}/prompts.json").EnumerateArray())
        {
            // Llama3-V-2_5's chat() fails without a picture.
            if (line.TryGetProperty("error", out _)) continue;
            string[] paths = !line.TryGetProperty("images", out var several)
                ? line.GetProperty("image") is { ValueKind: JsonValueKind.String } one
                    ? [one.GetString()!] : []
                : [.. several.EnumerateArray().Select(item => item.GetString()!)];
            SlicePlan[] plans =
                [.. paths.Select(path => Plan(images.GetProperty(path), format.Slicing))];
            var turns = line.GetProperty("msgs").EnumerateArray().Select((message, i) =>
                new PromptTurn(message.GetProperty("role").GetString()!,
                    [.. Enumerable.Range(0, i == 0 ? plans.Length : 0)
                        .Select(k => (PromptPart)k), message.GetProperty("content").GetString()!]))
                .ToArray();
            string? system = line.TryGetProperty("system_prompt", out var text)
                ? text.GetString() : null;
            AssertPrompt(format, "input_ids");
            if (family == "l3")
                AssertPrompt(Make(family, Path.Combine(Folder(family), "bos")),
                    "input_ids_other_tokenizer");
            seen++;

            void AssertPrompt(RowFormat format, string name)
            {
                var prompt = new SampleBuilder(format, 2048).BuildPrompt(turns, plans, system);
                Assert.That(prompt.InputIds,
                    Is.EqualTo(ReferenceText.Ints(line.GetProperty(name))), name);
                if (name == "input_ids")
                    AssertBounds(prompt.Bounds, line.GetProperty("image_bound"), name);
            }
        }

        Assert.That(seen, Is.EqualTo(least));
    }

    [TestCase("v4")]
    [TestCase("v45")]
    public void PromptsOfTheNewScheme(string family)
    {
        var sizes = ReferenceText.Json("v26/data/images.json").EnumerateArray().ToArray();
        foreach (var line in ReferenceText.FamilyJson($"{family}/prompts.json").EnumerateArray())
        {
            var arguments = line.GetProperty("case");
            var plans = new List<SlicePlan>();
            var turns = arguments.GetProperty("msgs").EnumerateArray().Select((message, i) =>
            {
                var parts = new List<PromptPart>();
                if (i == 0 && arguments.TryGetProperty("image", out var image)) Show(image);
                var content = message.GetProperty("content");
                foreach (var part in content.ValueKind == JsonValueKind.Array
                    ? content.EnumerateArray().ToArray() : [content])
                    if (part.ValueKind == JsonValueKind.Number) Show(part);
                    else parts.Add(part.GetString()!);
                return new PromptTurn(message.GetProperty("role").GetString()!, parts);

                void Show(JsonElement number)
                {
                    parts.Add(plans.Count);
                    plans.Add(Picture(sizes.Single(item => Path.GetFileNameWithoutExtension(
                        item.GetProperty("file").GetString()!) == $"p{number.GetInt32()}"), 9));
                }
            }).ToArray();
            var prompt = new SampleBuilder(Of(family), 2048).BuildPrompt(turns, plans);
            Assert.That(prompt.InputIds,
                Is.EqualTo(ReferenceText.Ints(line.GetProperty("input_ids")[0])));
            AssertBounds(prompt.Bounds, line.GetProperty("image_bound")[0], family);
        }
    }

    [Test]
    public void ProcessorsPromptsOfO45()
    {
        int seen = 0;
        var all = ReferenceText.FamilyJson("o45/processor.json").GetProperty("processor");
        foreach (var line in all.EnumerateArray())
        {
            if (!line.TryGetProperty("image_sizes", out var sizes)) continue;
            var options = line.GetProperty("options");
            var slicing = Of("o45").Slicing;
            if (options.TryGetProperty("max_slice_nums", out var most))
                slicing = slicing with { MaxSliceNums = most.GetInt32() };
            SlicePlan[] plans = [.. sizes.EnumerateArray().Select(size => Plan(size, slicing))];
            bool numbered = !options.TryGetProperty("use_image_id", out var id) || id.GetBoolean();
            var prompt = new SampleBuilder(Of("o45") with { Numbered = numbered }, 2048)
                .BuildPrompt([new PromptTurn("user",
                    [.. Enumerable.Range(0, plans.Length).Select(k => (PromptPart)k),
                        "What is it?"])], plans);
            Assert.That(prompt.InputIds,
                Is.EqualTo(ReferenceText.Ints(line.GetProperty("input_ids")[0])));
            AssertBounds(prompt.Bounds, line.GetProperty("image_bound")[0], line.ToString());
            Assert.That(Grids(plans), Is.EqualTo(line.GetProperty("tgt_sizes")[0].EnumerateArray()
                .SelectMany(ReferenceText.Ints)));
            seen++;
        }

        Assert.That(seen, Is.EqualTo(6));
    }

    [Test]
    public void TextsAndIdsOfO45sTemplate()
    {
        var prompts = (ChatMlFormat)Of("o45").Prompts;
        int seen = 0;
        var all = ReferenceText.FamilyJson("o45/processor.json").GetProperty("template");
        foreach (var line in all.EnumerateArray())
        {
            ChatTurn[] turns = [.. line.GetProperty("messages").EnumerateArray().Select(message =>
                new ChatTurn(message.GetProperty("role").GetString()!,
                    message.GetProperty("content").GetString()!))];
            var options = line.GetProperty("options");
            bool? thinks = options.TryGetProperty("enable_thinking", out var thinking)
                ? thinking.GetBoolean() : null;
            string text = !line.GetProperty("add_generation_prompt").GetBoolean()
                ? prompts.Render(turns)
                : options.TryGetProperty("use_tts_template", out _)
                    ? prompts.SpokenPrompt(turns, thinks) : prompts.Prompt(turns, thinks);
            Assert.That(text, Is.EqualTo(line.GetProperty("text").GetString()));
            Assert.That(prompts.Tokenizer.Encode(text),
                Is.EqualTo(ReferenceText.Ints(line.GetProperty("input_ids"))));
            seen++;
        }

        Assert.That(seen, Is.EqualTo(48));
    }

    [TestCase("v2")]
    [TestCase("l3")]
    public void TheirTokenizersEncodeAsTheOfficialOnes(string family)
    {
        var tokenizer = Of(family).Tokenizer;
        var cases = ReferenceText.FamilyJson($"{family}/tokenizer_cases.json");
        foreach (var line in cases.EnumerateArray())
            Assert.That(
                tokenizer.Encode(line.GetProperty("text").GetString()!, special: true),
                Is.EqualTo(ReferenceText.Ints(line.GetProperty("ids"))), line.ToString());
        Assert.That(cases.GetArrayLength(), Is.EqualTo(33));
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
        Assert.That(failure.Message, Does.Contain($"turn 1: the text holds the special token {token}"));
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

    [Test]
    public void TheFormatOfV2HasNoSystemTurn()
    {
        var failure = Assert.Throws<InputException>(() => new SampleBuilder(Of("v2"), 2048)
            .BuildPrompt([new PromptTurn("user", ["Hello"])], [], system: "Be short."))!;
        Assert.That(failure.Message, Does.Contain("no turn of role \"system\""));
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

    private static void AssertBounds(ImageBound[] bounds, JsonElement expected, string name) =>
        Assert.That(bounds.SelectMany(b => (int[])[b.Start, b.End]), Is.EqualTo(
            expected.EnumerateArray().SelectMany(ReferenceText.Ints)), name);

    private static void AssertGrids(SlicePlan[] plans, JsonElement expected, string name) =>
        Assert.That(Grids(plans), Is.EqualTo(expected.GetProperty("tgt_sizes").EnumerateArray()
            .SelectMany(ReferenceText.Ints)), name);
}
