using System.Text.Json;
using MiniCpmNative.Engine.Data.Text;
using static MiniCpmNative.Engine.Data.RowValues;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// Functions of one row: those that may be called, calls, and results, which stand in the order of
/// the calls that their ids name, as ms-swift has them.
/// </summary>
internal sealed class RowTools
{
    private readonly List<string?> _calls = [];
    private readonly List<int> _results = [];

    /// <summary>
    /// The functions under a key, a list or its text, each as templates write it; null for none.
    /// One that does not say its type is put into {"type": "function", "function": ...}.
    /// </summary>
    public static string[]? Of(JsonElement row, string key)
    {
        var tools = Unfolded(row.Member(key));
        if (tools.SaysNothing()) return null;
        if (tools.ValueKind != JsonValueKind.Array)
            throw new FormatException($"\"{key}\" is {Kind(tools)}, expected a list of functions");
        return [.. tools.EnumerateArray().Select(item =>
        {
            var tool = Unfolded(item);
            bool bare = tool.Member("function").ValueKind != JsonValueKind.Object;
            if (string.IsNullOrEmpty((bare ? tool : tool.Member("function")).Member("name").Text()))
                throw new FormatException($"\"{key}\" has a function without a name, expected "
                    + "{\"type\": \"function\", \"function\": {\"name\", ...}}");
            string text = Written(tool);
            return bare ? $"{{\"type\": \"function\", \"function\": {text}}}" : text;
        })];
    }

    /// <summary>Calls, one or a list, as JSON or its text; null where there are none.</summary>
    public IReadOnlyList<ToolCall>? Calls(JsonElement value)
    {
        var calls = Unfolded(value);
        if (calls.SaysNothing()) return null;
        _calls.Clear();
        _results.Clear();
        return calls.ValueKind == JsonValueKind.Array
            ? [.. calls.EnumerateArray().Select(Call)] : [Call(calls)];
    }

    private ToolCall Call(JsonElement value)
    {
        var call = Unfolded(value);
        var function = call.Member("function") is { ValueKind: JsonValueKind.Object } inner
            ? inner : call;
        if (function.ValueKind != JsonValueKind.Object
            || string.IsNullOrEmpty(function.Member("name").Text()))
            throw new FormatException($"a call is {(function.ValueKind == JsonValueKind.Object
                ? "without a name" : Kind(function))}, expected {{\"name\", \"arguments\"}}");
        var arguments = Unfolded(function.Member("arguments"));
        if (arguments.ValueKind != JsonValueKind.Object)
            throw new FormatException("a call's \"arguments\" are "
                + (arguments.ValueKind == JsonValueKind.Undefined ? "missing"
                    : Kind(arguments)) + ", expected an object, or its text");
        _ = Written(arguments);
        _calls.Add(call.Member("id").Text());
        return ToolCall.Read(call);
    }

    private static string Written(JsonElement value)
    {
        string text = PythonJson.Write(value);
        return Unfolded(JsonSerializer.SerializeToElement(text)).ValueKind == JsonValueKind.Object
            ? text : throw new FormatException(
                "a function has a number that is too large for what reads it");
    }

    /// <summary>The place of a result among the turns: in the order of the calls.</summary>
    /// <param name="turns">How many there are so far.</param>
    /// <param name="before">The role of the last one.</param>
    /// <param name="id">The call that it belongs to; null where that is not said.</param>
    public int PlaceOfResult(int turns, string? before, string? id)
    {
        if (before is not ("assistant" or "tool"))
            throw new FormatException("a function's result stands behind no answer");
        if (before == "assistant") _results.Clear();
        int call = id is null ? int.MaxValue : _calls.IndexOf(id);
        if (call < 0)
            throw new FormatException($"tool_call_id {Messages.Quote(id!)} is no call's that stands "
                + "before it");
        int place = _results.Count;
        while (place > 0 && _results[place - 1] > call) place--;
        _results.Insert(place, call);
        return turns - _results.Count + 1 + place;
    }
}
