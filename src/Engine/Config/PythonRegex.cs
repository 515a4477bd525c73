using System.Text;
using System.Text.RegularExpressions;

namespace MiniCpmNative.Engine.Config;

/// <summary>
/// Python's regular expressions as .NET's, for patterns that PEFT runs through re.fullmatch. The
/// two agree on what such patterns use; named groups and {,n} are rewritten, and what only .NET
/// knows is refused, because PEFT could not load an adapter saved with it.
/// </summary>
public static class PythonRegex
{
    private const int MaxLength = 10_000;
    private static readonly TimeSpan s_matchLimit = TimeSpan.FromSeconds(1);

    /// <summary>A regex that matches whole names only, within a time limit.</summary>
    /// <exception cref="InputException">
    /// Not a regular expression that Python and .NET share.
    /// </exception>
    public static Regex FullMatch(string pattern) => Create(pattern, @"\A(?:", @")\z");

    /// <summary>The same that matches any part of a name, as re.search.</summary>
    /// <inheritdoc cref="FullMatch"/>
    public static Regex Search(string pattern) => Create(pattern, "", "");

    private static Regex Create(string pattern, string begin, string end)
    {
        if (pattern.Length > MaxLength)
            throw new InputException(
                $"the pattern has {pattern.Length:N0} characters, expected at most"
                + $" {MaxLength:N0}");
        try
        {
            // By itself first, so that a fault stands where it is in the pattern.
            string own = Translate(pattern);
            _ = new Regex(own, RegexOptions.CultureInvariant, s_matchLimit);
            return new Regex($"{begin}{own}{end}", RegexOptions.CultureInvariant, s_matchLimit);
        }
        catch (ArgumentException failure)
        {
            throw new InputException($"{Messages.Quote(pattern)} is not a regular expression:"
                + $" {Messages.RegexFault(failure)}", failure);
        }
    }

    private static string Translate(string pattern)
    {
        var result = new StringBuilder(pattern.Length);
        bool inClass = false;
        for (int i = 0; i < pattern.Length; i++)
        {
            string rest = pattern[i..Math.Min(pattern.Length, i + 4)];
            if (pattern[i] == '\\' && i + 1 < pattern.Length)
            {
                if ("pPGkK".Contains(pattern[i + 1])) throw Foreign(pattern, rest[..2]);
                result.Append(pattern[i] is var slash && pattern[i + 1] == 'Z'
                    ? "\\z" : $"{slash}{pattern[i + 1]}");
                i++;
            }
            else if (inClass)
            {
                if (rest.StartsWith("-[", StringComparison.Ordinal)) result.Append("-\\[");
                else result.Append(pattern[i]);
                if (rest.StartsWith("-[", StringComparison.Ordinal)) i++;
                else inClass = pattern[i] != ']';
            }
            else if (pattern[i] == '[')
            {
                inClass = true;
                i = CopyClassStart(pattern, i, result);
            }
            else if (rest.StartsWith("(?P<", StringComparison.Ordinal))
            {
                result.Append("(?<");
                i += 3;
            }
            else if (rest.StartsWith("(?P=", StringComparison.Ordinal)
                && pattern.IndexOf(')', i) is var end and > 0)
            {
                result.Append($"\\k<{pattern[(i + 4)..end]}>");
                i = end;
            }
            else if (rest.StartsWith("(?'", StringComparison.Ordinal)
                || (rest.StartsWith("(?<", StringComparison.Ordinal) && !rest.EndsWith('=')
                    && !rest.EndsWith('!')))
            {
                throw Foreign(pattern, rest[..3]);
            }
            else
            {
                result.Append(rest.StartsWith("{,", StringComparison.Ordinal) ? "{0" : pattern[i]);
            }
        }

        return result.ToString();
    }

    // A bracket right after [ or [^ is a member of the class in Python.
    private static int CopyClassStart(string pattern, int at, StringBuilder result)
    {
        result.Append('[');
        if (at + 1 < pattern.Length && pattern[at + 1] == '^') result.Append(pattern[++at]);
        if (at + 1 < pattern.Length && pattern[at + 1] is ']' or '[')
            result.Append('\\').Append(pattern[++at]);
        return at;
    }

    private static InputException Foreign(string pattern, string part) => new(
        $"{Messages.Quote(pattern)} contains {Messages.Quote(part)}, which Python's regular "
            + "expressions do not have");
}
