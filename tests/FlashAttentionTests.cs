using System.Numerics;
using System.Runtime.Intrinsics;
using System.Text.Json;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

[TestFixture]
public sealed class FlashAttentionTests
{
    private static readonly ReferenceFile Reference = ReferenceFile.Open("ops/attention");

    private static IEnumerable<TestCaseData> ReferenceCases() =>
        from c in Reference.Cases
        from narrow in (bool[])[false, true]
        select new TestCaseData(c.Name, narrow).SetArgDisplayNames(c.ToString(), narrow ? "256" : "512");

    [TestCaseSource(nameof(ReferenceCases))]
    public void Float_agrees_with_PyTorch(string name, bool narrow)
    {
        ReferenceCase c = Reference.Cases.Single(x => x.Name == name);
        var result = new AttentionRunner<float>(narrow: narrow).Run(Read(c));
        bool large = c.Params.GetProperty("max_abs_lse").GetDouble() > 400;
        foreach (var (key, actual) in result.All())
        {
            double[] expected = c.Doubles(key);
            // Rounding of single sums decides where torch happens to be exact, hence the second term.
            double allowed = large
                ? 1e-4 * expected.Max(Math.Abs)
                : (4 * c.F32Error(key)) + (5e-7 * Math.Max(1, expected.Max(Math.Abs)));
            Assert.That(Worst(actual, expected), Is.LessThanOrEqualTo(allowed), key);
        }
    }

    [TestCaseSource(nameof(ReferenceCases))]
    public void Double_agrees_with_PyTorch(string name, bool narrow)
    {
        ReferenceCase c = Reference.Cases.Single(x => x.Name == name);
        var result = new AttentionRunner<double>(narrow: narrow).Run(Read(c));
        foreach (var (key, actual) in result.All())
        {
            double[] expected = c.Doubles(key);
            // Small cases are stored rounded to float.
            double relative = c.Type(key) == "F32" ? 6.1e-8 : 1e-12;
            double allowed = relative * Math.Max(1, expected.Max(Math.Abs));
            Assert.That(Worst(actual, expected), Is.LessThanOrEqualTo(allowed), key);
        }
    }

    private static AttentionProblem Read(ReferenceCase c)
    {
        JsonElement p = c.Params;
        bool padded = p.GetProperty("kind").GetString() == "padded";
        int[] startsQ, startsK;
        if (padded)
        {
            int batch = c.Shape("q")[0], queries = c.Shape("q")[1], keys = c.Shape("k")[1];
            startsQ = [.. Enumerable.Range(0, batch + 1).Select(b => b * queries)];
            startsK = [.. Enumerable.Range(0, batch + 1).Select(b => b * keys)];
        }
        else
        {
            (startsQ, startsK) = (c.Ints("cu_seqlens_q"), c.Ints("cu_seqlens_k"));
        }

        return new AttentionProblem(
            p.GetProperty("heads").GetInt32(), p.GetProperty("kv_heads").GetInt32(),
            p.GetProperty("head_dim").GetInt32(), startsQ, startsK,
            padded ? c.Ints("key_lengths") : null, p.GetProperty("causal").GetBoolean(),
            p.GetProperty("scale").GetDouble())
        {
            Q = c.Doubles("q"),
            K = c.Doubles("k"),
            V = c.Doubles("v"),
            DO = c.Doubles("do"),
        };
    }

    private static double Worst(double[] actual, double[] expected)
    {
        Assert.That(actual, Has.Length.EqualTo(expected.Length));
        double worst = 0;
        for (int i = 0; i < actual.Length; i++)
        {
            if (actual[i].Equals(expected[i])) continue;
            double error = Math.Abs(actual[i] - expected[i]);
            worst = double.IsNaN(error) ? double.PositiveInfinity : Math.Max(worst, error);
        }

        return worst;
    }
}
