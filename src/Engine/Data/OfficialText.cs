using System.Text.RegularExpressions;
using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// A row's turns as the official finetune/dataset.py writes them, for official_compat:
/// image numbers only for sliced pictures and counting only those, line ends around every tag of a
/// row with several pictures, features in the order of the "image" object whether shown or not.
/// </summary>
internal static partial class OfficialText
{
    /// <exception cref="BadRowException">
    /// The official script raises an error on the row.
    /// </exception>
    public static ChatTurn[] Compose(Row row, Func<int, int?, string> placeholder, bool[] sliced)
    {
        if (row.Names == PictureNames.None)
            throw row.Bad("has no \"image\", which the official script cannot read; "
                + "text-only rows work without official_compat");
        if (row.Names == PictureNames.Listed)
            throw row.Bad("\"image\" is a list, which the official script cannot read; use "
                + "{\"<image_00>\": path, ...} or leave official_compat out");
        if (row.Turns.Any(turn => turn.HasFunctions))
            throw row.Bad("has functions (tools, calls or their results), which the official "
                + "script does not know; leave official_compat out");
        if (row.Turns[0].Role == "system")
            throw row.Bad("has a system text, which the official script refuses; it works without "
                + "official_compat");
        if (row.Turns.Any(turn => turn is { Role: "assistant", Trained: false }))
            throw row.Bad("has an answer that is not learned, but the official script learns all; "
                + "leave official_compat out");
        int numbered = 0;
        var texts = new string[sliced.Length];
        for (int k = 0; k < texts.Length; k++)
            texts[k] = placeholder(k, sliced[k] ? numbered++ : null);
        return row.Names == PictureNames.Single ? Single(row, texts[0]) : Several(row, texts);
    }

    private static ChatTurn[] Single(Row row, string text)
    {
        var turns = row.Turns.ToArray();
        string first = turns[0].Content;
        turns[0] = turns[0] with
        {
            Content = first.Contains("<image>", StringComparison.Ordinal)
                ? first.Replace("<image>", text, StringComparison.Ordinal) : text + "\n" + first,
        };
        return turns;
    }

    private static ChatTurn[] Several(Row row, string[] texts)
    {
        var turns = row.Turns.ToArray();
        var pictures = row.Pictures.Zip(texts)
            .ToDictionary(pair => pair.First.Tag, pair => pair.Second, StringComparer.Ordinal);
        for (int turn = 0; turn < turns.Length; turn++)
        {
            var parts = Tag().Split(turns[turn].Content);
            for (int i = 1; i < parts.Length; i += 2)
                parts[i] = pictures.TryGetValue(parts[i], out string? text) ? text
                    : throw row.Bad($"tag {parts[i]} names no picture of \"image\"", turn + 1);
            turns[turn] = turns[turn] with { Content = string.Join('\n', parts) };
        }
        return turns;
    }

    [GeneratedRegex(@"(<image_\d+>)")]
    private static partial Regex Tag();
}
