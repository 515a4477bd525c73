using System.Text;
using System.Text.Json;
using System.Text.Json.Nodes;
using System.Text.RegularExpressions;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Rows with videos: how they are written, which are refused, what they become, a run on them.
/// </summary>
[TestFixture]
public sealed class VideoRowTests
{
    private static readonly ReferenceModel s_v45 = ReferenceModel.Of("v45");
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    // Its prompts are of lists of pictures with ids; here runs of them are videos. Padding is left
    // out.
    [Test]
    public void V45WritesGroupsAsItsProcessor()
    {
        int compared = 0;
        foreach (JsonElement reference in s_v45.Json("temporal.json").GetProperty("rows")
            .EnumerateArray())
        {
            string name = reference.GetProperty("name").GetString()!;
            for (int p = 0; p < reference.GetProperty("prompts").GetArrayLength(); p++)
            {
                string expected = reference.GetProperty("texts")[p].GetString()!;
                if (Row(reference, p) is not { } row || expected.Contains("<image_id>")) continue;
                row = VideoFrames.Choose(row, s_v45.Format.Video, VideoDecoder.Default);
                int[] sizes = [.. reference.GetProperty("picture_sizes")[p].EnumerateArray()
                    .SelectMany(s => ReferenceText.Ints(s))];
                SlicePlan[] plans = [.. row.Pictures.Select((_, i) => Slicer.Plan(
                    new(sizes[2 * i], sizes[(2 * i) + 1]),
                    reference.GetProperty("max_slice_nums").GetInt32(),
                    reference.GetProperty("scale_resolution").GetInt32()))];
                Prompt prompt = new SampleBuilder(s_v45.Format, 4096)
                    .BuildPrompt(row, plans, row.Turns.Count);
                Assert.That(prompt.InputIds, Is.EqualTo(reference.GetProperty("input_ids")[p]
                    .EnumerateArray().SelectMany(run => Enumerable.Repeat(
                        run[0].GetInt32(), run[1].GetInt32())).SkipWhile(id => id == 0)), name);
                compared++;
            }
        }

        Assert.That(compared, Is.GreaterThan(8));
    }

    private static Row? Row(JsonElement reference, int prompt)
    {
        JsonElement ids = reference.GetProperty("temporal_ids");
        if (ids.ValueKind != JsonValueKind.Array
            || ids[prompt][0].ValueKind != JsonValueKind.Array) return null;
        var groups = new Queue<int[]>(ids[prompt].EnumerateArray().Select(ReferenceText.Ints));
        var videos = new JsonArray();
        bool whole = true;
        string Video(Match match)
        {
            int frames = match.Value.Count(c => c == '□');
            var own = new JsonArray();
            for (int left = frames; left > 0 && whole;)
            {
                whole &= groups.Count > 0 && groups.Peek().Length <= left;
                if (!whole) break;
                left -= groups.Peek().Length;
                own.Add(new JsonArray([.. groups.Dequeue().Select(id => (JsonNode)id)]));
            }

            videos.Add(new JsonObject
            {
                ["frames"] = new JsonArray(
                    [.. Enumerable.Range(0, frames).Select(i => (JsonNode)$"{i}.png")]),
                ["temporal_ids"] = own,
            });
            return "<video>";
        }

        var turns = new JsonArray();
        foreach (Match turn in Regex.Matches(reference.GetProperty("prompts")[prompt].GetString()!,
            @"<\|im_start\|>(user|assistant)\n(.*?)<\|im_end\|>", RegexOptions.Singleline))
            turns.Add(new JsonObject
            {
                ["role"] = turn.Groups[1].Value,
                ["content"] = Regex.Replace(turn.Groups[2].Value, "□(\n□)*", Video),
            });
        var row = new JsonObject { ["videos"] = videos, ["messages"] = turns };
        return whole ? RowFile.Parse("rows.json", Encoding.UTF8.GetBytes($"[{row.ToJsonString()}]"),
            new RowOptions(Asked: true)).Rows.Single() : null;
    }

