using System.Text.Json;
using MiniCpmNative.Engine;

namespace MiniCpmNative.Cli.Serve;

/// <summary>What goes out, in the form of OpenAI's API; each ends its line.</summary>
internal sealed class ChatReply(string model)
{
    private readonly string _id = $"chatcmpl-{Guid.NewGuid():N}";
    private readonly long _created = DateTimeOffset.UtcNow.ToUnixTimeSeconds();

    /// <summary>All of an answer.</summary>
    public byte[] Whole(string text, string finish, int promptTokens, int tokens) => JsonLine.Of(json =>
    {
        Head(json, "chat.completion");
        json.WriteStartArray("choices");
        json.WriteStartObject();
        json.WriteNumber("index", 0);
        json.WriteStartObject("message");
        json.WriteString("role", "assistant");
        json.WriteString("content", text);
        json.WriteEndObject();
        json.WriteString("finish_reason", finish);
        json.WriteEndObject();
        json.WriteEndArray();
        Usage(json, promptTokens, tokens);
    });

    /// <summary>The next piece of an answer; finish at its end alone.</summary>
    public byte[] Chunk(string? piece, string? finish, bool first) => JsonLine.Of(json =>
    {
        Head(json, "chat.completion.chunk");
        json.WriteStartArray("choices");
        json.WriteStartObject();
        json.WriteNumber("index", 0);
        json.WriteStartObject("delta");
        if (first) json.WriteString("role", "assistant");
        if (piece is not null) json.WriteString("content", piece);
        json.WriteEndObject();
        json.WriteString("finish_reason", finish);
        json.WriteEndObject();
        json.WriteEndArray();
    });

    /// <summary>The last chunk where numbers were asked for.</summary>
    public byte[] UsageChunk(int promptTokens, int tokens) => JsonLine.Of(json =>
    {
        Head(json, "chat.completion.chunk");
        json.WriteStartArray("choices");
        json.WriteEndArray();
        Usage(json, promptTokens, tokens);
    });

    public static byte[] Error(string message, string type) => JsonLine.Of(json =>
    {
        json.WriteStartObject("error");
        json.WriteString("message", message);
        json.WriteString("type", type);
        json.WriteNull("param");
        json.WriteNull("code");
        json.WriteEndObject();
    });

    public static byte[] Models(IEnumerable<string> names, long created) => JsonLine.Of(json =>
    {
        json.WriteString("object", "list");
        json.WriteStartArray("data");
        foreach (string name in names)
        {
            json.WriteStartObject();
            json.WriteString("id", name);
            json.WriteString("object", "model");
            json.WriteNumber("created", created);
            json.WriteString("owned_by", "cpmx");
            json.WriteEndObject();
        }

        json.WriteEndArray();
    });

    private void Head(Utf8JsonWriter json, string kind)
    {
        json.WriteString("id", _id);
        json.WriteString("object", kind);
        json.WriteNumber("created", _created);
        json.WriteString("model", model);
    }

    private static void Usage(Utf8JsonWriter json, int promptTokens, int tokens)
    {
        json.WriteStartObject("usage");
        json.WriteNumber("prompt_tokens", promptTokens);
        json.WriteNumber("completion_tokens", tokens);
        json.WriteNumber("total_tokens", promptTokens + tokens);
        json.WriteEndObject();
    }
}
