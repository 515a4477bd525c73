using System.Text;
using MiniCpmNative.Cli;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Text;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Functions in rows: the manual's examples, the official format and back, what cannot be read, and
/// models that have none. Row by row against other tools: RowFormatTests; texts: ChatTests.
/// </summary>
[TestFixture]
public sealed class RowToolsTests
{
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    private static RowSet Parse(string name, string text) =>
        RowFile.Parse(name, Encoding.UTF8.GetBytes(text));

    // The template's text of the manual's row is worked out by hand from Qwen3's.
    [Test]
    public void TheFunctionsOfTheManualAreOneRow()
    {
        const string text = "<|im_start|>system\n# Tools\n\nYou may call one or more functions to "
            + "assist with the user query.\n\nYou are provided with function signatures within "
            + "<tools></tools> XML tags:\n<tools>\n{\"type\": \"function\", \"function\": "
            + "{\"name\": "
            + "\"area\", \"parameters\": {\"type\": \"object\"}}}\n</tools>\n\nFor each function "
            + "call, return a json object with function name and arguments within "
            + "<tool_call></tool_call> "
            + "XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": "
            + "<args-json-object>}\n</tool_call><|im_end|>\n<|im_start|>user\nHow large is 3 by "
            + "4?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n{\"name\": \"area\", "
            + "\"arguments\": {\"sides\": [3, "
            + "4]}}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n12\n"
            + "</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
            + "12.<|im_end|>\n";
        var format = new ChatMlFormat(TokenizerTests.Load("tiny-qwen3"), null,
            Thoughts.BehindLastQuestion, tools: ToolStyle.Of(FamilyFormats.ToolTemplate("o-4_5")));
        string file = Path.Combine(_folder, "rows.json"),
            result = Path.Combine(_folder, "out.json");
        foreach (string example in DataFormatDocTests.Examples("json")[8..])
        {
            Row row = Parse("rows.json", example).Rows.Single();
            Assert.That(format.Render(row.Turns), Is.EqualTo(text));
            Assert.That(row.Turns.Select(turn => turn.Trained),
                Is.EqualTo(new bool?[] { null, null, true, null, true }));
            File.WriteAllText(file, example);
            var output = new StringWriter();
            Assert.That(new CommandLine(output, output, new Runners())
                .Run(["data", "convert", file, result]), Is.Zero);
            Assert.That(output.ToString(),
                Does.Contain("have functions").And.Not.Contain("system turn"));
            Assert.That(RowFile.Read(result).Format, Is.Null);
            Assert.That(format.Render(RowFile.Read(result).Rows.Single().Turns), Is.EqualTo(text));
        }
    }

    private const string Call = "{\\\"name\\\":\\\"f\\\",\\\"arguments\\\":";

    [TestCase("""{"role":"tool_call","content":"f(1)"}""", "turn 2: a call is text, expected")]
    [TestCase("""{"role":"tool_call","content":"[]"}""", "turn 2: \"content\" has no call")]
    [TestCase("""{"role":"tool_call","content":"{\"arguments\":{}}"}""", "a call is without a name")]
    [TestCase("""{"role":"tool_call","content":"{\"name\":\"f\"}"}""", "\"arguments\" are missing")]
    [TestCase($"{{\"role\":\"tool_call\",\"content\":\"{Call}[1]}}\"}}",
        "\"arguments\" are a list, expected an object")]
    [TestCase($"{{\"role\":\"tool_call\",\"content\":\"{Call}{{\\\"a\\\":1e400}}}}\"}}",
        "too large")]
    [TestCase($"{{\"role\":\"tool_call\",\"content\":\"{Call}{{\\\"a\\\":\\\"<bbox>\\\"}}}}\"}},"
        + "{\"role\":\"tool_response\",\"content\":\"r\"}", "turn 2: has the tag <bbox>")]
    [TestCase("""{"role":"assistant","tool_calls":[{"id":"a","name":"f","arguments":"{"}]}""",
        "\"arguments\" are text, expected an object")]
    [TestCase("""{"role":"user","content":"b","tool_calls":[{"name":"f","arguments":{}}]}""",
        "turn 2: has \"tool_calls\", which only an answer can have")]
    [TestCase("""{"role":"tool_response","content":"r"}""",
        "turn 2: a function's result stands behind no answer")]
    [TestCase("""{"role":"assistant","content":"","tool_calls":[{"id":"a","name":"f","arguments":{}}]},"""
        + """{"role":"tool","tool_call_id":"b","content":"r"}""",
        "turn 3: tool_call_id \"b\" is no call's")]
    [TestCase($"{{\"role\":\"assistant\",\"content\":\"t\"}},{{\"role\":\"tool_call\",\"loss\":false,"
        + $"\"content\":\"{Call}{{}}}}\"}}", "turn 3: calls belong to the answer before them")]
    public void CallsThatCannotBeReadAreNamed(string turns, string problem)
    {
        RowSet set =
            Parse("rows.jsonl", "{\"images\":[],\"messages\":[{\"role\":\"user\",\"content\":"
            + $"\"q\"}},{turns},{{\"role\":\"assistant\",\"content\":\"a\"}}]}}");
        Assert.That($"{set.Bad.Single()}", Does.Contain(problem));
    }

    [TestCase("""[{"function":{}}]""", "\"tools\" has a function without a name")]
    [TestCase("""{"name":"f"}""", "\"tools\" is an object, expected a list of functions")]
    [TestCase("\"f\"", "\"tools\" is text, expected a list of functions")]
    [TestCase("""[{"name":"f","max":1e400}]""", "too large")]
    public void ToolsThatCannotBeReadAreNamed(string tools, string problem)
    {
        RowSet set =
            Parse("rows.jsonl", $"{{\"query\":\"q\",\"response\":\"a\",\"tools\":{tools}}}");
        Assert.That($"{set.Bad.Single()}", Does.Contain(problem));
    }

    // A function's texts may hold no token of the model's either, and show no picture.
    [TestCase("""[{"name":"f","description":"<|im_end|>"}]""", "x", "special token <|im_end|>")]
    [TestCase("""[{"name":"f"}]""", "<|im_end|>", "turn 4: the text holds the special token")]
    [TestCase("""[{"name":"f"}]""", "<image>", "turn 4: an image tag stands in a function's result")]
    public void TokensOfTheModelAreRefusedInFunctions(string tools, string result, string problem)
    {
        Row row = Parse("rows.jsonl",
            $"{{\"tools\":{tools},\"images\":[],\"messages\":[{{\"role\":\"user\","
            + $"\"content\":\"q\"}},{{\"role\":\"tool_call\",\"content\":\"{Call}{{}}}}\"}},{{\"role\":"
            + $"\"tool_response\",\"content\":\"{result}\"}},{{\"role\":\"assistant\",\"content\":\"a\"}}]}}")
            .Rows.Single();
        Assert.That(() => RowText.Compose(row, (_, _) => "", ["<|im_end|>"]),
            Throws.TypeOf<BadRowException>().With.Message.Contains(problem));
    }
}
