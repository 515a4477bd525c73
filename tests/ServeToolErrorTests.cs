using System.Text;
using MiniCpmNative.Cli.Serve;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Generate;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>Functions in requests that are refused, each with a line that says what is
/// where.</summary>
[TestFixture]
public sealed class ServeToolErrorTests
{
    private const string F = "{\"type\": \"function\", \"function\": {\"name\": \"f\"}}";

    private static void AssertRefused(string json, string problem)
    {
        InputException? failure = Assert.Throws<InputException>(() => ChatRequest.Read(
            Encoding.UTF8.GetBytes(json), new GenerationSettings()));
        Assert.That(failure!.Message, Does.StartWith("the request: ").And.Contain(problem)
            .And.Not.Contain("\n"));
        Assert.That(failure.Message, Has.Length.LessThan(300));
    }

    private static string Asked(string members) =>
        $"{{\"messages\": [{{\"role\": \"user\", \"content\": \"q\"}}], {members}}}";

    [TestCase("{}", "key \"tools\" is an object, expected an array")]
    [TestCase("[\"f\"]", "key \"tools[0]\" is \"f\", expected an object")]
    [TestCase("[{}]", "key \"tools[0].type\" is missing")]
    [TestCase("[{\"type\": \"custom\"}]", "key \"tools[0].type\" is \"custom\", expected "
        + "\"function\"")]
    [TestCase("[{\"type\": \"function\"}]", "key \"tools[0].function\" is missing")]
    [TestCase("[{\"type\": \"function\", \"function\": {}}]",
        "key \"tools[0].function.name\" is missing")]
    [TestCase($"[{F}, {F}]", "key \"tools[1].function.name\" is another function's too")]
    public void ToolsThatCannotBeReadAreNamed(string tools, string problem) =>
        AssertRefused(Asked($"\"tools\": {tools}"), problem);

    [TestCase("\"name\": 1", "name\" is 1, expected text")]
    [TestCase("\"name\": \"\"", "name\" is \"\", expected up to 64 letters, digits")]
    [TestCase("\"name\": \"a\\\"b\"", "expected up to 64 letters, digits")]
    [TestCase("\"name\": \"f\", \"name\": \"g\"", "name\" is there twice")]
    [TestCase("\"name\": \"f\", \"description\": []", "description\" is an array, expected text")]
    [TestCase("\"name\": \"f\", \"parameters\": \"{}\"", "parameters\" is \"{}\", expected an "
        + "object")]
    [TestCase("\"name\": \"f\", \"strict\": true", "strict\" is true, expected false")]
    [TestCase("\"name\": \"f\", \"parameters\": {\"a\": 1e999}", "a number that is too large")]
    [TestCase("\"name\": \"f\", \"parameters\": {\"a\": \"\\ud800\"}", "unpaired surrogate")]
    public void FunctionsThatCannotBeReadAreNamed(string function, string problem) => AssertRefused(
        Asked($"\"tools\": [{{\"type\": \"function\", \"function\": {{{function}}}}}]"), problem);

    [Test]
    public void LongNamesAndDeepSchemasAreRefused()
    {
        string start = "\"tools\": [{\"type\": \"function\", \"function\": {\"name\": ";
        AssertRefused(Asked($"{start}\"{new string('f', 1 << 20)}\"}}}}]"),
            "name\" is text, expected up to 64 letters");
        AssertRefused(Asked($"{start}\"f\", \"parameters\": {new string('[', 100_000)}"),
            "nested too deeply");
        AssertRefused(Asked($"\"tools\": [{F}], \"tool_choice\": {{\"type\": \"function\", "
            + $"\"function\": {{\"name\": \"{new string('g', 1 << 20)}\"}}}}"), "one of tools");
        MessagesThatCannotBeReadAreNamed($"{{\"role\": \"assistant\", \"tool_calls\": [{Call}]}}, "
            + $"{{\"role\": \"tool\", \"tool_call_id\": \"{new string('b', 1 << 20)}\", "
            + "\"content\": \"r\"}", "is no call's");
    }

