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
    private readonly record struct Place(int Turn, int At, int Length, int Picture);

    /// <param name="placeholder">Text of a picture and its number in the conversation.</param>
    /// <exception cref="BadRowException">A tag, a picture or a text is at fault.</exception>
    public static (ChatTurn[] Turns, int[] Pictures) Compose(
        Row row, Func<int, int, string> placeholder, IReadOnlyList<string> markers)
    {
        var places = Places(row);
        var turns = row.Turns.ToArray();
        int next = 0;
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
                var (_, at, length, picture) = places[next];
                text.Append(Own(content.AsSpan(from, at - from), turn));
                text.Append(placeholder(picture, next)).Append(length == 0 ? "\n" : "");
                from = at + length;
            }
            text.Append(Own(content.AsSpan(from), turn));
            turns[turn] = turns[turn] with { Content = text.ToString() };
        }
        return (turns, [.. places.Select(place => place.Picture)]);

        // Everything between the tags is the user's own text.
        ReadOnlySpan<char> Own(ReadOnlySpan<char> text, int turn)
        {
            foreach (string token in markers)
                if (text.Contains(token, StringComparison.Ordinal))
                    throw row.Bad(
                        $"the text holds the special token {token}, which would be taken for "
                        + "the model's own; take it out or write it in another way", turn + 1);
            return text;
        }
    }

    private static List<Place> Places(Row row)
    {
        var tags = Tags(row);
        if (row.Names == PictureNames.Tagged) return Tagged(row, tags);
        foreach (var tag in tags)
            if (Content(row, tag) is var text and not "<image>")
                throw row.Bad(row.Names == PictureNames.None
                    ? $"tag {text}, but the row has no \"image\""
                    : $"tag {text} names no picture: \"image\" is not {{\"{text}\": path}}",
                        tag.Turn + 1);
        int pictures = row.Pictures.Count;
        if (tags.Count == 0)
        {
            int first = row.Turns[0].Role == "system" ? 1 : 0;
            return [.. Enumerable.Range(0, pictures).Select(k => new Place(first, 0, 0, k))];
        }

        if (pictures == 0)
            throw row.Bad("tag <image>, but the row has no \"image\"", tags[0].Turn + 1);
        if (tags.Count != pictures)
            throw row.Bad(
                $"{tags.Count} <image> tags for {pictures} picture(s): each picture is shown "
                + "once", tags[Math.Min(pictures, tags.Count - 1)].Turn + 1);
        return [.. tags.Select((tag, k) => tag with { Picture = k })];
    }

    private static List<Place> Tagged(Row row, List<Place> tags)
    {
        var pictures = row.Pictures.Select((picture, k) => (picture.Tag, k))
            .ToDictionary(item => item.Tag, item => item.k, StringComparer.Ordinal);
        var shown = new bool[row.Pictures.Count];
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
            places.Add(tag with { Picture = picture });
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
                if (row.Turns[turn].Role != "user")
                    throw row.Bad("an image tag stands in "
                        + row.Turns[turn].Role switch
                        {
                            "assistant" => "an answer",
                            "tool" => "a function's result",
                            _ => "the system text",
                        }
                        + "; pictures are shown in user turns", turn + 1);
                tags.Add(new Place(turn, match.Index, match.Length, -1));
            }
        return tags;
    }

    private static string Content(Row row, Place tag) =>
        row.Turns[tag.Turn].Content.Substring(tag.At, tag.Length);

    [GeneratedRegex(@"<image(?:_\d+)?>")]
    private static partial Regex Tag();
}
