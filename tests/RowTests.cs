using System.Text;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Data.Text;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>Which rows are taken, which are refused, and in what words.</summary>
[TestFixture]
public class RowTests
{
    private const string Talk =
        """[{"role":"user","content":"What?"},{"role":"assistant","content":"This."}]""";

    private static readonly SlicePlan s_small = new(new PictureSize(448, 448), 0, 0, default);
    private static readonly SlicePlan s_sliced =
        new(new PictureSize(448, 448), 2, 1, new PictureSize(322, 630));

    private static RowSet Parse(string json) =>
        RowFile.Parse("train.json", Encoding.UTF8.GetBytes(json));

    private static string Turns(params string[] contents) => "[" + string.Join(",", contents.Select(
        (content, i) =>
            $$"""{"role":"{{(i % 2 == 0 ? "user" : "assistant")}}","content":"{{content}}"}"""))
        + "]";

    private static SampleBuilder Builder(int maxLength = 4096, bool official = false) =>
        new(RowFormats.Of("tiny-qwen", queries: 4), maxLength, official);

    private static Sample Build(string image, string turns, SampleBuilder? builder = null)
    {
        var row = Parse($$"""[{"id":"a","image":{{image}},"conversations":{{turns}}}]""").Rows[0];
        return (builder ?? Builder()).Build(row, [.. row.Pictures.Select(_ => s_small)]);
    }

    private static string Refused(string image, string turns, SampleBuilder? builder = null) =>
        Assert.Throws<BadRowException>(() => Build(image, turns, builder))!.Message;

    private static string Text(string image, string turns) =>
        TokenizerTests.Load("tiny-qwen").Decode(Build(image, turns).InputIds)
            .Replace("<unk><unk><unk><unk>", "U");

    [Test]
    public void ARowOfManyTurnsIsReadInOneWalk()
    {
        // An index for each turn took more than 20 s.
        const int turns = 100_000;
        var time = System.Diagnostics.Stopwatch.StartNew();
        var set = Parse($$"""[{"conversations":{{Turns([.. Enumerable.Repeat("x", turns)])}}}]""");
        Assert.That(set.Rows.Single().Turns, Has.Count.EqualTo(turns));
        Builder().Build(set.Rows[0], []);
        Assert.That(time.Elapsed.TotalSeconds, Is.LessThan(5));
    }

    [Test]
    public void AnswersThatLoseTheirEndAreCounted([Values] bool official)
    {
        var row = Parse($$"""
            [{"image":"x.png","conversations":{{Turns("a", "b c d e", "f", "g")}}}]
            """).Rows[0];
        int end = TokenizerTests.Load("tiny-qwen").IdOf("<|im_end|>")!.Value;
        Sample whole = Builder(official: official).Build(row, [s_small]);
        Assert.That((whole.Cut, whole.AnswersCut), Is.EqualTo((false, 0)));
        int[] ends =
            [.. Enumerable.Range(0, whole.FullLength).Where(t => whole.InputIds[t] == end)];
        int[] answers = [ends[^3], ends[^1]];
        // From the first answer's first token on: shorter rows are refused.
        for (int length = ends[^3] - 3; length <= whole.FullLength; length++)
        {
            Sample sample = Builder(length, official).Build(row, [s_small]);
            Assert.That(sample.AnswersCut, Is.EqualTo(answers.Count(e => e >= length)),
                $"{length}");
        }
    }

