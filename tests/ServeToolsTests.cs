using System.ClientModel.Primitives;
using System.Text;
using System.Text.Json;
using System.Text.Json.Nodes;
using MiniCpmNative.Cli.Serve;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Text;
using MiniCpmNative.Engine.Generate;
using NUnit.Framework;
using OpenAI.Chat;

namespace MiniCpmNative.Tests;

/// <summary>
/// Functions in requests of cpmx serve: prompts against the templates' texts and training rows, and
/// answers, given as tokens, as OpenAI's own client reads them.
/// </summary>
[TestFixture("o-4_5")]
[TestFixture("qwen3.5")]
public sealed class ServeToolsTests
{
    private const string Tools = """
        [{"type": "function", "function": {"name": "area", "description": "in m²", "parameters":
        {"type": "object", "properties": {"width": {"type": "number"}, "unit": {"type": "string"},
        "a": {"type": "array"}, "on": {"type": ["boolean", "null"]}, "n": {"anyOf":
        [{"type": "integer"}, {"type": "null"}]}, "k": {"enum": ["1", 2]}}}}},
        {"type": "function", "function": {"name": "now"}}]
        """;

    private readonly RowFormat _format;
    private readonly string _family;

    public ServeToolsTests(string family)
    {
        _family = family;
        _format = RowFormats.Of("tiny-qwen3", 4);
        var style = ToolStyle.Of(FamilyFormats.ToolTemplate(family));
        _format = _format with
        {
            Prompts = family == "o-4_5"
                ? new ChatMlFormat(_format.Tokenizer, null, Thoughts.BehindLastQuestion,
                    tools: style)
                : new ThinkingFormat(_format.Tokenizer, tools: style),
        };
    }

    private static ChatRequest Read(string json) =>
        ChatRequest.Read(Encoding.UTF8.GetBytes(json), new GenerationSettings());

    private static ChatRequest Asked(string members = "") => Read(
        $"{{\"messages\": [{{\"role\": \"user\", \"content\": \"q\"}}], \"tools\": "
            + $"{Tools}{members}}}");

    private int[] Ids(ChatRequest request) => new SampleBuilder(_format, 4096).BuildPrompt(
        request.Turns, [], request.System, request.Thinks, tools: request.Tools).InputIds;

    // What Jinja makes of each conversation that OpenAI's API has too: thoughts are no part of it,
    // and it asks for an answer.
    [Test]
    public void PromptsAreThoseOfTheTemplate()
    {
        int seen = 0;
        foreach (var line in ReferenceText.Lines("templates/tools.jsonl"))
        {
            var messages = JsonNode.Parse(line.GetProperty("messages").GetRawText())!.AsArray();
            var options = line.GetProperty("kwargs");
            if (line.GetProperty("family").GetString() != _family
                || !options.GetProperty("add_generation_prompt").GetBoolean()
                || !options.TryGetProperty("enable_thinking", out var thinking)
                || messages[^1]!["role"]!.GetValue<string>() == "assistant"
                || messages.Any(message => message!["reasoning_content"] is not null)) continue;
            seen++;
            int call = 0, result = 0;
            foreach (JsonNode? message in messages)
            {
                foreach (JsonNode? item in message!["tool_calls"]?.AsArray() ?? [])
                {
                    JsonNode function = item!["function"]?.DeepClone() ?? item.DeepClone();
                    function["arguments"] = function["arguments"]!.ToJsonString();
                    JsonObject each = item.AsObject();
                    each.Clear();
                    each["id"] = $"{call++}";
                    each["type"] = "function";
                    each["function"] = function;
                }

                if (message["role"]!.GetValue<string>() == "tool")
                    message["tool_call_id"] = $"{result++}";
            }

            var request = new JsonObject
            {
                ["messages"] = messages,
                ["tools"] = JsonNode.Parse(line.GetProperty("tools").GetRawText()),
                ["enable_thinking"] = thinking.GetBoolean(),
            };
            string text = line.GetProperty("text").GetString()!;
            Assert.That(Ids(Read(request.ToJsonString())), Is.EqualTo(
                _format.Tokenizer.Encode(text, special: true)), text);
        }

        Assert.That(seen, Is.EqualTo(24));
    }

