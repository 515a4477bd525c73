using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Text;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Chat texts against apply_chat_template, placeholders against the official processors.
/// </summary>
[TestFixture]
public class ChatTests
{
    private static ChatMlFormat Format(string family) => family == "o-4_5"
        ? new ChatMlFormat(Tokenizer, null, Thoughts.BehindLastQuestion,
            tools: ToolStyle.Of(FamilyFormats.ToolTemplate(family)))
        : Recognize(ReferenceText.Json("templates/templates.json").GetProperty(family)
            .GetProperty("template").GetString()!, family);

    // Of the tokenizer only the named tokens matter here.
    private static Tokenizer Tokenizer { get; } = TokenizerTests.Load("tiny-qwen3");

    private static ChatMlFormat Recognize(string template, string file = "x") =>
        ChatMlFormat.Recognize(Tokenizer, template, file);

    [TestCase("qwen2-chatml", 108)]
    [TestCase("chatml", 108)]
    [TestCase("o-4_5", 383)]
    public void TextsAreThoseOfApplyChatTemplate(string family, int least)
    {
        var format = Format(family);
        int seen = 0;
        foreach (var line in ReferenceText.Lines("templates/chat.jsonl"))
        {
            var options = line.GetProperty("kwargs");
            if (line.GetProperty("family").GetString() != family) continue;
            seen++;
            var turns = line.GetProperty("messages").EnumerateArray().Select(Turn).ToArray();
            bool prompt = options.GetProperty("add_generation_prompt").GetBoolean();
            bool? thinks = options.TryGetProperty("enable_thinking", out var thinking)
                ? thinking.GetBoolean() : null;
            bool speaks = options.TryGetProperty("use_tts_template", out var speech)
                && speech.GetBoolean();
            string text = !prompt ? format.Render(turns) : speaks
                ? format.SpokenPrompt(turns, thinks) : format.Prompt(turns, thinks);
            Assert.That(text, Is.EqualTo(line.GetProperty("text").GetString()));
        }
        Assert.That(seen, Is.GreaterThanOrEqualTo(least));
    }

    // The texts of the templates that came with o-4_5 (SHA-256 aa5ce37126f5...) and with Qwen3.5,
    // of which V-4_6's is made, by Jinja as transformers sets it up: system text or none, functions
    // or none, calls with and without text and thoughts, several of them, arguments of every kind,
    // results alone, in a row, last, and written as a question.
    [TestCase("o-4_5", 82)]
    [TestCase("qwen3.5", 80)]
    public void FunctionsAreWrittenAsTheTemplateDoes(string family, int count)
    {
        string template = FamilyFormats.ToolTemplate(family);
        Assert.That(ToolStyle.Of(template.Replace("function", "functional")), Is.Null);
        TemplateFormat format = family == "o-4_5"
            ? new ChatMlFormat(Tokenizer, null, Thoughts.BehindLastQuestion,
                tools: ToolStyle.Of(template))
            : new ThinkingFormat(Tokenizer, tools: ToolStyle.Of(template));
        int seen = 0;
        foreach (var line in ReferenceText.Lines("templates/tools.jsonl"))
        {
            if (line.GetProperty("family").GetString() != family) continue;
            seen++;
            var turns = line.GetProperty("messages").EnumerateArray().Select(Turn).ToList();
            string[] tools =
                [.. line.GetProperty("tools").EnumerateArray().Select(PythonJson.Write)];
            if (tools.Length > 0 && turns[0].Role != "system")
                turns.Insert(0, new ChatTurn("system", ""));
            if (tools.Length > 0) turns[0] = turns[0] with { Tools = tools };
            var options = line.GetProperty("kwargs");
            bool? thinks = options.TryGetProperty("enable_thinking", out var thinking)
                ? thinking.GetBoolean() : null;
            string expected = line.GetProperty("text").GetString()!;
            Assert.That(options.GetProperty("add_generation_prompt").GetBoolean()
                ? format.Prompt(turns, thinks) : format.Render(turns), Is.EqualTo(expected));
        }

        Assert.That(seen, Is.EqualTo(count));
    }

    // Each answer with its end, calls too; neither functions nor results, nor an empty thought.
    [TestCase("o-4_5", "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>")]
    [TestCase("qwen3.5", "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n"
        + "</tool_call>")]
    public void CallsAreLearnedAndResultsAreNot(string family, string call)
    {
        var style = ToolStyle.Of(FamilyFormats.ToolTemplate(family));
        TemplateFormat format = family == "o-4_5"
            ? new ChatMlFormat(Tokenizer, null, Thoughts.BehindLastQuestion, tools: style)
            : new ThinkingFormat(Tokenizer, tools: style);
        ChatTurn[] turns =
        [
            new("system", "s") { Tools = ["{\"type\": \"function\"}"] }, new("user", "q"),
            new("assistant", "", Calls: [new("f", "{\"a\": 1}")]), new("tool", "r"),
            new("assistant", "no", Calls: [new("f", "{}")]) { Trained = false }, new("tool", "t"),
            new("assistant", "done"),
        ];
        var chat = format.Encode(turns);
        string learned = "";
        for (int i = 0; i < chat.Ids.Length; i++)
            learned += chat.Answer[i] ? Tokenizer.Decode(chat.Ids.AsSpan(i, 1))
                : i > 0 && chat.Answer[i - 1] ? "|" : "";
        Assert.That(learned.Replace("<think>\n\n</think>\n\n", ""),
            Is.EqualTo(call + "<|im_end|>|done<|im_end|>|"));
        Assert.That(format.Said(turns[2]), Is.EqualTo(call));
    }