    [TestCase("\"any\"", "\"tool_choice\" is \"any\", expected \"none\", \"auto\"")]
    [TestCase("1", "\"tool_choice\" is 1, expected \"none\", \"auto\"")]
    [TestCase("{\"type\": \"allowed_tools\"}", "\"tool_choice.type\" is \"allowed_tools\"")]
    [TestCase("{\"type\": \"function\", \"function\": {\"name\": \"g\"}}",
        "\"tool_choice.function.name\" is \"g\", expected the name of one of tools")]
    [TestCase("\"required\", \"enable_thinking\": true", "beside enable_thinking")]
    [TestCase("\"auto\", \"parallel_tool_calls\": 1", "\"parallel_tool_calls\" is 1")]
    [TestCase($"\"auto\", \"functions\": [{F}]", "\"functions\" is an array, expected none")]
    public void ChoicesThatAreNotServedAreNamed(string choice, string problem) =>
        AssertRefused(Asked($"\"tools\": [{F}], \"tool_choice\": {choice}"), problem);

    [Test]
    public void ACallWithoutFunctionsCannotBeAskedFor() => AssertRefused(
        Asked("\"tool_choice\": \"required\""), "is \"required\", expected tools beside it");

    private const string Call = "{\"id\": \"a\", \"type\": \"function\", \"function\": "
        + "{\"name\": \"f\", \"arguments\": \"{}\"}}";

    [TestCase("{\"role\": \"tool\", \"tool_call_id\": \"a\", \"content\": \"r\"}",
        "\"messages[1].role\" is \"tool\", expected user and assistant in turn")]
    [TestCase("{\"role\": \"user\", \"content\": \"b\"}", "\"messages[1].role\" is \"user\"")]
    [TestCase("{\"role\": \"function\", \"content\": \"b\"}", "\"messages[1].role\" is "
        + "\"function\"")]
    [TestCase("{\"role\": \"assistant\", \"content\": null}", "\"messages[1].content\" is missing")]
    [TestCase($"{{\"role\": \"assistant\", \"tool_calls\": {Call}}}",
        "\"messages[1].tool_calls\" is an object, expected an array")]
    [TestCase("{\"role\": \"assistant\", \"tool_calls\": [1]}", "a call is a number")]
    [TestCase("{\"role\": \"assistant\", \"tool_calls\": "
        + "[{\"function\": {\"name\": \"f\", \"arguments\": \"1\"}}]}",
        "\"arguments\" are text, expected an object")]
    [TestCase("{\"role\": \"assistant\", \"tool_calls\": "
        + "[{\"function\": {\"name\": \"f\", \"arguments\": \"{\\\"a\\\": \\\"\\\\ud800\\\"}\"}}]}",
        "\"messages[1].tool_calls\" has an unpaired surrogate")]
    [TestCase($"{{\"role\": \"assistant\", \"tool_calls\": [{Call}]}}", "ends without a question")]
    [TestCase($"{{\"role\": \"assistant\", \"tool_calls\": [{Call}]}}, "
        + "{\"role\": \"tool\", \"content\": \"r\"}", "\"messages[2].tool_call_id\" is missing")]
    [TestCase($"{{\"role\": \"assistant\", \"tool_calls\": [{Call}]}}, "
        + "{\"role\": \"tool\", \"tool_call_id\": \"b\", \"content\": \"r\"}",
        "\"messages[2].tool_call_id\" is wrong: tool_call_id \"b\" is no call's")]
    [TestCase("{\"role\": \"assistant\", \"content\": \"a\"}, "
        + $"{{\"role\": \"user\", \"content\": \"b\", \"tool_calls\": [{Call}]}}",
        "\"messages[2].tool_calls\" is not an answer's")]
    [TestCase($"{{\"role\": \"assistant\", \"tool_calls\": [{Call}]}}, "
        + "{\"role\": \"tool\", \"tool_call_id\": \"a\", \"content\": "
        + "[{\"type\": \"image_url\", \"image_url\": \"data:,\"}]}",
            "\"messages[2].content[0].type\"")]
    public void MessagesThatCannotBeReadAreNamed(string messages, string problem) => AssertRefused(
        $"{{\"messages\": [{{\"role\": \"user\", \"content\": \"q\"}}, {messages}]}}", problem);
}
