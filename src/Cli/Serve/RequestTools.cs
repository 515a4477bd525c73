using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Cli.Serve;

/// <summary>
/// Functions of a request, read as a row's are. What OpenAI promises of them and nothing here keeps
/// is refused: arguments that fit their schema ("strict"). A call that must come is begun for the
/// model, in its template's words.
/// </summary>
internal sealed class RequestTools
{
    private const int MostLetters = 64;

    private readonly RowTools _rows = new();

    /// <summary>The functions that may be called, each as templates write it, and the one that must
    /// be: empty for any, null for none.</summary>
    /// <exception cref="InputException">They are none, or asked for in a way that is not
    /// served.</exception>
    public static (IReadOnlyList<string> Tools, string? MustCall) Read(JsonValue request)
    {
        var names = new HashSet<string>(StringComparer.Ordinal);
        IReadOnlyList<string> tools =
            request.Find("tools") is { } list ? Tools(request, list, names) : [];
        if (request.Find("tool_choice") is not { } choice) return (tools, null);
        if (choice.IsObject)
        {
            if (choice["type"].Text() != "function") throw choice["type"].Expected("\"function\"");
            JsonValue name = choice["function"]["name"];
            return names.Contains(name.Text()) ? (tools, name.Text())
                : throw name.Expected("the name of one of tools");
        }

        return choice.IsText ? choice.Text() switch
        {
            "none" => ([], null),
            "auto" => (tools, null),
            "required" when names.Count > 0 => (tools, ""),
            "required" => throw choice.Expected("tools beside it"),
            _ => throw Unknown(),
        } : throw Unknown();

        InputException Unknown() => choice.Expected("\"none\", \"auto\", \"required\" or "
            + "{\"type\": \"function\", \"function\": {\"name\"}}");
    }

    private static IReadOnlyList<string> Tools(
        JsonValue request, JsonValue list, HashSet<string> names)
    {
        foreach (JsonValue tool in list.Items())
        {
            if (tool["type"].Text() != "function") throw tool["type"].Expected("\"function\"");
            JsonValue function = tool["function"], name = function["name"];
            if (name.Text() is not { Length: > 0 and <= MostLetters } text
                || !text.All(c => char.IsLetterOrDigit(c) || c is '_' or '-' or '.'))
                throw name.Expected($"up to {MostLetters} letters, digits, _, - and .");
            if (!names.Add(text)) throw name.Error("is another function's too");
            _ = function.Find("description")?.Text();
            if (function.Find("parameters") is { IsObject: false } schema)
                throw schema.Expected("an object, their JSON schema");
            if (function.Find("strict") is { } strict && strict.Bool())
                throw strict.Expected("false: arguments are not made to fit their schema");
        }

        return At(list, () => RowTools.Of(request.Element, "tools")) ?? [];
    }

    /// <summary>What a message calls; null for nothing.</summary>
    /// <exception cref="InputException">It cannot be read.</exception>
    public IReadOnlyList<ToolCall>? Calls(JsonValue message, string role)
    {
        if (message.Find("tool_calls") is not { } calls) return null;
        if (role != "assistant") throw calls.Error("is not an answer's, which alone can call");
        _ = calls.Items().Count();
        return At(calls, () => _rows.Calls(calls.Element));
    }

    /// <summary>The place of a result among the turns.</summary>
    /// <exception cref="InputException">It belongs to no call.</exception>
    public int PlaceOfResult(JsonValue message, List<PromptTurn> turns)
    {
        JsonValue id = message["tool_call_id"];
        return At(id, () => _rows.PlaceOfResult(turns.Count, turns[^1].Role, id.Text()));
    }

    // What the rows' reader finds wrong, with its place.
    private static T At<T>(JsonValue value, Func<T> read)
    {
        try
        {
            return read();
        }
        catch (FormatException wrong)
        {
            throw value.Error($"is wrong: {wrong.Message}");
        }
        catch (InvalidOperationException)
        {
            throw value.Error("has an unpaired surrogate escape in a text");
        }
    }
}
