using System.Text.Json;
using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Data;

/// <summary>Values of a row as they are read and named; what is wrong is a
/// FormatException.</summary>
internal static class RowValues
{
    /// <summary>Of two values of one key the first would be lost.</summary>
    public static JsonDocumentOptions Strict { get; } = new() { AllowDuplicateProperties = false };

    /// <summary>What a value is, in words.</summary>
    public static string Kind(JsonElement value) => value.ValueKind switch
    {
        JsonValueKind.Object => "an object",
        JsonValueKind.Array => "a list",
        JsonValueKind.Number => "a number",
        JsonValueKind.String => value.GetString() == "" ? "empty" : "text",
        JsonValueKind.True => "true",
        JsonValueKind.False => "false",
        _ => "null",
    };

    /// <summary>Known keys that say nothing, such as an empty list, lose nothing.</summary>
    public static bool SaysNothing(this JsonElement value) => value.ValueKind switch
    {
        JsonValueKind.Undefined or JsonValueKind.Null => true,
        JsonValueKind.String => value.GetString()!.AsSpan().Trim() is "" or "[]" or "{}",
        JsonValueKind.Array => value.GetArrayLength() == 0,
        JsonValueKind.Object => !value.EnumerateObject().Any(),
        _ => false,
    };

    /// <summary>The text under a key that must be there.</summary>
    public static string TextOf(JsonElement of, string key)
    {
        var value = of.Member(key);
        if (value.ValueKind == JsonValueKind.Undefined)
            throw new FormatException($"\"{key}\" is missing");
        return value.Text()
            ?? throw new FormatException($"\"{key}\" is {Kind(value)}, expected text");
    }

    public static string? Id(JsonElement id) => id.ValueKind switch
    {
        JsonValueKind.String => id.GetString(),
        JsonValueKind.Number => id.GetRawText(),
        JsonValueKind.Null or JsonValueKind.Undefined => null,
        _ => throw new FormatException($"\"id\" is {Kind(id)}, expected text or a number"),
    };

    /// <summary>
    /// A list or an object that stands as text, as cells of tables hold it; anything else as it is.
    /// </summary>
    public static JsonElement Unfolded(JsonElement value)
    {
        if (value.Text() is not { Length: > 0 } text
            || text.AsSpan().TrimStart() is not ['[' or '{', ..])
            return value;
        try
        {
            using var document = JsonDocument.Parse(text, Strict);
            return document.RootElement.Clone();
        }
        catch (JsonException)
        {
            return value;
        }
    }

    /// <summary>
    /// Whether an answer is trained: true, false, 1 or 0 under the key; null where nothing is said.
    /// </summary>
    public static bool? Flag(JsonElement turn, string key)
    {
        var value = turn.Member(key);
        return value.ValueKind switch
        {
            JsonValueKind.Undefined or JsonValueKind.Null => null,
            JsonValueKind.True => true,
            JsonValueKind.False => false,
            JsonValueKind.Number when value.GetDouble() is 0 or 1 => value.GetDouble() == 1,
            JsonValueKind.Number => throw new FormatException($"\"{key}\" is {value.GetRawText()}, "
                + "expected 0 or 1: an answer is learned or not, with no weight between"),
            _ => throw new FormatException($"\"{key}\" is {Kind(value)}, expected true or false"),
        };
    }
}
