using System.Text;
using System.Text.RegularExpressions;
using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// A row's turns with a placeholder at each picture's place, and the pictures in the order they
/// stand there. Strict: every picture is shown exactly once, in a user turn, and no text holds a
/// token that would be taken for structure. No line ends are added beyond the one behind a picture
/// that has no tag and goes to the front, as the inference processors write it.
/// </summary>
internal static partial class RowText
{
    private const string VideoTag = RowVideo.Tag;

    // Item is a picture of the row, or a video of it.
    private readonly record struct Place(
        int Turn, int At, int Length, int Item, bool IsVideo = false);

    /// <param name="placeholder">Text of a picture, or of the video whose frames begin with it, and
    /// its number among the pictures, or the videos, of the conversation.</param>
    /// <exception cref="BadRowException">A tag, a picture or a text is at fault.</exception>
    public static (ChatTurn[] Turns, int[] Pictures) Compose(
        Row row, Func<int, int, string> placeholder, IReadOnlyList<string> markers)
    {
        var places = Places(row);
        var turns = row.Turns.ToArray();
        int next = 0, videos = 0;
        for (int turn = 0; turn < turns.Length; turn++)
        {
            string content = turns[turn].Content;
            if (turns[turn].Role == "assistant" && string.IsNullOrWhiteSpace(content)
                && !turns[turn].HasFunctions)
                throw row.Bad("the answer is empty", turn + 1);
            if (turns[turn].HasFunctions)
                foreach (string part in turns[turn].Texts) _ = Own(part, turn);
            var text = new StringBuilder();
            int from = 0;
            for (; next < places.Count && places[next].Turn == turn; next++)
            {
                var (_, at, length, item, isVideo) = places[next];
                int picture = isVideo ? row.Videos[item].First : item;
                text.Append(Own(content.AsSpan(from, at - from), turn));
                text.Append(placeholder(
                    picture, places[next].IsVideo ? videos++ : next - videos));
                if (length == 0) text.Append('\n');
                from = at + length;
            }
            text.Append(Own(content.AsSpan(from), turn));
            turns[turn] = turns[turn] with { Content = text.ToString() };
        }
        return (turns, [.. places.SelectMany(place => place.IsVideo
            ? row.Videos[place.Item].Shown(row) : [place.Item])]);

        // Everything between the tags is the user's own text.
        ReadOnlySpan<char> Own(ReadOnlySpan<char> text, int turn)
        {
            return Marker(text, markers) is { } problem ? throw row.Bad(problem, turn + 1) : text;
        }
    }

    /// <summary>What is wrong with a text that holds a token of the model's; null where it holds
    /// none.</summary>
    public static string? Marker(ReadOnlySpan<char> text, IReadOnlyList<string> markers)
    {
        foreach (string token in markers)
            if (text.Contains(token, StringComparison.Ordinal))
                return $"the text holds the special token {token}, which would be taken for the "
                    + "model's own; take it out or write it in another way";
        return null;
    }

    // What has no tag goes to the front, pictures first.
    private static List<Place> Places(Row row)
    {
        ILookup<bool, Place> tags = Tags(row).ToLookup(tag => Content(row, tag) == VideoTag);
        List<Place> videos = InOrder(row, [.. tags[true]], row.Videos.Count, VideoTag, "video");
        if (videos.Count == 0) return Pictures(row, [.. tags[false]]);
        return [.. Pictures(row, [.. tags[false]])
            .Concat(videos.Select(video => video with { IsVideo = true }))
            .OrderBy(place => place.Turn).ThenBy(place => place.At).ThenBy(place => place.Length)];
    }

    private static List<Place> Pictures(Row row, List<Place> tags)
    {
        if (row.Names == PictureNames.Tagged) return Tagged(row, tags);
        foreach (var tag in tags)
            if (Content(row, tag) is var text and not "<image>")
                throw row.Bad(row.Names == PictureNames.None
                    ? $"tag {text}, but the row has no \"image\""
                    : $"tag {text} names no picture: \"image\" is not {{\"{text}\": path}}",
                        tag.Turn + 1);
        return InOrder(row, tags, row.Stills, "<image>", "image");
    }

    private static List<Place> InOrder(
        Row row, List<Place> tags, int count, string text, string key)
    {
        if (tags.Count == 0)
        {
            int first = row.Turns[0].Role == "system" ? 1 : 0;
            return [.. Enumerable.Range(0, count).Select(k => new Place(first, 0, 0, k))];
        }

        if (count == 0)
            throw row.Bad($"tag {text}, but the row has no \"{key}\"", tags[0].Turn + 1);
        string what = key == "image" ? "picture" : key;
        if (tags.Count != count)
            throw row.Bad(
                $"{tags.Count} {text} tags for {count} {what}(s): each {what} is shown once",
                tags[Math.Min(count, tags.Count - 1)].Turn + 1);
        return [.. tags.Select((tag, k) => tag with { Item = k })];
    }

    private static List<Place> Tagged(Row row, List<Place> tags)
    {
        var pictures = row.Pictures.Take(row.Stills).Select((picture, k) => (picture.Tag, k))
            .ToDictionary(item => item.Tag, item => item.k, StringComparer.Ordinal);
        var shown = new bool[row.Stills];
        var places = new List<Place>();
        foreach (var tag in tags)
        {
            string text = Content(row, tag);
            if (!pictures.TryGetValue(text, out int picture))
                throw row.Bad($"tag {text} names no picture of \"image\"", tag.Turn + 1);
            if (shown[picture])
                throw row.Bad($"tag {text} is there twice: each picture is shown once",
                    tag.Turn + 1);
            shown[picture] = true;
            places.Add(tag with { Item = picture });
        }
        int missing = Array.IndexOf(shown, false);
        return missing < 0 ? places
            : throw row.Bad(
                $"picture {Messages.Quote(row.Pictures[missing].Tag)} is shown nowhere: "
                + "write its tag into a user turn");
    }

    private static List<Place> Tags(Row row)
    {
        var tags = new List<Place>();
        for (int turn = 0; turn < row.Turns.Count; turn++)
            foreach (var match in Tag().EnumerateMatches(row.Turns[turn].Content))
            {
                bool video = row.Turns[turn].Content.AsSpan(match.Index, match.Length) is VideoTag;
                if (row.Turns[turn].Role != "user")
                {
                    // Where there is none, it is a word like others.
                    if (video && row.Videos.Count == 0) continue;
                    throw row.Bad((video ? "a video tag" : "an image tag") + " stands in "
                        + Called(row.Turns[turn]) + $"; {(video ? "videos" : "pictures")} are "
                        + "shown in user turns", turn + 1);
                }

                tags.Add(new Place(turn, match.Index, match.Length, -1));
            }
        return tags;
    }

    /// <summary>What a turn is that shows nothing, in messages.</summary>
    public static string Called(ChatTurn turn) => turn.Role switch
    {
        "assistant" => "an answer",
        "tool" => "a function's result",
        _ => "the system text",
    };

    /// <summary>Puts tags in front of the first question, a line each.</summary>
    public static void TagFirst(ChatTurn[] turns, IEnumerable<string> tags)
    {
        int first = turns[0].Role == "system" ? 1 : 0;
        turns[first] = turns[first] with
        {
            Content = string.Concat(tags.Select(tag => tag + "\n")) + turns[first].Content,
        };
    }

    private static string Content(Row row, Place tag) =>
        row.Turns[tag.Turn].Content.Substring(tag.At, tag.Length);

    [GeneratedRegex(@"<image(?:_\d+)?>|<video>")]
    private static partial Regex Tag();
}
