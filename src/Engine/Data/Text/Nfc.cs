using System.Globalization;
using System.Runtime.InteropServices;
using System.Text;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// Unicode normalisation form C (UAX 15). string.Normalize does nothing without ICU (invariant
/// globalisation), so the tables are our own: Nfc.txt beside this file. Text of characters that
/// normalisation cannot touch, nearly all text, only costs the look.
/// </summary>
internal static class Nfc
{
    private const int HangulFirst = 0xAC00, LeadFirst = 0x1100, VowelFirst = 0x1161;
    private const int TailBefore = 0x11A7, Leads = 19, Vowels = 21, Tails = 28;
    private const int Syllables = Leads * Vowels * Tails;

    private static readonly Dictionary<int, (int First, int Second)> s_parts = [];
    private static readonly Dictionary<(int First, int Second), int> s_whole = [];
    private static readonly Dictionary<int, byte> s_class = [];
    private static readonly HashSet<int> s_touched = [];
    private static readonly bool[] s_touchedPlane0 = new bool[0x10000];

    static Nfc()
    {
        using var stream = typeof(Nfc).Assembly.GetManifestResourceStream("Nfc.txt")!;
        using var reader = new StreamReader(stream);
        while (reader.ReadLine() is { } line)
            if (line[0] != '#') Read(line.Split(' '));
        for (int i = 0; i < Vowels; i++) s_touched.Add(VowelFirst + i);
        for (int i = 1; i < Tails; i++) s_touched.Add(TailBefore + i);
        foreach (int c in s_touched)
            if (c < 0x10000) s_touchedPlane0[c] = true;
    }

    /// <summary>The text in form C; the very same span when nothing changes.</summary>
    public static ReadOnlySpan<char> Normalize(ReadOnlySpan<char> text)
    {
        for (int i = 0; i < text.Length; i++)
        {
            char c = text[i];
            if (c < 0x300) continue;
            if (s_touchedPlane0[c] || (char.IsHighSurrogate(c) && i + 1 < text.Length
                && char.IsLowSurrogate(text[i + 1])
                && s_touched.Contains(char.ConvertToUtf32(c, text[i + 1]))))
                return Compose(Sort(Decompose(text)));
        }
        return text;
    }

    private static void Read(string[] line)
    {
        int a = Hex(line[1]), b = Hex(line[2]);
        switch (line[0])
        {
            case "C":
                s_parts[a] = (b, Hex(line[3]));
                s_whole[(b, Hex(line[3]))] = a;
                s_touched.Add(Hex(line[3]));
                break;
            case "D":
                s_parts[a] = (b, Hex(line[3]));
                s_touched.Add(a);
                break;
            case "S":
                s_parts[a] = (b, 0);
                s_touched.Add(a);
                break;
            default:
                for (int c = a; c <= b; c++)
                {
                    s_class[c] = byte.Parse(line[3], CultureInfo.InvariantCulture);
                    s_touched.Add(c);
                }
                break;
        }

        static int Hex(string s) =>
            int.Parse(s, NumberStyles.HexNumber, CultureInfo.InvariantCulture);
    }

    private static List<int> Decompose(ReadOnlySpan<char> text)
    {
        var points = new List<int>(text.Length + 16);
        for (int i = 0; i < text.Length; i++)
        {
            bool pair = char.IsHighSurrogate(text[i]) && i + 1 < text.Length
                && char.IsLowSurrogate(text[i + 1]);
            Add(points, pair ? char.ConvertToUtf32(text[i], text[++i]) : text[i]);
        }
        return points;
    }

    private static void Add(List<int> points, int c)
    {
        int syllable = c - HangulFirst;
        if (syllable is >= 0 and < Syllables)
        {
            points.Add(LeadFirst + (syllable / (Vowels * Tails)));
            points.Add(VowelFirst + (syllable / Tails % Vowels));
            if (syllable % Tails != 0) points.Add(TailBefore + (syllable % Tails));
        }
        else if (s_parts.TryGetValue(c, out var parts))
        {
            Add(points, parts.First);
            if (parts.Second != 0) Add(points, parts.Second);
        }
        else
        {
            points.Add(c);
        }
    }

    // Puts every run of combining characters in the order of their classes,
    // equal ones as they stand.
    private static List<int> Sort(List<int> points)
    {
        for (int i = 0; i < points.Count; i++)
        {
            int start = i;
            while (i < points.Count && Class(points[i]) != 0) i++;
            if (i - start < 2) continue;
            var run = CollectionsMarshal.AsSpan(points)[start..i];
            var order = new long[run.Length];
            for (int k = 0; k < order.Length; k++) order[k] = ((long)Class(run[k]) << 32) | (uint)k;
            order.AsSpan().Sort(run);
        }
        return points;
    }

    private static string Compose(List<int> points)
    {
        var all = CollectionsMarshal.AsSpan(points);
        int kept = 0, starter = -1, before = -1;
        foreach (int c in all)
        {
            int own = Class(c);
            if (starter >= 0 && before < own && Whole(all[starter], c) is int whole)
            {
                all[starter] = whole;
                continue;
            }
            // A starter blocks everything behind it from what stands before it.
            if (own == 0)
            {
                starter = kept;
                before = -1;
            }
            else
            {
                before = own;
            }
            all[kept++] = c;
        }
        var text = new StringBuilder(kept + 16);
        foreach (int c in all[..kept])
            if (c < 0x10000) text.Append((char)c);
            else text.Append(char.ConvertFromUtf32(c));
        return text.ToString();
    }

    private static int? Whole(int first, int second)
    {
        int lead = first - LeadFirst, vowel = second - VowelFirst, tail = second - TailBefore;
        if (lead is >= 0 and < Leads && vowel is >= 0 and < Vowels)
            return HangulFirst + (((lead * Vowels) + vowel) * Tails);
        int syllable = first - HangulFirst;
        if (syllable is >= 0 and < Syllables && syllable % Tails == 0 && tail is > 0 and < Tails)
            return first + tail;
        return s_whole.TryGetValue((first, second), out int whole) ? whole : null;
    }

    private static int Class(int c) => c >= 0x300 && s_class.TryGetValue(c, out byte k) ? k : 0;
}
