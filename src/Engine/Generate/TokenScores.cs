using System.Numerics.Tensors;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Generate;

/// <summary>
/// What generation does to the scores of the next token, in the order and by the rules of
/// transformers' logits processors; a token that is left out has the score -Infinity. Scores are
/// floats whatever the model's type, sums and probabilities double.
/// </summary>
public static class TokenScores
{
    /// <summary>
    /// Each token of previous once: a positive logit is divided by the penalty, another multiplied.
    /// </summary>
    public static void Penalise(
        ReadOnlySpan<float> logits, Span<float> scores, ReadOnlySpan<int> previous, double penalty)
    {
        if (penalty == 1) return;
        float factor = (float)penalty;
        // Of the logits, not the scores: a token that comes twice is penalised once.
        foreach (int id in previous)
            scores[id] = logits[id] < 0 ? logits[id] * factor : logits[id] / factor;
    }

    public static void Forbid(Span<float> scores, IReadOnlyList<int> ids)
    {
        foreach (int id in ids) scores[id] = float.NegativeInfinity;
    }

    public static void Warm(Span<float> scores, double temperature)
    {
        if (temperature != 1) TensorPrimitives.Divide(scores, (float)temperature, scores);
    }

    /// <summary>Keeps the k largest, and what equals the last of them.</summary>
    public static void KeepTop(Span<float> scores, int k)
    {
        if (k == 0 || k >= scores.Length) return;
        // The k largest so far stand in front; the others are only looked at.
        var largest = new float[2 * k];
        int count = 0;
        float least = float.NegativeInfinity;
        foreach (float score in scores)
        {
            if (count >= k && score <= least) continue;
            largest[count++] = score;
            if (count < largest.Length) continue;
            Cut();
        }

        Cut();
        foreach (ref float score in scores)
            if (score < least) score = float.NegativeInfinity;

        void Cut()
        {
            Array.Sort(largest, 0, count);
            Array.Reverse(largest, 0, count);
            count = Math.Min(count, k);
            least = largest[count - 1];
        }
    }

    /// <summary>
    /// Leaves out the least likely tokens that together have at most the probability 1 - p; one
    /// stays.
    /// </summary>
    public static void KeepNucleus(Span<float> scores, double p)
    {
        if (p >= 1) return;
        int[] ids = Kept(scores);
        var sorted = new float[ids.Length];
        for (int i = 0; i < ids.Length; i++) sorted[i] = scores[ids[i]];
        Array.Sort(sorted, ids);
        double all = 0, below = 0;
        float largest = sorted[^1];
        foreach (float score in sorted) all += Math.Exp(score - largest);
        for (int i = 0; i < ids.Length - 1; i++)
        {
            below += Math.Exp(sorted[i] - largest);
            if (below > (1 - p) * all) break;
            scores[ids[i]] = float.NegativeInfinity;
        }
    }

    /// <summary>softmax(scores).</summary>
    public static double[] Probabilities(ReadOnlySpan<float> scores)
    {
        var p = new double[scores.Length];
        float largest = TensorPrimitives.Max(scores);
        double sum = 0;
        for (int i = 0; i < p.Length; i++) sum += p[i] = Math.Exp(scores[i] - largest);
        for (int i = 0; i < p.Length; i++) p[i] /= sum;
        return p;
    }

    /// <summary>The token at the share u, in [0, 1), of the probabilities' sum.</summary>
    public static int Draw(ReadOnlySpan<float> scores, double u)
    {
        int[] ids = Kept(scores);
        float largest = TensorPrimitives.Max(scores);
        double sum = 0;
        foreach (int id in ids) sum += Math.Exp(scores[id] - largest);
        double left = u * sum;
        foreach (int id in ids)
            if ((left -= Math.Exp(scores[id] - largest)) < 0) return id;
        return ids[^1];
    }

    /// <summary>
    /// The number in [0, 1) that draws a token: of the seed, the answer's number and the token's
    /// place in it alone, so that an answer does not depend on what is generated beside it.
    /// </summary>
    public static double Uniform(ulong seed, ulong answer, int place)
    {
        // The last word keeps these numbers apart from those of dropout and adapters.
        var (x0, x1, _, _) = Philox.Draw(
            ((uint)place, (uint)answer, (uint)(answer >> 32), 0x67656E65),
            ((uint)seed, (uint)(seed >> 32)));
        return (((ulong)x0 << 21) ^ (x1 >> 11)) * (1.0 / (1L << 53));
    }

    private static int[] Kept(ReadOnlySpan<float> scores)
    {
        int count = 0, next = 0;
        foreach (float score in scores)
            if (score > float.NegativeInfinity) count++;
        if (count == 0) throw new RunException("no token has a score that is a number");
        var ids = new int[count];
        for (int i = 0; i < scores.Length; i++)
            if (scores[i] > float.NegativeInfinity) ids[next++] = i;
        return ids;
    }
}
