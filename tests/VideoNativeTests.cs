using System.Text;
using System.Text.Json;
using System.Text.Json.Nodes;
using System.Text.RegularExpressions;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Model;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Videos of the members that are models of transformers: text, positions and pixels as their
/// processor has them (tests/reference/v47/video; losses are in MiniCpmV47Tests).
/// </summary>
[TestFixture]
public sealed class VideoNativeTests
{
    private static readonly NativeCase s_case = NativeCase.Of("v47");
    private static readonly RowFormat s_v46 = ModelSpec.Read(V46.Model).Rows();
    private static readonly RowFormat s_format = ModelSpec.Read(s_case.Model).Rows();

    [Test]
    public void FramesOfARowAreTheProcessors()
    {
        string folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;
        try
        {
            var file = ReferenceFile.OpenAt(s_case.At("video"));
            WriteFrames(file, folder);
            string data = Path.Combine(folder, "rows.json");
            File.WriteAllText(data, """
                [{"video": ["0.bmp", "1.bmp", "2.bmp"], "conversations": [
                  {"role": "user", "content": "<video>\nDescribe it."},
                  {"role": "assistant", "content": "It moves."}]}]
                """);
            TrainArguments run = s_case.Full with { DataPath = data };
            var batch = new Batch();
            batch.Clear();
            DataRows.Read(run.DataPath!, run, s_format).Append(0, batch);
            Assert.That(batch.Tokens.Span.ToArray(), Is.EqualTo(Ints(file, "video.input_ids")));
            CanvasPlace[] places = batch.Places.Span.ToArray();
            Assert.That(places.Select(p => p.Text).Concat(places.Select(p => p.Row))
                .Concat(places.Select(p => p.Column)),
                    Is.EqualTo(Ints(file, "video.position_ids")));
            double[] expected = file.Doubles("video.pixel_u8_videos");
            int patches = expected.Length / (3 * 196);
            Assert.That(batch.Patches.Count, Is.EqualTo(expected.Length));
            for (int p = 0, at = 0; p < patches; p++)
                for (int c = 0; c < 3; c++)
                    for (int y = 0; y < 14; y++)
                        for (int x = 0; x < 14; x++, at++)
                            Assert.That(batch.Patches[at], Is.EqualTo((expected[
                                (((c * 14) + y) * patches * 14) + (p * 14) + x] / 127.5) - 1)
                                .Within(1e-6));
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }
    }

    /// <summary>The frames of the reference's video, as 0.bmp and so on.</summary>
    internal static void WriteFrames(ReferenceFile file, string folder)
    {
        int[] shape = file.Shape("video.frames.0");
        double[] values = file.Doubles("video.frames.0");
        (int height, int width) = (shape[1], shape[2]);
        int stride = ((3 * width) + 3) & ~3;
        for (int n = 0; n < shape[0]; n++)
        {
            var pixels = new byte[stride * height];
            for (int y = 0; y < height; y++)
                for (int x = 0; x < width; x++)
                    for (int c = 0; c < 3; c++)
                        pixels[((height - 1 - y) * stride) + (3 * x) + 2 - c] = (byte)values[
                            (((((n * height) + y) * width) + x) * 3) + c];
            VideoRowTests.Bmp(Path.Combine(folder, $"{n}.bmp"), width, height, pixels);
        }
    }

    [Test]
    public void PromptsAreTheProcessors()
    {
        int compared = 0;
        foreach (JsonElement call in s_case.Json("video.json").GetProperty("processor")
            .EnumerateArray())
        {
            string text = call.GetProperty("texts")[0].GetString()!;
            int[] ids = Prompt(s_format, text, Sizes(call),
                [.. call.GetProperty("videos").EnumerateArray().Select(v => Enumerable.Repeat(
                    new PictureSize(v[1].GetInt32(), v[2].GetInt32()),
                    v[0].GetInt32()).ToArray())]);
            Assert.That(s_format.Tokenizer.Decode(ids),
                Is.EqualTo(call.GetProperty("expanded")[0].GetString()));
            compared++;
        }

        Assert.That(compared, Is.EqualTo(2));
    }

