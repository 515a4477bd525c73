namespace MiniCpmNative.Engine.Metrics;

/// <summary>Runs of words and how often they come, for BLEU and CIDEr.</summary>
internal static class NGrams
{
    public const int Longest = 4;

    /// <summary>Counts of the runs of n words.</summary>
    public static Dictionary<string, int> Of(string[] words, int n)
    {
        var counts = new Dictionary<string, int>(StringComparer.Ordinal);
        for (int i = 0; i + n <= words.Length; i++)
        {
            string run = string.Join(' ', words.AsSpan(i, n));
            counts[run] = counts.GetValueOrDefault(run) + 1;
        }

        return counts;
    }

    /// <summary>Whether a text has Chinese characters, which stand without spaces.</summary>
    public static bool HasChinese(string text) => text.EnumerateRunes().Any(rune =>
        rune.Value is (>= 0x3400 and <= 0x9FFF) or (>= 0xF900 and <= 0xFAFF)
            or (>= 0x20000 and <= 0x323AF));
}
