using System.Globalization;
using System.Text;
using System.Text.Json;
using System.Text.Json.Nodes;
using System.Text.RegularExpressions;
using MiniCpmNative.Cli;
using MiniCpmNative.Cli.Serve;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Generate;
using MiniCpmNative.Engine.Model;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>Videos that are shown to a model that is asked, in chat and to a server.</summary>
[TestFixture]
public sealed class VideoAskTests
{
    private string _folder = "";

    private string Video => Path.Combine(_folder, "a");

    [SetUp]
    public void MakeFrames()
    {
        _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;
        Directory.CreateDirectory(Video);
        for (int i = 0; i < 5; i++)
            VideoRowTests.Bmp(Path.Combine(Video, $"{i}.bmp"), 60, 40, i);
    }

    [TearDown]
    public void DeleteFrames() => Directory.Delete(_folder, recursive: true);

    private static string Model(string family) => family == "v46" ? V46.Model
        : Path.Combine(ReferenceFile.Root, family, "model");

    // Ids of the processor of transformers, whose row has an answer behind them.
    [Test]
    public void APromptIsThatOfTheProcessor()
    {
        NativeCase v47 = NativeCase.Of("v47");
        var file = ReferenceFile.OpenAt(v47.At("video"));
        string folder = Directory.CreateDirectory(Path.Combine(_folder, "v47")).FullName;
        VideoNativeTests.WriteFrames(file, folder);
        ModelSpec spec = ModelSpec.Read(v47.Model);
        var maker = new PromptMaker(spec, spec.Rows());
        GenerationInput input = maker.Make(
            [new("user", [new(null, -1, Video: 0), "Describe it."])], [],
            videos: [maker.Watch(folder)]);
        double[] ids = file.Doubles("video.input_ids");
        Assert.That(input.Tokens, Is.InRange(ids.Length / 2, ids.Length - 1));
        Assert.That(input.Ids, Is.EqualTo(ids[..input.Tokens]));
        var batch = new Batch();
        batch.Clear();
        input.Append(batch);
        Assert.That(batch.Patches.Count, Is.EqualTo(file.Doubles("video.pixel_u8_videos").Length));
        double[] places = file.Doubles("video.position_ids");
        Assert.That(batch.Places.Span.ToArray().Select(place => (double)place.Row), Is.EqualTo(
            places[ids.Length..(ids.Length + input.Tokens)]));
    }

    // What is tested against the references of rows holds for questions, too: joined frames,
    // pictures beside videos, numbers.
    [TestCase("v26")]
    [TestCase("v45")]
    [TestCase("v46")]
    public void AQuestionIsThatOfARow(string family)
    {
        ModelSpec spec = ModelSpec.Read(Model(family));
        RowFormat format = spec.Rows();
        string data = Path.Combine(_folder, "rows.json");
        File.WriteAllText(data, """
            [{"video": {"frames": "a", "fps": 2.5}, "image": "a/3.bmp", "conversations": [
              {"role": "user", "content": "<video>\n<image>\nWhat?"},
              {"role": "assistant", "content": "This."}]}]
            """);
        // Joined where the model joins.
        var run = new TrainArguments
        {
            VideoPacking = family == "v45" ? 2 : null,
            MaxSliceNums = 1,
            ModelMaxLength = 4096,
        };
        RowPrompt row = DataRows.Read(data, run, format).Prompt(0);
        var expected = new Batch();
        expected.Clear();
        row.Append(expected, 0, row.Tokens);
        var maker = new PromptMaker(spec, format, 1, format.Video!.Of(run));
        var frames = new RowVideo
        {
            Frames = [.. Enumerable.Range(0, 5).Select(i => new RowPicture(
                RowVideo.Tag, Path.Combine(Video, $"{i}.bmp")))],
            Fps = 2.5,
        };
        GenerationInput input = maker.Make(
            [new("user", [new(null, -1, Video: 0), 0, "What?"])],
            [maker.Open(Path.Combine(Video, "3.bmp"))], videos: [maker.Watch(frames, "a")]);
        var batch = new Batch();
        batch.Clear();
        input.Append(batch);
        Assert.That(batch.Tokens.Span.ToArray(), Is.EqualTo(expected.Tokens.Span.ToArray()));
        Assert.That(batch.Grids.Span.ToArray(), Is.EqualTo(expected.Grids.Span.ToArray()));
        Assert.That(batch.Times.Span.ToArray(), Is.EqualTo(expected.Times.Span.ToArray()));
        Assert.That(batch.Times.Count, family == "v45" ? Is.EqualTo(4) : Is.Zero);
        Assert.That(batch.Patches.Span.SequenceEqual(expected.Patches.Span));
        Assert.That(input.Pictures, Is.EqualTo(row.Pictures));
    }

