using System.Globalization;
using System.Text;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// The text that stands for a picture:
/// [&lt;image_id&gt;k&lt;/image_id&gt;]&lt;image&gt;unk*Q&lt;/image&gt;, then for a sliced one a
/// line of &lt;slice&gt;unk*Q&lt;/slice&gt; per row of tiles; Q query tokens per view.
/// </summary>
internal static class Placeholder
{
    public const string ImageStart = "<image>", ImageEnd = "</image>";
    public const string SliceStart = "<slice>", SliceEnd = "</slice>";
    public const string IdStart = "<image_id>", IdEnd = "</image_id>";

    public static string Text(SlicePlan plan, int queries, int? id, string unknown)
    {
        var text = new StringBuilder();
        if (id is not null)
            text.Append(IdStart).Append(CultureInfo.InvariantCulture, $"{id}").Append(IdEnd);
        View(ImageStart, ImageEnd);
        for (int row = 0; row < (plan.Sliced ? plan.Rows : 0); row++)
        {
            if (row > 0) text.Append('\n');
            for (int column = 0; column < plan.Columns; column++) View(SliceStart, SliceEnd);
        }
        return text.ToString();

        void View(string start, string end) =>
            text.Append(start).Insert(text.Length, unknown, queries).Append(end);
    }
}
