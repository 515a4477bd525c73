using System.Text;
using System.Text.Json.Nodes;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data.Text;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// What the tokenizers of TokenizerTests do not have: odd SentencePiece models, Metaspace, broken
/// tokenizer.model files; and the merging of long words.
/// </summary>
[TestFixture]
public class SentencePieceTests
{
    /// <summary>
    /// 42 random models with the ids that SentencePiece 0.1.97 gave to random texts, and the texts
    /// to random ids: runs of equal letters, equal scores, user-defined pieces, letters that are no
    /// pieces, with and without byte fallback, dummy prefix and removal of extra spaces.
    /// </summary>
    [Test]
    public void RandomModelsGiveTheIdsOfSentencePiece()
    {
        int tied = 0, bare = 0, userDefined = 0;
        foreach (var line in ReferenceText.Lines("tokenizers/sentencepiece.jsonl"))
        {
            byte[] model = line.GetProperty("m").GetBytesFromBase64();
            var tokenizer = Tokenizer.ParseModel(model, null);
            foreach (var item in line.GetProperty("c").EnumerateArray())
                Assert.That(tokenizer.Encode(item.GetProperty("t").GetString()),
                    Is.EqualTo(ReferenceText.Ints(item.GetProperty("i"))), item.GetRawText());
            // LlamaTokenizer takes the first piece's mark away, SentencePiece decodes the rest.
            foreach (var item in line.GetProperty("d").EnumerateArray())
                Assert.That(tokenizer.Decode(ReferenceText.Ints(item.GetProperty("i"))),
                    Is.EqualTo(item.GetProperty("d").GetString()), item.GetRawText());
            var file = new SentencePieceFile(model, "m");
            if (file.Merges.GroupBy(merge => merge.Rank).Any(group => group.Count() > 1)) tied++;
            if (file.Mergeable.Values.Max() >= file.Kinds.Count) bare++;
            if (file.Kinds.Contains(SentencePieceFile.Kind.UserDefined)) userDefined++;
        }
        Assert.That(new[] { tied, bare, userDefined }, Is.All.GreaterThan(4));
    }

    [TestCase("tiny-qwen", "abcdefghijklmnopqrstuvwxyz")]
    [TestCase("tiny-qwen", "aest")]
    [TestCase("tiny-llama3", "\u0120\u010A!.")]
    [TestCase("tiny-v4", "\u2581aest!\u2581")]
    [TestCase("tiny-v4", "\u2581")]
    public void LongWordsHaveThePackagesIds(string name, string letters)
    {
        var file = new TokenizerFile(
            ReferenceText.Bytes($"tokenizers/{name}/tokenizer.json"), name);
        var merges = new WordMerges(file.Vocabulary, file.Merges);
        var random = new Random(3);
        int[] lengths = [.. Enumerable.Range(1, 300), WordMerges.LongWord - 1, WordMerges.LongWord,
            WordMerges.LongWord + 1, WordMerges.LongWord + 999];
        foreach (int length in lengths)
        {
            string word = string.Concat(Enumerable.Range(0, length)
                .Select(_ => letters[random.Next(letters.Length)]));
            List<int> ids = [], package = [], own = [];
            merges.Encode(word, ids);
            merges.EncodeByPackage(word, package);
            merges.EncodeLong(word, own);
            Assert.That(own, Is.EqualTo(package), word);
            Assert.That(ids, Is.EqualTo(package), word);
        }
    }

    // The rules of tokenizers' Metaspace: "always" and "first" put a mark in front of a section, or
    // of the text, unless it begins with one.
    [TestCase("always", "a b", "\u2581a\u2581b")]
    [TestCase("always", " a", "\u2581a")]
    [TestCase("always", "a<s>b", "\u2581a|<s>|\u2581b")]
    [TestCase("first", "a<s>b", "\u2581a|<s>|b")]
    [TestCase("first", "<s>b", "<s>|b")]
    [TestCase("never", "a b", "a\u2581b")]
    public void MetaspaceMarksSections(string scheme, string text, string marked)
    {
        var json = Json("tiny-sp");
        json["normalizer"] = null;
        json["pre_tokenizer"] = new JsonObject
        {
            ["type"] = "Metaspace",
            ["replacement"] = "\u2581",
            ["prepend_scheme"] = scheme,
            ["split"] = false,
        };
        var tokenizer = Parse(json);
        // The same without any marking but the text's own, one section at a time.
        json["pre_tokenizer"]!["prepend_scheme"] = "never";
        var plain = Parse(json);
        Assert.That(tokenizer.Encode(text),
            Is.EqualTo(marked.Split('|').SelectMany(part => plain.Encode(part))));
    }