    [Test]
    public void AListOfRowsIsRead()
    {
        var set = Parse("""
            [{"id":"a","image":"x.png","conversations":TALK},
             {"id":7,"conversations":TALK},
             {"image":{"<image_00>":"x.png","<image_01>":"y.png"},"conversations":TALK},
             {"image":["x.png","y.png"],"conversations":TALK,"extra":{"kept":1}}]
            """.Replace("TALK", Talk));
        Assert.That(set.Bad, Is.Empty);
        Assert.That(set.Rows.Select(row => row.Id), Is.EqualTo((string?[])["a", "7", null, null]));
        Assert.That(set.Rows.Select(row => row.Names), Is.EqualTo((PictureNames[])
            [PictureNames.Single, PictureNames.None, PictureNames.Tagged, PictureNames.Listed]));
        Assert.That(set.Rows[2].Pictures[1], Is.EqualTo(new RowPicture("<image_01>", "y.png")));
        Assert.That(set.Rows[0].Turns[1], Is.EqualTo(
            new ChatTurn("assistant", "This.") { Trained = true }));
    }

    [Test]
    public void OneRowPerLineIsRead()
    {
        var set = Parse("""
            {"id":"a","conversations":TALK}

            {"id":"b","conversations":3}
            {"id":"c","conversations":TALK
            {"id":"d","conversations":TALK}
            """.Replace("TALK", Talk));
        Assert.That(set.Rows.Select(row => (row.Id, row.Number)), Is.EqualTo(
            ((string?, int)[])[("a", 1), ("d", 5)]));
        Assert.That(set.Bad.Select(bad => bad.ToString()), Is.EqualTo((string[])
        [
            "train.json row 3 (id \"b\"): \"conversations\" is a number, expected a list of turns",
            set.Bad[1].ToString(),
        ]));
        Assert.That(set.Bad[1].ToString(), Does.StartWith("train.json row 4: is not valid JSON"));
    }

