using System.Text.Encodings.Web;
using System.Text.Json;

namespace MiniCpmNative.Engine;

/// <summary>Lines of JSON Lines files that people read: characters stay characters.</summary>
internal static class JsonLine
{
    private static readonly JsonWriterOptions s_readable = new()
    {
        Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping,
    };

    /// <summary>An object and the end of its line.</summary>
    public static byte[] Of(Action<Utf8JsonWriter> content)
    {
        using var line = new MemoryStream();
        using (var json = new Utf8JsonWriter(line, s_readable))
        {
            json.WriteStartObject();
            content(json);
            json.WriteEndObject();
        }

        line.WriteByte((byte)'\n');
        return line.ToArray();
    }
}
