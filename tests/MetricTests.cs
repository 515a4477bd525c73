using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Metrics;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Metrics against the public evaluation code, on 536 answers with odd texts among them, and on
/// corpora.
/// </summary>
[TestFixture]
public sealed class MetricTests
{
    private static ScoredAnswer[] Pairs { get; } = [.. ReferenceText.Lines("metrics/pairs.jsonl")
        .Select(line => new ScoredAnswer(line.GetProperty("prediction").GetString()!,
            Texts(line.GetProperty("references"))))];

    private static JsonElement[] Scores { get; } = ReferenceText.Lines("metrics/scores.jsonl");

    [TestCase("exact_match", "exact", "stripped")]
    [TestCase("contains", "contains", "ocrbench")]
    [TestCase("anls", "anls", "official")]
    [TestCase("relaxed_accuracy", "relaxed", "best")]
    public void ScoresOfAnswers(string name, string field, string kind)
    {
        MetricResult result = Metric.Of([name])[0].Score(Pairs);
        for (int i = 0; i < Pairs.Length; i++)
            AssertScore(result.Each[i], Scores[i].GetProperty(field).GetProperty(kind), i);
        Assert.That(result.All, Is.EqualTo(result.Each.Average()).Within(1e-12));
        Assert.That(Pairs, Has.Length.EqualTo(536));
    }

    [Test]
    public void ScoresOfVqa()
    {
        MetricResult result = Metric.Of(["vqa_score"])[0].Score(Pairs);
        for (int i = 0; i < Pairs.Length; i++)
        {
            AssertScore(VqaScore.Official(Pairs[i].Text, Pairs[i].References),
                Scores[i].GetProperty("vqa").GetProperty("official"), i);
            string[] normal = Texts(Scores[i].GetProperty("normal").GetProperty("vqa"));
            Assert.That(
                (string[])[.. Pairs[i].References.Prepend(Pairs[i].Text)
                    .Select(VqaScore.Normalise)], Is.EqualTo(normal), $"{i}");
            // One reference counts for ten that agree.
            if (Pairs[i].References is [var only])
                Assert.That(result.Each[i], Is.EqualTo(
                    VqaScore.Official(Pairs[i].Text, [.. Enumerable.Repeat(only, 10)])));
        }

        foreach (var word in ReferenceText.Json("metrics/vqa_words.json").EnumerateObject())
            Assert.That(VqaScore.Normalise(word.Name), Is.EqualTo(word.Value.GetString()));
    }

    [Test]
    public void ScoresOfRougeL()
    {
        MetricResult result = Metric.Of(["rouge_l"])[0].Score(Pairs);
        for (int i = 0; i < Pairs.Length; i++)
            AssertScore(result.Each[i],
                Scores[i].GetProperty("rouge").GetProperty("rougeL")[2], i);
    }

    [Test]
    public void ScoresOfBleu()
    {
        int chinese = 0;
        for (int i = 0; i < Pairs.Length; i++)
        {
            Check("bleu_13a", Bleu.Western);
            if (!Scores[i].TryGetProperty("bleu_zh", out _)) continue;
            Check("bleu_zh", Bleu.Chinese);
            chinese++;

            void Check(string field, Func<string, string[]> words)
            {
                JsonElement expected = Scores[i].GetProperty(field);
                string[] tokens = Texts(expected.GetProperty("tokens"));
                Assert.That((string[])[.. Pairs[i].References.Prepend(Pairs[i].Text)
                    .Select(text => string.Join(' ', words(text)))], Is.EqualTo(tokens), $"{i}");
                for (int n = 1; n <= 4; n++)
                    AssertScore(Bleu.Score([Pairs[i]], words, n).Each[0],
                        expected.GetProperty("scores")[n - 1], i);
            }
        }

        Assert.That(chinese, Is.GreaterThan(50));
    }

    [TestCase("all_13a")]
    [TestCase("caption_13a")]
    [TestCase("sentence_13a")]
    [TestCase("zh_zh")]
    [TestCase("caption_none")]
    public void BleuOfCorpora(string name)
    {
        JsonElement corpus = Corpus("sacrebleu").GetProperty(name);
        ScoredAnswer[] answers =
            [.. ReferenceText.Ints(corpus.GetProperty("ids")).Select(id => Pairs[id])];
        Func<string, string[]> words = corpus.GetProperty("tokenizer").GetString() switch
        {
            "13a" => Bleu.Western,
            "zh" => Bleu.Chinese,
            _ => PythonText.Split,
        };
        for (int n = 1; n <= 4; n++)
            AssertScore(
                Bleu.Score(answers, words, n).All, corpus.GetProperty("scores")[n - 1], n);
        if (name is "caption_13a" or "zh_zh")
            AssertScore(new Bleu().Score(answers).All, corpus.GetProperty("scores")[3], 4);
    }

