using System.Text.RegularExpressions;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;

namespace MiniCpmNative.Engine.Generate;

/// <summary>
/// Videos that are shown to a model: frames are chosen, joined and cut as those of rows are
/// (<see cref="VideoFrames"/>).
/// </summary>
/// <param name="model">Its name.</param>
/// <param name="format">Its rows.</param>
/// <param name="rules">How videos are shown; null where the model takes none.</param>
/// <param name="decoder">Decodes files.</param>
internal sealed class PromptVideos(
    string model, RowFormat format, VideoRules? rules, VideoDecoder decoder)
{
    // What one sends that came from elsewhere may cost: its frames are held until it is answered.
    private const int MostSeconds = 60;
    private const long MostBytes = 256 << 20;

    /// <summary>What is shown of a video, in order.</summary>
    /// <param name="video">Its frames, path or content.</param>
    /// <param name="name">Its name in messages.</param>
    /// <exception cref="InputException">It cannot be shown.</exception>
    public IReadOnlyList<PromptPicture> Open(RowVideo video, string name)
    {
        if (rules is null)
            throw new InputException($"{name}: {model} takes no videos: show some of its frames as "
                + "pictures");
        if (video.Bytes is null) return Shown(video, name, decoder);
        string folder = Directory.CreateTempSubdirectory("cpmx-video-").FullName;
        try
        {
            return Shown(video, name, decoder.In(folder, MostSeconds), folder);
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }
    }

    private List<PromptPicture> Shown(
        RowVideo video, string name, VideoDecoder decodes, string? fleeting = null) =>
        Named(name, () =>
        {
            // As a row that is beside what is asked.
            Row row = VideoFrames.Choose(
                new Row("video", 1, null, PictureNames.None, [], []) { Videos = [video] },
                rules, decodes);
            return Cut(fleeting is null ? row : Held(row, name), name);
        }, fleeting);

    // Without a row in messages, and without a folder that nobody knows.
    private static T Named<T>(string name, Func<T> make, string? fleeting = null)
    {
        try
        {
            return make();
        }
        catch (BadRowException bad)
        {
            string reason = bad.Row.Reason;
            if (fleeting is not null)
                reason = Regex.Replace(reason, Regex.Escape(fleeting) + "[^: ]*", "its content");
            throw new InputException(
                reason.StartsWith(name, StringComparison.Ordinal)
                    || reason.StartsWith(Path.GetFullPath(name), StringComparison.Ordinal)
                    ? reason : $"{name}: {reason}");
        }
    }

    // With its frames' content, as their files go.
    private static Row Held(Row row, string name)
    {
        long bytes = 0;
        return row with { Pictures = [.. row.Pictures.Select(Hold)] };

        RowPicture Hold(RowPicture frame, int number)
        {
            byte[] content = File.ReadAllBytes(frame.Path);
            bytes += content.Length;
            return bytes <= MostBytes ? frame with
            {
                Bytes = content,
                Path = $"{name}, frame {number + 1}",
                Beside = [.. frame.Beside.Select(beside => Hold(beside, number))],
            } : throw row.Bad($"has frames of more than {MostBytes >> 20} MiB: scale it down");
        }
    }

    private List<PromptPicture> Cut(Row row, string name)
    {
        SlicingSpec slicing = format.SlicingOfFrames(rules!.MaxSlices);
        SlicePlan[] plans = [.. row.Pictures.Select(
            (_, i) => slicing.Plan(DataRows.Probe(row, i).Size))];
        var shown = new List<PromptPicture>();
        foreach (int first in row.Videos[0].Shown(row))
        {
            DataRows.MustBeCutAlike(row, first, plans);
            IReadOnlyList<int>? times = row.Pictures[first].Times;
            PromptPicture[] group = [.. Enumerable.Range(first, times?.Count ?? 1).Select(Frame)];
            shown.Add(group[0] with { Times = times, Joined = group[1..] });
        }

        return shown;

        PromptPicture Frame(int i)
        {
            // What somebody sent is refused before others are answered beside it.
            if (row.Pictures[i].Bytes is not null) Decode().Dispose();
            return new(name, Decode, plans[i]) { IsFrame = true };

            Picture Decode() => Named(name, () => DataRows.Decode(row, i, format.OverWhite));
        }
    }
}
