using System.Globalization;
using System.Text;
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

/// <summary>
/// JSON as Python's json.dumps(ensure_ascii=False) writes it, which templates call tojson: a space
/// behind commas and colons, numbers that are not integers as the shortest that reads back.
/// </summary>
internal static class PythonJson
{
    public static string Write(JsonElement value)
    {
        var text = new StringBuilder();
        Append(text, value);
        return text.ToString();
    }

    private static void Append(StringBuilder text, JsonElement value)
    {
        string separator = "";
        switch (value.ValueKind)
        {
            case JsonValueKind.Object:
                text.Append('{');
                foreach (var property in value.EnumerateObject())
                {
                    Quote(text.Append(separator), property.Name);
                    Append(text.Append(": "), property.Value);
                    separator = ", ";
                }
                text.Append('}');
                break;
            case JsonValueKind.Array:
                text.Append('[');
                foreach (var item in value.EnumerateArray())
                {
                    Append(text.Append(separator), item);
                    separator = ", ";
                }
                text.Append(']');
                break;
            case JsonValueKind.String:
                Quote(text, value.GetString()!);
                break;
            case JsonValueKind.Number:
                text.Append(Number(value.GetRawText()));
                break;
            default:
                text.Append(value.GetRawText());
                break;
        }
    }

    private static void Quote(StringBuilder text, string value)
    {
        text.Append('"');
        foreach (char c in value)
            text.Append(c switch
            {
                '"' => "\\\"",
                '\\' => "\\\\",
                '\n' => "\\n",
                '\r' => "\\r",
                '\t' => "\\t",
                '\b' => "\\b",
                '\f' => "\\f",
                < ' ' => $"\\u{(int)c:x4}",
                _ => c.ToString(),
            });
        text.Append('"');
    }

    /// <summary>
    /// An integer as it stands; else a double's repr: 2.5, 1e-05, 1e+16, 100000.0.
    /// </summary>
    private static string Number(string raw)
    {
        if (raw.AsSpan().IndexOfAny('.', 'e', 'E') < 0) return raw == "-0" ? "0" : raw;
        double value = double.Parse(raw, CultureInfo.InvariantCulture);
        if (double.IsInfinity(value)) return value > 0 ? "Infinity" : "-Infinity";
        // The shortest digits, d.ddd: the runtime's own notation changes to exponents elsewhere.
        string shortest = value.ToString("E16", CultureInfo.InvariantCulture);
        for (int digits = 0; digits < 16; digits++)
        {
            string some = value.ToString($"E{digits}", CultureInfo.InvariantCulture);
            if (double.Parse(some, CultureInfo.InvariantCulture) != value) continue;
            shortest = some;
            break;
        }
        int exponent =
            int.Parse(shortest.AsSpan(shortest.IndexOf('E') + 1), NumberStyles.AllowLeadingSign);
        if (exponent is < -4 or >= 16)
        {
            char sign = exponent < 0 ? '-' : '+';
            return $"{shortest[..shortest.IndexOf('E')]}e{sign}{Math.Abs(exponent):d2}";
        }
        int decimals = Math.Max(1, shortest.IndexOf('E') - shortest.IndexOf('.') - 1 - exponent);
        if (shortest.IndexOf('.') < 0) decimals = Math.Max(1, -exponent);
        return value.ToString($"F{decimals}", CultureInfo.InvariantCulture);
    }
}
