using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Data.Text;
using NUnit.Framework;
using static MiniCpmNative.Tests.FamilyFormats;

namespace MiniCpmNative.Tests;

/// <summary>
/// Prompts of every family's reference model, against its official chat() and processor, and the
/// tokenizers under them.
/// </summary>
[TestFixture]
public class FamilyPromptTests
{
    [TestCase("v2", 4)]
    [TestCase("l3", 4)]
    public void PromptsOfTheOldScheme(string family, int least)
    {
        var format = Of(family);
        var images = ReferenceText.Json($"families/{family}/images.json");
        int seen = 0;
        foreach (var line in ReferenceText.Json($"families/{family}/prompts.json").EnumerateArray())
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
        foreach (var line in ReferenceText.Json($"families/{family}/prompts.json").EnumerateArray())
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
                    plans.Add(SharedPlan(sizes.Single(item => Path.GetFileNameWithoutExtension(
                        item.GetProperty("file").GetString()!) == $"p{number.GetInt32()}")));
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
        var all = ReferenceText.Json("families/o45/processor.json").GetProperty("processor");
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
        var all = ReferenceText.Json("families/o45/processor.json").GetProperty("template");
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
        var cases = ReferenceText.Json($"families/{family}/tokenizer_cases.json");
        foreach (var line in cases.EnumerateArray())
            Assert.That(
                tokenizer.Encode(line.GetProperty("text").GetString()!, special: true),
                Is.EqualTo(ReferenceText.Ints(line.GetProperty("ids"))), line.ToString());
        Assert.That(cases.GetArrayLength(), Is.EqualTo(33));
    }

    [Test]
    public void TheFormatOfV2HasNoSystemTurn()
    {
        var failure = Assert.Throws<InputException>(() => new SampleBuilder(Of("v2"), 2048)
            .BuildPrompt([new PromptTurn("user", ["Hello"])], [], system: "Be short."))!;
        Assert.That(failure.Message, Does.Contain("no turn of role \"system\""));
    }
}
