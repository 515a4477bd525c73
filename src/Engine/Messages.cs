using System.Globalization;
using System.Text;
using System.Text.RegularExpressions;

namespace MiniCpmNative.Engine;

/// <summary>
/// Pieces of one-line messages; what comes from a file must not break the line or fill the screen.
/// </summary>
public static partial class Messages
{
    private const int QuotedLength = 160;
    private const int Listed = 10;
    private const int MostLine = 8192;

    /// <summary>"text" with control characters escaped, shortened when it is long.</summary>
    public static string Quote(string text)
    {
        var line = new StringBuilder("\"");
        Append(line, text);
        return line.Append('"').ToString();
    }

    /// <summary>The first line of a library's message, without control characters.</summary>
    public static string OneLine(string text)
    {
        var line = new StringBuilder();
        Append(line, text.ReplaceLineEndings(" "));
        return line.ToString();
    }

    /// <summary>
    /// Why a file could not be used, without the path that the message begins with.
    /// </summary>
    public static string Reason(Exception failure, string path) =>
        OneLine(failure.Message.Replace($" : '{path}'", "", StringComparison.Ordinal));

    /// <summary>"a, b, c", or the first ten and how many more there are.</summary>
    public static string List(IReadOnlyCollection<string> items) =>
        string.Join(", ", items.Take(Listed))
        + (items.Count > Listed ? $" and {Number(items.Count - Listed)} more" : "");

    /// <summary>What is wrong with a regular expression, in words of this program.</summary>
    public static string RegexFault(ArgumentException failure) =>
        failure is RegexParseException { Error: var error, Offset: var at }
            ? Capital().Replace($"{error}", " $0").ToLowerInvariant().Trim() + $" at character {at}"
            : "it cannot be read";

    [GeneratedRegex("[A-Z]")]
    private static partial Regex Capital();

    /// <summary>1234567 as 1,234,567.</summary>
    public static string Number(long value) => value.ToString("N0", CultureInfo.InvariantCulture);

    /// <summary>A line of which no screen is filled: what is in the middle goes.</summary>
    public static string Cut(string line) => line.Length <= MostLine ? line
        : $"{line.AsSpan(0, MostLine / 2)} ... {line.AsSpan(line.Length - (MostLine / 2))}";

    /// <summary>
    /// Text of any length with its control characters escaped: what a terminal would act on.
    /// </summary>
    public static string Visible(string text)
    {
        if (!text.Any(IsControl)) return text;
        var line = new StringBuilder(text.Length + 16);
        foreach (char c in text)
            if (IsControl(c)) line.Append($"\\u{(int)c:x4}");
            else line.Append(c);
        return line.ToString();
    }

    private static bool IsControl(char c) =>
        char.IsControl(c) || c is '\u2028' or '\u2029';

    private static void Append(StringBuilder line, string text)
    {
        foreach (char c in text.Length > QuotedLength ? text.AsSpan(0, QuotedLength) : text)
        {
            if (IsControl(c) || char.IsSurrogate(c))
                line.Append($"\\u{(int)c:x4}");
            else line.Append(c);
        }

        if (text.Length > QuotedLength) line.Append("...");
    }
}
