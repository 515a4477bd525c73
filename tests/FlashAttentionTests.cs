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
        select new TestCaseData(c.Name, narrow)
            .SetArgDisplayNames(c.ToString(), narrow ? "256" : "512");

    [TestCaseSource(nameof(ReferenceCases))]
    public void Float_agrees_with_PyTorch(string name, bool narrow)
    {
        ReferenceCase c = Reference.Cases.Single(x => x.Name == name);
        var result = new AttentionRunner<float>(narrow: narrow).Run(Read(c));
        bool large = c.Params.GetProperty("max_abs_lse").GetDouble() > 400;
        foreach (var (key, actual) in result.All())
        {
            double[] expected = c.Doubles(key);
            // Rounding of single sums decides where torch happens to be exact, hence the second
            // term.
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

    // Odd sizes around the tile's 12, 24 and 48 lanes and 64 rows; head dimensions around its 4 or
    // 8 rows.
    private static IEnumerable<TestCaseData> Shapes()
    {
        yield return Shape(2, 1, 64, [1], [1], causal: true);
        yield return Shape(2, 2, 72, [7], [7], causal: true);
        yield return Shape(3, 1, 5, [33], [33], causal: true);
        yield return Shape(6, 2, 16, [129], [129], causal: true);
        yield return Shape(1, 1, 1, [65], [65], causal: false);
        yield return Shape(2, 2, 128, [48, 1, 49], [48, 1, 49], causal: true);
        yield return Shape(4, 2, 9, [0, 12, 0, 23, 0], [0, 12, 0, 23, 0], causal: true);
        yield return Shape(2, 1, 20, [64], [130], causal: false);
        yield return Shape(2, 1, 20, [10, 3], [70, 3], causal: true);
        yield return Shape(2, 1, 20, [70, 5], [10, 0], causal: true);
        yield return Shape(2, 1, 20, [5, 3], [0, 9], causal: false);
        yield return Shape(2, 2, 24, [17, 17, 17], [17, 17, 17], causal: false, [17, 5, 0]);
        yield return Shape(2, 1, 24, [30, 30], [50, 30], causal: true, [20, 100]);
        yield return Shape(2, 1, 8, [], [], causal: true);
        yield return Shape(6, 2, 48, [1, 1, 30], [1, 1, 30], causal: true);
        yield return Shape(3, 1, 256, [1, 14, 1], [1, 14, 1], causal: true);
        foreach (int headDim in (int[])[20, 48, 256])
            yield return Shape(3, 1, headDim, [1, 5, 0, 40, 3], [70, 40, 4, 60, 9], causal: true,
                [60, 33, 3, 40, 1], cached: true);
    }

    private static TestCaseData Shape(
        int heads, int kvHeads, int headDim, int[] queries, int[] keys, bool causal,
        int[]? lengths = null, bool cached = false)
    {
        AttentionProblem problem =
            AttentionProblem.Random(heads, kvHeads, headDim, queries, keys, causal, lengths) with
            {
                Cached = cached,
            };
        string name = $"{heads}/{kvHeads} heads of {headDim}, {string.Join('+', queries)} queries, "
            + $"{string.Join('+', keys)} keys{(causal ? ", causal" : "")}"
            + (cached ? ", cached" : lengths is null ? "" : ", cut");
        return new TestCaseData(problem).SetArgDisplayNames(name);
    }

    // One thread takes whole heads backward, five take blocks of queries and of keys.
    [TestCaseSource(nameof(Shapes))]
    public void Any_shape_equals_the_written_out_formula(AttentionProblem problem)
    {
        AttentionResult expected = problem.Naive();
        foreach (bool narrow in (bool[])[false, true])
        {
            foreach (int threads in (int[])[1, 5])
            {
                var doubles = new AttentionRunner<double>(threads, narrow: narrow);
                Compare(doubles.Run(problem), expected, 1e-13, 0);
                var floats = new AttentionRunner<float>(threads, narrow: narrow);
                Compare(floats.Run(problem), expected, 2e-6, 0);
            }
        }
    }

    [TestCaseSource(nameof(Shapes))]
    public void Rows_may_be_parts_of_longer_ones_and_gradients_add(AttentionProblem problem)
    {
        foreach (int threads in (int[])[1, 5])
        {
            var runner = new AttentionRunner<double>(threads, gap: 11);
            Compare(
                runner.Run(problem, Ask.All | Ask.Accumulate), problem.Naive(), 1e-13,
                AttentionRunner<double>.Start);
        }
    }

    [Test]
    public void Gradients_not_asked_for_are_left_alone([Values] bool accumulate)
    {
        var problem = AttentionProblem.Random(4, 2, 12, [20, 31], [20, 31], causal: true);
        AttentionResult all = new AttentionRunner<float>().Run(problem);
        double[] untouched = [.. Enumerable.Repeat(AttentionRunner<float>.Start, problem.Q.Length)];
        double start = accumulate ? AttentionRunner<float>.Start : 0;
        for (Ask ask = Ask.None; ask < Ask.All; ask++)
        {
            AttentionResult some =
                new AttentionRunner<float>().Run(problem, ask | (accumulate ? Ask.Accumulate : 0));
            foreach (var (flag, wanted, got) in new[]
            {
                (Ask.DQ, all.DQ, some.DQ), (Ask.DK, all.DK, some.DK), (Ask.DV, all.DV, some.DV),
            })
            {
                double[] expected = ask.HasFlag(flag)
                    ? Array.ConvertAll(wanted, x => x + start)
                    : untouched[..got.Length];
                Assert.That(Worst(got, expected), Is.LessThan(ask.HasFlag(flag) ? 1e-6 : 1e-300));
            }
        }
    }

    [TestCase(true, null)]
    [TestCase(false, null)]
    [TestCase(false, 3)]
    public void Gradients_equal_central_differences(bool causal, int? length)
    {
        int[] queries = [5, 2], keys = causal ? [5, 2] : [6, 3];
        int[]? lengths = length is { } n ? [n, n] : null;
        var problem = AttentionProblem.Random(4, 2, 3, queries, keys, causal, lengths);
        var runner = new AttentionRunner<double>(threads: 1);
        AttentionResult result = runner.Run(problem);
        Check(problem.Q, result.DQ);
        Check(problem.K, result.DK);
        Check(problem.V, result.DV);

        void Check(double[] input, double[] gradient)
        {
            const double Step = 1e-4;
            double largest = gradient.Max(Math.Abs);
            for (int i = 0; i < input.Length; i++)
            {
                double at = input[i];
                input[i] = at + Step;
                double above = Loss();
                input[i] = at - Step;
                double below = Loss();
                input[i] = at;
                double slope = (above - below) / (2 * Step);
                Assert.That(gradient[i], Is.EqualTo(slope).Within(1e-6 * largest), $"element {i}");
            }
        }

        double Loss() => runner.Run(problem, Ask.None).O.Zip(problem.DO, (o, d) => o * d).Sum();
    }

    [TestCaseSource(nameof(Shapes))]
    public void Whole_heads_give_the_bits_of_blocks(AttentionProblem problem)
    {
        AttentionResult heads = new AttentionRunner<float>(threads: 1).Run(problem);
        AttentionResult blocks = new AttentionRunner<float>(threads: 9).Run(problem);
        foreach (var (a, b) in heads.All().Zip(blocks.All()))
            Assert.That(b.Values, Is.EqualTo(a.Values), a.Name);
    }

    [Test]
    public void The_same_bits_for_any_number_of_threads_and_every_run()
    {
        var problem = AttentionProblem.Random(6, 2, 40, [150, 61], [150, 61], causal: true);
        AttentionResult first = new AttentionRunner<float>(threads: 1).Run(problem);
        foreach (int threads in (int[])[1, 2, 2, 3, 5])
        {
            AttentionResult next = new AttentionRunner<float>(threads).Run(problem);
            foreach (var (a, b) in first.All().Zip(next.All()))
                Assert.That(b.Values, Is.EqualTo(a.Values), $"{a.Name}, {threads} threads");
        }
    }

    [Test]
    public void A_warm_call_allocates_nothing()
    {
        var problem = AttentionProblem.Random(4, 2, 64, [100, 30], [100, 30], causal: true);
        var runner = new AttentionRunner<float>(runs: 3);
        runner.Run(problem);
        Assert.That(runner.Allocated, Is.Zero);
    }

    [TestCase(double.NaN)]
    [TestCase(double.PositiveInfinity)]
    public void What_is_not_finite_reaches_every_query_that_sees_it_and_no_other(double value)
    {
        var problem = AttentionProblem.Random(2, 1, 8, [30, 70], [30, 70], causal: true);
        problem.K[((30 + 41) * 8) + 3] = value;
        problem.Q[(((30 + 20) * 2) + 1) * 8] = value;
        AttentionResult expected = problem.Naive();
        AttentionResult actual = new AttentionRunner<float>().Run(problem);
        Assert.That(expected.O.Count(double.IsNaN), Is.GreaterThan(8));
        Assert.That(actual.O.Select(double.IsNaN), Is.EqualTo(expected.O.Select(double.IsNaN)));
        Assert.That(
            actual.Lse.Select(double.IsFinite), Is.EqualTo(expected.Lse.Select(double.IsFinite)));
        foreach (var (e, a) in expected.All().Zip(actual.All()))
        {
            int other = a.Values.Length * 30 / 100;
            Assert.That(a.Values.Take(other), Is.All.Matches<double>(double.IsFinite), a.Name);
            for (int i = other; i < a.Values.Length; i++)
            {
                if (double.IsNaN(e.Values[i]))
                    Assert.That(a.Values[i], Is.NaN, $"{a.Name} {i}");
            }
        }
    }

    [TestCase(double.NaN)]
    [TestCase(double.PositiveInfinity)]
    [TestCase(double.NegativeInfinity)]
    public void Values_that_are_not_finite_come_through(double value)
    {
        var problem = AttentionProblem.Random(1, 1, 8, [20], [90], causal: false);
        problem.V[(75 * 8) + 2] = value;
        double[] o = new AttentionRunner<float>().Run(problem).O;
        Assert.That(o.Where((_, i) => i % 8 == 2), Is.All.EqualTo(value));
        Assert.That(o.Where((_, i) => i % 8 != 2), Is.All.Matches<double>(double.IsFinite));
    }

    [TestCase(3000)]
    [TestCase(30000)]
    public void Logits_far_apart_pick_one_key(double spread)
    {
        var problem = AttentionProblem.Random(1, 1, 64, [40], [40], causal: false);
        for (int i = 0; i < problem.Q.Length; i++) problem.Q[i] *= spread;
        AttentionResult expected = problem.Naive();
        AttentionResult actual = new AttentionRunner<float>().Run(problem);
        Assert.That(expected.Lse.Max(Math.Abs), Is.GreaterThan(1000));
        Assert.That(Worst(actual.O, expected.O), Is.LessThan(2e-3));
        Assert.That(
            Worst(actual.Lse, expected.Lse), Is.LessThan(1e-6 * expected.Lse.Max(Math.Abs)));
        foreach (var (_, values) in actual.All())
            Assert.That(values, Is.All.Matches<double>(double.IsFinite));
    }

    [Test]
    public unsafe void Powers_of_two_are_right_to_two_units()
    {
        float* floats = stackalloc float[16];
        double* doubles = stackalloc double[8];
        var random = new Random(3);
        for (int i = 0; i < 20000; i++)
        {
            double x = i < 8 ? -i * 0.5 : -124 * Math.Pow(random.NextDouble(), 3);
            FlashAttention<Lanes512<float>, Vector512<float>, float>
                .Exp2(Vector512.Create((float)x)).Store(floats);
            FlashAttention<Lanes512<double>, Vector512<double>, double>
                .Exp2(Vector512.Create(x)).Store(doubles);
            double single = Math.Pow(2, (float)x), exact = Math.Pow(2, x);
            double units = single * 2 / (1 << 23);
            Assert.That(floats[i % 16], Is.EqualTo(single).Within(units), $"2^{x}");
            Assert.That(doubles[i % 8], Is.EqualTo(exact).Within(exact * 4e-16), $"2^{x}");
        }
    }

    [TestCase(0f, 1f)]
    [TestCase(float.NegativeInfinity, 0f)]
    [TestCase(-1e30f, 0f)]
    [TestCase(-126f, 0f)]
    [TestCase(float.NaN, float.NaN)]
    public unsafe void Powers_of_two_at_the_ends(float x, float expected)
    {
        float* results = stackalloc float[16];
        FlashAttention<Lanes512<float>, Vector512<float>, float>
            .Exp2(Vector512.Create(x)).Store(results);
        Assert.That(results[5], Is.EqualTo(expected));
        FlashAttention<Lanes256<float>, Vector256<float>, float>
            .Exp2(Vector256.Create(x)).Store(results);
        Assert.That(results[5], Is.EqualTo(expected));
    }

    [TestCase(3, 2, 8, 1.0, "3 query heads are not a multiple of 2 key heads")]
    [TestCase(2, 2, 0, 1.0, "head dimension is 0")]
    [TestCase(2, 2, 8, 0.0, "scale is 0")]
    [TestCase(2, 2, 8, double.NaN, "scale is NaN")]
    public void Wrong_shapes_are_named(
        int heads, int kvHeads, int dim, double scale, string message)
    {
        var problem = new AttentionProblem(heads, kvHeads, dim, [0], [0], null, true, scale);
        Assert.That(
            () => FlashAttentionCall(problem),
            Throws.TypeOf<ShapeException>().With.Message.Contains(message));
    }

    [Test]
    public void Falling_sequence_starts_and_short_rows_are_named()
    {
        var falling = new AttentionProblem(1, 1, 4, [0, 5, 3], [0, 5, 5], null, true, 1);
        Assert.That(
            () => FlashAttentionCall(falling),
            Throws.TypeOf<ShapeException>().With.Message.Contains("cu_seqlens_q[2] is 3"));
        var fine = new AttentionProblem(2, 1, 4, [0], [0], null, true, 1);
        Assert.That(
            () => FlashAttentionCall(fine, stride: 7),
            Throws.TypeOf<ShapeException>()
                .With.Message.Contains("7 elements between tokens, expected 8"));
    }

    private static unsafe void FlashAttentionCall(AttentionProblem p, int? stride = null)
    {
        using var workers = new Workers(1);
        float unused = 0;
        fixed (int* startsQ = p.StartsQ, startsK = p.StartsK)
        {
            FlashAttention.Forward(workers, new AttentionArguments<float>
            {
                Q = &unused,
                K = &unused,
                V = &unused,
                O = &unused,
                Lse = &unused,
                QStride = stride ?? 64,
                KStride = 64,
                VStride = 64,
                OStride = 64,
                Heads = p.Heads,
                KvHeads = p.KvHeads,
                HeadDim = p.HeadDim,
                Sequences = p.StartsQ.Length - 1,
                CuSeqlensQ = startsQ,
                CuSeqlensK = startsK,
                Causal = p.Causal,
                Scale = (float)p.Scale,
                Scratch = null,
            });
        }
    }

    /// <summary>
    /// Errors relative to each tensor's largest element; gradients start from start.
    /// </summary>
    private static void Compare(
        AttentionResult actual, AttentionResult expected, double relative, double start)
    {
        foreach (var (e, a) in expected.All().Zip(actual.All()))
        {
            double added = e.Name[0] == 'd' ? start : 0;
            double[] values = Array.ConvertAll(e.Values, x => x + added);
            double largest = values.Where(double.IsFinite).Select(Math.Abs).Append(1).Max();
            Assert.That(Worst(a.Values, values), Is.LessThanOrEqualTo(relative * largest), e.Name);
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