    [TestCase("3", "row 2: is a number, expected an object")]
    [TestCase("\"x\"", "row 2: is text, expected an object")]
    [TestCase("{\"id\":[],\"conversations\":TALK}", "\"id\" is a list")]
    [TestCase("{\"id\":\"a\"}", "row 2 (id \"a\"): \"conversations\" is missing")]
    [TestCase("{\"conversations\":[]}", "has 0 turn(s)")]
    [TestCase("{\"conversations\":[{\"role\":\"user\",\"content\":\"x\"}]}", "has 1 turn(s)")]
    [TestCase("{\"conversations\":[1,2]}", "turn 1: is a number")]
    [TestCase("{\"conversations\":[{\"from\":\"human\"},{}]}", "turn 1: \"role\" is missing")]
    [TestCase("{\"conversations\":[{\"role\":\"user\"},{}]}", "turn 1: \"content\" is missing")]
    [TestCase("{\"conversations\":[{\"role\":\"user\",\"content\":5},{}]}",
        "turn 1: \"content\" is a number")]
    [TestCase("{\"conversations\":[{\"role\":\"user\",\"content\":\"x\"},"
        + "{\"role\":\"system\",\"content\":\"x\"}]}", "turn 2: role is \"system\"")]
    [TestCase("{\"system\":\"x\",\"conversations\":[{\"role\":\"system\",\"content\":\"x\"},{}]}",
        "turn 1: has a system turn and \"system\" too")]
    [TestCase("{\"conversations\":[{\"role\":\"assistant\",\"content\":\"x\"},"
        + "{\"role\":\"user\",\"content\":\"x\"}]}", "first turn")]
    [TestCase("{\"conversations\":[{\"role\":\"user\",\"content\":\"x\"},{\"role\":\"user\",\"content\":\"y\"}]}",
        "no turn has role \"assistant\"")]
    [TestCase("{\"image\":3,\"conversations\":TALK}", "\"image\" is a number")]
    [TestCase("{\"image\":\"\",\"conversations\":TALK}", "a picture's path is empty")]
    [TestCase("{\"image\":[null],\"conversations\":TALK}", "a picture's path is null")]
    [TestCase("{\"image\":{\"<image_00>\":\"a\",\"<image_00>\":\"b\"},\"conversations\":TALK}",
        "twice")]
    [TestCase("{\"images\":[\"a\"],\"conversations\":TALK}", "key \"images\" is not used here")]
    [TestCase("{\"system\":3,\"conversations\":TALK}", "\"system\" is a number")]
    [TestCase("{\"objects\":[1],\"conversations\":TALK}", "\"objects\" is a list")]
    [TestCase("{\"objects\":{\"bbox\":[[1,2,3]]},\"conversations\":TALK}", "a bbox is a list of 3")]
    [TestCase("{\"image\":\"https://x.org/a.png\",\"conversations\":TALK}", "address on the "
        + "network")]
    [TestCase("{\"image\":\"data:image/png;base64,!\",\"conversations\":TALK}", "is not base64")]
    [TestCase("{\"conversations\":[{\"role\":\"user\",\"content\":\"<audio>What?\"},"
        + "{\"role\":\"assistant\",\"content\":\"x\"}]}", "turn 1: has the tag <audio>")]
    [TestCase("{\"rejected\":\"no\",\"conversations\":TALK}", "key \"rejected\" is not used here")]
    [TestCase("{\"history\":[[\"a\",\"b\"]],\"conversations\":TALK}",
        "key \"history\" is not used here")]
    [TestCase("{\"conversations\":[{\"role\":\"user\",\"content\":\"a\"},"
        + "{\"role\":\"assistant\",\"content\":\"b\",\"loss\":false}]}",
        "no answer is learned")]
    [TestCase("{\"conversations\":[{\"role\":\"user\",\"content\":\"\\ud800\"},{}]}", "surrogate")]
    [TestCase("{\"image_path\":\"a.png\",\"conversations\":TALK}",
        "key \"image_path\" is not used here; pictures belong in \"image\"")]
    [TestCase("{\"conversations\":[{\"role\":\"user\",\"content\":\"Where?\"},"
        + "{\"role\":\"assistant\",\"content\":\"<bbox>\"}]}", "turn 2: has the tag <bbox>, but")]
    [TestCase("{\"id\":\"a\",\"msgs\":[{}]}", "key \"msgs\" is not used here")]
    [TestCase("{\"data\":[{\"conversations\":[]}]}",
        "is missing: the row has only \"data\"; where the rows stand under a key")]
    public void FaultyRowsAreNamed(string row, string reason)
    {
        var set = Parse($"[{{\"conversations\":{Talk}}},{row.Replace("TALK", Talk)}]");
        Assert.That(set.Rows, Has.Count.EqualTo(1));
        Assert.That(set.Bad.Single().ToString(),
            Does.StartWith("train.json row 2").And.Contain(reason)
            .And.Not.Contain("\n"));
    }

    [TestCase("", "is empty")]
    [TestCase("  \n", "is empty")]
    [TestCase("[]", "has no rows")]
    [TestCase("3", "neither a JSON list")]
    [TestCase("[{\"id\":1},", "not valid JSON at line 1")]
    [TestCase("[{\"id\":1}] x", "not valid JSON")]
    public void FilesThatHoldNoRowsAreRefused(string json, string reason) =>
        Assert.That(Assert.Throws<InputException>(() => Parse(json))!.Message,
            Does.StartWith("train.json: ").And.Contain(reason).And.Not.Contain("\n"));

    [TestCase(new byte[] { 0x1f, 0x8b, 8 }, "compressed by gzip (gunzip it)")]
    [TestCase(new byte[] { 0x50, 0x4b, 3, 4 }, "an Excel workbook")]
    [TestCase(new byte[] { 0xff, 0xfe, 0x5b, 0 }, "in UTF-16 (save it in UTF-8)")]
    [TestCase(new byte[] { 0x80, 4, 0x95 }, "a pickle of Python's")]
    public void FilesOfOtherKindsAreNamed(byte[] bytes, string kind) => Assert.That(
        () => RowFile.Parse("rows.json", bytes),
        Throws.TypeOf<InputException>().With.Message.StartsWith("rows.json: is ")
            .And.Message.Contains(kind));

