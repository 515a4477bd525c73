namespace MiniCpmNative.Engine.Metrics;

/// <summary>An answer and what is taken for right.</summary>
/// <param name="Text">What was answered.</param>
/// <param name="References">One or more right answers.</param>
public sealed record ScoredAnswer(string Text, IReadOnlyList<string> References)
{
    /// <summary>Tokens of the answer and of the first reference, where they are known.</summary>
    public (IReadOnlyList<int> Answer, IReadOnlyList<int> Reference) Tokens { get; init; } =
        ([], []);
}

/// <summary>The score of all answers, and that of each.</summary>
public sealed record MetricResult(double All, IReadOnlyList<double> Each);

/// <summary>
/// A metric of answers by its name, equal to the evaluation code that is in public use for it: the
/// file of each says whose.
/// </summary>
public abstract class Metric(string name)
{
    public string Name { get; } = name;

    public static IReadOnlyList<Metric> Known { get; } =
    [
        new MeanMetric("exact_match", TextMatch.Exact),
        new MeanMetric("contains", TextMatch.Contains),
        new TokenAccuracy(),
        new MeanMetric("anls", Anls.Score),
        new MeanMetric("relaxed_accuracy", RelaxedAccuracy.Score),
        new MeanMetric("vqa_score", VqaScore.Score),
        new MeanMetric("rouge_l", RougeL.Score),
        new Bleu(),
        new Cider(),
    ];

    /// <summary>The metrics of these names.</summary>
    /// <exception cref="InputException">A name is none.</exception>
    public static IReadOnlyList<Metric> Of(IReadOnlyList<string> names) =>
        [.. names.Distinct().Select(name => Known.FirstOrDefault(m => m.Name == name)
            ?? throw new InputException($"metrics: {Messages.Quote(name)} is none; expected some "
                + "of " + string.Join(", ", Known.Select(m => m.Name))))];

    public abstract MetricResult Score(IReadOnlyList<ScoredAnswer> answers);

    /// <summary>A metric whose score is the mean of the answers' own.</summary>
    private sealed class MeanMetric(
        string name, Func<string, IReadOnlyList<string>, double> score) : Metric(name)
    {
        public override MetricResult Score(IReadOnlyList<ScoredAnswer> answers)
        {
            double[] each = [.. answers.Select(a => score(a.Text, a.References))];
            return new MetricResult(each.DefaultIfEmpty().Average(), each);
        }
    }
}

/// <summary>
/// Share of the reference's tokens that the answer has at the same place, of all answers together,
/// as ms-swift and LLaMA-Factory count where the answer is the model's choice token by token.
/// </summary>
public sealed class TokenAccuracy() : Metric("token_accuracy")
{
    public override MetricResult Score(IReadOnlyList<ScoredAnswer> answers)
    {
        long all = 0, right = 0;
        var each = new double[answers.Count];
        for (int i = 0; i < each.Length; i++)
        {
            var (answer, reference) = answers[i].Tokens;
            int hits = Hits(answer, reference);
            (all, right) = (all + reference.Count, right + hits);
            each[i] = reference.Count == 0 ? 0 : (double)hits / reference.Count;
        }

        return new MetricResult(all == 0 ? 0 : (double)right / all, each);
    }

    /// <summary>Places at which both have the same token.</summary>
    public static int Hits(IReadOnlyList<int> answer, IReadOnlyList<int> reference) =>
        answer.Zip(reference).Count(pair => pair.First == pair.Second);
}
