using System.Text.RegularExpressions;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// Chooses the frames of rows' videos and puts them among the rows' pictures: behind this a frame
/// is a picture like others, checked and decoded as they are.
/// </summary>
internal static partial class VideoFrames
{
    // By their names, as whatever else lies in a folder is no frame.
    private static readonly string[] s_kinds =
        [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tga"];

    /// <summary>The row with its videos' frames.</summary>
    /// <param name="row">The row.</param>
    /// <param name="rules">The run's; null where the model takes no videos.</param>
    /// <param name="decoder">Decodes files.</param>
    /// <exception cref="BadRowException">A video cannot be used.</exception>
    public static Row Choose(Row row, VideoRules? rules, VideoDecoder decoder)
    {
        if (row.Videos.Count == 0) return row;
        if (rules is null)
            throw row.Bad("has a video, and the model takes none: show some of its frames as "
                + "pictures, \"image\": [...]");
        var pictures = row.Pictures.ToList();
        var videos = new List<RowVideo>();
        foreach (RowVideo video in row.Videos)
        {
            List<RowPicture> frames = Frames(row, video, rules, decoder);
            videos.Add(video with { First = pictures.Count, Count = frames.Count });
            pictures.AddRange(frames);
        }

        return row with { Pictures = pictures, Videos = videos };
    }

    private static List<RowPicture> Frames(
        Row row, RowVideo video, VideoRules rules, VideoDecoder decoder)
    {
        IReadOnlyList<RowPicture> all = video.Frames;
        string? file = null;
        if (video.Bytes is { } content) file = decoder.Store(content);
        else if (video.Path is { } named)
        {
            string path = row.Locate("video", named, p => Directory.Exists(p) || File.Exists(p));
            if (Directory.Exists(path)) all = InFolder(row, named, path);
            else file = path;
        }

        if (video.TemporalIds is { } groups)
        {
            if (rules.Rule != FrameRule.Packed)
                throw row.Bad("has \"temporal_ids\", and the model does not join frames: leave "
                    + "them out");
            if (file is not null || video.Fps is not null || groups.Sum(g => g.Length) != all.Count)
                throw row.Bad($"has {groups.Sum(g => g.Length)} \"temporal_ids\" "
                    + (file is null && video.Fps is null ? $"for {all.Count} frames"
                        : "beside a file or \"fps\"; they are given to frames one by one"));
            var given = all.ToList();
            for (int g = 0, at = 0; g < groups.Count; at += groups[g++].Length)
                given[at] = given[at] with { Times = groups[g] };
            return given;
        }

        ChosenFrames chosen;
        List<RowPicture> frames;
        if (file is null)
        {
            chosen = rules.Choose(all.Count, video.Fps);
            frames = [.. chosen.Frames.Select(i => all[i])];
        }
        else
        {
            if (video.Fps is not null)
                throw row.Bad($"gives \"fps\" to the file {Messages.Quote(video.Path!)}, which has "
                    + "its own: video_fps says how many frames of a second are taken");
            try
            {
                (chosen, string[] paths) = decoder.Decode(file, rules.Choose);
                frames = [.. paths.Select(path => new RowPicture(RowVideo.Tag, path))];
            }
            catch (InputException failure)
            {
                throw row.Bad(failure.Message);
            }
        }

        if (chosen.Ids is { } ids)
            for (int at = 0; at < frames.Count; at += chosen.Packing)
                frames[at] = frames[at] with
                {
                    Times = ids[at..Math.Min(at + chosen.Packing, frames.Count)],
                };
        return chosen.Shown is { } shown ? Together(frames, shown) : frames;
    }

    private static List<RowPicture> Together(List<RowPicture> frames, int[] shown)
    {
        var pictures = new List<RowPicture>();
        int at = 0;
        foreach (int count in shown)
        {
            pictures.Add(frames[at] with { Beside = frames[(at + 1)..(at + count)] });
            at += count;
        }

        return pictures;
    }

    private static RowPicture[] InFolder(Row row, string named, string path)
    {
        string[] files = [.. Directory.GetFiles(path).Where(file =>
            s_kinds.Contains(Path.GetExtension(file), StringComparer.OrdinalIgnoreCase)
                && !Path.GetFileName(file).StartsWith('.'))];
        if (files.Length == 0)
            throw row.Bad($"video {Messages.Quote(named)} is a folder without frames, expected "
                + "pictures in the order of their names");
        return [.. files.OrderBy(ByNumber, StringComparer.Ordinal)
            .ThenBy(file => file, StringComparer.Ordinal)
            .Select(file => new RowPicture(RowVideo.Tag, file))];
    }

    // frame2 before frame10.
    private static string ByNumber(string path) =>
        Digits().Replace(Path.GetFileName(path), digits => digits.Value.PadLeft(20, '0'));

    [GeneratedRegex("[0-9]+")]
    private static partial Regex Digits();
}