    // Pictures count by themselves, and videos do; V-4_7 numbers pictures alone.
    [Test]
    public void V46NumbersVideos()
    {
        var size = new PictureSize(56, 56);
        string text = s_v46.Tokenizer.Decode(Prompt(s_v46,
            "<|im_start|>user\n<|video_pad|><|image_pad|><|video_pad|>Same?<|im_end|>", [size],
            [[size, size], [size]]));
        text = Regex.Replace(text, @"(<\|(image|video)_pad\|>)+", "$1");
        Assert.That(text, Does.Contain(
            "<image_id>0</image_id><image><|video_pad|></image><image><|video_pad|></image>"
            + "<image_id>0</image_id><image><|image_pad|></image>"
            + "<image_id>1</image_id><image><|video_pad|></image>Same?"));
    }

    // What the checkpoint's own file says goes before the class's numbers.
    [Test]
    public void TheVideoProcessorsFileIsRead()
    {
        string folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;
        try
        {
            foreach (string file in Directory.GetFiles(s_case.Model).Where(f =>
                !f.EndsWith("tensors")))
                File.Copy(file, Path.Combine(folder, Path.GetFileName(file)));
            Assert.That(s_format.Video!.MaxFrames, Is.EqualTo(128));
            VideoRules rules = With(("max_num_frames", 7), ("max_slice_nums", 3),
                ("scale_resolution", 224)).Video!;
            Assert.That((rules.MaxFrames, rules.MaxSlices, rules.Stacked), Is.EqualTo((7, 3, 1)));
            Assert.That(With(("stack_frames", 3)).Video!.Stacked, Is.EqualTo(3));
            Assert.That(With(("scale_resolution", 224)).SlicingOfFrames(2),
                Is.EqualTo(s_format.Slicing with { MaxSliceNums = 2, ScaleResolution = 224 }));
            Assert.That(With(("slice_mode", false)).Video!.MaxSlices, Is.EqualTo(1));
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }

        RowFormat With(params (string Key, JsonNode Value)[] changes)
        {
            string path = Path.Combine(folder, "processor_config.json");
            JsonNode json = JsonNode.Parse(
                File.ReadAllBytes(Path.Combine(s_case.Model, "processor_config.json")))!;
            foreach (var (key, value) in changes) json["video_processor"]![key] = value;
            File.WriteAllText(path, json.ToJsonString());
            return ModelSpec.Read(folder).Rows();
        }
    }

    private static int[] Prompt(
        RowFormat format, string text, PictureSize[] pictures, PictureSize[][] videos)
    {
        string content = Regex.Match(text, @"<\|im_start\|>user\n(.*?)<\|im_end\|>",
            RegexOptions.Singleline).Groups[1].Value
            .Replace("<|video_pad|>", "<video>").Replace("<|image_pad|>", "<image>");
        var json = new JsonObject
        {
            ["images"] = Names(pictures.Length),
            ["videos"] =
                new JsonArray([.. videos.Select(frames => (JsonNode)Names(frames.Length))]),
            ["messages"] = new JsonArray(
                new JsonObject { ["role"] = "user", ["content"] = content }),
        };
        Row row = RowFile.Parse("rows.json", Encoding.UTF8.GetBytes($"[{json.ToJsonString()}]"),
            new RowOptions(Asked: true)).Rows.Single();
        row = VideoFrames.Choose(row, format.Video, VideoDecoder.Default);
        SlicePlan[] plans = [.. pictures.Concat(videos.SelectMany(frames => frames))
            .Select(size => V46.Plan(format, size))];
        return new SampleBuilder(format, 4096).BuildPrompt(row, plans, 1).InputIds;

        static JsonArray Names(int count) =>
            new([.. Enumerable.Range(0, count).Select(i => (JsonNode)$"{i}.png")]);
    }

    private static PictureSize[] Sizes(JsonElement call) =>
        [.. call.GetProperty("picture_sizes").EnumerateArray().Select(s =>
            new PictureSize(s[0].GetInt32(), s[1].GetInt32()))];

    private static int[] Ints(ReferenceFile file, string name) =>
        [.. file.Doubles(name).Select(v => (int)v)];
}
