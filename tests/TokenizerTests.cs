using System.Text;
using System.Text.Json;
using System.Text.RegularExpressions;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data.Text;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Ids and texts against Hugging Face's tokenizers 0.21.4 (with transformers 4.51.3 for what
/// tokenizer_config.json adds); the committed strings are a part of the full set.
/// </summary>
[TestFixture]
public class TokenizerTests
{
    private static readonly string[] s_names =
    [
        "tiny-qwen", "tiny-qwen3", "tiny-llama3", "tiny-llama3.raw", "o-4_5", "tiny-sp.fast",
        "tiny-v4.fast", "tiny-sp.slow", "tiny-sp-noprefix.slow", "tiny-sp-nfkc.slow",
        .. ReferenceText.Has("tokenizers/llama2/tokenizer.json")
            ? (ReadOnlySpan<string>)["llama2"] : [],
    ];

    private static readonly Dictionary<string, Tokenizer> s_loaded = [];

    /// <summary>
    /// A tokenizer of tests/reference/tokenizers; NAME.raw is its tokenizer.json alone, NAME.slow
    /// its tokenizer.model.
    /// </summary>
    internal static Tokenizer Load(string name)
    {
        if (s_loaded.TryGetValue(name, out var loaded)) return loaded;
        string folder = "tokenizers/" + name.Split('.')[0];
        byte[]? config = name.EndsWith(".raw", StringComparison.Ordinal) ? null
            : ReferenceText.Bytes(folder + "/tokenizer_config.json");
        return s_loaded[name] = name.EndsWith(".slow", StringComparison.Ordinal)
            ? Tokenizer.ParseModel(ReferenceText.Bytes(folder + "/tokenizer.model"), config)
            : Tokenizer.Parse(ReferenceText.Bytes(folder + "/tokenizer.json"), config);
    }

    [TestCaseSource(nameof(s_names))]
    public void EveryStringHasTheIdsOfHuggingFace(string name)
    {
        var tokenizer = Load(name);
        var strings = ReferenceText.Lines("tokenizers/strings.jsonl");
        var expected = ReferenceText.Lines($"tokenizers/{name}.ids.jsonl");
        Assert.That(expected, Has.Length.EqualTo(strings.Length));
        var wrong = new List<string>();
        for (int i = 0; i < strings.Length; i++)
        {
            // Characters of Unicode 13 to 16: the result depends on the reader's Unicode version.
            if (strings[i].GetProperty("k").GetString() == "newunicode") continue;
            // The committed part of some files leaves lines out.
            if (!expected[i].TryGetProperty("i", out var list)) continue;
            string text = strings[i].GetProperty("t").GetString()!;
            int[] ids = ReferenceText.Ints(list);
            if (!tokenizer.Encode(text).SequenceEqual(ids)) wrong.Add($"line {i + 1} ids");
            string decoded = expected[i].TryGetProperty("d", out var d) ? d.GetString()! : text;
            if (tokenizer.Decode(ids, cleanUp: false) != decoded) wrong.Add($"line {i + 1} text");
            string cleaned = expected[i].TryGetProperty("c", out var c) ? c.GetString()! : decoded;
            if (tokenizer.Decode(ids) != cleaned) wrong.Add($"line {i + 1} clean text");
        }
        Assert.That(wrong, Is.Empty);
    }

    [TestCaseSource(nameof(s_names))]
    public void IdListsDecodeWithAndWithoutSpecialTokens(string name)
    {
        var tokenizer = Load(name);
        foreach (var line in ReferenceText.Lines($"tokenizers/{name}.decode.jsonl"))
        {
            int[] ids = ReferenceText.Ints(line.GetProperty("i"));
            Assert.That(tokenizer.Decode(ids, cleanUp: false),
                Is.EqualTo(line.GetProperty("d").GetString()));
            Assert.That(tokenizer.Decode(ids, skipSpecial: true, cleanUp: false),
                Is.EqualTo(line.GetProperty("s").GetString()));
        }
    }

