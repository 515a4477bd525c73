using System.Text;
using static MiniCpmNative.Engine.Report.Html;

namespace MiniCpmNative.Engine.Report;

/// <summary>A line of a chart; points that are not finite break it.</summary>
/// <param name="Label">Its name in the legend.</param>
/// <param name="Colour">Which of the page's colours it has, from 0.</param>
/// <param name="Dashed">Whether it is the second of its colour.</param>
internal sealed record ChartLine(
    string Label, int Colour, bool Dashed, IReadOnlyList<(double X, double Y)> Points);

/// <summary>
/// How an axis of values goes: from 0, or logarithmic where the values are positive and span more
/// than a factor of 50.
/// </summary>
internal enum ChartAxis { FromZero, Fitted }

/// <summary>
/// A line chart as an inline SVG picture, in the page's colours. Of lines with more points than
/// there are pixels each pixel keeps its lowest and highest, so that no peak is lost; of lines with
/// few points each has a mark.
/// </summary>
internal static class LineChart
{
    private const int Width = 480, Height = 240, Left = 66, Right = 12, Top = 10, Bottom = 26;
    private const double Span = 50;
    private const int MostMarks = 40, MostPoints = 2 * (Width - Left - Right);

    /// <param name="title">What a screen reader says.</param>
    /// <param name="lines">What is drawn.</param>
    /// <param name="axis">Where values begin.</param>
    /// <param name="value">How a value is written.</param>
    public static string Draw(
        string title, IReadOnlyList<ChartLine> lines, ChartAxis axis, Func<double, string> value)
    {
        var points = lines.SelectMany(l => l.Points).Where(p => double.IsFinite(p.Y)).ToList();
        if (points.Count == 0) return "<p class=\"none\">no numbers</p>";
        double low = points.Min(p => p.Y), high = points.Max(p => p.Y);
        bool log = axis == ChartAxis.Fitted && low > 0 && high / low > Span;
        if (axis == ChartAxis.FromZero) low = Math.Min(low, 0);
        var ticks = log ? Decades(low, high) : Steps(low, high);
        (low, high) = (Math.Min(low, ticks[0]), Math.Max(high, ticks[^1]));
        double first = points.Min(p => p.X), last = Math.Max(points.Max(p => p.X), first + 1);
        var svg = new StringBuilder();
        svg.Append(Invariant($"<svg viewBox=\"0 0 {Width} {Height}\" role=\"img\" aria-label=\""))
            .Append(Text(title)).Append("\">");
        foreach (double tick in ticks)
        {
            svg.Append(Invariant($"<line class=\"grid\" x1=\"{Left}\" x2=\"{Width - Right}\" "))
                .Append(Invariant($"y1=\"{Y(tick):0.#}\" y2=\"{Y(tick):0.#}\"/>"))
                .Append(Invariant($"<text x=\"{Left - 6}\" y=\"{Y(tick) + 4:0.#}\" "))
                .Append($"text-anchor=\"end\">{Text(value(tick))}</text>");
        }

        foreach (double tick in Steps(first, last).Where(t => t >= first && t <= last
            && t == Math.Floor(t)))
            svg.Append(Invariant($"<text x=\"{X(tick):0.#}\" y=\"{Height - 8}\" "))
                .Append(Invariant($"text-anchor=\"middle\">{tick:#,0}</text>"));
        foreach (ChartLine line in lines) Append(line);
        return svg.Append("</svg>").ToString();

        double X(double x) =>
            Left + ((x - first) / (last - first) * (Width - Left - Right));
        double Y(double y)
        {
            double at = log ? Math.Log(y / low) / Math.Log(high / low)
                : high > low ? (y - low) / (high - low) : 0.5;
            return Height - Bottom - (at * (Height - Top - Bottom));
        }

        void Append(ChartLine line)
        {
            var path = new StringBuilder();
            bool pen = false;
            foreach (var (x, y) in Thinned(line.Points))
            {
                bool drawn = double.IsFinite(y);
                if (drawn) path.Append(Invariant($"{(pen ? 'L' : 'M')}{X(x):0.#} {Y(y):0.#}"));
                pen = drawn;
            }

            svg.Append($"<path class=\"line c{line.Colour}{(line.Dashed ? " dashed" : "")}\" ")
                .Append($"d=\"{path}\"/>");
            if (line.Points.Count > MostMarks) return;
            foreach (var (x, y) in Thinned(line.Points).Where(p => double.IsFinite(p.Y)))
                svg.Append(Invariant($"<circle class=\"c{line.Colour}\" cx=\"{X(x):0.#}\" "))
                    .Append(Invariant($"cy=\"{Y(y):0.#}\" r=\"3\"><title>"))
                    .Append(Text(Invariant($"{line.Label} step {x:#,0}: ").TrimStart()))
                    .Append(Text(value(y))).Append("</title></circle>");
        }
    }

    private static List<(double X, double Y)> Thinned(IReadOnlyList<(double X, double Y)> points)
    {
        if (points.Count <= MostPoints) return [.. points];
        var kept = new List<(double, double)>();
        int buckets = MostPoints / 2;
        for (int i = 0; i < buckets; i++)
        {
            int begin = (int)((long)i * points.Count / buckets);
            int end = (int)((long)(i + 1) * points.Count / buckets);
            int low = begin, high = begin;
            for (int j = begin; j < end; j++)
            {
                if (!(points[j].Y >= points[low].Y)) low = j;
                if (!(points[j].Y <= points[high].Y)) high = j;
            }

            kept.Add(points[Math.Min(low, high)]);
            if (low != high) kept.Add(points[Math.Max(low, high)]);
        }

        return kept;
    }

    /// <summary>Round numbers, 4 to 8 of them, around a range.</summary>
    private static List<double> Steps(double low, double high)
    {
        double range = high > low ? high - low : Math.Max(Math.Abs(high), 1e-12);
        double step = Math.Pow(10, Math.Floor(Math.Log10(range / 4)));
        step *= (range / step) switch { > 30 => 10, > 12 => 5, > 6 => 2, _ => 1 };
        var ticks = new List<double>();
        for (double i = Math.Floor(low / step); ticks.Count < 12; i++)
        {
            ticks.Add(i * step);
            if (i * step >= high) break;
        }

        return ticks;
    }

    private static List<double> Decades(double low, double high)
    {
        var ticks = new List<double>();
        int from = (int)Math.Floor(Math.Log10(low)), to = (int)Math.Ceiling(Math.Log10(high));
        for (int i = from, by = Math.Max(1, (to - from) / 6); ; i += by)
        {
            ticks.Add(Math.Pow(10, i));
            if (i >= to) return ticks;
        }
    }
}