    [Test]
    public void FramesOfAGroupLieViewByView()
    {
        Frames("a", 5, 700, 500);
        string data = Data($$"""
            {"video":{"frames":"a","temporal_ids":[[0,7],[9],[12,12]]},"conversations":{{Talk("<video>")}}}
            """);
        TrainArguments run = s_v45.Full with { DataPath = data, VideoMaxSliceNums = 4 };
        Batch batch = Read(run);
        var picture = new Batch();
        picture.Clear();
        var rows = DataRows.Read(Data($$"""
            {"image":["a/0.bmp","a/1.bmp","a/2.bmp","a/3.bmp","a/4.bmp"],"conversations":{{Talk("")}}}
            """), run with { MaxSliceNums = 4, OfficialCompat = false }, s_v45.Format);
        rows.Append(0, picture);
        int views = picture.Grids.Count / 2 / 5, queries = s_v45.Spec.Resampler.Queries;
        Assert.That(views, Is.GreaterThan(2));
        Assert.That(batch.Features, Is.EqualTo(3 * views * queries).And.EqualTo(batch.Slots.Count));
        // Each group: of each view, that of every frame.
        int at = 0;
        foreach (int[] group in (int[][])[[0, 1], [2], [3, 4]])
            for (int view = 0; view < views; view++)
                foreach (int frame in group)
                {
                    int of = (frame * views) + view;
                    Assert.That(batch.Times[at], Is.EqualTo(
                        new ViewTime(((int[])[0, 7, 9, 12, 12])[frame], frame != group[0])));
                    Assert.That(View(batch, at++).SequenceEqual(View(picture, of)), $"{at}");
                }

        Assert.That(batch.Times.Count, Is.EqualTo(at));
    }

    private static ReadOnlySpan<float> View(Batch batch, int view)
    {
        const int Length = 3 * 14 * 14;
        int start = batch.PictureStarts[view], end = batch.PictureStarts[view + 1];
        return batch.Patches.Span[(start * Length)..(end * Length)];
    }

    // A model whose pictures have no times shows frames as a list of pictures, without numbers.
    [Test]
    public void V26ShowsFramesAsPictures()
    {
        Frames("a", 3, 60, 40);
        TrainArguments run = V26.Full with { OfficialCompat = false };
        Batch video = Read(run with
        {
            DataPath = Data($$"""{"video":"a","conversations":{{Talk("")}}}"""),
        }, V26.Format);
        Batch pictures = Read(run with
        {
            DataPath = Data($$"""
                {"image":["a/0.bmp","a/1.bmp","a/2.bmp"],"conversations":{{Talk("")}}}
                """),
        }, V26.Format with { Numbered = false });
        Assert.That(video.Tokens.Span.ToArray(), Is.EqualTo(pictures.Tokens.Span.ToArray()));
        Assert.That(video.Patches.Span.SequenceEqual(pictures.Patches.Span));
        Assert.That(video.Times.Count, Is.Zero);
    }

    [Test]
    public void FramesOfAFolderAreInTheOrderOfTheirNumbers()
    {
        Frames("a", 12, 30, 20);
        File.WriteAllText(Path.Combine(_folder, "a", "notes.txt"), "no frame");
        Row row = Rows($$"""{"video":"a","conversations":{{Talk("")}}}""", s_v45.Full)[0];
        Assert.That(row.Pictures.Select(p => Path.GetFileName(p.Path)),
            Is.EqualTo(Enumerable.Range(0, 12).Select(i => $"{i}.bmp")));
    }

