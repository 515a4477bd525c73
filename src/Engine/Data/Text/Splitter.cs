using System.Globalization;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>What the split patterns ask of a character.</summary>
[Flags]
internal enum CharClass : byte
{
    Other = 0,
    Letter = 1,
    Number = 2,
    Space = 4,
    LineEnd = 8,
    Surrogate = 16,
}

/// <summary>
/// \p{L}, \p{N}, \s and [\r\n] of every code point, by the Unicode data of the runtime.
/// </summary>
internal static class CharClasses
{
    private static readonly CharClass[] s_plane0 = Plane0();

    /// <summary>Class of the code point at i and the number of UTF-16 units it takes.</summary>
    public static CharClass At(ReadOnlySpan<char> text, int i, out int width)
    {
        width = 1;
        var value = s_plane0[text[i]];
        if (value != CharClass.Surrogate) return value;
        if (!char.IsHighSurrogate(text[i]) || i + 1 >= text.Length
            || !char.IsLowSurrogate(text[i + 1]))
            return CharClass.Other;
        width = 2;
        return Of(CharUnicodeInfo.GetUnicodeCategory(
            char.ConvertToUtf32(text[i], text[i + 1])));
    }

    private static CharClass Of(UnicodeCategory category) => category switch
    {
        <= UnicodeCategory.OtherLetter => CharClass.Letter,
        UnicodeCategory.DecimalDigitNumber or UnicodeCategory.LetterNumber
            or UnicodeCategory.OtherNumber => CharClass.Number,
        _ => CharClass.Other,
    };

    private static CharClass[] Plane0()
    {
        var table = new CharClass[0x10000];
        for (int c = 0; c < table.Length; c++)
            table[c] = char.IsSurrogate((char)c) ? CharClass.Surrogate
                : c is '\r' or '\n' ? CharClass.Space | CharClass.LineEnd
                : char.IsWhiteSpace((char)c) ? CharClass.Space
                : Of(CharUnicodeInfo.GetUnicodeCategory(c));
        return table;
    }
}

/// <summary>Cuts a text into the pieces ("words") that byte pairs are merged in.</summary>
internal abstract class Splitter
{
    /// <summary>
    /// Appends the end of every piece of text, in order; the last is text.Length.
    /// </summary>
    public abstract void Cut(ReadOnlySpan<char> text, List<int> ends);

    /// <summary>
    /// A scanner for the patterns of known models, a translated regex for others.
    /// </summary>
    public static Splitter For(string pattern, string file) => pattern switch
    {
        WordSplitter.Qwen => new WordSplitter(maxDigits: 1),
        WordSplitter.Llama3 => new WordSplitter(maxDigits: 3),
        Gpt2Splitter.Pattern => new Gpt2Splitter(),
        _ => new RegexSplitter(pattern, file),
    };

    // \s+(?!\S) | \s+ : a run of white space leaves its last character to what follows it.
    protected static int Spaces(ReadOnlySpan<char> text, int start, int end, int last) =>
        end == text.Length || last == start ? end : last;
}

/// <summary>
/// The split of Qwen2, Qwen3 (one digit per piece) and Llama 3 (up to three):
/// contractions in any case, letters with one leading character that is not a letter, digit or line
/// end, digits, marks with an optional leading space and trailing line ends, white space up to its
/// last line end, other white space. One pass, no backtracking.
/// </summary>
internal sealed class WordSplitter(int maxDigits) : Splitter
{
    private const string Head = @"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|";
    private const string Tail = @"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

    public const string Qwen = Head + @"\p{N}" + Tail;
    public const string Llama3 = Head + @"\p{N}{1,3}" + Tail;

    public override void Cut(ReadOnlySpan<char> text, List<int> ends)
    {
        for (int i = 0; i < text.Length;)
        {
            i = Next(text, i);
            ends.Add(i);
        }
    }

