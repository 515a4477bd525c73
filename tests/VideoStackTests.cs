using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Model;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>Frames of a second that are one picture (video_stack_frames).</summary>
[TestFixture]
public sealed class VideoStackTests
{
    private static readonly NativeCase s_case = NativeCase.Of("v47");
    private static readonly RowFormat s_format = ModelSpec.Read(s_case.Model).Rows();

    private string _folder = "";

    [SetUp]
    public void MakeFolder() =>
        _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void RemoveFolder() => Directory.Delete(_folder, recursive: true);

    // Sizes of the whole and corners of the frames are the processor's, bars and ground black.
    [Test]
    public void FramesAreJoinedAsTheProcessorJoinsThem()
    {
        JsonElement reference = s_case.Json("video.json");
        Assert.That(reference.GetProperty("joined_background").GetInt32(), Is.Zero);
        int compared = 0;
        foreach (JsonElement join in reference.GetProperty("joins").EnumerateArray())
        {
            int count = join.GetProperty("frames").GetInt32();
            int height = join.GetProperty("height").GetInt32();
            int width = join.GetProperty("width").GetInt32();
            int[] canvas = ReferenceText.Ints(join.GetProperty("canvas"));
            var expected = new byte[canvas[0] * canvas[1] * 3];
            JsonElement.ArrayEnumerator corners =
                join.GetProperty("top_left").EnumerateArray();
            int number = 0;
            foreach (JsonElement corner in corners)
            {
                int[] at = ReferenceText.Ints(corner);
                for (int y = 0; y < height; y++)
                    for (int i = 0; i < 3 * width; i++)
                        expected[((((at[0] + y) * canvas[1]) + at[1]) * 3) + i] =
                            Value(number, y, i);
                number++;
            }

            PictureSize[] sizes = [.. Enumerable.Repeat(new PictureSize(width, height), count)];
            using Picture whole = FrameMosaic.Join(Row("a"), sizes, frame =>
            {
                var picture = new Picture(width, height);
                for (int y = 0; y < height; y++)
                    for (int i = 0; i < 3 * width; i++) picture.Row(y)[i] = Value(frame, y, i);
                return picture;
            });
            Assert.That((whole.Height, whole.Width), Is.EqualTo((canvas[0], canvas[1])), $"{join}");
            Assert.That(whole.Rgb.SequenceEqual(expected), $"{join}");
            compared++;
        }

        Assert.That(compared, Is.EqualTo(25));

        static byte Value(int frame, int y, int i) =>
            (byte)(1 + (((frame * 50) + (y * 7) + i) % 251));
    }

    // Two seconds of three frames each: the first of a second, then the others as one, which here
    // are pasted together by hand, below each other with six black lines between.
    [Test]
    public void ARowShowsThemBehindTheFirstOfTheirSecond([Values] bool bySetting)
    {
        const int Width = 70, Height = 40, Stride = 212;
        Directory.CreateDirectory(Path.Combine(_folder, "a"));
        Directory.CreateDirectory(Path.Combine(_folder, "b"));
        var pixels = new byte[6][];
        for (int i = 0; i < 6; i++)
        {
            pixels[i] = new byte[Stride * Height];
            new Random(i).NextBytes(pixels[i]);
            VideoRowTests.Bmp(Path.Combine(_folder, "a", $"{i}.bmp"), Width, Height, pixels[i]);
        }

        // Rows of a BMP begin at the bottom.
        for (int second = 0; second < 2; second++)
        {
            int first = 3 * second;
            VideoRowTests.Bmp(Path.Combine(_folder, "b", $"{2 * second}.bmp"), Width, Height,
                pixels[first]);
            VideoRowTests.Bmp(Path.Combine(_folder, "b", $"{(2 * second) + 1}.bmp"), Width,
                (2 * Height) + 6,
                [.. pixels[first + 2], .. new byte[6 * Stride], .. pixels[first + 1]]);
        }

        RowFormat stacks = s_format with { Video = s_format.Video! with { Stacked = 3 } };
        TrainArguments run = s_case.Full with { VideoStackFrames = bySetting ? 3 : null };
        Batch found = Read("""{"frames":"a","fps":3}""", run, bySetting ? s_format : stacks);
        Batch expected = Read("\"b\"", s_case.Full, s_format);
        Assert.That(found.Grids.Count, Is.EqualTo(8));
        Assert.That(found.Tokens.Span.ToArray(), Is.EqualTo(expected.Tokens.Span.ToArray()));
        Assert.That(found.Patches.Span.SequenceEqual(expected.Patches.Span));
        Batch frames = Read("\"a\"", run, s_format);
        Assert.That(frames.Grids.Count, Is.EqualTo(12), "frames without a rate are chosen already");
    }

    [Test]
    public void DamagedFramesAndSizesThatDifferAreNamed()
    {
        Directory.CreateDirectory(Path.Combine(_folder, "a"));
        for (int i = 0; i < 6; i++)
            VideoRowTests.Bmp(Path.Combine(_folder, "a", $"{i}.bmp"), 20, i == 4 ? 31 : 30, i);
        TrainArguments run = s_case.Full with { VideoStackFrames = 3 };
        Assert.That(() => Read("""{"frames":"a","fps":3}""", run, s_format),
            Throws.TypeOf<BadRowException>().With.Message.Contains(
                "has frames of 20 x 31 and of 20 x 30, which are to be one picture"));

        string damaged = Path.Combine(_folder, "a", "4.bmp");
        VideoRowTests.Bmp(damaged, 20, 30, 4);
        File.WriteAllBytes(damaged, File.ReadAllBytes(damaged)[..500]);
        var rows = DataRows.Read(Data("""{"frames":"a","fps":3}"""), run, s_format);
        Assert.That(rows.Check(decode: true).Single().Bad!.Reason, Does.Contain("4.bmp"));
        Assert.That(rows.PictureFiles.Count(), Is.EqualTo(6));
    }

    private string Data(string video)
    {
        string path = Path.Combine(_folder, "rows.jsonl");
        string row = $$"""{"video":{{video}},"conversations":[{"role":"user","content":"<video>What?"},""";
        File.WriteAllText(path, row + """{"role":"assistant","content":"This."}]}""");
        return path;
    }

    private Batch Read(string video, TrainArguments run, RowFormat format)
    {
        var batch = new Batch();
        batch.Clear();
        DataRows.Read(Data(video), run, format).Append(0, batch);
        return batch;
    }

    private static Row Row(string path) =>
        new("rows.json", 1, null, PictureNames.None, [new RowPicture(RowVideo.Tag, path)], []);
}