    // In the arguments, in the session, beside the base; a folder's frames are chosen already.
    [Test]
    public void AChatShowsThem()
    {
        string text = Chat("v26", "What?\n/reset\n/video " + Video + "\nWhat?\n/reset\nWhat?\n",
            "--video", Video);
        Assert.That(text, Does.Contain("a: 5 frame(s), shown with the next question"));
        int[] told = Tokens(text);
        Assert.That(told, Is.EqualTo((int[])[told[0], told[0], told[2]]));
        // Each frame has 64 features, or as many as the tiny model has, and its marks.
        int frame = (told[0] - told[2]) / 5;
        Assert.That(frame, Is.GreaterThan(2));
        string adapted = Chat("v26", "What?\n/base\n", "--video", Video, "--adapter",
            Path.Combine(ReferenceFile.Root, "v26", "adapters", "trained_lora_only"));
        Assert.That(Tokens(adapted), Is.EqualTo((int[])[told[0], told[0]]));
        string thinned = Chat("v26", "What?\n", "--video", Video, "--video_max_frames", "2");
        Assert.That(Tokens(thinned), Is.EqualTo((int[])[told[0] - (3 * frame)]));

        static int[] Tokens(string told) => [.. Regex.Matches(told, "tokens after ([0-9]+)")
            .Select(match => int.Parse(match.Groups[1].Value, CultureInfo.InvariantCulture))];
    }

    [TestCase("v2", "a", "MiniCPM-V-2 takes no videos: show some of its frames as pictures")]
    [TestCase("v26", "none", "none: there is no such file or folder")]
    [TestCase("v26", "a/0.bmp", "a/0.bmp: is a picture, expected a video file or a folder")]
    [TestCase("v26", "empty", "is a folder without frames")]
    [TestCase("v26", "damaged", "0.png")]
    [TestCase("v26", "cut", "0.png: ")]
    public void WhatCannotBeShownIsRefusedInALine(string family, string video, string reason)
    {
        Directory.CreateDirectory(Path.Combine(_folder, "empty"));
        Directory.CreateDirectory(Path.Combine(_folder, "damaged"));
        File.WriteAllText(Path.Combine(_folder, "damaged", "0.png"), "no picture");
        // Noticed when it is shown.
        Directory.CreateDirectory(Path.Combine(_folder, "cut"));
        File.WriteAllBytes(Path.Combine(_folder, "cut", "0.png"), CutFrame());
        Assert.That(() => Chat(family, "What?\n", terminal: false, "--video",
            Path.Combine(_folder, video)), Throws.TypeOf<InputException>()
                .With.Message.Contains(reason).And.Message.Not.Contains("\n"));
    }

    [Test]
    public async Task ARequestsVideosAreShownAsAConversations()
    {
        using AskedModel model = GenerationCase.Open(Model("v26"));
        GenerationSettings settings = ServedModel.Settings(model, 12);
        var maker = new PromptMaker(model.Model.Spec, model.Rows) { Decoder = Scripts() };
        string frames = Answer(session => session.Watch(Video));
        string thinned = Answer(session => session.Watch(Path.Combine(_folder, "film.mp4")));
        Assert.That(thinned, Is.Not.EqualTo(frames));
        await using var server =
            new ChatServer(new ServeOptions { Port = 0 }, "m", model, settings, maker, _ => { });
        await server.Start();
        string[] base64 = [.. Enumerable.Range(0, 5).Select(i =>
            Convert.ToBase64String(File.ReadAllBytes(Path.Combine(Video, $"{i}.bmp"))))];
        JsonArray list = new([.. base64.Select(b => (JsonNode)$"data:image/bmp;base64,{b}")]);
        string joined = "data:video/jpeg;base64," + string.Join(',', base64);
        string file = "data:video/mp4;base64," + Convert.ToBase64String(
            File.ReadAllBytes(Path.Combine(_folder, "film.mp4")));
        foreach (JsonNode video in (JsonNode[])[list, Url(list.DeepClone()), Url(joined), joined])
            Assert.That(await Ask(video), Is.EqualTo(frames));
        Assert.That(await Ask(Url(file)), Is.EqualTo(thinned));
        // At two frames of a second every second one is shown.
        JsonObject rated = Url(list.DeepClone());
        rated["fps"] = 2;
        Assert.That(await Ask(rated), Is.EqualTo(thinned));

        foreach (var (video, wrong) in (List<(JsonNode, string)>)
            [
                (Url("http://example.com/a.mp4"), "nothing is fetched"),
                (new JsonArray(), "has no frames"),
                (Url("data:video/jpeg;base64,AAAA"), "video 1, frame 1"),
                (Url("data:video/jpeg;base64," + Convert.ToBase64String(CutFrame())),
                    "video 1, frame 1: "),
                (Url("data:video/mp4;base64,AAAA"), "video 1: its content: ffprobe cannot decode "
                    + "it"),
                (Url("data:video/mp4;base64,!"), "is not base64"),
                (new JsonObject { ["url"] = list.DeepClone(), ["fps"] = 0 }, "fps"),
                (7, "expected"),
            ])
            Assert.That(await Ask(video), Does.Contain(wrong));
        Assert.That(await Ask([.. Enumerable.Repeat(joined, 5).Select(j => (JsonNode)j)]),
            Does.Contain("is video 5, at most 4 are shown"));
        await server.Stop();

        string Answer(Action<ChatSession> show)
        {
            var session = new ChatSession(model, maker, settings);
            show(session);
            ChatAnswer answer = session.Ask("What?", _ => { }, () => true);
            return $"{answer.PromptTokens}: {answer.Text}";
        }

        Task<string> Ask(params JsonNode[] videos) => Said(server, videos);
    }

