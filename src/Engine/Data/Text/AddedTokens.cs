using System.Buffers;
using System.Globalization;
using System.Text;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>A token that is cut out of the text before anything else looks at it.</summary>
internal sealed record AddedToken(
    int Id, string Content, bool SingleWord, bool LeftStrip, bool RightStrip, bool Normalized,
    bool Special)
{
    /// <summary>
    /// The longest content in UTF-16 units: what finding one may cost at each place of a text.
    /// </summary>
    public const int MaxLength = 1024;
}

/// <summary>
/// Finds added tokens in a text as Hugging Face's AddedVocabulary does: leftmost match, the longest
/// at one place; single_word matches inside words are passed over; lstrip and rstrip take the white
/// space around a match with it.
/// </summary>
internal sealed class AddedTokens
{
    private readonly AddedToken[] _sorted;
    private readonly SearchValues<char> _firsts;

    public AddedTokens(IEnumerable<AddedToken> tokens)
    {
        _sorted = [.. tokens.Where(token => token.Content.Length > 0)
            .DistinctBy(token => token.Content)
            .OrderBy(token => token.Content, StringComparer.Ordinal)];
        _firsts = SearchValues.Create(
            [.. _sorted.Select(token => token.Content[0]).Distinct()]);
    }

    /// <summary>The tokens of a text, from left to right.</summary>
    public Matches In(ReadOnlySpan<char> text) => new(this, text);

    /// <summary>A walk through the tokens of one text.</summary>
    public ref struct Matches(AddedTokens tokens, ReadOnlySpan<char> text)
    {
        private readonly ReadOnlySpan<char> _text = text;
        private int _at, _white;

        /// <summary>
        /// The match with the white space it takes; Start is never before the End before it.
        /// </summary>
        public int Start { get; private set; }

        /// <inheritdoc cref="Start"/>
        public int End { get; private set; }

        /// <summary>The next token; null behind the last, Start and End are the text's end
        /// then.</summary>
        public AddedToken? Next()
        {
            while (_text[_at..].IndexOfAny(tokens._firsts) is var offset and >= 0)
            {
                int start = _at + offset;
                _at = start + 1;
                if (tokens.Longest(_text[start..]) is not { } token) continue;
                _at = start + token.Content.Length;
                if (token.SingleWord
                    && (EndsWithWord(_text[..start]) || StartsWithWord(_text[_at..]))) continue;
                if (token.LeftStrip)
                    while (start > End && char.IsWhiteSpace(_text[start - 1])) start--;
                Start = Math.Max(start, End);
                End = token.RightStrip ? WhiteEnd() : _at;
                return token;
            }
            Start = End = _text.Length;
            return null;
        }

        // The first place from _at on that is no white space; up to _white that is known.
        private int WhiteEnd()
        {
            if (_at >= _white)
            {
                _white = _at;
                while (_white < _text.Length && char.IsWhiteSpace(_text[_white])) _white++;
            }
            return _white;
        }
    }

    // Narrows the sorted tokens down letter by letter to those that begin as text does.
    private AddedToken? Longest(ReadOnlySpan<char> text)
    {
        AddedToken? best = null;
        int low = 0, high = _sorted.Length;
        for (int n = 0; n < text.Length && low < high; n++)
        {
            low = Bound(low, high, n, text[n]);
            high = Bound(low, high, n, text[n] + 1);
            if (low < high && _sorted[low].Content.Length == n + 1) best = _sorted[low++];
        }
        return best;
    }

    // The first of tokens low to high whose letter n is at least c.
    private int Bound(int low, int high, int n, int c)
    {
        while (low < high)
        {
            int middle = (low + high) >>> 1;
            if (_sorted[middle].Content[n] < c) low = middle + 1;
            else high = middle;
        }
        return low;
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
