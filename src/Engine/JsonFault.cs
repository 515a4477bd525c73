using System.Text.Json;

namespace MiniCpmNative.Engine;

/// <summary>
/// Why text is not JSON, in words of this program: the library's speak of readers and options.
/// </summary>
internal static class JsonFault
{
    /// <param name="json">The text.</param>
    /// <param name="failure">Where the library stopped.</param>
    public static string Reason(ReadOnlySpan<byte> json, JsonException failure)
    {
        if (failure.Message.Contains("depth", StringComparison.OrdinalIgnoreCase))
            return "it is nested too deeply";
        if (failure.Message.Contains("uplicate", StringComparison.Ordinal))
            return "a key is there twice";
        int at = 0;
        for (long line = failure.LineNumber ?? 0; line > 0; line--)
        {
            int end = json[at..].IndexOf((byte)'\n');
            if (end < 0) break;
            at += end + 1;
        }

        at = (int)Math.Min(json.Length, at + (failure.BytePositionInLine ?? 0));
        var rest = json[at..].TrimStart(" \t\r\n"u8);
        var before = json[..at].TrimEnd(" \t\r\n"u8);
        if (rest.IsEmpty) return before.IsEmpty ? "it is empty" : "it ends in the middle of a "
            + "value";
        char next = (char)rest[0];
        if (next is ']' or '}' && before.EndsWith(","u8)) return "a comma stands in front of "
            + $"{next}";
        return next switch
        {
            '\'' => "texts stand between double quotes, not single ones",
            '/' or '#' => "JSON has no comments",
            'N' or 'T' or 'F' when Start(rest).TrimEnd('}', ']') is "None" or "True" or "False" =>
                "Python's None, True and False are null, true and false in JSON",
            'N' or 'I' or 'i' => "NaN and Infinity are no JSON numbers",
            '\\' => "a backslash that begins no escape",
            ',' => "a comma where none belongs",
            < ' ' => "a line end or another control character inside a text: write \\n",
            _ => "unexpected " + Messages.Quote(Start(rest)),
        };
    }

    private static string Start(ReadOnlySpan<byte> rest)
    {
        string text = System.Text.Encoding.UTF8.GetString(rest[..Math.Min(rest.Length, 40)]);
        int end = text.AsSpan().IndexOfAny(" \t\r\n,");
        text = end > 0 ? text[..end] : text;
        return text.Length > 12 ? text[..12] : text;
    }
}