    [Test]
    public void WhereAPictureCameFromIsNoOtherPicture() => Assert.That(RowFile.Parse("rows.json",
        """
        [{"image": "a.png", "image_url": "https://x.org/a.png", "conversations": [
          {"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]}]
        """u8.ToArray()).Rows.Single().Pictures.Single().Path, Is.EqualTo("a.png"));

    [TestCase("""{"type": "image", "path": "a.png"}""")]
    [TestCase("""{"type": "image", "image": "a.png"}""")]
    [TestCase("""{"type": "image", "url": "a.png"}""")]
    [TestCase("""{"type": "image_url", "image_url": "a.png"}""")]
    [TestCase("""{"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}""")]
    public void APartsPictureIsReadWhereverItStands(string part)
    {
        Row row = RowFile.Parse("rows.jsonl", System.Text.Encoding.UTF8.GetBytes(
            $$$"""{"messages": [{"role": "user", "content": [{{{part}}}, {"type": "text", "text": "?"}]},"""
            + """{"role": "assistant", "content": "That."}]}""")).Rows.Single();
        Assert.That((row.Turns[0].Content, row.Pictures.Single().Path),
            Is.EqualTo(("<image>?", "a.png")));
    }

    [Test]
    public void DeepNestingIsRefused() => Assert.That(
        Assert.Throws<InputException>(() => Parse(new string('[', 100_000)))!.Message,
        Does.Contain("nested too deeply").And.Not.Contain("\n"));

    [Test]
    public void TextThatIsNotUtf8IsRefusedWithItsLine()
    {
        byte[] bytes =
            Encoding.UTF8.GetBytes("[\n" + string.Concat(Enumerable.Repeat("\"äöü\",\n", 999))
            + "\"x\"]");
        bytes[^3] = 0xFF;
        Assert.That(
            Assert.Throws<InputException>(() => RowFile.Parse("train.json", bytes))!.Message,
            Does.Contain("is not UTF-8 at about line 1001"));
    }

    [Test]
    public void BrokenFilesGiveOneLine()
    {
        byte[] json = Encoding.UTF8.GetBytes($$"""
            [{"id":"a","image":"x.png","conversations":{{Talk}}},
             {"image":{"<image_00>":"x.png"},"conversations":{{Turns("<image_00> a", "b")}}}]
            """);
        var random = new Random(3);
        var builder = Builder();
        int refused = 0;
        for (int i = 0; i < 10_000; i++)
        {
            byte[] broken = (byte[])json.Clone();
            for (int k = random.Next(4); k >= 0; k--)
                broken[random.Next(broken.Length)] = (byte)random.Next(i % 2 == 0 ? 256 : 128);
            try
            {
                var set = RowFile.Parse("x.json", broken);
                refused += set.Bad.Count > 0 ? 1 : 0;
                Assert.That(set.Bad.All(bad => !bad.ToString().Contains('\n')));
                foreach (var row in set.Rows)
                    builder.Build(row, [.. row.Pictures.Select(_ => s_small)]);
            }
            catch (Exception e) when (e is InputException or BadRowException)
            {
                Assert.That(e.Message, Does.Not.Contain("\n"));
                refused++;
            }
        }
        Assert.That(refused, Is.GreaterThan(5000));
    }

    [TestCase("\"a\"", "What?", "<image_id>0</image_id><image>U</image>\nWhat?")]
    [TestCase("\"a\"", "A <image> b", "A <image_id>0</image_id><image>U</image> b")]
    [TestCase("[\"a\",\"b\"]", "Both?",
        "<image_id>0</image_id><image>U</image>\n<image_id>1</image_id><image>U</image>\nBoth?")]
    [TestCase("[\"a\",\"b\"]", "<image>and<image>",
        "<image_id>0</image_id><image>U</image>and<image_id>1</image_id><image>U</image>")]
    [TestCase("{\"<image_00>\":\"a\",\"<image_01>\":\"b\"}", "<image_01> then <image_00>",
        "<image_id>0</image_id><image>U</image> then <image_id>1</image_id><image>U</image>")]
    public void PicturesStandWhereTheirTagsAre(string image, string question, string text) =>
        Assert.That(Text(image, Turns(question, "Yes.")),
            Does.Contain("user\n" + text + "<|im_end|>"));

