using System.Text;
using System.Text.Json.Nodes;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Text;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Tokenizer files that once took the time's square, or an internal error, to be answered.
/// </summary>
[TestFixture]
public class HostileTokenizerTests
{
    private const int Many = 200_000, Spaces = 1_000_000;

    [Test]
    public void ASlowPatternIsRefusedWithinSeconds()
    {
        var json = Qwen();
        // No match is slow by itself, all together are: each looks back to the start.
        json["pre_tokenizer"]!["pretokenizers"]![0]!["pattern"]!["Regex"] = "(?<=a.*)b|.";
        var tokenizer = Parse(json);
        var e = Assert.Throws<InputException>(() => tokenizer.Encode(new string('c', 200_000)));
        Assert.That(e!.Message, Does.Contain("(?<=a.*)b|.").And.Contain("tokenizer.json")
            .And.Contain("200,000").And.Not.Contain("\n"));
    }

    [Test]
    public void TheCheckOfRowsSaysTheSame()
    {
        string folder = Directory.CreateTempSubdirectory("cpmx-").FullName;
        try
        {
            var json = JsonNode.Parse(ReferenceText.Bytes("v26/model/tokenizer.json"))!;
            json["pre_tokenizer"]!["pretokenizers"]![0]!["pattern"]!["Regex"] = "(?<=a.*)b|.";
            File.WriteAllText(Path.Combine(folder, "tokenizer.json"), json.ToJsonString());
            File.WriteAllBytes(Path.Combine(folder, "tokenizer_config.json"),
                ReferenceText.Bytes("v26/model/tokenizer_config.json"));
            string data = Path.Combine(folder, "rows.json");
            File.WriteAllText(data, $$"""
                [{"conversations": [{"role": "user", "content": "{{new string('c', Many)}}"},
                  {"role": "assistant", "content": "Yes."}]}]
                """);
            var rows = DataRows.Read(
                data, V26.Full with { ModelNameOrPath = folder, OfficialCompat = false },
                (V26.Spec with { Directory = folder }).Rows());
            Assert.That(rows.Check(decode: false).Single().Bad?.Reason,
                Does.Contain("(?<=a.*)b|.").And.Not.Contain("AggregateException"));
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }
    }

    [TestCase("[]")]
    [TestCase("null")]
    [TestCase("3")]
    public void ASequenceOfNothingIsRefused(string list)
    {
        var json = Qwen();
        json["pre_tokenizer"]!["pretokenizers"] = JsonNode.Parse(list);
        Assert.That(Assert.Throws<InputException>(() => Parse(json))!.Message,
            Does.Contain("pre_tokenizer").And.Contain("Sequence").And.Not.Contain("\n"));
    }

    // Hugging Face cuts every space out as a token of its own, whatever the one before took.
    [TestCase("lstrip", " ")]
    [TestCase("rstrip", " ")]
    [TestCase("rstrip", "\t ")]
    [CancelAfter(60_000)]
    public void ATextOfSpacesThatAreTokensTakesLinearTime(
        string flag, string unit, CancellationToken cancel)
    {
        var json = Qwen();
        var added = json["added_tokens"]!.AsArray();
        int id = Parse(json).Size;
        foreach (char space in unit)
            added.Add(JsonNode.Parse($$"""
                {"id": {{id++}}, "content": "{{(space == '\t' ? "\\t" : " ")}}",
                 "normalized": false, "special": true, "{{(space == unit[0] ? flag : "x")}}": true}
                """));
        string text = string.Concat(Enumerable.Repeat(unit, Spaces / unit.Length));
        var task = Task.Run(() => Parse(json).Encode(text), cancel);
        task.Wait(cancel);
        Assert.That(task.Result.Count(token => token >= id - unit.Length), Is.EqualTo(Spaces));
    }

    [Test]
    [CancelAfter(60_000)]
    public void ManyTokensWithOneStartTakeLinearTime(CancellationToken cancel)
    {
        var json = Qwen();
        var added = json["added_tokens"]!.AsArray();
        int id = Parse(json).Size;
        for (int i = 0; i < Many; i++)
            added.Add(JsonNode.Parse($$"""
                {"id": {{id + i}}, "content": "a{{i:D6}}", "normalized": false, "special": false}
                """));
        var task = Task.Run(() => Parse(json).Encode(
            new string('a', Many) + "a000017"), cancel);
        task.Wait(cancel);
        Assert.That(task.Result[^1], Is.EqualTo(id + 17));
    }

    [Test]
    public void AnEndlessAddedTokenIsRefused()
    {
        var json = Qwen();
        json["added_tokens"]!.AsArray().Add(JsonNode.Parse($$"""
            {"id": 5000, "content": "{{new string('a', 1025)}}", "special": true}
            """));
        Assert.That(Assert.Throws<InputException>(() => Parse(json))!.Message,
            Does.Contain("1,025").And.Not.Contain("\n"));
    }

    private static JsonNode Qwen() =>
        JsonNode.Parse(ReferenceText.Bytes("tokenizers/tiny-qwen/tokenizer.json"))!;

    private static Tokenizer Parse(JsonNode json) =>
        Tokenizer.Parse(Encoding.UTF8.GetBytes(json.ToJsonString()), null);
}
