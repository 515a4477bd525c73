using System.Globalization;
using System.Text;
using System.Text.Json;

namespace MiniCpmNative.Engine;

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

    /// <summary>Text between its quotes.</summary>
    public static void Quote(StringBuilder text, string value)
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

    /// <summary>The shortest digits: 2.5, 64, 1e-05.</summary>
    public static string Short(double value) =>
        value.ToString("R", CultureInfo.InvariantCulture).Replace('E', 'e');

    /// <summary>A float's repr: 2.5, 1e-05, 1e+16, 100000.0.</summary>
    public static string Float(double value)
    {
        if (!double.IsFinite(value)) return value.ToString(CultureInfo.InvariantCulture);
        // The shortest digits, d.ddd: the runtime's own notation changes to exponents elsewhere.
        string shortest = value.ToString("E16", CultureInfo.InvariantCulture);
        for (int digits = 0; digits < 16; digits++)
        {
            string some = value.ToString($"E{digits}", CultureInfo.InvariantCulture);
            if (double.Parse(some, CultureInfo.InvariantCulture) != value) continue;
            shortest = some;
            break;
        }

        int end = shortest.IndexOf('E');
        int exponent = int.Parse(shortest.AsSpan(end + 1), NumberStyles.AllowLeadingSign);
        if (exponent is < -4 or >= 16)
            return $"{shortest[..end]}e{(exponent < 0 ? '-' : '+')}{Math.Abs(exponent):d2}";
        int point = shortest.IndexOf('.');
        int decimals = (point < 0 ? 0 : end - point - 1) - exponent;
        return value.ToString($"F{Math.Max(1, decimals)}", CultureInfo.InvariantCulture);
    }

    // An integer as it stands, of any size.
    private static string Number(string raw) =>
        raw.AsSpan().IndexOfAny('.', 'e', 'E') >= 0
            ? Float(double.Parse(raw, CultureInfo.InvariantCulture))
            : raw == "-0" ? "0" : raw;
}