    [TestCaseSource(nameof(s_names))]
    public void NamedTokensAreThoseOfTransformers(string name)
    {
        var tokenizer = Load(name);
        var info = ReferenceText.Json("tokenizers/info.json").GetProperty(name);
        Assert.That(tokenizer.Size, Is.EqualTo(info.GetProperty("size").GetInt32()));
        Assert.That(tokenizer.Prefix,
            Is.EqualTo(ReferenceText.Ints(info.GetProperty("encode_adds"))));
        Assert.That(tokenizer.CleansUp,
            Is.EqualTo(info.GetProperty("clean_up_tokenization_spaces").GetBoolean()));
        Assert.That(tokenizer.BosId, Is.EqualTo(Id("bos")));
        Assert.That(tokenizer.EosId, Is.EqualTo(Id("eos")));
        Assert.That(tokenizer.PadId, Is.EqualTo(Id("pad")));
        Assert.That(tokenizer.UnknownId, Is.EqualTo(Id("unk")));
        foreach (int id in ReferenceText.Ints(info.GetProperty("special_ids")))
            Assert.That(tokenizer.IsSpecial(id), $"id {id} is special");
        if (info.TryGetProperty("im_start_id", out var start))
            Assert.That(tokenizer.IdOf("<image>"), Is.EqualTo(start.GetInt32()));

        int? Id(string key) => info.GetProperty(key) is { ValueKind: JsonValueKind.Number } id
            ? id.GetInt32() : null;
    }

    [Test]
    public void SpecialTokensGoAroundTheTextWhenAsked()
    {
        var tokenizer = Load("tiny-llama3");
        Assert.That(tokenizer.Encode("a", special: true),
            Is.EqualTo((int[])[.. tokenizer.Prefix, .. tokenizer.Encode("a")]));
    }

    [Test]
    public void AnyPatternSplitsAsItsScannerDoes()
    {
        string qwen = Text("tokenizers/tiny-qwen/tokenizer.json");
        // The same language written in another way, which no scanner knows.
        var other = Parse(qwen.Replace(@"|\\s+(?!\\S)|\\s+""", @"|\\s+(?!\\S)|(?:\\s+)"""));
        var tokenizer = Load("tiny-qwen");
        foreach (var line in ReferenceText.Lines("tokenizers/strings.jsonl"))
        {
            string text = line.GetProperty("t").GetString()!;
            Assert.That(other.Encode(text), Is.EqualTo(tokenizer.Encode(text)), text);
        }
    }

    [Test]
    public void Gpt2SplitIsThatOfItsRegex()
    {
        var regex = new Regex(Gpt2Splitter.Pattern, RegexOptions.CultureInvariant);
        foreach (var line in ReferenceText.Lines("tokenizers/strings.jsonl"))
        {
            string text = line.GetProperty("t").GetString()!;
            // The runtime's regex knows no categories outside plane 0.
            if (text.Any(char.IsSurrogate)) continue;
            var ends = new List<int>();
            new Gpt2Splitter().Cut(text, ends);
            Assert.That(ends,
                Is.EqualTo(regex.Matches(text).Select(m => m.Index + m.Length)), text);
        }
    }

    [TestCase("", 32, 0, ExpectedResult = "a|[x]|b")]
    [TestCase("lstrip", 32, 32, ExpectedResult = "a|[x]| b")]
    [TestCase("rstrip", 32, 32, ExpectedResult = "a |[x]|b")]
    [TestCase("single_word", 0, 0, ExpectedResult = "axb")]
    [TestCase("single_word", 32, 32, ExpectedResult = "a |[x]| b")]
    public string FlagsOfAddedTokensDecideWhatTheyTake(string flag, int before, int after)
    {
        var token = new AddedToken(0, "x", SingleWord: flag == "single_word",
            LeftStrip: flag == "lstrip", RightStrip: flag == "rstrip", Normalized: false,
            Special: true);
        string text = "a" + Character(flag == "" ? 0 : before) + "x" + Character(after) + "b";
        var parts = new List<string>();
        int from = 0;
        var added = new AddedTokens([token]).In(text);
        while (added.Next() is not null)
        {
            parts.Add(text[from..added.Start]);
            parts.Add("[x]");
            from = added.End;
        }
        parts.Add(text[from..]);
        return string.Join("|", parts);

        static string Character(int code) => code == 0 ? "" : ((char)code).ToString();
    }

