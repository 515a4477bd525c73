using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Cli.Serve;

/// <summary>What goes out, in the form of OpenAI's API; each ends its line.</summary>
internal sealed class ChatReply(string model)
{
    private readonly string _id = $"chatcmpl-{Guid.NewGuid():N}";
    private readonly long _created = DateTimeOffset.UtcNow.ToUnixTimeSeconds();

    /// <summary>All of an answer.</summary>
    public byte[] Whole(string text, IReadOnlyList<ToolCall> calls, string finish,
        int promptTokens, int tokens) => JsonLine.Of(json =>
    {
        Head(json, "chat.completion");
        json.WriteStartArray("choices");
        json.WriteStartObject();
        json.WriteNumber("index", 0);
        json.WriteStartObject("message");
        json.WriteString("role", "assistant");
        json.WriteString("content", text.Length == 0 && calls.Count > 0 ? null : text);
        if (calls.Count > 0) Calls(json, calls, numbered: false);
        json.WriteEndObject();
        json.WriteString("finish_reason", finish);
        json.WriteEndObject();
        json.WriteEndArray();
        Usage(json, promptTokens, tokens);
    });

    /// <summary>The next piece of an answer; calls and finish at its end alone.</summary>
    public byte[] Chunk(string? piece, string? finish, bool first,
        IReadOnlyList<ToolCall>? calls = null) => JsonLine.Of(json =>
    {
        Head(json, "chat.completion.chunk");
        json.WriteStartArray("choices");
        json.WriteStartObject();
        json.WriteNumber("index", 0);
        json.WriteStartObject("delta");
        if (first) json.WriteString("role", "assistant");
        if (piece is not null) json.WriteString("content", piece);
        if (calls is { Count: > 0 }) Calls(json, calls, numbered: true);
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

    private static void Calls(
        Utf8JsonWriter json, IReadOnlyList<ToolCall> calls, bool numbered)
    {
        json.WriteStartArray("tool_calls");
        for (int i = 0; i < calls.Count; i++)
        {
            json.WriteStartObject();
            if (numbered) json.WriteNumber("index", i);
            json.WriteString("id", $"call_{Guid.NewGuid():N}");
            json.WriteString("type", "function");
            json.WriteStartObject("function");
            json.WriteString("name", calls[i].Name);
            json.WriteString("arguments", calls[i].Arguments);
            json.WriteEndObject();
            json.WriteEndObject();
        }

        json.WriteEndArray();
    }

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
