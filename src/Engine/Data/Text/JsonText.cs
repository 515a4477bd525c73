using System.Text.Json;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// JSON as users hand it in: every defect becomes one InputException that names the file.
/// </summary>
internal static class JsonText
{
    /// <summary>
    /// The members of an object and the bytes of each value; a later one of a name wins.
    /// </summary>
    public static Dictionary<string, ReadOnlyMemory<byte>> Members(
        ReadOnlyMemory<byte> json, string path, string where)
    {
        var members = new Dictionary<string, ReadOnlyMemory<byte>>(StringComparer.Ordinal);
        var reader = new Utf8JsonReader(json.Span);
        try
        {
            reader.Read();
            if (reader.TokenType != JsonTokenType.StartObject)
                throw new InputException($"{Where(path, where)} is not a JSON object");
            while (reader.Read() && reader.TokenType == JsonTokenType.PropertyName)
            {
                string name = String(ref reader, path, where);
                reader.Read();
                int start = (int)reader.TokenStartIndex;
                reader.Skip();
                members[name] = json[start..(int)reader.BytesConsumed];
            }
            reader.Read();
        }
        catch (JsonException e)
        {
            throw new InputException($"{path}: is not valid JSON at line {e.LineNumber + 1}, byte "
                + $"{e.BytePositionInLine + 1}", e);
        }
        return members;
    }

    /// <summary>A small part as a tree.</summary>
    public static JsonElement Parse(ReadOnlyMemory<byte> json, string path, string where) =>
        JsonInput.Parse(Where(path, where), json).Element;

    /// <summary>The string at the reader.</summary>
    public static string String(ref Utf8JsonReader reader, string path, string where)
    {
        try
        {
            return reader.GetString()!;
        }
        catch (InvalidOperationException e)
        {
            throw new InputException(
                $"{Where(path, where)}: the string at byte {reader.TokenStartIndex:N0} of it is "
                + "not valid Unicode", e);
        }
    }

    private static string Where(string path, string where) =>
        where.Length == 0 ? path : $"{path}: {where}";

    public static JsonElement Member(this JsonElement element, string name) =>
        element.ValueKind == JsonValueKind.Object && element.TryGetProperty(name, out var value)
            ? value : default;

    public static IEnumerable<JsonElement> Items(this JsonElement element) =>
        element.ValueKind == JsonValueKind.Array ? element.EnumerateArray() : [];

    public static string? Text(this JsonElement element) =>
        element.ValueKind == JsonValueKind.String ? element.GetString() : null;

    public static bool IsTrue(this JsonElement element) => element.ValueKind == JsonValueKind.True;

    public static bool? Flag(this JsonElement element) => element.ValueKind switch
    {
        JsonValueKind.True => true,
        JsonValueKind.False => false,
        _ => null,
    };

    public static bool IsNull(this JsonElement element) =>
        element.ValueKind is JsonValueKind.Null or JsonValueKind.Undefined;

    public static bool IsInt(this JsonElement element, out int value)
    {
        value = 0;
        return element.ValueKind == JsonValueKind.Number && element.TryGetInt32(out value);
    }
}