    [Test]
    public void FunctionsAreRefusedWhereTheTemplateHasNone()
    {
        PromptFormat[] formats =
        [
            new ChatMlFormat(Tokenizer, "You are kind.", Thoughts.None),
            new ChatMlFormat(Tokenizer, null, Thoughts.LastTurn), new ThinkingFormat(Tokenizer),
            new Llama3Format(TokenizerTests.Load("tiny-llama3")),
            new MiniCpmFormat(TokenizerTests.Load("tiny-sp")),
        ];
        ChatTurn[][] conversations =
        [
            [new("system", "") { Tools = ["{}"] }, new("user", "q"), new("assistant", "a")],
            [new("user", "q"), new("assistant", "", Calls: [new("f", "{}")])],
            [new("user", "q"), new("assistant", "a"), new("tool", "r")],
        ];
        foreach (var format in formats)
            foreach (var turns in conversations)
            {
                Assert.That(() => format.Encode(turns), Refused);
                Assert.That(() => format.Prompt(turns), Refused);
            }
    }

    private static NUnit.Framework.Constraints.IResolveConstraint Refused =>
        Throws.TypeOf<InputException>().With.Message.StartsWith("has functions");

    // The checkpoint's own template opens an answer at the end of every text, the one that the
    // official script passes at none.
    [TestCase("llama3-v")]
    [TestCase("llama3-v-train")]
    public void TextsOfLlama3AreThoseOfApplyChatTemplate(string family)
    {
        var format = new Llama3Format(TokenizerTests.Load("tiny-llama3"));
        int seen = 0;
        foreach (var line in ReferenceText.Lines("templates/chat.jsonl"))
        {
            if (line.GetProperty("family").GetString() != family) continue;
            seen++;
            var turns = line.GetProperty("messages").EnumerateArray().Select(Turn).ToArray();
            Assert.That(family == "llama3-v" ? format.Prompt(turns) : format.Render(turns),
                Is.EqualTo(line.GetProperty("text").GetString()));
        }

        Assert.That(seen, Is.EqualTo(108));
    }

    private static ChatTurn Turn(JsonElement message) => new(
        message.GetProperty("role").GetString()!, message.GetProperty("content").GetString()!,
        message.TryGetProperty("reasoning_content", out var thought) ? thought.GetString() : null,
        message.TryGetProperty("tool_calls", out var calls)
            ? [.. calls.EnumerateArray().Select(ToolCall.Read)] : null);

    // Expected: what Python's json.dumps(json.loads(text), ensure_ascii=False) prints.
    [TestCase("""{"a" :[1,-0,-0.0,1.0,100000.0] , "b":{}}""",
        """{"a": [1, 0, -0.0, 1.0, 100000.0], "b": {}}""")]
    [TestCase("[1e5,1E22,1e15,1e16,123456789012345680,1e-4,0.00001,1e400]",
        "[100000.0, 1e+22, 1000000000000000.0, 1e+16, 123456789012345680, 0.0001, 1e-05, "
            + "Infinity]")]
    [TestCase("[0.1,2.50,1.7976931348623157e308,5e-324,123456.789e-7,-1e-7,9007199254740993.0]",
        "[0.1, 2.5, 1.7976931348623157e+308, 5e-324, 0.0123456789, -1e-07, 9007199254740992.0]")]
    [TestCase("""["\u00e9\"\\/\/\u0001\u007f\n\b",null,true,[]]""",
        "[\"é\\\"\\\\//\\u0001\u007f\\n\\b\", null, true, []]")]
    public void ArgumentsAreWrittenAsPythonWritesThem(string json, string expected)
    {
        using var document = JsonDocument.Parse($"{{\"name\": \"f\", \"arguments\": {json}}}");
        Assert.That(ToolCall.Read(document.RootElement).Arguments, Is.EqualTo(expected));
    }