    [Test]
    public void TheLongestAddedTokenAtAPlaceWins()
    {
        var added = new AddedTokens([Token(1, "<a"), Token(2, "<a>"), Token(3, "a>b")]);
        var found = added.In("<a>b");
        Assert.That(found.Next()!.Id, Is.EqualTo(2));
        Assert.That(found.End, Is.EqualTo(3));

        static AddedToken Token(int id, string content) =>
            new(id, content, false, false, false, false, true);
    }

    // From UAX 15 and NormalizationTest.txt: composition, singletons, exclusions, order, Hangul.
    [TestCase("e\u0301", "\u00E9")]
    [TestCase("\u212B\u2126", "\u00C5\u03A9")]
    [TestCase("\u0958", "\u0915\u093C")]
    [TestCase("a\u0307\u0323", "\u1EA1\u0307")]
    [TestCase("\u1100\u1161\u11A8", "\uAC01")]
    [TestCase("\uAC00\u11A8", "\uAC01")]
    [TestCase("\u1100\u1161\u11A7", "\uAC00\u11A7")]
    [TestCase("\U00011099\U000110BA", "\U0001109A")]
    [TestCase("\U0001D15E", "\U0001D157\U0001D165")]
    [TestCase("\u0344", "\u0308\u0301")]
    [TestCase("\u0B47\u0300\u0B3E", "\u0B47\u0300\u0B3E")]
    [TestCase("\uD800\u0301", "\uD800\u0301")]
    public void NfcIsThatOfUnicode(string text, string expected) =>
        Assert.That(Nfc.Normalize(text).ToString(), Is.EqualTo(expected));

    [Test]
    [CancelAfter(20_000)]
    public void OneLongWordTakesNoSquareOfTime(CancellationToken cancel)
    {
        var tokenizer = Load("o-4_5");
        var random = new Random(1);
        string word = string.Concat(Enumerable.Range(0, 1_000_000)
            .Select(_ => (char)('a' + random.Next(26))));
        var task = Task.Run(() => tokenizer.Encode(word), cancel);
        task.Wait(cancel);
        Assert.That(tokenizer.Decode(task.Result), Is.EqualTo(word));
    }

    [Test]
    public void LongWordsMergeAsShortOnesDo()
    {
        // A repeated word without any merge over its end: the same ids again and again.
        var tokenizer = Load("tiny-qwen");
        var strings = ReferenceText.Lines("tokenizers/strings.jsonl")
            .Select(line => line.GetProperty("t").GetString()!)
            .Where(text => text.Length is > 3 and < 12 && text.All(char.IsAsciiLetter)).Take(50);
        foreach (string text in strings)
        {
            int[] once = tokenizer.Encode(text);
            int[] twice = tokenizer.Encode(text + text);
            if (!twice.SequenceEqual(once.Concat(once))) continue;
            int[] many = tokenizer.Encode(string.Concat(Enumerable.Repeat(text, 60)));
            Assert.That(many, Is.EqualTo(Enumerable.Repeat(once, 60).SelectMany(ids => ids)), text);
        }
    }

    [Test]
    public void ThreadsShareATokenizer()
    {
        var tokenizer = Load("tiny-qwen");
        string[] texts = [.. ReferenceText.Lines("tokenizers/strings.jsonl")
            .Select(line => line.GetProperty("t").GetString()!)];
        int[][] alone = Array.ConvertAll(texts, text => tokenizer.Encode(text));
        Parallel.For(0, texts.Length * 4, i =>
        {
            if (!tokenizer.Encode(texts[i % texts.Length]).SequenceEqual(alone[i % texts.Length]))
                throw new InvalidOperationException(texts[i % texts.Length]);
        });
    }

