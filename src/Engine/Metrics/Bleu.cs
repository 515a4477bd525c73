using System.Text;
using System.Text.RegularExpressions;

namespace MiniCpmNative.Engine.Metrics;

/// <summary>
/// BLEU-4 (Papineni et al. 2002) in per cent, as sacrebleu has it: its words ("13a", or "zh" where
/// the references have Chinese), exponential smoothing; of single answers with the orders they are
/// long enough for.
/// </summary>
public sealed partial class Bleu() : Metric("bleu")
{
    /// <summary>Matches and runs of each order, and lengths.</summary>
    private sealed class Counts(int orders)
    {
        public long[] Right { get; } = new long[orders];

        public long[] All { get; } = new long[orders];

        public long Length { get; set; }

        public long Reference { get; set; }

        public void Add(Counts other)
        {
            for (int n = 0; n < orders; n++)
                (Right[n], All[n]) = (Right[n] + other.Right[n], All[n] + other.All[n]);
            (Length, Reference) = (Length + other.Length, Reference + other.Reference);
        }
    }

    public override MetricResult Score(IReadOnlyList<ScoredAnswer> answers)
    {
        bool chinese = answers.Any(a => a.References.Any(NGrams.HasChinese));
        return Score(answers, chinese ? Chinese : Western);
    }

    internal static MetricResult Score(
        IReadOnlyList<ScoredAnswer> answers, Func<string, string[]> words,
        int orders = NGrams.Longest)
    {
        var all = new Counts(orders);
        var each = new double[answers.Count];
        for (int i = 0; i < each.Length; i++)
        {
            Counts counts = Count(words(answers[i].Text),
                [.. answers[i].References.Select(words)], orders);
            each[i] = Value(counts, orders, effectiveOrder: true);
            all.Add(counts);
        }

        return new MetricResult(Value(all, orders, effectiveOrder: false), each);
    }

    private static Counts Count(string[] answer, string[][] references, int orders)
    {
        var counts = new Counts(orders)
        {
            Length = answer.Length,
            // The closest in length, the shorter of two.
            Reference = references.Select(r => r.Length)
                .MinBy(length => (Math.Abs(length - answer.Length), length)),
        };
        for (int n = 1; n <= orders; n++)
        {
            var most = new Dictionary<string, int>(StringComparer.Ordinal);
            foreach (string[] reference in references)
                foreach (var (run, count) in NGrams.Of(reference, n))
                    most[run] = Math.Max(count, most.GetValueOrDefault(run));
            foreach (var (run, count) in NGrams.Of(answer, n))
            {
                counts.All[n - 1] += count;
                counts.Right[n - 1] += Math.Min(count, most.GetValueOrDefault(run));
            }
        }

        return counts;
    }

    private static double Value(Counts counts, int orders, bool effectiveOrder)
    {
        if (counts.Right.All(right => right == 0)) return 0;
        double sum = 0, smooth = 1;
        int used = 0;
        for (; used < orders && counts.All[used] > 0; used++)
        {
            double right = counts.Right[used];
            if (right == 0) right = 1 / (smooth *= 2);
            sum += Math.Log(100 * right / counts.All[used]);
        }

        if (used < orders && !effectiveOrder) return 0;
        double penalty = counts.Length < counts.Reference
            ? Math.Exp(1 - ((double)counts.Reference / counts.Length)) : 1;
        return penalty * Math.Exp(sum / used);
    }

    /// <summary>The words of sacrebleu's tokenizer 13a.</summary>
    internal static string[] Western(string text)
    {
        string line = PythonText.Strip(text).Replace("<skipped>", "").Replace("-\n", "")
            .Replace('\n', ' ').Replace("&quot;", "\"").Replace("&amp;", "&").Replace("&lt;", "<")
            .Replace("&gt;", ">");
        return Words($" {line} ");
    }

    /// <summary>Those of its tokenizer zh.</summary>
    internal static string[] Chinese(string text)
    {
        var line = new StringBuilder();
        foreach (Rune rune in PythonText.Strip(text).EnumerateRunes())
            line.Append(IsChinese(rune.Value) ? $" {rune} " : rune.ToString());
        return Words(line.ToString());
    }

    // Ranges of the tokenizer; the second is not meant, but what its comparison of texts takes.
    private static bool IsChinese(int code) => code
        is (>= 0x3400 and <= 0x4DB5) or (>= 0x2001 and <= 0x2A6D) or (>= 0x4E00 and <= 0x9FBB)
        or (>= 0xF900 and <= 0xFA2D) or (>= 0xFA30 and <= 0xFA6A) or (>= 0xFA70 and <= 0xFAD9)
        or (>= 0xFF00 and <= 0xFFEF) or (>= 0x2E80 and <= 0x2FDF) or (>= 0x2FF0 and <= 0x303F)
        or (>= 0x3100 and <= 0x312F) or (>= 0x31A0 and <= 0x31BF) or (>= 0x31C0 and <= 0x31EF)
        or (>= 0x3200 and <= 0x33FF) or (>= 0xFE10 and <= 0xFE1F) or (>= 0xFE30 and <= 0xFE4F);

    private static string[] Words(string line)
    {
        line = Symbols().Replace(line, " $1 ");
        line = MarkBehindOther().Replace(line, "$1 $2 ");
        line = MarkBeforeOther().Replace(line, " $1 $2");
        line = DashBehindDigit().Replace(line, "$1 $2 ");
        return PythonText.Split(line);
    }

    [GeneratedRegex(@"([\{-\~\[-\` -\&\(-\+\:-\@\/])")]
    private static partial Regex Symbols();

    [GeneratedRegex(@"([^0-9])([\.,])")]
    private static partial Regex MarkBehindOther();

    [GeneratedRegex(@"([\.,])([^0-9])")]
    private static partial Regex MarkBeforeOther();

    [GeneratedRegex(@"([0-9])(-)")]
    private static partial Regex DashBehindDigit();
}
