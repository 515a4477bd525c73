using System.Text.RegularExpressions;
using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// A row's turns with a placeholder at each picture's place, and the pictures in the order they stand
/// there. Strict: every picture is shown exactly once, in a user turn, and no text holds a token that
/// would be taken for structure. No line ends are added beyond the one behind a picture that has no
/// tag and goes to the front, as the inference processors write it.
/// </summary>
internal static partial class RowText
{
    private readonly record struct Place(int Turn, int At, int Length, int Picture);

    /// <param name="placeholder">Text of a picture and its number in the conversation.</param>
    /// <exception cref="BadRowException">A tag, a picture or a text is at fault.</exception>
    public static (ChatTurn[] Turns, int[] Pictures) Compose(
        Row row, Func<int, int, string> placeholder, string[] structural)
    {
        var places = Places(row);
        var turns = row.Turns.ToArray();
        CheckText(row, structural, places);
        for (int k = places.Count - 1; k >= 0; k--)
        {
            var (turn, at, length, picture) = places[k];
            string content = turns[turn].Content, text = placeholder(picture, k);
            turns[turn] = turns[turn] with
            {
                Content = content[..at] + text + (length == 0 ? "\n" : "") + content[(at + length)..],
            };
        }
        return (turns, [.. places.Select(place => place.Picture)]);
    }

    private static List<Place> Places(Row row)
    {
        var tags = Tags(row);
        if (row.Names == PictureNames.Tagged) return Tagged(row, tags);
        foreach (var tag in tags)
            if (Content(row, tag) is var text and not "<image>")
                throw row.Bad(row.Names == PictureNames.None
                    ? $"tag {text}, but the row has no \"image\""
                    : $"tag {text} names no picture: \"image\" is not {{\"{text}\": path}}", tag.Turn + 1);
        int pictures = row.Pictures.Count;
        if (tags.Count == 0)
            return [.. Enumerable.Range(0, pictures).Select(k => new Place(0, 0, 0, k))];
        if (pictures == 0)
            throw row.Bad("tag <image>, but the row has no \"image\"", tags[0].Turn + 1);
        if (tags.Count != pictures)
            throw row.Bad($"{tags.Count} <image> tags for {pictures} picture(s): each picture is shown "
                + "once", tags[Math.Min(pictures, tags.Count - 1)].Turn + 1);
        return [.. tags.Select((tag, k) => tag with { Picture = k })];
    }

    private static List<Place> Tagged(Row row, List<Place> tags)
    {
        var places = new List<Place>();
        foreach (var tag in tags)
        {
            string text = Content(row, tag);
            int picture = row.Pictures.Select(p => p.Tag).ToList().IndexOf(text);
            if (picture < 0)
                throw row.Bad($"tag {text} names no picture of \"image\"", tag.Turn + 1);
            if (places.Exists(place => place.Picture == picture))
                throw row.Bad($"tag {text} is there twice: each picture is shown once", tag.Turn + 1);
            places.Add(tag with { Picture = picture });
        }
        for (int k = 0; k < row.Pictures.Count; k++)
            if (!places.Exists(place => place.Picture == k))
                throw row.Bad($"picture {Messages.Quote(row.Pictures[k].Tag)} is shown nowhere: "
                    + "write its tag into a user turn");
        return places;
    }

    private static List<Place> Tags(Row row)
    {
        var tags = new List<Place>();
        for (int turn = 0; turn < row.Turns.Count; turn++)
            foreach (var match in Tag().EnumerateMatches(row.Turns[turn].Content))
            {
                if (row.Turns[turn].Role != "user")
                    throw row.Bad("an image tag stands in an answer; pictures are shown in user turns",
                        turn + 1);
                tags.Add(new Place(turn, match.Index, match.Length, -1));
            }
        return tags;
    }

    // Everything between the tags is the user's own text.
    private static void CheckText(Row row, string[] structural, List<Place> places)
    {
        for (int turn = 0; turn < row.Turns.Count; turn++)
        {
            string content = row.Turns[turn].Content;
            if (row.Turns[turn].Role == "assistant" && string.IsNullOrWhiteSpace(content))
                throw row.Bad("the answer is empty", turn + 1);
            int start = 0;
            foreach (var place in places.Where(place => place.Turn == turn))
            {
                Check(content.AsSpan(start, place.At - start), turn);
                start = place.At + place.Length;
            }
            Check(content.AsSpan(start), turn);
        }

        void Check(ReadOnlySpan<char> text, int turn)
        {
            foreach (string token in structural)
                if (text.Contains(token, StringComparison.Ordinal))
                    throw row.Bad($"the text holds the special token {token}, which would be taken for "
                        + "the model's own; take it out or write it in another way", turn + 1);
        }
    }

    private static string Content(Row row, Place tag) =>
        row.Turns[tag.Turn].Content.Substring(tag.At, tag.Length);

    [GeneratedRegex(@"<image(?:_\d+)?>")]
    private static partial Regex Tag();
}
