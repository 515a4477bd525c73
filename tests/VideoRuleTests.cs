using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>Which frames of a video are taken, as the families' own code takes them.</summary>
[TestFixture]
public sealed class VideoRuleTests
{
    private static readonly JsonElement s_sampling =
        ReferenceModel.Of("v45").Json("temporal.json").GetProperty("sampling");

    private static VideoRules Rules(string family) =>
        Families.All.Single(f => f.Name == family).Video!;

    [Test]
    public void V45TakesAndJoinsFramesAsItsReadMe()
    {
        int compared = 0;
        VideoRules rules = Rules("MiniCPM-V-4_5");
        JsonElement defaults = s_sampling.GetProperty("defaults");
        Assert.That((rules.MaxFrames, rules.MaxPacking, rules.Fps, rules.MaxSlices), Is.EqualTo((
            defaults.GetProperty("max_num_frames").GetInt32(),
            defaults.GetProperty("max_num_packing").GetInt32(),
            defaults.GetProperty("choose_fps_of_the_function").GetDouble(),
            defaults.GetProperty("chat").GetProperty("max_slice_nums").GetInt32())));
        foreach (JsonElement video in s_sampling.GetProperty("videos").EnumerateArray())
        {
            // Fails there.
            if (!video.TryGetProperty("packing", out JsonElement packing)) continue;
            JsonElement force = video.GetProperty("force_packing");
            VideoRules its = rules with
            {
                Fps = video.GetProperty("choose_fps").GetDouble(),
                MaxFrames = video.GetProperty("max_num_frames").GetInt32(),
                MaxPacking = video.GetProperty("max_num_packing").GetInt32(),
                Packing = force.ValueKind == JsonValueKind.Number && force.GetInt32() > 0
                    ? force.GetInt32() : null,
            };
            ChosenFrames chosen = its.Choose(
                video.GetProperty("video_frames").GetInt32(),
                video.GetProperty("video_fps").GetDouble());
            Assert.That(chosen.Packing, Is.EqualTo(packing.GetInt32()), $"{video}");
            Same(chosen.Frames, video.GetProperty("frame_index"), []);
            Dictionary<int, int[]> either =
                !video.TryGetProperty("equally_near", out JsonElement near)
                ? [] : near.EnumerateArray().ToDictionary(
                    pair => pair[0].GetInt32(), pair => ReferenceText.Ints(pair[1]));
            foreach (var (i, ids) in either)
                Assert.That(ids, Does.Contain(chosen.Ids![i]), $"{video}");
            Same(chosen.Ids!, video.GetProperty("temporal_ids"), either);
            compared++;
        }

        Assert.That(compared, Is.GreaterThan(30));
    }

    // Lists are whole, or have their ends and two sums.
    private static void Same(int[] found, JsonElement expected, Dictionary<int, int[]> but)
    {
        if (expected.TryGetProperty("all", out JsonElement all))
        {
            int[] list = ReferenceText.Ints(all);
            Assert.That(found, Has.Length.EqualTo(list.Length));
            for (int i = 0; i < list.Length; i++)
                if (!but.ContainsKey(i)) Assert.That(found[i], Is.EqualTo(list[i]), $"{i}");
            return;
        }

        if (but.Count > 0) return;
        Assert.That(found[..16], Is.EqualTo(ReferenceText.Ints(expected.GetProperty("first"))));
        Assert.That(found[^8..], Is.EqualTo(ReferenceText.Ints(expected.GetProperty("last"))));
        Assert.That(found.Sum(v => (long)v), Is.EqualTo(expected.GetProperty("sum").GetInt64()));
        Assert.That(found.Select((v, i) => (i + 1L) * v).Sum(),
            Is.EqualTo(expected.GetProperty("weighted_sum").GetInt64()));
    }

    [TestCase("MiniCPM-V-2_6")]
    [TestCase("MiniCPM-V-4")]
    [TestCase("MiniCPM-o-2_6")]
    [TestCase("MiniCPM-o-4_5")]
    public void TheOthersTakeAFrameOfEachSecond(string family)
    {
        VideoRules rules = Rules(family);
        foreach (JsonElement video in s_sampling.GetProperty("trainers").EnumerateArray())
            Same(rules.Choose(video.GetProperty("video_frames").GetInt32(),
                video.GetProperty("video_fps").GetDouble()).Frames,
                video.GetProperty("ms_swift").GetProperty("frame_index"), []);
    }