    // A PNG whose header is good.
    private static byte[] CutFrame() => File.ReadAllBytes(Path.Combine(
        ReferenceFile.Root, "v26", "data", "images", "p1.png"))[..200];

    // Programs in the place of ffmpeg, for what has a header of a video: five frames, two a second.
    private VideoDecoder Scripts()
    {
        if (OperatingSystem.IsWindows()) Assert.Ignore("scripts of sh");
        File.WriteAllText(Path.Combine(_folder, "film.mp4"), "\0\0\0 ftypisom");
        string probe = Script("ffprobe", """
            for last; do :; done
            case "$last" in */cpmx-video-*) echo "$@" | grep -q -e '-format_whitelist mov' || exit 2;; esac
            grep -q ftyp "$last" || { echo "no video" >&2; exit 1; }
            echo '{"streams":[{"avg_frame_rate":"2/1","nb_read_frames":"5"}]}'
            """);
        // It writes what is no PNG file under that name, which is told by its content.
        string decode = Script("ffmpeg", $$"""
            for last; do :; done
            i=1
            for n in $(echo "$@" | grep -o 'eq(n[^)]*' | grep -o '[0-9]*$'); do
                cp "{{Video}}/$n.bmp" "$(printf "$last" $i)"; i=$((i+1)); done
            """);
        return new VideoDecoder(Path.Combine(_folder, "cache"), decode, probe);
    }

    private string Script(string name, string text)
    {
        string path = Path.Combine(_folder, name);
        File.WriteAllText(path, "#!/bin/sh\n" + text + "\n");
        if (!OperatingSystem.IsWindows())
            File.SetUnixFileMode(path, UnixFileMode.UserRead | UnixFileMode.UserExecute);
        return path;
    }

    private static JsonObject Url(JsonNode url) => new() { ["url"] = url };

    // The answer, or what is said in its place.
    private static async Task<string> Said(ChatServer server, JsonNode[] videos)
    {
        var content = new JsonArray([.. videos.Select(video => (JsonNode)new JsonObject
        {
            ["type"] = "video_url",
            ["video_url"] = video.DeepClone(),
        }), new JsonObject { ["type"] = "text", ["text"] = "What?" }]);
        var body = new JsonObject
        {
            ["messages"] = new JsonArray(
                new JsonObject { ["role"] = "user", ["content"] = content }),
        };
        using var client = new HttpClient();
        using HttpResponseMessage reply = await client.PostAsync(
            server.Address + ServedModel.Completions,
            new StringContent(body.ToJsonString(), Encoding.UTF8, "application/json"));
        using JsonDocument json = JsonDocument.Parse(await reply.Content.ReadAsStringAsync());
        return json.RootElement.TryGetProperty("error", out JsonElement error)
            ? error.GetProperty("message").GetString()!
            : json.RootElement.GetProperty("usage").GetProperty("prompt_tokens") + ": "
                + json.RootElement.GetProperty("choices")[0].GetProperty("message")
                    .GetProperty("content").GetString();
    }

    private static string Chat(string family, string input, params string[] more) =>
        Chat(family, input, terminal: true, more);

    private static string Chat(
        string family, string input, bool terminal, params string[] more)
    {
        var output = new StringWriter();
        string[] args = [Model(family), "--device", "cpu", "--do_sample", "false",
            "--max_new_tokens", "9", .. more];
        Assert.That(ChatCommand.Run(args, help: false, new StringReader(input), output,
            new StringWriter(), new Runners(), terminal), Is.Zero);
        return $"{output}";
    }
}
