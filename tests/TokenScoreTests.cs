using System.Text.Json;
using MiniCpmNative.Engine.Generate;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Scores of the next token against transformers' logits processors, one by one and together, and
/// draws against the exact probabilities.
/// </summary>
[TestFixture]
public sealed class TokenScoreTests
{
    [Test]
    public void SingleProcessors()
    {
        var file = ReferenceFile.OpenCommitted("generation/processors");
        JsonElement all = ReferenceText.Json("generation/processors.json").GetProperty("single");
        foreach (JsonElement line in all.EnumerateArray())
        {
            JsonElement parameters = line.GetProperty("parameters");
            GenerationSettings settings = GenerationCase.Settings(parameters,
                parameters.TryGetProperty("eos", out var eos) ? ReferenceText.Ints(eos) : [], 100);
            AssertRows(file, line, (logits, scores, previous) =>
            {
                int prompt = parameters.TryGetProperty("prompt_length", out var length)
                    ? length.GetInt32() : 0;
                // Here previous holds the prompt too, which min_new_tokens does not count.
                Generator.Process(logits, scores, previous[prompt..], settings);
                Generator.Narrow(scores, settings);
            });
        }

        Assert.That(all.GetArrayLength(), Is.EqualTo(85));
    }

    [Test]
    public void ProcessorsTogether()
    {
        var file = ReferenceFile.OpenCommitted("generation/processors");
        JsonElement all = ReferenceText.Json("generation/processors.json").GetProperty("composed");
        foreach (JsonElement line in all.EnumerateArray())
        {
            JsonElement options = line.GetProperty("options");
            GenerationSettings settings = GenerationCase.Settings(options, [3, 11], 100);
            // transformers takes 50 where nothing is given.
            if (settings.DoSample && !options.TryGetProperty("top_k", out _))
                settings = settings with { TopK = 50 };
            AssertRows(file, line, (logits, scores, previous) =>
            {
                Generator.Process(logits, scores, previous, settings);
                if (settings.DoSample) Generator.Narrow(scores, settings);
            });
        }

        Assert.That(all.GetArrayLength(), Is.EqualTo(29));
    }

    // The logits of real steps, with the options that chat() samples by.
    [Test]
    public void ProbabilitiesOfChat()
    {
        var file = ReferenceFile.OpenCommitted("generation/chat");
        var settings = new GenerationSettings
        {
            DoSample = true,
            TopP = 0.8,
            TopK = 100,
            Temperature = 0.7,
            RepetitionPenalty = 1.05,
        };
        foreach (JsonElement line in ReferenceText.Json("generation/chat.json")
            .GetProperty("sampled").EnumerateArray())
        {
            string name = file.Names.Single(n => n.EndsWith(".logits", StringComparison.Ordinal)
                && n.Contains(line.GetProperty("case").GetString()!))[..^".logits".Length];
            float[] logits = file.Floats(name + ".logits");
            double[] expected = file.Doubles(name + ".probabilities");
            int[] ids = ReferenceText.Ints(line.GetProperty("ids"));
            int vocabulary = logits.Length / ids.Length;
            for (int step = 0; step < ids.Length; step++)
            {
                float[] scores = logits[(step * vocabulary)..((step + 1) * vocabulary)];
                Generator.Process([.. scores], scores, ids.AsSpan(0, step), settings);
                Generator.Narrow(scores, settings);
                double[] got = TokenScores.Probabilities(scores);
                for (int v = 0; v < vocabulary; v++)
                    Assert.That(got[v],
                        Is.EqualTo(expected[(step * vocabulary) + v]).Within(2e-6), $"{step} {v}");
            }
        }
    }

    // Chi-square over the tokens that can be drawn, the rare ones together: its mean is the
    // degrees of freedom n, its standard deviation sqrt(2 n); five of them is one in 3 million.
    [Test]
    public void DrawsHaveTheExactProbabilities()
    {
        const int Draws = 20_000;
        var file = ReferenceFile.OpenCommitted("generation/sampling");
        JsonElement all = ReferenceText.Json("generation/sampling.json");
        foreach (var (number, line) in all.EnumerateArray().Index())
        {
            string name = line.GetProperty("name").GetString()!;
            GenerationSettings settings =
                GenerationCase.Settings(line.GetProperty("options"), [], 100)
                with
                { DoSample = true };
            int[] previous = ReferenceText.Ints(line.GetProperty("previous_ids"));
            float[] logits = file.Floats(name + ".logits"), scores = [.. logits];
            double[] exact = file.Doubles(name + ".probabilities");
            Generator.Process(logits, scores, previous, settings);
            Generator.Narrow(scores, settings);
            double[] got = TokenScores.Probabilities(scores);
            for (int v = 0; v < exact.Length; v++)
                Assert.That(got[v], Is.EqualTo(exact[v]).Within(1e-6), name);
            var counts = new int[exact.Length];
            for (int draw = 0; draw < Draws; draw++)
                counts[TokenScores.Draw(
                    scores, TokenScores.Uniform(7, (ulong)number, draw))]++;
            double chi = 0, rare = 0, rarely = 0;
            int cells = 0;
            for (int v = 0; v < exact.Length; v++)
            {
                if (exact[v] == 0) Assert.That(counts[v], Is.Zero, name);
                if (exact[v] * Draws < 5)
                {
                    (rare, rarely) = (rare + (exact[v] * Draws), rarely + counts[v]);
                    continue;
                }

                chi += Cell(counts[v], exact[v] * Draws);
                cells++;
            }

            if (rare >= 5) (chi, cells) = (chi + Cell(rarely, rare), cells + 1);
            double freedom = Math.Max(1, cells - 1);
            TestContext.Out.WriteLine($"{name}: {chi:F1} of {freedom}");
            Assert.That(chi, Is.LessThan(freedom + (5 * Math.Sqrt(2 * freedom))), name);
        }

        Assert.That(all.GetArrayLength(), Is.GreaterThanOrEqualTo(7));

        static double Cell(double seen, double expected) =>
            (seen - expected) * (seen - expected) / expected;
    }

    private delegate void Rule(
        ReadOnlySpan<float> logits, Span<float> scores, ReadOnlySpan<int> previous);

    private static void AssertRows(ReferenceFile file, JsonElement line, Rule rule)
    {
        string name = line.GetProperty("name").GetString()!;
        float[] logits = file.Floats(name + ".logits"), expected = file.Floats(name + ".scores");
        JsonElement previous = line.GetProperty("previous_ids");
        int rows = previous.GetArrayLength(), cols = logits.Length / rows;
        bool ties = name.Contains("ties") || line.TryGetProperty("ties", out _);
        for (int r = 0; r < rows; r++)
        {
            float[] scores = logits[(r * cols)..((r + 1) * cols)];
            rule([.. scores], scores, ReferenceText.Ints(previous[r]));
            float[] wanted = expected[(r * cols)..((r + 1) * cols)];
            // Which of equal logits stay at a border is arbitrary.
            if (ties) Array.Sort(scores);
            if (ties) Array.Sort(wanted);
            for (int i = 0; i < cols; i++)
                if (float.IsInfinity(wanted[i]))
                    Assert.That(scores[i], Is.EqualTo(wanted[i]), $"{name} {r} {i}");
                else Assert.That(scores[i], Is.EqualTo(wanted[i]).Within(1e-5), $"{name} {r} {i}");
        }
    }
}
