using System.Diagnostics;
using System.Globalization;
using System.Text.RegularExpressions;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// Any other split pattern, by System.Text.RegularExpressions. Its classes look at UTF-16 units, so
/// a character outside plane 0 is shown to it as one plane 0 character of the same category; the
/// pieces between matches are pieces too (Hugging Face's behaviour "Isolated"). A pattern that the
/// engine does not know, or that takes seconds on one text, is refused by name.
/// </summary>
/// <remarks>
/// Backtracking has no bound that grows with the text, so time has one: two seconds and 10 us a
/// character, some hundred times of what the patterns of known models take.
/// </remarks>
internal sealed class RegexSplitter : Splitter
{
    private static readonly TimeSpan s_least = TimeSpan.FromSeconds(2);
    private static readonly TimeSpan s_each = TimeSpan.FromMicroseconds(10);

    private readonly Regex _regex;
    private readonly string _file;

    public RegexSplitter(string pattern, string file)
    {
        _file = file;
        try
        {
            // \s, \S and \p mean the same in both engines; only the long s is missing from (?i:'s).
            _regex = new Regex(
                pattern.Replace("(?i:'s|", "(?i:'[s\u017F]|", StringComparison.Ordinal),
                RegexOptions.CultureInvariant, s_least);
        }
        catch (ArgumentException e)
        {
            throw new InputException(
                $"{file}: pre_tokenizer: the pattern {Messages.Quote(pattern)} cannot be used "
                + $"({Messages.RegexFault(e)})", e);
        }
    }

    public override void Cut(ReadOnlySpan<char> text, List<int> ends)
    {
        var seen = new char[text.Length];
        var starts = new int[text.Length + 1];
        int count = 0;
        for (int i = 0; i < text.Length; count++)
        {
            starts[count] = i;
            bool pair = char.IsHighSurrogate(text[i]) && i + 1 < text.Length
                && char.IsLowSurrogate(text[i + 1]);
            seen[count] = pair ? Like(char.ConvertToUtf32(text[i], text[i + 1])) : text[i];
            i += pair ? 2 : 1;
        }
        starts[count] = text.Length;
        int end = 0;
        var limit = s_least + (s_each * text.Length);
        var watch = Stopwatch.StartNew();
        try
        {
            foreach (var match in _regex.EnumerateMatches(seen.AsSpan(0, count)))
            {
                if (watch.Elapsed > limit) throw TooSlow(text.Length, null);
                if (match.Length == 0) continue;
                if (match.Index > end) ends.Add(starts[match.Index]);
                end = match.Index + match.Length;
                ends.Add(starts[end]);
            }
        }
        catch (RegexMatchTimeoutException e)
        {
            throw TooSlow(text.Length, e);
        }
        if (end < count) ends.Add(text.Length);
    }

    private InputException TooSlow(int length, Exception? inner) => new(
        $"{_file}: pre_tokenizer: the pattern {Messages.Quote(_regex.ToString())} takes too long "
        + $"on a text of {Messages.Number(length)} characters; shorten the text or simplify the "
        + "pattern", inner);

    // One rare plane 0 character for each category that planes 1 to 16 use.
    private static char Like(int codePoint) => CharUnicodeInfo.GetUnicodeCategory(codePoint) switch
    {
        UnicodeCategory.UppercaseLetter => '\u2C00',
        UnicodeCategory.LowercaseLetter => '\u2C30',
        UnicodeCategory.TitlecaseLetter => '\u1FBC',
        UnicodeCategory.ModifierLetter => '\uA717',
        UnicodeCategory.OtherLetter => '\uA000',
        UnicodeCategory.NonSpacingMark => '\uA806',
        UnicodeCategory.SpacingCombiningMark => '\uA823',
        UnicodeCategory.EnclosingMark => '\uA670',
        UnicodeCategory.DecimalDigitNumber => '\uA8D0',
        UnicodeCategory.LetterNumber => '\uA6E6',
        UnicodeCategory.OtherNumber => '\uA830',
        UnicodeCategory.ConnectorPunctuation => '\uFE33',
        UnicodeCategory.DashPunctuation => '\u301C',
        UnicodeCategory.OpenPunctuation => '\u2E22',
        UnicodeCategory.ClosePunctuation => '\u2E23',
        UnicodeCategory.InitialQuotePunctuation => '\u2E02',
        UnicodeCategory.FinalQuotePunctuation => '\u2E03',
        UnicodeCategory.OtherPunctuation => '\uA60D',
        UnicodeCategory.MathSymbol => '\u2A00',
        UnicodeCategory.CurrencySymbol => '\uA838',
        UnicodeCategory.ModifierSymbol => '\uA700',
        UnicodeCategory.OtherSymbol => '\uA490',
        UnicodeCategory.Format => '\u2061',
        UnicodeCategory.PrivateUse => '\uE000',
        _ => '\uFFFF',
    };
}