    [TestCase("\"type\": \"BPE\"", "\"type\": \"Unigram\"", "Unigram")]
    [TestCase("\"byte_fallback\": false", "\"byte_fallback\": true", "byte_fallback")]
    [TestCase("\"!\": 0", "\"!\": 1", "same id")]
    [TestCase("\"dropout\": null", "\"dropout\": 0.1", "dropout")]
    [TestCase("\"end_of_word_suffix\": null", "\"end_of_word_suffix\": \"</w>\"",
        "end_of_word_suffix")]
    [TestCase("\"type\": \"NFC\"", "\"type\": \"Lowercase\"", "Lowercase")]
    [TestCase("\"behavior\": \"Isolated\"", "\"behavior\": \"Removed\"", "Removed")]
    [TestCase("\"Regex\": \"(", "\"Regex\": \"((", "pattern")]
    [TestCase("\"merges\": [", "\"merges\": [[\"a\"],", "entry 1")]
    [TestCase("\"merges\": [", "\"merges\": [\"a b c\",", "entry 1")]
    [TestCase("\"merges\": [", "\"merges\": [[\"zq\", \"qz\"],", "not in the vocabulary")]
    [TestCase("\"!\": 0", "\"!\": 2000000000", "whole number")]
    [TestCase("\"!\": 0", "\"!\": -1", "whole number")]
    [TestCase("\"!\": 0", "\"\\ud800\": 0", "Unicode")]
    [TestCase("\"model\": {", "\"model\": 3, \"x\": {", "not a JSON object")]
    public void WhatItCannotReadIsRefusedByName(string old, string now, string named)
    {
        string json = Text("tokenizers/tiny-qwen/tokenizer.json");
        Assert.That(json, Does.Contain(old));
        int at = json.IndexOf(old, StringComparison.Ordinal);
        var e = Assert.Throws<InputException>(
            () => Parse(json[..at] + now + json[(at + old.Length)..]));
        Assert.That(e!.Message,
            Does.Contain(named).And.Contain("tokenizer.json").And.Not.Contain("\n"));
    }

    [Test]
    public void ANamedTokenThatIsNowhereGetsTheNextId()
    {
        string config = Text("tokenizers/tiny-qwen/tokenizer_config.json")
            .Replace("\"pad_token\": \"<|endoftext|>\"", "\"pad_token\": \"[PAD]\"");
        var tokenizer = Tokenizer.Parse(ReferenceText.Bytes("tokenizers/tiny-qwen/tokenizer.json"),
            Encoding.UTF8.GetBytes(config));
        int next = Load("tiny-qwen").Size;
        Assert.That(tokenizer.PadId, Is.EqualTo(next));
        Assert.That(tokenizer.Encode("a[PAD]"),
            Is.EqualTo((int[])[.. tokenizer.Encode("a"), next]));
        Assert.That(tokenizer.Decode([next]), Is.EqualTo("[PAD]"));
    }

    [Test]
    public void BrokenFilesGiveOneLine()
    {
        byte[] json = ReferenceText.Bytes("tokenizers/tiny-qwen/tokenizer.json");
        byte[] config = ReferenceText.Bytes("tokenizers/tiny-qwen/tokenizer_config.json");
        var random = new Random(2);
        int refused = 0;
        for (int i = 0; i < 10_000; i++)
        {
            byte[] broken = (byte[])(i % 2 == 0 ? json : config).Clone();
            if (i % 5 == 0) broken = broken[..random.Next(broken.Length)];
            for (int k = 0; k < 3 && broken.Length > 0; k++)
                broken[random.Next(broken.Length)] = (byte)random.Next(256);
            try
            {
                Tokenizer.Parse(i % 2 == 0 ? broken : json, i % 2 == 0 ? config : broken)
                    .Encode("Hello, <image>world!");
            }
            catch (InputException e)
            {
                Assert.That(e.Message, Does.Not.Contain("\n"));
                refused++;
            }
        }
        Assert.That(refused, Is.GreaterThan(5000));
    }

    [Test]
    public void AMissingFileIsNamed()
    {
        var e = Assert.Throws<InputException>(
            () => Tokenizer.Load(TestContext.CurrentContext.WorkDirectory));
        Assert.That(e!.Message, Does.Contain("tokenizer.json"));
    }

    private static string Text(string name) => Encoding.UTF8.GetString(ReferenceText.Bytes(name));

    private static Tokenizer Parse(string json) =>
        Tokenizer.Parse(Encoding.UTF8.GetBytes(json), null);
}
