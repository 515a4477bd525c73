using System.Text;

namespace MiniCpmNative.Engine.Metrics;

/// <summary>
/// CIDEr-D (Vedantam et al. 2015), what papers report as CIDEr and pycocoevalcap computes: runs of
/// 1 to 4 words, each weighted by how rare it is among the references of all items, compared with
/// each reference. Words are lower-cased pieces between white space (where the references have
/// Chinese, characters); of one item alone everything is equally rare and the score 0.
/// </summary>
public sealed class Cider() : Metric("cider")
{
    private const double Sigma = 6;

    private readonly record struct Vector(
        Dictionary<string, double>[] Weights, double[] Norms, int Bigrams);

    public override MetricResult Score(IReadOnlyList<ScoredAnswer> answers)
    {
        bool chinese = answers.Any(a => a.References.Any(NGrams.HasChinese));
        return Score(answers, text => chinese ? Characters(text)
            : PythonText.Split(PythonText.Lower(text)));
    }

    internal static MetricResult Score(
        IReadOnlyList<ScoredAnswer> answers, Func<string, string[]> words)
    {
        var items = answers.Select(a => (Answer: words(a.Text),
            References: a.References.Select(words).ToArray())).ToArray();
        var found = new Dictionary<string, int>(StringComparer.Ordinal);
        foreach (var (_, references) in items)
            foreach (string run in references.SelectMany(Runs).ToHashSet(StringComparer.Ordinal))
                found[run] = found.GetValueOrDefault(run) + 1;
        double[] each = [.. items.Select(item =>
        {
            Vector answer = Weigh(item.Answer);
            return item.References.Select(r => Similarity(answer, Weigh(r)))
                .DefaultIfEmpty().Average();
        })];
        return new MetricResult(each.DefaultIfEmpty().Average(), each);

        Vector Weigh(string[] text)
        {
            var weights = new Dictionary<string, double>[NGrams.Longest];
            for (int n = 0; n < weights.Length; n++)
                weights[n] = NGrams.Of(text, n + 1).ToDictionary(run => run.Key, run => run.Value
                    * (Math.Log(items.Length)
                        - Math.Log(Math.Max(1, found.GetValueOrDefault(run.Key)))));
            return new Vector(
                weights, [.. weights.Select(w => Math.Sqrt(w.Values.Sum(v => v * v)))],
                Math.Max(0, text.Length - 1));
        }
    }

    private static IEnumerable<string> Runs(string[] words) =>
        Enumerable.Range(1, NGrams.Longest).SelectMany(n => NGrams.Of(words, n).Keys);

    private static double Similarity(Vector answer, Vector reference)
    {
        double sum = 0, off = answer.Bigrams - reference.Bigrams;
        for (int n = 0; n < NGrams.Longest; n++)
        {
            double product = 0;
            foreach (var (run, weight) in answer.Weights[n])
                if (reference.Weights[n].TryGetValue(run, out double other))
                    product += Math.Min(weight, other) * other;
            double norms = answer.Norms[n] * reference.Norms[n];
            sum += norms == 0 ? product : product / norms;
        }

        return 10 * sum / NGrams.Longest * Math.Exp(-off * off / (2 * Sigma * Sigma));
    }

    private static string[] Characters(string text) =>
        [.. text.EnumerateRunes().Where(rune => !Rune.IsWhiteSpace(rune))
            .Select(rune => rune.ToString())];
}