    [TestCase("""{"videos":["a"],"messages":TALK}""")]
    [TestCase("""{"video":["a/0.bmp","a/1.bmp"],"conversations":TALK}""")]
    [TestCase("""{"videos":[["a/0.bmp","a/1.bmp"]],"messages":TALK}""")]
    [TestCase("""{"video":[["a/0.bmp","a/1.bmp"]],"conversations":TALK}""")]
    [TestCase("""{"videos":[{"frames":"a","fps":3}],"messages":TALK}""")]
    [TestCase("""{"query":"<video>What?","response":"x","videos":["a"]}""")]
    [TestCase("""{"conversations":[{"from":"human","value":"<video>What?"},{"from":"gpt","value":"x"}],"video":"a"}""")]
    [TestCase("""{"messages":[{"role":"user","content":[{"type":"video_url","video_url":{"url":"a"}},{"type":"text","text":"What?"}]},{"role":"assistant","content":"x"}]}""")]
    [TestCase("""{"messages":[{"role":"user","content":[{"type":"video","video":["a/0.bmp","a/1.bmp"]},{"type":"text","text":"What?"}]},{"role":"assistant","content":"x"}]}""")]
    public void EveryToolsVideosAreRead(string row)
    {
        Frames("a", 2, 30, 20);
        Row read = Rows(row.Replace("TALK", Talk("<video>")), s_v45.Full)[0];
        Assert.That(read.Fault, Is.Null);
        Assert.That(read.Pictures, Has.Count.EqualTo(2));
        Assert.That(read.Videos.Single(), Has.Property("Count").EqualTo(2));
        Assert.That(read.Turns[0].Content, Does.StartWith("<video>"));
        Assert.That(read.Pictures[0].Times, Is.EqualTo((int[])[0]));
        Assert.That(read.Pictures[1].Times, Is.EqualTo((int[])[3]));
    }

    [TestCase("""{"video":"none","conversations":TALK}""", "v45",
        "video \"none\" is neither in the data file's folder nor in the working directory")]
    [TestCase("""{"video":"empty","conversations":TALK}""", "v45",
        "video \"empty\" is a folder without frames")]
    [TestCase("""{"video":"a/0.bmp","conversations":TALK}""", "v45", "is a picture, expected a video")]
    [TestCase("""{"video":7,"conversations":TALK}""", "v45", "a video is a number, expected")]
    [TestCase("""{"video":{"frames":"a","fps":0},"conversations":TALK}""", "v45",
        "a video's \"fps\" is 0, expected")]
    [TestCase("""{"video":"https://x/a.mp4","conversations":TALK}""", "v45",
        "is an address on the network")]
    [TestCase("""{"video":{"frames":"a","temporal_ids":[[0]]},"conversations":TALK}""", "v45",
        "has 1 \"temporal_ids\" for 2 frames")]
    [TestCase("""{"video":{"frames":"a","temporal_ids":[[0,1]]},"conversations":TALK}""", "v26",
        "does not join frames")]
    [TestCase("""{"video":"a","videos":["a"],"conversations":TALK}""", "v45", "under both")]
    [TestCase("""{"video":"data:video/mp4;base64,!","conversations":TALK}""", "v45",
        "a video's content is not base64")]
    [TestCase("""{"video":["a/0.bmp","a/9.bmp"],"conversations":TALK}""", "v45",
        "\"a/9.bmp\" is neither")]
    [TestCase("""{"conversations":TALK}""", "v45", "turn 1: tag <video>, but the row has no")]
    [TestCase("""{"videos":["a","a"],"conversations":TALK}""", "v45",
        "1 <video> tags for 2 video(s)")]
    [TestCase("""{"video":"a","conversations":TALK}""", "v2", "has a video, and the model takes none")]
    [TestCase("""{"video":"a","conversations":TALK}""", "official",
        "has a video, which the official script does not know")]
    [TestCase("""{"video":{"frames":["a/0.bmp","wide.bmp"],"temporal_ids":[[0,1]]},"conversations":TALK}""",
        "v45", "are joined, but cut into different numbers of tiles")]
    public void WhatCannotBeShownIsRefused(string row, string model, string words)
    {
        Frames("a", 2, 30, 20);
        Directory.CreateDirectory(Path.Combine(_folder, "empty"));
        Bmp(Path.Combine(_folder, "wide.bmp"), 900, 300, 1);
        bool official = model == "official";
        RowFormat format = model is "v26" or "official" ? V26.Format : s_v45.Format;
        if (model == "v2") format = format with { Video = null };
        TrainArguments run = s_v45.Full with
        {
            OfficialCompat = official,
            DataPath = Data(row.Replace("TALK", Talk("<video>"))),
            VideoMaxSliceNums = 4,
        };
        Assert.That(() => DataRows.Open(run.DataPath!, run, format, _ => { }),
            Throws.TypeOf<InputException>().With.Message.Contains(words));
    }

