using System.Buffers;
using System.Globalization;
using System.Text;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>A token that is cut out of the text before anything else looks at it.</summary>
internal sealed record AddedToken(
    int Id, string Content, bool SingleWord, bool LeftStrip, bool RightStrip, bool Normalized,
    bool Special);

/// <summary>
/// Finds added tokens in a text as Hugging Face's AddedVocabulary does: leftmost match, the longest
/// at one place; single_word matches inside words are passed over; lstrip and rstrip take the white
/// space around a match with it.
/// </summary>
internal sealed class AddedTokens
{
    private readonly SearchValues<string>? _contents;
    private readonly Dictionary<char, AddedToken[]> _byFirst = [];

    public AddedTokens(IEnumerable<AddedToken> tokens)
    {
        var all = tokens.Where(token => token.Content.Length > 0).ToArray();
        if (all.Length == 0) return;
        _contents = SearchValues.Create(
            [.. all.Select(token => token.Content)], StringComparison.Ordinal);
        foreach (var group in all.GroupBy(token => token.Content[0]))
            _byFirst[group.Key] = [.. group.OrderByDescending(token => token.Content.Length)];
    }

    /// <summary>
    /// The next token of text at or after position at, which moves behind the match. start and end
    /// hold the match with the white space it takes; start is never before floor.
    /// </summary>
    public AddedToken? Next(
        ReadOnlySpan<char> text, ref int at, int floor, out int start, out int end)
    {
        while (_contents is not null)
        {
            int offset = text[at..].IndexOfAny(_contents);
            if (offset < 0) break;
            start = at + offset;
            var token = Longest(text[start..]);
            end = at = start + token.Content.Length;
            if (token.SingleWord && (EndsWithWord(text[..start]) || StartsWithWord(text[end..])))
                continue;
            if (token.LeftStrip)
            {
                while (start > 0 && char.IsWhiteSpace(text[start - 1])) start--;
                start = Math.Max(start, floor);
            }
            if (token.RightStrip)
                while (end < text.Length && char.IsWhiteSpace(text[end])) end++;
            return token;
        }
        start = end = text.Length;
        return null;
    }

    private AddedToken Longest(ReadOnlySpan<char> text)
    {
        foreach (var token in _byFirst[text[0]])
            if (text.StartsWith(token.Content, StringComparison.Ordinal)) return token;
        throw new InvalidOperationException("a match that no added token explains");
    }

    private static bool StartsWithWord(ReadOnlySpan<char> text) =>
        Rune.DecodeFromUtf16(text, out var rune, out _) == OperationStatus.Done
        && IsWord(rune);

    private static bool EndsWithWord(ReadOnlySpan<char> text) =>
        Rune.DecodeLastFromUtf16(text, out var rune, out _) == OperationStatus.Done
        && IsWord(rune);

    // \w of the regex crate: Alphabetic, Mark, Nd, Pc, Join_Control. The circled and squared
    // letters are the alphabetic characters that no category below holds.
    private static bool IsWord(Rune rune) => Rune.GetUnicodeCategory(rune) switch
    {
        <= UnicodeCategory.LetterNumber or UnicodeCategory.ConnectorPunctuation => true,
        UnicodeCategory.OtherSymbol => rune.Value is (>= 0x24B6 and <= 0x24E9)
            or (>= 0x1F130 and <= 0x1F149) or (>= 0x1F150 and <= 0x1F169)
            or (>= 0x1F170 and <= 0x1F189),
        _ => rune.Value is 0x200C or 0x200D,
    };
}
