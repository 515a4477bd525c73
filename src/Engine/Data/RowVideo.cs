using System.Text.Json;
using MiniCpmNative.Engine.Data.Text;
using static MiniCpmNative.Engine.Data.RowValues;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// A video of a row: its frames, each named, or where they are, a folder of pictures or a file.
/// Once its frames are chosen they stand among the row's pictures, behind those that are none.
/// </summary>
public sealed record RowVideo
{
    /// <summary>Says in a text where it stands.</summary>
    public const string Tag = "<video>";

    private const int MostId = 10_000_000;

    private static readonly string[] s_files =
        [".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv"];

    /// <summary>Its frames as the row names them; empty where <see cref="Path"/> says.</summary>
    public IReadOnlyList<RowPicture> Frames { get; init; } = [];

    /// <summary>A folder of frames or a video file, as the row has it.</summary>
    public string? Path { get; init; }

    /// <summary>The file's content where the row holds it; Path is a name of it then.</summary>
    public byte[]? Bytes { get; init; }

    /// <summary>Frames a second, of what is not a file; null where they are chosen
    /// already.</summary>
    public double? Fps { get; init; }

    /// <summary>
    /// Temporal ids as the row gives them, a list for each group of frames; null where times say.
    /// </summary>
    public IReadOnlyList<int[]>? TemporalIds { get; init; }

    /// <summary>The first of its chosen frames among the row's pictures.</summary>
    public int First { get; init; }

    /// <summary>Its chosen frames.</summary>
    public int Count { get; init; }

    /// <summary>Of the row's pictures, those that stand for a group of frames each.</summary>
    public IEnumerable<int> Shown(Row row)
    {
        for (int i = First; i < First + Count; i += row.Pictures[i].Times?.Count ?? 1)
            yield return i;
    }

    /// <summary>
    /// The videos under one of the keys; "video" alone holds one, whose list is its frames.
    /// </summary>
    /// <exception cref="FormatException">They are none.</exception>
    public static RowVideo[] Read(JsonElement row, IReadOnlyList<string> keys)
    {
        string[] said = [.. keys.Where(key => !row.Member(key).SaysNothing())];
        if (said.Length == 0) return [];
        if (said.Length > 1)
            throw new FormatException("has videos under both "
                + string.Join(" and ", said.Select(key => $"\"{key}\"")));
        JsonElement found = Unfolded(row.Member(said[0]));
        return found.ValueKind == JsonValueKind.Array && (said[0] != "video" || IsSeveral(found))
            ? [.. found.EnumerateArray().Select(Of)] : [Of(found)];
    }

    /// <summary>One video: a path, a list of frames, or {"frames", "fps",
    /// "temporal_ids"}.</summary>
    public static RowVideo Of(JsonElement video) => Of(video, default);

    /// <summary>The same, with a rate that stands beside it.</summary>
    public static RowVideo Of(JsonElement video, JsonElement fps)
    {
        if (!fps.IsNull()) return Of(video) with { Fps = Rate(fps) };
        video = Unfolded(video);
        switch (video.ValueKind)
        {
            case JsonValueKind.String when !video.SaysNothing():
                return Named(video);
            case JsonValueKind.Array when !video.SaysNothing():
                return new RowVideo
                {
                    Frames = [.. video.EnumerateArray().Select(frame => RowPictures.One(frame))],
                };
            case JsonValueKind.Object when video.Member("bytes").Text() is { Length: > 0 } content:
                return Embedded(content);
            case JsonValueKind.Object:
                JsonElement inner = video.Member("frames");
                foreach (string key in (string[])["video", "path", "url"])
                    if (inner.SaysNothing()) inner = video.Member(key);
                if (inner.SaysNothing() || Unfolded(inner).ValueKind == JsonValueKind.Object) break;
                return Of(inner) with
                {
                    Fps = Rate(video.Member("fps")),
                    TemporalIds = Ids(Unfolded(video.Member("temporal_ids"))),
                };
        }

        throw new FormatException($"a video is {Kind(video)}, expected a list of frames, a path of "
            + "a folder or a file, or {\"frames\", \"fps\"}");
    }

    // A list of videos, not of one's frames.
    private static bool IsSeveral(JsonElement list) => list.ValueKind == JsonValueKind.Array
        && list.EnumerateArray().All(item => item.ValueKind == JsonValueKind.Array
            || (item.ValueKind == JsonValueKind.Object && item.TryGetProperty("frames", out _))
            || s_files.Contains(System.IO.Path.GetExtension(item.Text()),
                StringComparer.OrdinalIgnoreCase));

    private static RowVideo Named(JsonElement video)
    {
        string path = video.GetString()!;
        if (path.StartsWith("data:", StringComparison.OrdinalIgnoreCase))
        {
            int comma = path.IndexOf(',');
            return comma > 0
                && path.AsSpan(0, comma).EndsWith(";base64", StringComparison.OrdinalIgnoreCase)
                ? Embedded(path[(comma + 1)..])
                : throw new FormatException("a video is a data: URI that is not of base64");
        }

        if (path.StartsWith("file://", StringComparison.OrdinalIgnoreCase))
            return new RowVideo { Path = path["file://".Length..] };
        return path.AsSpan(0, Math.Min(path.Length, 12)).Contains("://", StringComparison.Ordinal)
            ? throw new FormatException($"video {Messages.Quote(path)} is an address on the "
                + "network: download it, and name the file") : new RowVideo { Path = path };
    }

    private static RowVideo Embedded(string base64)
    {
        var bytes = new byte[(base64.Length / 4 * 3) + 3];
        if (!Convert.TryFromBase64String(base64, bytes, out int length))
            throw new FormatException("a video's content is not base64");
        Array.Resize(ref bytes, length);
        return new RowVideo
        {
            Bytes = bytes,
            Path = $"embedded video of {Messages.Number(length)} bytes",
        };
    }

    private static double? Rate(JsonElement fps)
    {
        if (fps.IsNull()) return null;
        return fps.ValueKind == JsonValueKind.Number
            && fps.GetDouble() is > 0 and <= 1000 and var rate
            ? rate : throw new FormatException(
                $"a video's \"fps\" is {(fps.ValueKind == JsonValueKind.Number ? fps.GetRawText()
                    : Kind(fps))}, expected frames a second, above 0 and at most 1000");
    }

    private static IReadOnlyList<int[]>? Ids(JsonElement groups)
    {
        if (groups.IsNull()) return null;
        var ids = new List<int[]>();
        if (groups.ValueKind == JsonValueKind.Array)
            foreach (JsonElement group in groups.EnumerateArray())
            {
                if (group.ValueKind != JsonValueKind.Array || group.GetArrayLength() == 0) break;
                int[] one = [.. group.EnumerateArray().Select(id => id.ValueKind
                    == JsonValueKind.Number && id.TryGetInt32(out int value) ? value : -2)];
                if (one.Any(id => id is < -1 or > MostId)) break;
                ids.Add(one);
            }

        return ids.Count > 0 && ids.Count == groups.GetArrayLength() ? ids
            : throw new FormatException("a video's \"temporal_ids\" are expected to be a list for "
                + $"each group of frames, of whole numbers from -1 to {MostId}");
    }

}