    private int Next(ReadOnlySpan<char> text, int start)
    {
        var first = CharClasses.At(text, start, out int width);
        int next = start + width;
        if ((first & CharClass.Letter) != 0) return Letters(text, next);
        if (text[start] == '\'' && Contraction(text, next) is int length and > 0)
            return next + length;
        if ((first & CharClass.Number) != 0) return Numbers(text, next);
        if ((first & CharClass.LineEnd) == 0 && next < text.Length)
        {
            var second = CharClasses.At(text, next, out int secondWidth);
            if ((second & CharClass.Letter) != 0) return Letters(text, next + secondWidth);
            if (text[start] == ' ' && second == CharClass.Other)
                return Marks(text, next + secondWidth);
        }
        return first == CharClass.Other ? Marks(text, next) : WhiteSpace(text, start);
    }

    private static int Letters(ReadOnlySpan<char> text, int i)
    {
        while (i < text.Length && (CharClasses.At(text, i, out int width) & CharClass.Letter) != 0)
            i += width;
        return i;
    }

    private int Numbers(ReadOnlySpan<char> text, int i)
    {
        for (int n = 1; n < maxDigits && i < text.Length; n++)
        {
            if ((CharClasses.At(text, i, out int width) & CharClass.Number) == 0) break;
            i += width;
        }
        return i;
    }

    private static int Marks(ReadOnlySpan<char> text, int i)
    {
        while (i < text.Length && CharClasses.At(text, i, out int width) == CharClass.Other)
            i += width;
        while (i < text.Length && text[i] is '\r' or '\n') i++;
        return i;
    }

    private static int WhiteSpace(ReadOnlySpan<char> text, int start)
    {
        int end = start, last = start, afterLine = -1;
        while (end < text.Length)
        {
            var kind = CharClasses.At(text, end, out _);
            if ((kind & CharClass.Space) == 0) break;
            last = end++;
            if ((kind & CharClass.LineEnd) != 0) afterLine = end;
        }
        return afterLine > 0 ? afterLine : Spaces(text, start, end, last);
    }

    // Unicode folding: the long s counts as s.
    private static int Contraction(ReadOnlySpan<char> text, int i)
    {
        if (i >= text.Length) return 0;
        char a = text[i], b = i + 1 < text.Length ? text[i + 1] : '\0';
        if (a is 's' or 'S' or '\u017F' or 't' or 'T' or 'm' or 'M' or 'd' or 'D') return 1;
        bool two = a switch
        {
            'r' or 'R' or 'v' or 'V' => b is 'e' or 'E',
            'l' or 'L' => b is 'l' or 'L',
            _ => false,
        };
        return two ? 2 : 0;
    }
}

/// <summary>
/// The split of GPT-2 (ByteLevel with use_regex): contractions in lower case, letters, digits or
/// marks each with an optional leading space, white space.
/// </summary>
internal sealed class Gpt2Splitter : Splitter
{
    public const string Pattern =
        @"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

    public override void Cut(ReadOnlySpan<char> text, List<int> ends)
    {
        for (int i = 0; i < text.Length;)
        {
            i = Next(text, i);
            ends.Add(i);
        }
    }

    private static int Next(ReadOnlySpan<char> text, int start)
    {
        var rest = text[start..];
        if (rest is ['\'', 's' or 't' or 'm' or 'd', ..]) return start + 2;
        if (rest is ['\'', 'r' or 'v', 'e', ..] or ['\'', 'l', 'l', ..]) return start + 3;
        int i = rest is [' ', _, ..]
            && (CharClasses.At(text, start + 1, out _) & CharClass.Space) == 0 ? start + 1 : start;
        var kind = CharClasses.At(text, i, out int width);
        if ((kind & CharClass.Space) == 0)
        {
            for (i += width; i < text.Length; i += width)
                if (CharClasses.At(text, i, out width) != kind) break;
            return i;
        }
        int end = start, last = start;
        while (end < text.Length && (CharClasses.At(text, end, out _) & CharClass.Space) != 0)
            last = end++;
        return Spaces(text, start, end, last);
    }
}
