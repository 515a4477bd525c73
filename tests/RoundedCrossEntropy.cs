using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Cross-entropy in double by its formula: losses and hits, label by label, and gradients with the
/// roundings of a GPU's products, which the plain path does not make; G = softmax - one at the
/// target.
/// </summary>
internal static class RoundedCrossEntropy
{
    // Below this the order of a sum of floats makes no difference that the rule could see.
    private const int LargeVocabulary = 100_000;

    /// <summary>
    /// Every label's loss, and whether its target is the first of the largest logits. A loss is the
    /// difference of two sums of products: it may err by their terms' rounding, which has nothing
    /// to do with its own size, nor with that of the largest loss.
    /// </summary>
    public static void LabelsAgree(OpRun run, Op op, Value[] inputs, DType type, string what)
    {
        if (op is not CrossEntropy loss) return;
        double[] losses = run.Saved(0), hits = run.Saved(1);
        for (int i = 0; i < losses.Length; i++)
        {
            double[] logits = Logits(inputs, i, loss.Scale, x => x),
                sizes = Logits(inputs, i, loss.Scale, Math.Abs);
            double max = logits.Max(), own = logits[(int)inputs[3].Data[i]];
            int terms = inputs[1].Shape[1] + (inputs.Length > 4 ? inputs[5].Shape[1] : 0);
            double rounding = type == DType.F64 ? 1e-15 : 1.0 / (1 << 24);
            Assert.That(losses[i],
                Is.EqualTo(Math.Log(logits.Sum(x => Math.Exp(x - max))) + max - own)
                    .Within(2 * (terms + 8) * rounding * (1 + sizes.Max())),
                $"{what} loss[{i}]");
            Assert.That(hits[i],
                Is.EqualTo(Array.IndexOf(logits, max) == (int)inputs[3].Data[i] ? 1 : 0),
                $"{what} hit[{i}]");
        }
    }

    /// <summary>The gradient of an input; null where the plain path rounds as a GPU does.</summary>
    public static double[]? Gradient(
        Op op, Value[] inputs, double[] dloss, DType storage, int input) => (op, input) switch
        {
            (CrossEntropy loss, 1 or 5) when storage != DType.F32 =>
                OfWeight(inputs, dloss[0], storage, input, loss.Scale),
            (CrossEntropy, 0) when storage == DType.F32 && inputs[1].Shape[0] >= LargeVocabulary =>
                OfRowsInOrder(inputs, dloss[0]),
            _ => null,
        };

    // dw = (dloss G)^T h with dloss G in the storage type. The CPU keeps it in float. Tensor cores
    // take it in the type of h, so a GPU rounds it, as PyTorch does whose logits are bf16: each
    // term of dw then errs by up to 2^-9 of itself, and dw in F32 shows it.
    private static double[] OfWeight(
        Value[] inputs, double dloss, DType storage, int weight, double scale)
    {
        int cols = inputs[weight].Shape[1];
        var dw = new double[inputs[weight].Data.Length];
        for (int i = 0; i < inputs[2].Data.Length; i++)
        {
            ReadOnlySpan<double> x = Row(inputs, i, weight - 1);
            double[] g = Storage.Round(
                Array.ConvertAll(LogitGradient(inputs, i, scale), v => dloss * v), storage);
            double factor = weight == 1 ? 1 : scale;
            for (int at = 0; at < dw.Length; at++)
                dw[at] += factor * g[at / cols] * x[at % cols];
        }

        return dw;
    }

    // dh = dloss G w summed in float in the order of the vocabulary, as cuBLAS may and its
    // emulation does: 150,000 terms in one sum lose what the CPU's sums in blocks keep.
    private static double[] OfRowsInOrder(Value[] inputs, double dloss)
    {
        int cols = inputs[1].Shape[1];
        var dh = new double[inputs[0].Data.Length];
        for (int i = 0; i < inputs[2].Data.Length; i++)
        {
            double[] g = LogitGradient(inputs, i, 1), w = inputs[1].Data;
            var sum = new float[cols];
            for (int at = 0; at < w.Length; at++)
                sum[at % cols] += (float)g[at / cols] * (float)w[at];
            for (int c = 0; c < cols; c++)
                dh[((int)inputs[2].Data[i] * cols) + c] = dloss * sum[c];
        }

        return dh;
    }

    // Row i with a label.
    private static ReadOnlySpan<double> Row(Value[] inputs, int i, int of)
    {
        int cols = inputs[of].Shape[1];
        return inputs[of].Data.AsSpan((int)inputs[2].Data[i] * cols, cols);
    }

    private static double[] LogitGradient(Value[] inputs, int i, double scale)
    {
        double[] g = Logits(inputs, i, scale, x => x);
        double max = g.Max(), sum = g.Sum(logit => Math.Exp(logit - max));
        for (int v = 0; v < g.Length; v++)
            g[v] = (Math.Exp(g[v] - max) / sum) - (v == (int)inputs[3].Data[i] ? 1 : 0);
        return g;
    }

    // The sum of what becomes of each term.
    private static double[] Logits(Value[] inputs, int i, double scale, Func<double, double> of)
    {
        var logits = new double[inputs[1].Shape[0]];
        for (int from = 0; from < inputs.Length; from += 4)
        {
            ReadOnlySpan<double> x = Row(inputs, i, from);
            double[] w = inputs[from + 1].Data;
            for (int at = 0; at < w.Length; at++)
                logits[at / x.Length] +=
                    of((from == 0 ? 1 : scale) * x[at % x.Length] * w[at]);
        }

        return logits;
    }
}