    [Test]
    public void WithoutByteFallbackALetterIsTheUnknownToken()
    {
        var json = Json("tiny-sp");
        json["model"]!["byte_fallback"] = false;
        int a = Parse(json).IdOf("\u2581a")!.Value;
        Assert.That(Parse(json).Encode("a\u9FA0\u9FA1"), Is.EqualTo((int[])[a, 0]));
        json["model"]!["fuse_unk"] = false;
        Assert.That(Parse(json).Encode("a\u9FA0\u9FA1"), Is.EqualTo((int[])[a, 0, 0]));
        json["model"]!["unk_token"] = null;
        Assert.That(Parse(json).Encode("a\u9FA0\u9FA1"), Is.EqualTo((int[])[a]));
    }

    [TestCase("normalizer", "{\"type\": \"Precompiled\"}", "Precompiled")]
    [TestCase("normalizer", "{\"type\": \"Prepend\", \"prepend\": \"_\"}", "Prepend")]
    [TestCase("normalizer", "null", "byte-level")]
    [TestCase("pre_tokenizer", "{\"type\": \"Whitespace\"}", "Whitespace")]
    [TestCase("pre_tokenizer", "{\"type\": \"Metaspace\", \"replacement\": \"\u2581\"}", "split")]
    [TestCase("decoder", "null", "ByteFallback")]
    [TestCase("decoder", "{\"type\": \"Sequence\", \"decoders\": []}", "ByteFallback")]
    public void WhatTokenizerJsonMayNotSayIsRefusedByName(string part, string value, string named)
    {
        var json = Json("tiny-sp");
        json[part] = JsonNode.Parse(value);
        var e = Assert.Throws<InputException>(() => Parse(json));
        Assert.That(e!.Message,
            Does.Contain(named).And.Contain("tokenizer.json").And.Not.Contain("\n"));
    }

    [Test]
    public void AMissingByteTokenIsNamed()
    {
        var json = Json("tiny-sp");
        var vocabulary = json["model"]!["vocab"]!.AsObject();
        vocabulary.Remove("<0x41>");
        Assert.That(Assert.Throws<InputException>(() => Parse(json))!.Message,
            Does.Contain("<0x41>"));
    }

    [TestCase("legacy", "false", "legacy")]
    [TestCase("split_special_tokens", "true", null)]
    public void ConfigurationsOfModelFiles(string key, string value, string? refused)
    {
        var config = JsonNode.Parse(
            ReferenceText.Bytes("tokenizers/tiny-sp/tokenizer_config.json"))!;
        config[key] = JsonNode.Parse(value);
        byte[] model = ReferenceText.Bytes("tokenizers/tiny-sp/tokenizer.model");
        byte[] bytes = Encoding.UTF8.GetBytes(config.ToJsonString());
        if (refused is not null)
            Assert.That(Assert.Throws<InputException>(
                () => Tokenizer.ParseModel(model, bytes))!.Message, Does.Contain(refused));
        else
            Assert.That(Tokenizer.ParseModel(model, bytes).Encode("<s>"),
                Has.No.Member(TokenizerTests.Load("tiny-sp.slow").BosId));
    }