    [Test]
    public void NativeMembersTakeFramesAsTheirProcessor()
    {
        int compared = 0, stacked = 0;
        VideoRules rules = Rules("MiniCPM-V-4_7");
        foreach (JsonElement video in NativeCase.Of("v47").Json("video.json").GetProperty("choices")
            .EnumerateArray())
        {
            VideoRules its = rules with
            {
                MaxFrames = video.GetProperty("max_num_frames").GetInt32(),
                Stacked = video.GetProperty("stack_frames").GetInt32(),
            };
            ChosenFrames chosen = its.Choose(video.GetProperty("frames").GetInt32(),
                video.GetProperty("fps").GetDouble());
            // There the frames of each second stand in front, then all that lie between them; a
            // second of the video without any between is its last.
            var first = new List<int>();
            var between = new List<int>();
            int[] shown = chosen.Shown ?? [.. chosen.Frames.Select(_ => 1)];
            for (int picture = 0, at = 0; picture < shown.Length; at += shown[picture++])
                (its.Stacked == 1 || picture % 2 == 0 ? first : between).AddRange(
                    chosen.Frames[at..(at + shown[picture])]);
            Assert.That(first.Concat(between),
                Is.EqualTo(ReferenceText.Ints(video.GetProperty("indices"))), $"{video}");
            Assert.That(shown.Sum(), Is.EqualTo(chosen.Frames.Length));
            Assert.That(shown.Max(), Is.LessThanOrEqualTo(Math.Max(1, its.Stacked - 1)));
            compared++;
            if (its.Stacked > 1) stacked++;
        }

        Assert.That((compared, stacked), Is.EqualTo((100, 60)));
        Assert.That(rules.MaxFrames, Is.EqualTo(128));
    }

    // Those that stand in a list are chosen already.
    [Test]
    public void FramesWithoutARateAreAllTaken([Values("MiniCPM-V-2_6", "MiniCPM-V-4_5",
        "MiniCPM-V-4_6")] string family)
    {
        VideoRules rules = Rules(family) with { MaxFrames = 4 };
        Assert.That(rules.Choose(4, null).Frames, Is.EqualTo((int[])[0, 1, 2, 3]));
        ChosenFrames many = rules.Choose(24, null);
        if (family != "MiniCPM-V-4_5")
        {
            Assert.That(many.Frames, Is.EqualTo((int[])[3, 9, 15, 21]));
            return;
        }

        // Three of each group; at three frames a second, the tenths nearest to thirds.
        Assert.That((many.Frames.Length, many.Packing), Is.EqualTo((12, 3)));
        Assert.That(rules.Choose(4, null).Ids, Is.EqualTo((int[])[0, 3, 7, 10]));
        Assert.That(rules.Choose(9, null).Packing, Is.EqualTo(3));
        Assert.That((rules with { Packing = 2 }).Choose(4, null).Packing, Is.EqualTo(2));
    }

    [Test]
    public void SettingsGoBeforeTheFamilys()
    {
        var run = new TrainArguments
        {
            VideoFps = 2,
            VideoMaxFrames = 7,
            VideoMaxSliceNums = 3,
            VideoPacking = 5,
        };
        VideoRules rules = Rules("MiniCPM-V-4_5").Of(run);
        Assert.That((rules.Fps, rules.MaxFrames, rules.MaxSlices, rules.Packing, rules.MaxPacking),
            Is.EqualTo((2.0, 7, 3, 5, 5)));
        Assert.That(() => Rules("MiniCPM-V-2_6").Of(run), Throws.TypeOf<InputException>()
            .With.Message.StartsWith("video_packing: the model does not join frames"));
        run = new TrainArguments { VideoStackFrames = 3 };
        Assert.That(Rules("MiniCPM-V-4_6").Of(run).Stacked, Is.EqualTo(3));
        Assert.That(() => Rules("MiniCPM-V-4_5").Of(run), Throws.TypeOf<InputException>()
            .With.Message.StartsWith("video_stack_frames: the model does not show several"));
    }

    [Test]
    public void MembersWithoutVideoHaveNoRules() => Assert.That(
        Families.All.Where(family => family.Video is null).Select(family => family.Name),
        Is.EquivalentTo((string[])["MiniCPM-V-2", "MiniCPM-Llama3-V-2_5"]));
}