    [Test]
    public void PicturesComeInTheOrderOfTheText()
    {
        var sample = Build("{\"<image_00>\":\"a\",\"<image_01>\":\"b\"}",
            Turns("<image_01>", "Yes.", "<image_00>", "No."));
        Assert.That(sample.Pictures, Is.EqualTo((int[])[1, 0]));
        Assert.That(sample.Bounds.Select(bound => bound.End - bound.Start), Is.All.EqualTo(4));
        Assert.That(sample.Bounds, Has.Length.EqualTo(2));
    }

    [Test]
    public void ALaterTurnMayShowThePicture() => Assert.That(
        Text("\"a\"", Turns("Hello", "Hi.", "<image>\\nAnd this?", "A dog.")),
        Does.Contain("user\n<image_id>0</image_id><image>U</image>\nAnd this?"));

    [TestCase("\"a\"", "<image> <image>", "B", "turn 1: 2 <image> tags for 1 picture(s)")]
    [TestCase("\"a\"", "A", "B <image>", "turn 2: an image tag stands in an answer")]
    [TestCase("\"a\"", "<image_00>", "B", "turn 1: tag <image_00> names no picture")]
    [TestCase("[\"a\",\"b\"]", "<image>", "B", "turn 1: 1 <image> tags for 2 picture(s)")]
    [TestCase("null", "<image>", "B", "turn 1: tag <image>, but the row has no \"image\"")]
    [TestCase("null", "<image_03>", "B", "turn 1: tag <image_03>, but the row has no \"image\"")]
    [TestCase("{\"<image_00>\":\"a\"}", "<image_00><image_00>", "B",
        "tag <image_00> is there twice")]
    [TestCase("{\"<image_00>\":\"a\"}", "<image_07>", "B", "tag <image_07> names no picture")]
    [TestCase("{\"<image_00>\":\"a\"}", "A", "B", "picture \"<image_00>\" is shown nowhere")]
    [TestCase("null", "A </slice>", "B", "turn 1: the text holds the special token </slice>")]
    [TestCase("null", "A", "B <|im_end|>", "turn 2: the text holds the special token <|im_end|>")]
    [TestCase("null", "A <unk>", "B", "turn 1: the text holds the special token <unk>")]
    [TestCase("null", "A", "", "turn 2: the answer is empty")]
    [TestCase("null", "A", " \\n", "turn 2: the answer is empty")]
    public void TextsAndPicturesThatDoNotFitAreNamed(string image, string ask, string say,
        string reason) =>
        Assert.That(Refused(image, Turns(ask, say)),
            Does.StartWith("train.json row 1 (id \"a\")").And.Contain(reason));

    [Test]
    public void TextOnlyRowsNeedNoPicture()
    {
        var sample = Build("null", Talk);
        Assert.That(sample.Bounds, Is.Empty);
        Assert.That(sample.Supervised, Is.GreaterThan(1));
        Assert.That(Refused("null", Talk, Builder(official: true)),
            Does.Contain("has no \"image\""));
    }