    [Test]
    public void TheFolderDecidesWhichFileIsRead()
    {
        string folder = Directory.CreateTempSubdirectory("cpmx-").FullName;
        try
        {
            Copy("tokenizer.model");
            Copy("tokenizer_config.json");
            // The two decode a leading space differently: it tells them apart.
            int[] ids = [TokenizerTests.Load("tiny-sp.slow").IdOf("<image>")!.Value,
                TokenizerTests.Load("tiny-sp.slow").IdOf("\u2581a")!.Value];
            string slow = TokenizerTests.Load("tiny-sp.slow").Decode(ids);
            string fast = TokenizerTests.Load("tiny-sp.fast").Decode(ids);
            Assert.That(slow, Is.Not.EqualTo(fast));
            Assert.That(Tokenizer.Load(folder).Decode(ids), Is.EqualTo(slow));
            Copy("tokenizer.json");
            Assert.That(Tokenizer.Load(folder).Decode(ids), Is.EqualTo(fast));
            string path = Path.Combine(folder, "tokenizer_config.json");
            var config = JsonNode.Parse(File.ReadAllText(path))!;
            config["auto_map"] = JsonNode.Parse("{\"AutoTokenizer\": [\"x.Tokenizer\", null]}");
            File.WriteAllText(path, config.ToJsonString());
            Assert.That(Tokenizer.Load(folder).Decode(ids), Is.EqualTo(slow));
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }

        void Copy(string name) => File.WriteAllBytes(
            Path.Combine(folder, name), ReferenceText.Bytes("tokenizers/tiny-sp/" + name));
    }

    [TestCase("tiny-sp")]
    [TestCase("tiny-sp-nfkc")]
    public void BrokenModelsGiveOneLine(string name)
    {
        byte[] model = ReferenceText.Bytes($"tokenizers/{name}/tokenizer.model");
        var random = new Random(2);
        int refused = 0;
        for (int i = 0; i < 2_000; i++)
        {
            byte[] broken = (byte[])model.Clone();
            if (i % 5 == 0) broken = broken[..random.Next(broken.Length)];
            for (int k = 0; k < 3 && broken.Length > 0; k++)
                broken[random.Next(broken.Length)] = (byte)random.Next(256);
            try
            {
                Tokenizer.ParseModel(broken, null).Encode("Hello, \u00BD \uFB01 world!");
            }
            catch (InputException e)
            {
                Assert.That(e.Message, Does.Not.Contain("\n").And.Contain("tokenizer.model"));
                refused++;
            }
        }
        Assert.That(refused, Is.GreaterThan(200));
    }

    [TestCase("not a model at all", "another kind")]
    [TestCase("", "no pieces")]
    // A piece that claims 2^62 bytes.
    [TestCase("\n\u00FF\u00FF\u00FF\u00FF\u00FF\u00FF\u00FF\u00FF?", "another kind")]
    // Model type UNIGRAM, which is also what a model without a type is; UNUSED; no unknown piece.
    [TestCase("\n\u0003\n\u0001a", "UNIGRAM")]
    [TestCase("\n\u0005\n\u0001a\u0018\u0005", "UNUSED")]
    [TestCase("\n\u0003\n\u0001a\u0012\u0002\u0018\u0002", "no unknown piece")]
    [TestCase("\n\u0003\n\u0001a\n\u0003\n\u0001a", "twice")]
    [TestCase("\u001A\u0003\u0012\u0001a", "precompiled_charsmap")]
    [TestCase("\u001A\u0002(\0", "escape_whitespaces")]
    [TestCase("*\u0003\u0012\u0001a", "denormalizer_spec")]
    public void WhatAModelMayNotSayIsRefusedByName(string latin1, string named)
    {
        var e = Assert.Throws<InputException>(
            () => Tokenizer.ParseModel(Encoding.Latin1.GetBytes(latin1), null));
        Assert.That(e!.Message,
            Does.Contain(named).And.Contain("tokenizer.model").And.Not.Contain("\n"));
    }

    [Test]
    public void SeveralThreadsGiveTheSameIds()
    {
        var tokenizer = TokenizerTests.Load("tiny-sp-nfkc.slow");
        string[] texts = [.. ReferenceText.Lines("tokenizers/strings.jsonl")
            .Select(line => line.GetProperty("t").GetString()!)];
        int[][] alone = Array.ConvertAll(texts, text => tokenizer.Encode(text));
        Parallel.For(0, texts.Length, i =>
        {
            if (!tokenizer.Encode(texts[i]).SequenceEqual(alone[i]))
                throw new InvalidOperationException(texts[i]);
        });
    }

    private static JsonNode Json(string name) =>
        JsonNode.Parse(ReferenceText.Bytes($"tokenizers/{name}/tokenizer.json"))!;

    private static Tokenizer Parse(JsonNode json) =>
        Tokenizer.Parse(Encoding.UTF8.GetBytes(json.ToJsonString()), null);
}
