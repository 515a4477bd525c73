using System.Text.Json;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// A function that an answer calls, and its arguments as the template writes them.
/// </summary>
public sealed record ToolCall(string Name, string Arguments)
{
    /// <summary>
    /// From {"name", "arguments"}, alone or as "function" of an object; arguments are a JSON value,
    /// or text that is taken as it is.
    /// </summary>
    public static ToolCall Read(JsonElement call)
    {
        if (call.TryGetProperty("function", out var function)) call = function;
        var arguments = call.GetProperty("arguments");
        return new(call.GetProperty("name").GetString()!,
            arguments.ValueKind is JsonValueKind.String
            ? arguments.GetString()! : PythonJson.Write(arguments));
    }
}