    [Test]
    public void LongTextIsCutPicturesAreNot()
    {
        var whole = Build("\"a\"", Turns("What?", "One two three four five."));
        int answer = Array.FindIndex(whole.Labels, label => label != PromptFormat.Ignored);
        var cut = Build("\"a\"", Turns("What?", "One two three four five."), Builder(answer + 3));
        Assert.That(cut.Cut);
        Assert.That(cut.InputIds, Is.EqualTo(whole.InputIds[..(answer + 3)]));
        Assert.That(cut.Labels[..^1], Is.EqualTo(whole.Labels[..(answer + 2)]));
        Assert.That(cut.Labels[^1], Is.EqualTo(PromptFormat.Ignored));
        Assert.That(Refused("\"a\"", Turns("What?", "One."), Builder(answer)),
            Does.Contain("no answer is left within model_max_length"));
        int end = whole.Bounds[0].End;
        Assert.That(Refused("\"a\"", Turns("What?", "One."), Builder(end)),
            Does.Contain("picture 1 of 1 would be cut"));
        // One token more holds the picture's end, and only the answer is missing.
        Assert.That(Refused("\"a\"", Turns("What?", "One."), Builder(end + 1)),
            Does.Contain("no answer is left"));
        Assert.That(Refused("[\"a\",\"b\"]", Turns("<image>", "One.", "<image>", "Two."),
            Builder(end + 12)),
            Does.Contain("picture 2 of 2 would be cut"));
    }

    [Test]
    public void SlicedPicturesHaveABoundForEachView()
    {
        var row = Parse($$"""[{"image":"x","conversations":{{Talk}}}]""").Rows[0];
        var sample = Builder().Build(row, [s_sliced]);
        Assert.That(sample.Views, Is.EqualTo(3));
        Assert.That(sample.Bounds, Has.Length.EqualTo(3));
        var unknown = TokenizerTests.Load("tiny-qwen").UnknownId;
        foreach (var bound in sample.Bounds)
            Assert.That(sample.InputIds[bound.Start..bound.End], Is.All.EqualTo(unknown));
    }

    [Test]
    [CancelAfter(20_000)]
    public void ManyTagsAndTurnsTakeNoSquareOfTime(CancellationToken cancel)
    {
        const int Count = 20_000;
        var pictures = Enumerable.Range(0, Count).Select(k => new RowPicture($"<image_{k}>", "x"))
            .ToArray();
        string content = string.Concat(pictures.Select(picture => picture.Tag));
        var turns = Enumerable.Range(0, Count)
            .Select(k => new ChatTurn(k % 2 == 0 ? "user" : "assistant",
            k == 0 ? content : "x")).ToArray();
        var row = new Row("x", 1, null, PictureNames.Tagged, pictures, turns);
        var plans = Enumerable.Repeat(s_small, Count).ToArray();
        var task = Task.Run(() => Builder(int.MaxValue).Build(row, plans), cancel);
        task.Wait(cancel);
        Assert.That(task.Result.Bounds, Has.Length.EqualTo(Count));
    }

    [Test]
    public void PicturesAreLookedForBesideTheDataFileThenHere()
    {
        string folder = Path.Combine(Path.GetTempPath(), Path.GetRandomFileName());
        Directory.CreateDirectory(folder);
        try
        {
            File.WriteAllText(Path.Combine(folder, "p.png"), "");
            var row = new Row(Path.Combine(folder, "train.json"), 3, "x", PictureNames.Single,
                [], []);
            Assert.That(row.Locate(new RowPicture("", "p.png")),
                Is.EqualTo(Path.Combine(folder, "p.png")));
            Assert.That(
                Assert.Throws<BadRowException>(() =>
                    row.Locate(new RowPicture("", "q.png")))!.Message,
                Does.Contain("row 3 (id \"x\"): picture \"q.png\""));
        }
        finally
        {
            Directory.Delete(folder, true);
        }
    }

    [Test]
    public void AnswersThatSpeakOfAnAssistantAreLearnedWhole()
    {
        var sample = Build("null", Turns("assistant?", "assistant"));
        int[] said = [.. TokenizerTests.Load("tiny-qwen").Encode("assistant<|im_end|>")];
        Assert.That(sample.Labels.Where(label => label != PromptFormat.Ignored).Take(said.Length),
            Is.EqualTo(said));
    }
}
