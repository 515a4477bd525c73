using System.Globalization;
using System.Text;

namespace MiniCpmNative.Engine;

/// <summary>
/// Strings as Python sees them where .NET differs: white space has U+001C to U+001F besides,
/// lengths count code points, lower() and upper() are the full mappings of Unicode, and float()
/// takes what it takes.
/// </summary>
internal static class PythonText
{
    public static bool IsSpace(char c) => char.IsWhiteSpace(c) || c is >= '\u001C' and <= '\u001F';

    /// <summary>str.strip().</summary>
    public static string Strip(string text)
    {
        int start = 0, end = text.Length;
        while (start < end && IsSpace(text[start])) start++;
        while (end > start && IsSpace(text[end - 1])) end--;
        return text[start..end];
    }

    /// <summary>str.split().</summary>
    public static string[] Split(string text)
    {
        var words = new List<string>();
        for (int start = 0; start < text.Length;)
        {
            int end = start;
            while (end < text.Length && !IsSpace(text[end])) end++;
            if (end > start) words.Add(text[start..end]);
            start = end + 1;
        }

        return [.. words];
    }

    public static int Length(string text) => text.EnumerateRunes().Count();

    /// <summary>len(text.upper()).</summary>
    public static int UpperLength(string text) =>
        text.EnumerateRunes().Sum(rune => UpperLength(rune.Value));

    /// <summary>str.lower().</summary>
    public static string Lower(string text)
    {
        var lower = new StringBuilder(text.Length);
        int at = 0;
        foreach (Rune rune in text.EnumerateRunes())
        {
            if (rune.Value == 'İ') lower.Append("i\u0307");
            else if (rune.Value == 'Σ') lower.Append(IsFinal(text, at) ? 'ς' : 'σ');
            else lower.Append(Rune.ToLowerInvariant(rune).ToString());
            at += rune.Utf16SequenceLength;
        }

        return lower.ToString();
    }

    /// <summary>float(text), or null where Python raises ValueError.</summary>
    public static double? Float(string text)
    {
        var digits = new StringBuilder(text.Length);
        foreach (Rune rune in Strip(text).EnumerateRunes())
        {
            double value = Rune.GetUnicodeCategory(rune) == UnicodeCategory.DecimalDigitNumber
                ? Rune.GetNumericValue(rune) : -1;
            digits.Append(value >= 0 ? ((int)value).ToString(CultureInfo.InvariantCulture)
                : rune.ToString());
        }

        string number = digits.ToString();
        string word = number.TrimStart('+', '-').ToLowerInvariant();
        if (number.Length - word.Length <= 1 && word is "inf" or "infinity" or "nan")
            return word == "nan" ? double.NaN
                : number[0] == '-' ? double.NegativeInfinity : double.PositiveInfinity;
        for (int i = 0; i < number.Length; i++)
        {
            if (number[i] is not ((>= '0' and <= '9') or '_' or '+' or '-' or '.' or 'e' or 'E'))
                return null;
            // Only between digits.
            if (number[i] == '_' && (i == 0 || i + 1 == number.Length
                || !char.IsAsciiDigit(number[i - 1]) || !char.IsAsciiDigit(number[i + 1])))
                return null;
        }

        return double.TryParse(number.Replace("_", ""), NumberStyles.Float,
            CultureInfo.InvariantCulture, out double parsed) ? parsed : null;
    }

    // Behind a letter and before none; marks and apostrophes between do not count.
    private static bool IsFinal(string text, int at)
    {
        int before = at - 1, after = at + 1;
        while (before >= 0 && IsIgnored(text[before])) before--;
        while (after < text.Length && IsIgnored(text[after])) after++;
        return before >= 0 && IsCased(text, before)
            && !(after < text.Length && IsCased(text, after));

        static bool IsIgnored(char c) => c is '\'' or '.' or ':' or '·' or '’' or '^' or '`'
            || char.GetUnicodeCategory(c) is UnicodeCategory.NonSpacingMark
                or UnicodeCategory.EnclosingMark or UnicodeCategory.Format
                or UnicodeCategory.ModifierLetter or UnicodeCategory.ModifierSymbol;
        static bool IsCased(string text, int i) =>
            CharUnicodeInfo.GetUnicodeCategory(text, i) is UnicodeCategory.UppercaseLetter
                or UnicodeCategory.LowercaseLetter or UnicodeCategory.TitlecaseLetter;
    }

    // Letters whose upper case is several, of Unicode's SpecialCasing.txt.
    private static int UpperLength(int code) => code switch
    {
        0x390 or 0x3B0 or 0x1F52 or 0x1F54 or 0x1F56 or 0x1FB7 or 0x1FC7 or 0x1FD2 or 0x1FD3
            or 0x1FD7 or 0x1FE2 or 0x1FE3 or 0x1FE7 or 0x1FF7 or 0xFB03 or 0xFB04 => 3,
        0xDF or 0x149 or 0x1F0 or 0x587 or (>= 0x1E96 and <= 0x1E9A) or 0x1F50
            or (>= 0x1F80 and <= 0x1FAF) or (>= 0x1FB2 and <= 0x1FB4) or 0x1FB6 or 0x1FBC
            or (>= 0x1FC2 and <= 0x1FC4) or 0x1FC6 or 0x1FCC or 0x1FD6 or 0x1FE4 or 0x1FE6
            or (>= 0x1FF2 and <= 0x1FF4) or 0x1FF6 or 0x1FFC or (>= 0xFB00 and <= 0xFB02)
            or 0xFB05 or 0xFB06 or (>= 0xFB13 and <= 0xFB17) => 2,
        _ => 1,
    };
}