    // Rows of every kind in one batch, a damaged frame left out, both of a GPU's types on the CPU.
    [Test]
    public void ARunLearnsFromRowsOfEveryKind([Values] bool bf16)
    {
        Frames("a", 7, 60, 40);
        Frames("b", 3, 40, 60);
        File.WriteAllBytes(Path.Combine(_folder, "b", "1.bmp"),
            File.ReadAllBytes(Path.Combine(_folder, "b", "1.bmp"))[..2000]);
        TrainArguments run = s_v45.Lora with
        {
            OfficialCompat = false,
            Bf16 = bf16,
            Device = DeviceChoice.Cpu,
            DataPath = Data($$"""
                {"id":"joined","video":{"frames":"a","fps":3},"conversations":{{Talk("<video>\\n")}}}
                {"id":"both","video":["a/1.bmp","a/2.bmp"],"image":"a/3.bmp","conversations":{{Talk("<image>\\n<video>\\n")}}}
                {"id":"damaged","video":"b","conversations":{{Talk("<video>")}}}
                {"id":"picture","image":"b/2.bmp","conversations":{{Talk("<image>")}}}
                {"id":"text","conversations":{{Talk("")}}}
                """),
            OnBadRow = BadRows.Skip,
            VideoPacking = 3,
            OutputDir = Path.Combine(_folder, "out"),
            PerDeviceTrainBatchSize = 4,
            MaxSteps = 12,
            LoggingSteps = new Interval(1),
            LearningRate = 3e-3,
        };
        string said = Runs.Train(run);
        Assert.That(said, Does.Contain("(id \"damaged\")").And.Contain("skipped"));
        double[] losses = [.. Runs.Losses(run)];
        Assert.That(losses, Has.Length.EqualTo(12));
        Assert.That(losses[^1], Is.LessThan(0.7 * losses[0]));
        Assert.That(File.Exists(Path.Combine(run.OutputDir, "adapter_model.safetensors")));

        // Frames that are joined are one picture's features; the first loss is that of the rows
        // by themselves.
        using var model = TunedModel.Open(run);
        var rows = DataRows.Open(run.DataPath!, run, model.Loaded.Rows, _ => { });
        double sum = 0, labels = 0;
        for (int row = 0; row < rows.Count; row++)
        {
            var one = new Batch();
            one.Clear();
            rows.Append(row, one);
            if (rows[row].Id == "joined")
                Assert.That((one.Grids.Count / 2, one.Features / s_v45.Spec.Resampler.Queries),
                    Is.EqualTo((7, 3)));
            sum += Trace.Run(model, one, gradients: false).Floats["loss"].Values[0]
                * one.LabelRows.Count;
            labels += one.LabelRows.Count;
        }

        Assert.That(losses[0], Is.EqualTo(sum / labels).Within((bf16 ? 1e-2 : 1e-5) * losses[0]));
    }

    [Test]
    public void APictureAVideoAndASoundStandInOneRow()
    {
        string model = Directory.CreateDirectory(Path.Combine(_folder, "model")).FullName;
        AudioModel.Write(model);
        File.WriteAllBytes(Path.Combine(_folder, "a.wav"), AudioModel.Wav(16000));
        Frames("a", 3, 60, 40);
        TrainArguments run = s_v45.Lora with
        {
            ModelNameOrPath = model,
            InitAudio = true,
            OfficialCompat = false,
            DataPath = Data($$"""
                {"image":"a/0.bmp","video":"a","audio":"a.wav","conversations":{{Talk("<audio>\\n<image>\\n<video>\\n")}}}
                {"video":["a/1.bmp"],"conversations":{{Talk("")}}}
                {"audio":"a.wav","conversations":{{Talk("")}}}
                """),
            OutputDir = Path.Combine(_folder, "out"),
            PerDeviceTrainBatchSize = 3,
            MaxSteps = 8,
            LoggingSteps = new Interval(1),
            LearningRate = 1e-2,
        };
        ModelSpec spec = ModelSpec.Read(model).Hearing(true);
        var rows = DataRows.Open(run.DataPath!, run, spec.Rows(), _ => { });
        var batch = new Batch();
        batch.Clear();
        rows.Append(0, batch);
        Assert.That((batch.Clips, batch.Grids.Count / 2), Is.EqualTo((1, 4)));
        Assert.That(batch.Slots.Count, Is.EqualTo(4 * spec.Resampler.Queries));
        Assert.That(batch.SoundSlots[^1], Is.LessThan(batch.Slots[0]));
        Runs.Train(run);
        double[] losses = [.. Runs.Losses(run)];
        Assert.That(losses[^1], Is.LessThan(0.7 * losses[0]));
    }