    [TestCase("v26")]
    [TestCase("o45")]
    [TestCase("l3")]
    [TestCase("v2new")]
    public void PlaceholdersAreThoseOfTheProcessors(string family)
    {
        int seen = 0;
        foreach (var line in ReferenceText.Lines("templates/placeholders.jsonl"))
        {
            if (line.GetProperty("family").GetString() != family) continue;
            seen++;
            bool sliced = !line.TryGetProperty("slice_mode", out var mode) || mode.GetBoolean();
            var plan = ReferenceSlices.Of(line.GetProperty("size"),
                sliced ? line.GetProperty("max_slice_nums").GetInt32() : 1);
            bool old = family is "l3" or "v2new";
            bool numbered =
                !old && line.GetProperty("use_image_id").ValueKind != JsonValueKind.False;
            var scheme = RowFormats.Placeholders(old ? "tiny-llama3" : "tiny-qwen",
                line.GetProperty("image_feature_size").GetInt32());
            // The refactored V-2 has the line end behind a picture here, the release in chat().
            string text =
                scheme.Text(plan, numbered ? line.GetProperty("image_idx").GetInt32() : null)
                + (family == "v2new" ? "\n" : "");
            Assert.That(text, Is.EqualTo(line.GetProperty("text").GetString()));
        }

        Assert.That(seen, Is.GreaterThanOrEqualTo(115));
    }

    [Test]
    public void TheDefaultSystemPromptIsReadFromTheTemplate()
    {
        // As Qwen2.5 writes it: an escaped line end, the prompt in two branches.
        const string Template = "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- else %}"
            + "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
            + "{{- '<|im_start|>system\\nYou are Qwen, it\\'s me.\\nBe kind.<|im_end|>\\n' }}{%- "
            + "endif %}";
        var format = Recognize(Template);
        Assert.That(format.DefaultSystem, Is.EqualTo("You are Qwen, it's me.\nBe kind."));
        Assert.That(format.Thoughts, Is.EqualTo(Thoughts.None));
        Assert.That(Recognize("'<|im_start|>' + role + '<|im_end|>'").DefaultSystem, Is.Null);
    }

    [Test]
    public void ThinkingIsRecognised()
    {
        const string Template =
            "{%- set ns = namespace(multi_step_tool=true, last_query_index=3) %}"
            + "<|im_start|>{%- if message.reasoning_content is string %}</think><|im_end|>";
        Assert.That(Recognize(Template).Thoughts, Is.EqualTo(Thoughts.BehindLastQuestion));
    }

    // The short templates of the V-4_5 and o-4_5 references, whose effect FamilyRowTests holds.
    [TestCase("v45", Thoughts.LastTurn)]
    [TestCase("o45", Thoughts.BehindLastQuestion)]
    [TestCase("v4", Thoughts.None)]
    public void ShorterTemplatesAreToldApart(string family, Thoughts expected)
    {
        var tokenizer = FamilyFormats.Of(family).Tokenizer;
        Assert.That(ChatMlFormat.Recognize(tokenizer, tokenizer.ChatTemplate!, "x").Thoughts,
            Is.EqualTo(expected));
    }

    // What the template of the V-4_5 reference renders, worked out by hand: only the last turn
    // keeps its thought, where Qwen3's keeps those behind the last question.
    [TestCase(Thoughts.LastTurn, "b", "<think>\n\n</think>\n\nc")]
    [TestCase(Thoughts.BehindLastQuestion, "<think>\na\n</think>\n\nb",
        "<think>\n\n</think>\n\nc")]
    public void ThoughtsOfTheLastAnswers(Thoughts thoughts, string first, string second)
    {
        var format = new ChatMlFormat(Tokenizer, null, thoughts);
        Assert.That(
            format.Render([new("user", "q"),
                new("assistant", "<think>\na\n</think>\n\nb"), new("assistant", "c")]),
            Is.EqualTo($"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{first}<|im_end|>\n"
                + $"<|im_start|>assistant\n{second}<|im_end|>\n"));
    }

    [TestCase("{{ '<|start_header_id|>' + message['role'] }}", "does not use <|im_start|>")]
    [TestCase("<|im_start|>{{ message['content'] | trim }}<|im_end|>", "trims")]
    [TestCase("<|im_start|>{{ content.split('</think>') }}<|im_end|>", "</think>")]
    [TestCase("<|im_start|><|vision_start|><|im_end|>", "pictures")]
    public void OtherTemplatesAreRefused(string template, string named)
    {
        var e = Assert.Throws<InputException>(() => Recognize(template, "model/x.json"));
        Assert.That(e!.Message, Does.StartWith("model/x.json: chat_template").And.Contain(named));
    }

    [Test]
    public void TheTemplateFileComesBeforeTheConfiguration()
    {
        string folder = Path.Combine(Path.GetTempPath(), Path.GetRandomFileName());
        Directory.CreateDirectory(folder);
        try
        {
            var tokenizer = TokenizerTests.Load("tiny-qwen");
            Assert.That(ChatMlFormat.Load(folder, tokenizer).DefaultSystem,
                Is.EqualTo("You are a helpful assistant."));
            var e = Assert.Throws<InputException>(
                () => ChatMlFormat.Load(folder, TokenizerTests.Load("tiny-qwen3")));
            Assert.That(e!.Message, Does.Contain("has no chat_template"));
            File.WriteAllText(Path.Combine(folder, "chat_template.jinja"),
                "<|im_start|><|im_end|>");
            Assert.That(ChatMlFormat.Load(folder, tokenizer).DefaultSystem, Is.Null);
        }
        finally
        {
            Directory.Delete(folder, true);
        }
    }
}