    [TestCase("captions_ptb")]
    [TestCase("captions_words")]
    [TestCase("captions_zh_characters")]
    [TestCase("sentences_words")]
    [TestCase("one_image")]
    [TestCase("two_images")]
    [TestCase("odd")]
    public void CiderOfCorpora(string name)
    {
        JsonElement corpus = Corpus(name);
        ScoredAnswer[] answers = [.. Texts(corpus.GetProperty("predictions"))
            .Zip(corpus.GetProperty("references").EnumerateArray(),
                (text, references) => new ScoredAnswer(text, Texts(references)))];
        MetricResult result = Cider.Score(answers, PythonText.Split);
        AssertScore(result.All, corpus.GetProperty("cider_d"), 0);
        JsonElement each = corpus.GetProperty("each").GetProperty("cider_d");
        for (int i = 0; i < answers.Length; i++) AssertScore(result.Each[i], each[i], i);
        // From the texts themselves the same words come.
        if (corpus.GetProperty("ids").ValueKind != JsonValueKind.Array || name == "captions_ptb")
            return;
        AssertScore(new Cider().Score([.. ReferenceText.Ints(corpus.GetProperty("ids"))
            .Select(id => Pairs[id])]).All, corpus.GetProperty("cider_d"), 0);
    }

    [Test]
    public void TokensThatAreRight()
    {
        foreach (JsonElement line in ReferenceText.Json("metrics/token_accuracy.json")
            .EnumerateArray())
        {
            ScoredAnswer[] rows = [.. line.GetProperty("predictions").EnumerateArray().Zip(
                line.GetProperty("labels").EnumerateArray(), (predictions, labels) =>
                {
                    int[] said = ReferenceText.Ints(predictions)[..^1];
                    int[] wanted = ReferenceText.Ints(labels)[1..];
                    int[] counted = [.. Enumerable.Range(0, wanted.Length)
                        .Where(t => wanted[t] != -100)];
                    return new ScoredAnswer("", [""])
                    {
                        Tokens = ([.. counted.Select(t => said[t])],
                            [.. counted.Select(t => wanted[t])]),
                    };
                })];
            MetricResult result = new TokenAccuracy().Score(rows);
            if (line.GetProperty("all_tokens").ValueKind == JsonValueKind.Number)
                AssertScore(result.All, line.GetProperty("all_tokens"), 0);
            for (int i = 0; i < rows.Length; i++)
                if (line.GetProperty("rows")[i].ValueKind == JsonValueKind.Number)
                    AssertScore(result.Each[i], line.GetProperty("rows")[i], i);
        }
    }

    [Test]
    public void StringsAreThoseOfPython()
    {
        foreach (JsonElement line in ReferenceText.Lines("metrics/python_strings.jsonl"))
        {
            string text = line.GetProperty("text").GetString()!, what = line.GetRawText();
            Assert.That(PythonText.Lower(text),
                Is.EqualTo(line.GetProperty("lower").GetString()), what);
            Assert.That(PythonText.UpperLength(text),
                Is.EqualTo(line.GetProperty("upper_length").GetInt32()), what);
            Assert.That(PythonText.Length(text),
                Is.EqualTo(line.GetProperty("length").GetInt32()), what);
            Assert.That(PythonText.Strip(text),
                Is.EqualTo(line.GetProperty("strip").GetString()), what);
            Assert.That(PythonText.Split(text), Is.EqualTo(Texts(line.GetProperty("split"))), what);
            JsonElement number = line.GetProperty("float");
            double? expected = number.ValueKind switch
            {
                JsonValueKind.Number => number.GetDouble(),
                JsonValueKind.Null => null,
                _ => number.GetString() switch
                {
                    "inf" => double.PositiveInfinity,
                    "-inf" => double.NegativeInfinity,
                    _ => double.NaN,
                },
            };
            Assert.That(PythonText.Float(text), Is.EqualTo(expected), what);
        }
    }

    [Test]
    public void AnUnknownMetricIsNamed() => Assert.That(() => Metric.Of(["exact_match", "blue"]),
        Throws.TypeOf<InputException>().With.Message.StartWith(
            "metrics: \"blue\" is none; expected some of exact_match, contains, token_accuracy, "));

    private static JsonElement Corpus(string name) => ReferenceText.Lines("metrics/corpora.jsonl")
        .Single(line => line.GetProperty("name").GetString() == name);

    private static string[] Texts(JsonElement list) =>
        [.. list.EnumerateArray().Select(item => item.GetString()!)];

    private static void AssertScore(double got, JsonElement expected, int number) => Assert.That(
        got, Is.EqualTo(expected.ValueKind switch
        {
            JsonValueKind.True => 1,
            JsonValueKind.False => 0,
            _ => expected.GetDouble(),
        }).Within(1e-9), $"{number}");
}