    // The calls of the conversations above, out of the text that Jinja makes of each answer, in
    // pieces of any size.
    [Test]
    public void CallsAreReadAsTheTemplateWritesThem([Values(1, 3, 7, 1000)] int size)
    {
        int seen = 0;
        foreach (var line in ReferenceText.Lines("templates/tools.jsonl"))
        {
            if (line.GetProperty("family").GetString() != _family) continue;
            var read = new List<ToolCall>();
            foreach (string turn in line.GetProperty("text").GetString()!
                .Split("<|im_start|>assistant\n").Skip(1))
            {
                string answer = turn.Split("<|im_end|>")[0], text = "";
                var fold = new ToolFold(_format.Prompts.Tools!, [], false,
                    t => text += t, read.Add);
                foreach (char[] piece in answer.Chunk(size)) fold.Add(new string(piece));
                fold.End();
                Assert.That(text.TrimEnd(), Is.EqualTo(answer.Split("<tool_call>")[0].TrimEnd()));
            }

            ToolCall[] called = [.. line.GetProperty("messages").EnumerateArray()
                .SelectMany(message => message.TryGetProperty("tool_calls", out var calls)
                    ? calls.EnumerateArray().Select(ToolCall.Read) : [])];
            Assert.That(read.Select(call => call.Name),
                Is.EqualTo(called.Select(call => call.Name)));
            foreach (var (its, expected) in read.Zip(called))
                Assert.That(JsonNode.DeepEquals(JsonNode.Parse(its.Arguments),
                    JsonNode.Parse(expected.Arguments)), its.Arguments);
            seen += called.Length;
        }

        Assert.That(seen, Is.EqualTo(_family == "o-4_5" ? 74 : 72));
    }

    // The same JSON as a row and, without its last answer, as a request.
    [TestCase("""{"role":"user","content":"q"}""")]
    [TestCase("""{"role":"system","content":"s"},{"role":"user","content":"q"}""")]
    [TestCase("""
        {"role":"user","content":"q"},{"role":"assistant","content":null,"tool_calls":[{"id":"a",
        "type":"function","function":{"name":"area","arguments":"{\"width\":1e20,\"unit\": \"é\"}"}},
        {"id":"b","type":"function","function":{"name":"now","arguments":"{}"}}]},
        {"role":"tool","tool_call_id":"b","content":"noon"},
        {"role":"tool","tool_call_id":"a","content":[{"type":"text","text":"1"},
        {"type":"text","text":"2"}]}
        """)]
    [TestCase("""
        {"role":"user","content":"q"},{"role":"assistant","content":"Wait.","tool_calls":[{"id":"a",
        "type":"function","function":{"name":"now","arguments":"{\"t\":[true,null,\"x\"]}"}}]},
        {"role":"tool","tool_call_id":"a","content":"noon\n"},{"role":"assistant","content":"Noon."},
        {"role":"user","content":"Really?"}
        """)]
    public void PromptsAreThoseOfTrainingRows(string turns)
    {
        string start = $"{{\"tools\": {Tools}, \"messages\": [{turns}";
        Row row = RowFile.Parse("rows.json", Encoding.UTF8.GetBytes(
            $"[{start}, {{\"role\":\"assistant\",\"content\":\"answer\"}}]}}]")).Rows.Single();
        var builder = new SampleBuilder(_format, 4096);
        int[] ids = Ids(Read(start + "]}"));
        Assert.That(ids, Is.EqualTo(
            builder.BuildPrompt(row, [], row.Turns.Count - 1).InputIds));
        Assert.That(ids, Is.EqualTo(builder.Build(row, []).InputIds[..ids.Length]));
    }

