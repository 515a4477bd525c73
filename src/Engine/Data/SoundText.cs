using System.Text.RegularExpressions;
using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// Sounds in a row's turns: each &lt;audio&gt; of a user turn is one of them, in their order. Where
/// no turn has one, they go in front of the first question, behind its pictures, a line each.
/// </summary>
internal static partial class SoundText
{
    public const string Tag = "<audio>";

    /// <summary>The row with a tag for each of its sounds.</summary>
    /// <exception cref="BadRowException">Tags and sounds do not agree.</exception>
    public static Row Tagged(Row row)
    {
        if (row.Sounds.Count == 0) return row;
        var turns = row.Turns.ToArray();
        int tags = 0;
        for (int i = 0; i < turns.Length; i++)
        {
            int here = Tags().Count(turns[i].Content);
            if (here > 0 && turns[i].Role != "user")
                throw row.Bad($"the tag {Tag} stands in {RowText.Called(turns[i])}; "
                    + "sounds are heard in user turns", i + 1);
            tags += here;
        }

        if (tags == 0)
        {
            RowText.TagFirst(turns, Enumerable.Repeat(Tag, row.Sounds.Count));
            return row with { Turns = turns };
        }

        return tags == row.Sounds.Count ? row : throw row.Bad(
            $"{tags} {Tag} tags for {row.Sounds.Count} sound(s): each sound is heard once");
    }

    /// <summary>The turns with texts in the places of their tags.</summary>
    public static ChatTurn[] Filled(Row row, ChatTurn[] turns, Func<int, string> text)
    {
        if (row.Sounds.Count == 0) return turns;
        int next = 0;
        return [.. turns.Select(turn => turn.Role != "user" ? turn
            : turn with { Content = Tags().Replace(turn.Content, _ => text(next++)) })];
    }

    [GeneratedRegex(Tag)]
    private static partial Regex Tags();
}
