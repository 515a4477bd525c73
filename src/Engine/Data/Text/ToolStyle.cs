using System.Text;
using System.Text.Json;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// How a chat template writes functions: those that may be called into the system turn, calls
/// behind an answer's content, results into a turn of the user's. A template's style is recognised
/// by its texts, every word of them: a model knows functions by these.
/// </summary>
public abstract class ToolStyle
{
    /// <summary>What stands around a call.</summary>
    public const string CallStart = "<tool_call>", CallEnd = "</tool_call>";

    private const string ResultStart = "<tool_response>", ResultEnd = "</tool_response>";

    private static readonly ToolStyle[] s_all = [new JsonTools(), new TaggedTools()];

    private protected ToolStyle()
    {
    }

    /// <summary>What a template of this style has among its texts.</summary>
    private protected abstract IEnumerable<string> Parts { get; }

    /// <summary>The style of a Jinja template; null where it has none that is known.</summary>
    public static ToolStyle? Of(string template)
    {
        string text = template.Replace("\\n", "\n", StringComparison.Ordinal)
            .Replace("\\\"", "\"", StringComparison.Ordinal);
        return Array.Find(s_all, style => style.Parts
            .Concat([$"\n{ResultStart}\n", $"\n{ResultEnd}"])
            .All(part => text.Contains(part, StringComparison.Ordinal)));
    }

    /// <summary>The system turn's text with the functions that may be called.</summary>
    internal abstract string System(string content, IReadOnlyList<string> tools);

    /// <summary>Calls as they stand behind an answer's content.</summary>
    internal abstract string Calls(IReadOnlyList<ToolCall> calls, bool behindText);

    /// <summary>
    /// How an answer begins that calls a function, or any where the name is empty: up to where a
    /// token of the call ends too.
    /// </summary>
    public abstract string Opening(string name);

    /// <summary>
    /// The call that stands between <see cref="CallStart"/> and <see cref="CallEnd"/>, its
    /// arguments as a JSON object; null where none does that the template could have written.
    /// </summary>
    /// <param name="text">What stands there.</param>
    /// <param name="tools">Functions that may be called, each as templates write it.</param>
    public abstract ToolCall? Read(string text, IReadOnlyList<string> tools);

    /// <summary>The results at the start of some turns; they stand in one turn.</summary>
    internal static string Results(IEnumerable<ChatTurn> turns) => string.Join('\n', turns
        .TakeWhile(turn => turn.Role == "tool")
        .Select(turn => $"{ResultStart}\n{turn.Content}\n{ResultEnd}"));

    /// <summary>The last turn of the user's that is no result written as text; -1 for none.</summary>
    internal static int LastQuestion(IReadOnlyList<ChatTurn> turns)
    {
        for (int i = turns.Count - 1; i >= 0; i--)
            if (turns[i].Role == "user"
                && !(turns[i].Content.StartsWith(ResultStart, StringComparison.Ordinal)
                    && turns[i].Content.EndsWith(ResultEnd, StringComparison.Ordinal)))
                return i;
        return -1;
    }

    private static JsonElement? Json(string text)
    {
        try
        {
            return JsonInput.Parse("a call", Encoding.UTF8.GetBytes(text)).Element;
        }
        catch (InputException)
        {
            return null;
        }
    }

    /// <summary>Qwen3's: a call is a JSON object; functions stand behind the system text.</summary>
    private sealed class JsonTools : ToolStyle
    {
        private const string Head = "# Tools\n\nYou may call one or more functions to assist with "
            + "the user query.\n\nYou are provided with function signatures within "
            + "<tools></tools> XML tags:\n<tools>";

        private const string Tail = "\n</tools>\n\nFor each function call, return a json object "
            + "with function name and arguments within <tool_call></tool_call> XML tags:\n"
            + "<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n"
            + "</tool_call>";

        private protected override IEnumerable<string> Parts =>
            [Head, Tail, "<tool_call>\n{\"name\": \"", "\", \"arguments\": ", "}\n</tool_call>"];

        internal override string System(string content, IReadOnlyList<string> tools) =>
            content + (content.Length > 0 ? "\n\n" : "") + Head
            + string.Concat(tools.Select(tool => "\n" + tool)) + Tail;

        internal override string Calls(IReadOnlyList<ToolCall> calls, bool behindText) =>
            (behindText ? "\n" : "") + string.Join('\n', calls.Select(call => "<tool_call>\n"
                + $"{{\"name\": \"{call.Name}\", \"arguments\": {call.Arguments}}}\n</tool_call>"));

        public override string Opening(string name) => CallStart + "\n"
            + (name.Length > 0 ? $"{{\"name\": \"{name}\", \"arguments\":" : "");

        public override ToolCall? Read(string text, IReadOnlyList<string> tools) =>
            Json(text) is { } call && call.Member("name").Text() is { Length: > 0 } name
            && call.Member("arguments") is { ValueKind: JsonValueKind.Object } arguments
                ? new ToolCall(name, arguments.GetRawText()) : null;
    }

    /// <summary>Qwen3.5's: a call has a tag for each argument; functions stand first.</summary>
    private sealed class TaggedTools : ToolStyle
    {
        private const string Head =
            "# Tools\n\nYou have access to the following functions:\n\n<tools>";