    [Test]
    public void FunctionsThatMayNotBeCalledAreLeftOut()
    {
        ChatRequest without =
            Read("""{"messages": [{"role": "user", "content": "q"}], "tools": []}""");
        Assert.That(Ids(Asked(", \"tool_choice\": \"none\"")), Is.EqualTo(Ids(without)));
        Assert.That(Ids(Asked(", \"tool_choice\": \"auto\"")), Is.EqualTo(Ids(Asked())));
        Assert.That(Ids(Asked()), Is.Not.EqualTo(Ids(without)));
    }

    private string Call(string name, params (string Name, string Written)[] arguments) =>
        _family == "o-4_5"
            ? $"<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {{{string.Join(", ",
                arguments.Select(item => $"\"{item.Name}\": {item.Written}"))}}}}}\n</tool_call>"
            : $"<tool_call>\n<function={name}>\n{string.Concat(arguments.Select(item =>
                $"<parameter={item.Name}>\n{item.Written.Trim('"')}\n</parameter>\n"))}"
                + "</function>\n</tool_call>";

    // An answer as it would come from the model, in OpenAI's form, not streamed and streamed.
    private (ChatCompletion Whole, StreamingChatCompletionUpdate[] Chunks) Answer(
        string text, string members = "", bool ended = true)
    {
        var job = new AnswerJob(
            new GenerationInput(1, _ => { }), Asked(members), false, 1000, default);
        var running = new RunningAnswer(job, _format.Prompts);
        int[] begun = _format.Tokenizer.Encode(job.Request.Begun(_format.Prompts), special: true),
            ids = _format.Tokenizer.Encode(text, special: true);
        Assert.That(ids[..begun.Length], Is.EqualTo(begun), "tokens as in a trained answer");
        foreach (int id in ids[begun.Length..])
            if (!running.Take(id)) break;
        running.End(ended);
        var reply = new ChatReply("m");
        var chunks = new List<byte[]> { reply.Chunk("", null, first: true) };
        string content = "";
        while (job.Pieces.TryRead(out string? piece))
        {
            chunks.Add(reply.Chunk(piece, null, first: false));
            content += piece;
        }

        chunks.Add(reply.Chunk(null, null, first: false, job.Calls));
        chunks.Add(reply.Chunk(null, job.Finish, first: false));
        return (Parsed<ChatCompletion>(
            reply.Whole(content, job.Calls, job.Finish, 1, job.Tokens)),
            [.. chunks.Select(Parsed<StreamingChatCompletionUpdate>)]);
    }

    private static T Parsed<T>(byte[] json) where T : IPersistableModel<T> =>
        ModelReaderWriter.Read<T>(BinaryData.FromBytes(json))!;

    private void AssertAnswer(string text, string content, ChatFinishReason finish,
        string[] calls, string members = "", bool ended = true)
    {
        var (whole, chunks) = Answer(text, members, ended);
        Assert.That(string.Concat(whole.Content.Select(part => part.Text)), Is.EqualTo(content));
        Assert.That(whole.FinishReason, Is.EqualTo(finish));
        Assert.That(whole.ToolCalls.Select(call => $"{call.FunctionName} {call.FunctionArguments}"),
            Is.EqualTo(calls));
        Assert.That(string.Concat(chunks.SelectMany(chunk => chunk.ContentUpdate)
            .Select(part => part.Text)), Is.EqualTo(content));
        StreamingChatToolCallUpdate[] updates =
            [.. chunks.SelectMany(chunk => chunk.ToolCallUpdates)];
        Assert.That(updates.Select(call => $"{call.FunctionName} {call.FunctionArgumentsUpdate}"),
            Is.EqualTo(calls));
        Assert.That(updates.Select(call => call.Index),
            Is.EqualTo(Enumerable.Range(0, calls.Length)));
        Assert.That(updates.Select(call => call.ToolCallId).Distinct().Count(),
            Is.EqualTo(calls.Length));
        Assert.That(chunks[^1].FinishReason, Is.EqualTo(finish));
    }

    [Test]
    public void CallsAreTakenOutOfAnswers()
    {
        const ChatFinishReason Calls = ChatFinishReason.ToolCalls, Stop = ChatFinishReason.Stop;
        string area = Call("area", ("width", "2.5"), ("unit", "\"3\"")), now = Call("now");
        string[] both = ["area {\"width\": 2.5, \"unit\": \"3\"}", "now {}"];
        AssertAnswer("No.", "No.", Stop, []);
        AssertAnswer(area, "", Calls, both[..1]);
        AssertAnswer($"\nOne moment.\n\n{area}\n{now}\n", "One moment.", Calls, both);
        AssertAnswer($"{area} and {now}.", "and .", Calls, both);
        AssertAnswer($"a{area}\n{now}", "a", Calls, both[..1], ", \"parallel_tool_calls\": false");
        // A stop text ends the answer where it stands in the text, not among arguments.
        AssertAnswer($"a b{area}c d{now}", "a b", Calls, both[..1], ", \"stop\": [\"c \", "
            + "\"2.5\"]");
        AssertAnswer($"an{area}b{now}", "a", Stop, [], ", \"stop\": \"n\"");
        // What is cut has no calls but whole ones.
        AssertAnswer(
            $"{area}\n{now[..^3]}", now[..^3], ChatFinishReason.Length, both[..1], ended: false);
        // Thoughts may weigh a call.
        AssertAnswer($"<think>\n{now}?\n</think>\n\n{area}", $"<think>\n{now}?\n</think>", Calls,
            both[..1]);
        string opened = _family == "o-4_5" ? "<think>\n" : "";
        AssertAnswer($"{opened}Or {now}?\n</think>\n\n{area}", $"{opened}Or "
            + $"{now}?\n</think>", Calls,
            both[..1], ", \"enable_thinking\": true");
    }

    [Test]
    public void WhatIsNoCallStaysText()
    {
        string call = Call("area", ("width", "2.5"));
        string[] others =
        [
            "<tool_call", "<tool_call>\n", "<tool_call></tool_call>", call[..^1], call[11..],
            call.Replace("area", ""), call.Replace("width", ""), call.Replace(">\n", ">"),
            call.Replace("\n</tool_call>", "}\n</tool_call>"),
            "</tool_call>\n<tool_call>\nnow\n</tool_call>", "<tool_call>\n[]\n</tool_call>",
            "<tool_call>\n{\"name\": 1, \"arguments\": {}}\n</tool_call>",
            "<tool_call>\n{\"name\": \"now\", \"arguments\": []}\n</tool_call>",
            "<tool_call>\n{\"name\": \"now\", \"arguments\": {\"a\": 1, \"a\": 2}}\n</tool_call>",
            "<tool_call>\n{\"name\": \"\\ud800\", \"arguments\": {}}\n</tool_call>",
            "<tool_call>\n<function=now>\n<parameter=a>\n1\n</parameter>\n<parameter=a>\n2\n"
                + "</parameter>\n</function>\n</tool_call>",
            "<tool_call>\n<function=now>\n<parameter=a>1</parameter>\n</function>\n</tool_call>",
            "<tool_call>\n" + new string('[', 500) + "\n</tool_call>",
        ];
        foreach (string text in others)
        {
            // An empty name of an argument, and no line end, are JSON too.
            bool isCall = _family == "o-4_5"
                && (text == call.Replace("width", "") || text == call.Replace(">\n", ">"));
            string all = "so: " + text;
            if (!isCall) AssertAnswer(all, all.TrimEnd(), ChatFinishReason.Stop, []);
        }
    }

    // In Qwen3.5's way text and other values are written alike.
    [TestCase("unit", "3", "\"3\"")]
    [TestCase("unit", "None", "\"None\"")]
    [TestCase("width", "1e+20", "1e+20")]
    [TestCase("width", "a\nb", "\"a\\nb\"")]
    [TestCase("a", "[1, true]", "[1, true]")]
    [TestCase("a", "{}", "\"{}\"")]
    [TestCase("on", "True", "true")]
    [TestCase("on", "None", "null")]
    [TestCase("on", "1", "\"1\"")]
    [TestCase("n", "-4", "-4")]
    [TestCase("n", "False", "\"False\"")]
    [TestCase("k", "1", "\"1\"")]
    [TestCase("k", "2", "2")]
    [TestCase("unknown", "2.50", "2.50")]
    [TestCase("unknown", "", "\"\"")]
    [TestCase("unknown", "{\"a\": 1, \"a\": 2}", "\"{\\\"a\\\": 1, \\\"a\\\": 2}\"")]
    public void ArgumentsHaveTheTypesOfTheirFunction(string name, string written, string json) =>
        Assert.That(ToolStyle.Of(FamilyFormats.ToolTemplate("qwen3.5"))!.Read(
            $"\n<function=area>\n<parameter={name}>\n{written}\n</parameter>\n</function>\n",
            Asked().Tools)!.Arguments, Is.EqualTo($"{{\"{name}\": {json}}}"));

    [Test]
    public void ACallThatMustComeIsBegun()
    {
        const ChatFinishReason Calls = ChatFinishReason.ToolCalls;
        const string Required = ", \"tool_choice\": \"required\"",
            Named = ", \"tool_choice\": {\"type\": \"function\", \"function\": {\"name\": "
                + "\"area\"}}";
        string area = Call("area", ("width", "2.5")), now = Call("now"), none = Call("area");
        string both = area + "\n" + now;
        AssertAnswer(both, "", Calls, ["area {\"width\": 2.5}", "now {}"], Required);
        AssertAnswer(both, "", Calls, ["area {\"width\": 2.5}"], Named);
        AssertAnswer(none, "", Calls, ["area {}"], Named + ", \"parallel_tool_calls\": true");
        AssertAnswer(area[..^1], area[..^1], ChatFinishReason.Length, [], Named, ended: false);
        foreach (string choice in (string[])[Required, Named])
        {
            ChatRequest request = Asked(choice);
            Assert.That(new SampleBuilder(_format, 4096).BuildPrompt(request.Turns, [],
                tools: request.Tools, begun: request.Begun(_format.Prompts)).InputIds,
                Is.EqualTo(Ids(request).Concat(_format.Tokenizer.Encode(
                    request.Begun(_format.Prompts), special: true))));
            Assert.That(request.Begun(_format.Prompts), Is.Not.Empty);
        }
    }

    // As OpenAI's own client writes them.
    [Test]
    public void WhatTheClientOfOpenAiSendsIsRead()
    {
        var call = ChatToolCall.CreateFunctionToolCall(
            "a", "area", BinaryData.FromString("{\"width\": 2.5}"));
        ChatMessage[] messages =
        [
            new UserChatMessage("q"), new AssistantChatMessage([call]),
            new ToolChatMessage("a", "r"),
        ];
        ChatTool[] tools =
        [
            ChatTool.CreateFunctionTool(
                "area", "in m²", BinaryData.FromString("{\"type\": \"object\"}")),
            ChatTool.CreateFunctionTool("now"),
        ];
        ChatRequest request = Read(
            $"{{\"messages\": [{Written(messages)}], \"tools\": [{Written(tools)}]}}");
        Assert.That(request.Turns[1].Calls,
            Is.EqualTo((ToolCall[])[new("area", "{\"width\": 2.5}")]));
        Assert.That(request.Turns[2].Parts[0].Text, Is.EqualTo("r"));
        Assert.That(request.Tools, Has.Count.EqualTo(2));

        static string Written<T>(T[] items) where T : IPersistableModel<T> => string.Join(
            ",", items.Select(item => ModelReaderWriter.Write(item).ToString()));
    }
}
