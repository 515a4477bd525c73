using System.Text;
using System.Text.RegularExpressions;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Video files, with scripts in the place of ffmpeg and ffprobe that check what they are asked; the
/// examples of docs/data.md.
/// </summary>
[TestFixture]
public sealed class VideoFileTests
{
    private static readonly VideoRules s_rules =
        Families.All.Single(family => family.Name == "MiniCPM-V-2_6").Video!;

    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    private string Cache => Path.Combine(_folder, "cache");

    private string Video
    {
        get
        {
            string path = Path.Combine(_folder, "a film.mp4");
            File.WriteAllText(path, "\0\0\0 ftypisom");
            return path;
        }
    }

    private string Script(string name, string text)
    {
        string path = Path.Combine(_folder, name);
        File.WriteAllText(path, "#!/bin/sh\n" + text);
        if (!OperatingSystem.IsWindows())
            File.SetUnixFileMode(path, UnixFileMode.UserRead | UnixFileMode.UserExecute);
        return path;
    }

    private string Probe(string frames = "75", string rate = "30000/1001") => Script("ffprobe",
        "echo '{\"streams\":[{\"avg_frame_rate\":\"" + rate + "\",\"nb_read_frames\":\"" + frames
        + "\"}]}'\n");

    // Writes a file for each frame that it is asked for, but for so many, and what it was asked.
    private string Decode(int less = 0) => Script("ffmpeg", $$"""
        first=1
        for last; do [ "$before" = -start_number ] && first=$last; before=$last; done
        echo "$@" >> '{{_folder}}/asked'
        count=$(echo "$@" | grep -o 'eq(n' | wc -l)
        i=1
        while [ $i -le $((count - {{less}})) ]; do
            echo $i > "$(printf "$last" $((first + i - 1)))"; i=$((i+1)); done
        """ + "\n");

    [Test, Platform("Unix")]
    public void TheFramesThatAreTakenAreDecodedOnce()
    {
        var decoder = new VideoDecoder(Cache, Decode(), Probe());
        string video = Video;
        var (chosen, paths) = decoder.Decode(video, s_rules.Choose);
        Assert.That(chosen.Frames, Is.EqualTo((int[])[0, 30, 60]));
        Assert.That(paths.Select(File.ReadAllText), Is.EqualTo((string[])["1\n", "2\n", "3\n"]));
        string asked = File.ReadAllText(Path.Combine(_folder, "asked"));
        Assert.That(asked, Does.Contain($"-i {video} ")
            .And.Contain(@"select=eq(n\,0)+eq(n\,30)+eq(n\,60),setpts="));
        Assert.That(decoder.Decode(video, s_rules.Choose).Paths, Is.EqualTo(paths));
        Assert.That(File.ReadAllText(Path.Combine(_folder, "asked")), Is.EqualTo(asked));
        // Other frames, or another file of that name, are decoded anew.
        decoder.Decode(video, (s_rules with { Fps = 2 }).Choose);
        File.AppendAllText(video, "more");
        decoder.Decode(video, s_rules.Choose);
        Assert.That(File.ReadAllLines(Path.Combine(_folder, "asked")), Has.Length.EqualTo(3));
        Assert.That(Directory.GetDirectories(Cache), Has.Length.EqualTo(3));
    }

    // Of content that somebody sent.
    [Test, Platform("Unix")]
    public void AProgramThatTakesTooLongIsEnded()
    {
        var decoder = new VideoDecoder(
            Cache, Decode(), Script("ffprobe", "exec sleep 60\n")).In(_folder, mostSeconds: 1);
        Assert.That(() => decoder.Decode(Video, s_rules.Choose),
            Throws.TypeOf<InputException>().With.Message.EndsWith(
                "a film.mp4: ffprobe needs more than 1 s for it: shorten it"));
    }

    [Test, Platform("Unix")]
    public void AFrameMayBeTakenTwice()
    {
        var decoder = new VideoDecoder(Cache, Decode(), Probe());
        var (_, paths) = decoder.Decode(Video, (_, _) => new ChosenFrames([4, 4, 9]));
        Assert.That(paths.Select(File.ReadAllText), Is.EqualTo((string[])["1\n", "1\n", "2\n"]));
    }

    [Test, Platform("Unix")]
    public void DamagedFilesAreRefusedAndLeaveNothing()
    {
        Refused(new VideoDecoder(Cache, Decode(less: 1), Probe()),
            "ffmpeg decodes 2 of 3 frames: the file is damaged");
        Refused(new VideoDecoder(Cache, Script("broken", "echo moov atom not found >&2; exit 1\n"),
            Probe()), "broken cannot decode it: moov atom not found");
        Refused(new VideoDecoder(Cache, "ffmpeg", Probe(frames: "0")), "finds no frames of a "
            + "video");
        Refused(new VideoDecoder(Cache, "ffmpeg", Probe(rate: "0/0")), "finds no frames of a "
            + "video");
        Refused(new VideoDecoder(Cache, "ffmpeg", Script("silent", "echo '{}'\n")),
            "finds no frames of a video");
        // But how many frames there are.
        Assert.That(Directory.GetFileSystemEntries(Cache).Select(Path.GetExtension),
            Is.All.EqualTo(".json"));
    }

