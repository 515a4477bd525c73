using System.Globalization;
using System.Text;
using System.Text.Json;
using System.Text.RegularExpressions;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Data.Text;
using static MiniCpmNative.Engine.Data.RowValues;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// "objects" of a row, as ms-swift has it: texts for the &lt;ref-object&gt; tags and boxes, or
/// points, for the &lt;bbox&gt; tags of its turns, in order. A number is written as round(x / size
/// * 1000), half to even, with the size of the picture as it is stored; without a picture as it
/// stands.
/// </summary>
/// <param name="Names">For the &lt;ref-object&gt; tags.</param>
/// <param name="Boxes">x1, y1, x2, y2, or a point x, y.</param>
/// <param name="Pictures">Which picture each box is in; empty: all in the first.</param>
/// <param name="Range">What 1000 stands for: 1 or 1000; null for the picture's size.</param>
public sealed partial record Grounding(
    IReadOnlyList<string> Names, IReadOnlyList<double[]> Boxes, IReadOnlyList<int> Pictures,
    int? Range)
{
    internal static string[] Tags { get; } = ["<bbox>", "<ref-object>"];

    /// <exception cref="FormatException">It is something else.</exception>
    internal static Grounding? Read(JsonElement objects)
    {
        objects = Unfolded(objects);
        if (objects.SaysNothing()) return null;
        if (objects.ValueKind != JsonValueKind.Object)
            throw new FormatException(
                $"\"objects\" is {Kind(objects)}, expected {{\"ref\": [...], \"bbox\": [...]}}");
        string type = objects.Member("bbox_type").Text() ?? "real";
        return new Grounding(
            [.. objects.Member("ref").Items().Select(name => name.Text()
                ?? throw new FormatException($"\"objects\": a ref is {Kind(name)}, expected "
                    + "text"))],
            [.. objects.Member("bbox").Items().Select(Box)],
            [.. objects.Member("image_id").Items().Select(
                id => id.IsInt(out int picture) && picture >= 0
                ? picture : throw new FormatException(
                    $"\"objects\": an image_id is {Kind(id)}, expected a picture's number from "
                        + "0"))],
            type switch
            {
                "real" => null,
                "norm1" => 1,
                "norm1000" => 1000,
                _ => throw new FormatException($"\"objects\": bbox_type is {Messages.Quote(type)}, "
                    + "expected \"real\", \"norm1\" or \"norm1000\""),
            });
    }

    private static double[] Box(JsonElement box)
    {
        double[] numbers = [.. box.Items().Select(number =>
            number.ValueKind == JsonValueKind.Number && number.TryGetDouble(out double value)
                && double.IsFinite(value) && Math.Abs(value) < 1e9 ? value : double.NaN)];
        return numbers.Length is 2 or 4 && !numbers.Any(double.IsNaN) ? numbers
            : throw new FormatException("\"objects\": a bbox is "
                + (box.ValueKind == JsonValueKind.Array ? $"a list of {numbers.Length}" : Kind(box))
                + ", expected two or four numbers");
    }

    /// <summary>The row with its tags filled in.</summary>
    /// <param name="row">A row that has objects.</param>
    /// <param name="format">How a box is written.</param>
    /// <param name="size">The size of the row's picture of that index.</param>
    /// <exception cref="BadRowException">Tags and objects do not belong together.</exception>
    internal Row Fill(Row row, BoxFormat format, Func<int, PictureSize> size)
    {
        int name = 0, box = 0;
        var turns = row.Turns.Select((turn, i) => turn with
        {
            Content = Tag().Replace(turn.Content, match => match.Value == "<bbox>"
                ? box < Boxes.Count ? Written(row, box++, format, size)
                    : throw row.Bad($"has more <bbox> tags than boxes ({Boxes.Count})", i + 1)
                : name < Names.Count
                    ? format == BoxFormat.Tokens ? $"<ref>{Names[name++]}</ref>" : Names[name++]
                    : throw row.Bad("has more <ref-object> tags than refs "
                        + $"({Names.Count})", i + 1)),
        }).ToArray();
        if (box < Boxes.Count)
            throw row.Bad($"has {Boxes.Count} boxes, but only {box} <bbox> tags to show them");
        if (name < Names.Count)
            throw row.Bad($"has {Names.Count} refs, but only {name} <ref-object> tags to show "
                + "them");
        return row with { Turns = turns, Objects = null };
    }

    private string Written(Row row, int index, BoxFormat format, Func<int, PictureSize> size)
    {
        int picture = index < Pictures.Count ? Pictures[index] : 0;
        double width = 0, height = 0;
        if (row.Pictures.Count > 0)
        {
            if (picture >= row.Pictures.Count)
                throw row.Bad($"box {index + 1} is in picture {picture}, counted from 0; the row "
                    + $"has {row.Pictures.Count}");
            PictureSize of = Range is { } range ? new(range, range) : size(picture);
            (width, height) = (of.Width, of.Height);
        }

        double[] at = Boxes[index];
        long[] numbers = [.. at.Select((value, i) => Scaled(value, i % 2 == 0 ? width : height))];
        if (numbers.Length == 4)
            numbers =
            [
                Math.Min(numbers[0], numbers[2]), Math.Min(numbers[1], numbers[3]),
                Math.Max(numbers[0], numbers[2]), Math.Max(numbers[1], numbers[3]),
            ];
        if (format == BoxFormat.Tokens)
            return numbers.Length == 4 ? $"<box>{string.Join(' ', numbers)}</box>"
                : $"<point>{string.Join(' ', numbers)}</point>";
        var text = new StringBuilder("[");
        for (int i = 0; i < numbers.Length; i += 2)
            text.Append(i == 0 ? "" : ",").Append(CultureInfo.InvariantCulture,
                $"({numbers[i]},{numbers[i + 1]})");
        return text.Append(']').ToString();
    }

    private static long Scaled(double value, double size) =>
        (long)Math.Round(size == 0 ? value : value / size * 1000, MidpointRounding.ToEven);

    [GeneratedRegex("<bbox>|<ref-object>")]
    private static partial Regex Tag();
}