    [Test]
    public void RowsWithVideosAreConverted()
    {
        Frames("a", 4, 30, 20);
        string data = Data($$"""
            {"image":"a/3.bmp","video":"a","conversations":{{Talk("")}}}
            {"video":{"frames":["a/0.bmp","a/1.bmp","a/2.bmp"],"temporal_ids":[[0,4],[9]]},"conversations":{{Talk("<video>")}}}
            {"videos":[["a/2.bmp"],{"frames":"a","fps":2.5}],"conversations":{{Talk("<video><video>")}}}
            """), result = Path.Combine(_folder, "sub", "out.json");
        Directory.CreateDirectory(Path.GetDirectoryName(result)!);
        var text = new StringWriter();
        Assert.That(new Cli.CommandLine(text, text, new Cli.Runners())
            .Run(["data", "convert", data, result]), Is.Zero, text.ToString());
        Assert.That(text.ToString(), Does.Contain("3 rows have videos"));
        TrainArguments run = s_v45.Full with { OfficialCompat = false };
        var before = DataRows.Read(data, run, s_v45.Format);
        var after = DataRows.Read(result, run, s_v45.Format);
        for (int row = 0; row < 3; row++)
        {
            var (a, b) = (new Batch(), new Batch());
            a.Clear();
            b.Clear();
            before.Append(row, a);
            after.Append(row, b);
            Assert.That(b.Tokens.Span.ToArray(), Is.EqualTo(a.Tokens.Span.ToArray()));
            Assert.That(b.Times.Span.ToArray(), Is.EqualTo(a.Times.Span.ToArray()));
            Assert.That(b.Patches.Span.SequenceEqual(a.Patches.Span));
        }
    }

    private static string Talk(string tag) =>
        $$"""[{"role":"user","content":"{{tag}}What?"},{"role":"assistant","content":"This."}]""";

    private string Data(string rows)
    {
        string path = Path.Combine(_folder, $"{Guid.NewGuid():N}.jsonl");
        File.WriteAllText(path, string.Join('\n', rows.Split('\n').Select(r => r.Trim())));
        return path;
    }

    private DataRows Rows(string row, TrainArguments run) =>
        DataRows.Read(Data(row), run with { OfficialCompat = false }, s_v45.Format);

    private static Batch Read(TrainArguments run, RowFormat? format = null)
    {
        var batch = new Batch();
        batch.Clear();
        DataRows.Read(run.DataPath!, run with { OfficialCompat = false }, format ?? s_v45.Format)
            .Append(0, batch);
        return batch;
    }

    private void Frames(string name, int count, int width, int height)
    {
        Directory.CreateDirectory(Path.Combine(_folder, name));
        for (int i = 0; i < count; i++)
            Bmp(Path.Combine(_folder, name, $"{i}.bmp"), width, height, i);
    }

    /// <summary>A picture of noise.</summary>
    internal static void Bmp(string path, int width, int height, int seed)
    {
        int stride = ((3 * width) + 3) & ~3;
        var pixels = new byte[stride * height];
        new Random(seed).NextBytes(pixels);
        Bmp(path, width, height, pixels);
    }

    // Rows from the bottom, blue first, each of a multiple of four bytes.
    internal static void Bmp(string path, int width, int height, byte[] pixels)
    {
        using var file = new BinaryWriter(File.Create(path));
        file.Write("BM"u8);
        foreach (int number in (int[])[54 + pixels.Length, 0, 54, 40, width, height])
            file.Write(number);
        file.Write((short)1);
        file.Write((short)24);
        foreach (int number in (int[])[0, pixels.Length, 2835, 2835, 0, 0]) file.Write(number);
        file.Write(pixels);
    }
}