    [Test]
    public void WithoutFfmpegAFileIsRefusedInWords() => Refused(
        new VideoDecoder(Cache, "ffmpeg", Path.Combine(_folder, "none", "ffprobe")),
        "video files are decoded by ffmpeg and ffprobe, and there is no ffprobe on this machine: "
        + "install them, or write the frames to a folder and name that");

    private void Refused(VideoDecoder decoder, string words) => Assert.That(
        () => decoder.Decode(Video, s_rules.Choose), Throws.TypeOf<InputException>()
            .With.Message.StartsWith(Path.Combine(_folder, "a film.mp4")).And.Message.Contains(
                words));

    [Test, Platform("Unix")]
    public void AFilesFramesAreTheRows()
    {
        Row row = RowFile.Parse(Path.Combine(_folder, "rows.json"), Encoding.UTF8.GetBytes($$"""
            [{"video":"{{Path.GetFileName(Video)}}","conversations":[
             {"role":"user","content":"What?"},{"role":"assistant","content":"This."}]}]
            """)).Rows.Single();
        var rules = Families.All.Single(family => family.Name == "MiniCPM-V-4_5").Video!;
        row = VideoFrames.Choose(row, rules with { Packing = 2 },
            new VideoDecoder(Cache, Decode(), Probe(frames: "75", rate: "25")));
        // Three of each of three seconds, at the middles of equal parts.
        Assert.That(row.Pictures, Has.Count.EqualTo(9));
        Assert.That(row.Videos.Single().Shown(row), Is.EqualTo((int[])[0, 2, 4, 6, 8]));
        Assert.That(row.Pictures[0].Times, Is.EqualTo((int[])[2, 5]));
        Assert.That(row.Pictures[8].Times, Is.EqualTo((int[])[28]));
        Assert.That(File.Exists(row.Locate(row.Pictures[8])));
    }

    [Test, Platform("Unix")]
    public void AVideoMayStandInTheRow(
        [Values("\"data:video/mp4;base64,AAEC\"",
            "{\"bytes\":\"AAEC\",\"path\":\"x.mp4\"}")] string video)
    {
        Row row = RowFile.Parse("rows.json", Encoding.UTF8.GetBytes($$"""
            [{"video":{{video}},"conversations":[
             {"role":"user","content":"What?"},{"role":"assistant","content":"This."}]}]
            """)).Rows.Single();
        row = VideoFrames.Choose(row, s_rules, new VideoDecoder(Cache, Decode(), Probe()));
        Assert.That(row.Pictures, Has.Count.EqualTo(3));
        Assert.That(File.ReadAllBytes(Directory.GetFiles(Cache, "*.video").Single()),
            Is.EqualTo((byte[])[0, 1, 2]));
    }

    // More frames than one command can name.
    [Test, Platform("Unix")]
    public void ManyFramesAreDecodedInParts()
    {
        var decoder = new VideoDecoder(Cache, Decode(), Probe(frames: "2500", rate: "1"));
        var (_, paths) = decoder.Decode(Video, (s_rules with { MaxFrames = 2500 }).Choose);
        Assert.That(paths, Has.Length.EqualTo(2500));
        Assert.That(File.ReadAllText(paths[2499]), Is.EqualTo("500\n"));
        Assert.That(File.ReadAllLines(Path.Combine(_folder, "asked")), Has.Length.EqualTo(3));
    }

    [Test]
    public void TheVideosOfTheManualAreRead()
    {
        string doc = File.ReadAllText(
            Path.Combine(ReferenceFile.Root, "..", "..", "docs", "data.md"));
        string[] rows = Regex.Match(doc, @"```jsonl\n(.*?)```", RegexOptions.Singleline)
            .Groups[1].Value.Split('\n', StringSplitOptions.RemoveEmptyEntries);
        Assert.That(rows, Has.Length.EqualTo(7));
        foreach (string text in rows)
        {
            Row row = RowFile.Parse("rows.json", Encoding.UTF8.GetBytes($"[{text}]")).Rows.Single();
            RowVideo video = row.Videos.Single();
            Assert.That(row.Turns.Select(turn => turn.Content),
                Is.EqualTo((string[])["<video>\nWhat happens?", "A cat jumps."]), text);
            Assert.That(video.Path ?? string.Join(' ', video.Frames.Select(f => f.Path)),
                Is.AnyOf("1.png 2.png 3.png", "frames/jump", "jump.mp4"), text);
            Assert.That(video.Fps, Is.EqualTo(text.Contains("fps") ? 25 : null), text);
            Assert.That(video.TemporalIds,
                text.Contains("ids") ? Is.EqualTo((int[][])[[0, 5], [10]]) : Is.Null, text);
        }
    }
}