        private const string Tail = "\n\nIf you choose to call a function ONLY reply in the "
            + "following format with NO suffix:\n\n<tool_call>\n<function=example_function_name>\n"
            + "<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
            + "<parameter=example_parameter_2>\nThis is the value for the second parameter\n"
            + "that can span\nmultiple lines\n</parameter>\n</function>\n</tool_call>\n\n"
            + "<IMPORTANT>\nReminder:\n- Function calls MUST follow the specified format: an inner "
            + "<function=...></function> block must be nested within <tool_call></tool_call> XML "
            + "tags\n- Required parameters MUST be specified\n- You may provide optional reasoning "
            + "for your function call in natural language BEFORE the function call, but NOT after\n"
            + "- If there is no function call available, answer the question like normal with your "
            + "current knowledge and do not tell the user about function calls\n</IMPORTANT>";

        private protected override IEnumerable<string> Parts =>
        [
            Head, "\n</tools>", Tail, "<tool_call>\n<function=", "<parameter=", "\n</parameter>\n",
            "</function>\n</tool_call>",
        ];

        internal override string System(string content, IReadOnlyList<string> tools) =>
            Head + string.Concat(tools.Select(tool => "\n" + tool)) + "\n</tools>" + Tail
            + (content.Length > 0 ? "\n\n" : "") + content;

        internal override string Calls(IReadOnlyList<ToolCall> calls, bool behindText) =>
            (behindText ? "\n\n" : "") + string.Join('\n', calls.Select(Call));

        private static string Call(ToolCall call)
        {
            var text = new StringBuilder($"<tool_call>\n<function={call.Name}>\n");
            using var arguments = JsonDocument.Parse(call.Arguments);
            foreach (var argument in arguments.RootElement.EnumerateObject())
                text.Append($"<parameter={argument.Name}>\n{Value(argument.Value)}\n</parameter>\n");
            return text.Append("</function>\n</tool_call>").ToString();
        }

        public override string Opening(string name) =>
            CallStart + "\n" + (name.Length > 0 ? $"<function={name}>\n" : "");

        public override ToolCall? Read(string text, IReadOnlyList<string> tools)
        {
            const string Start = "<function=", End = "</function>", Parameter = "<parameter=",
                ParameterEnd = "\n</parameter>";
            string rest = text.Trim();
            int named = rest.IndexOf(">\n", StringComparison.Ordinal);
            if (!rest.StartsWith(Start, StringComparison.Ordinal) || named <= Start.Length
                || !rest.EndsWith("\n" + End, StringComparison.Ordinal)) return null;
            string name = rest[Start.Length..named];
            JsonElement properties = Parameters(name, tools).Member("properties");
            var arguments = new StringBuilder("{");
            var seen = new HashSet<string>(StringComparer.Ordinal);
            rest = rest[(named + 1)..^End.Length].TrimStart();
            while (rest.Length > 0)
            {
                named = rest.IndexOf(">\n", StringComparison.Ordinal);
                if (!rest.StartsWith(Parameter, StringComparison.Ordinal)
                    || named <= Parameter.Length) return null;
                string key = rest[Parameter.Length..named];
                int end = rest.IndexOf(ParameterEnd, named + 1, StringComparison.Ordinal);
                if (end < 0 || !seen.Add(key)) return null;
                PythonJson.Quote(arguments.Append(seen.Count > 1 ? ", " : ""), key);
                arguments.Append(": ").Append(Argument(
                    rest[(named + 2)..Math.Max(named + 2, end)], properties.Member(key)));
                rest = rest[(end + ParameterEnd.Length)..].TrimStart();
            }

            return new ToolCall(name, arguments.Append('}').ToString());
        }

        private static JsonElement Parameters(string name, IReadOnlyList<string> tools) => tools
            .Select(tool => JsonDocument.Parse(tool).RootElement.Member("function"))
            .FirstOrDefault(tool => tool.Member("name").Text() == name).Member("parameters");

        // Text and values of other types are written alike: the parameter's schema says which it
        // is, and where that says nothing a value that reads as one.
        private static string Argument(string text, JsonElement schema)
        {
            foreach (var choice in schema.Member("enum").Items())
                if (Value(choice) == text) return choice.GetRawText();
            string json = text switch
            {
                "True" => "true",
                "False" => "false",
                "None" => "null",
                _ => text,
            };
            string[] types = [.. Types(schema)];
            string[] its = Json(json)?.ValueKind switch
            {
                JsonValueKind.Number => ["number", "integer"],
                JsonValueKind.True or JsonValueKind.False => ["boolean"],
                JsonValueKind.Null => ["null"],
                JsonValueKind.Array => ["array"],
                JsonValueKind.Object => ["object"],
                _ => [],
            };
            if (its.Length > 0 && (types.Length == 0 || types.Intersect(its).Any())) return json;
            var quoted = new StringBuilder();
            PythonJson.Quote(quoted, text);
            return quoted.ToString();
        }

        private static IEnumerable<string> Types(JsonElement schema) =>
            schema.Member("type").Items().Append(schema.Member("type"))
                .Select(type => type.Text()).OfType<string>()
                .Concat(schema.Member("anyOf").Items().Concat(schema.Member("oneOf").Items())
                    .SelectMany(Types));

        // Lists and objects as JSON, all else as Python's str() has it.
        private static string Value(JsonElement value) => value.ValueKind switch
        {
            JsonValueKind.String => value.GetString()!,
            JsonValueKind.True => "True",
            JsonValueKind.False => "False",
            JsonValueKind.Null => "None",
            _ => PythonJson.Write(value),
        };
    }
}
