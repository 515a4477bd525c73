using System.Text;
using static MiniCpmNative.Engine.Report.Html;

namespace MiniCpmNative.Engine.Report;

/// <summary>
/// report.html: one run, or several side by side, as a single page that needs nothing else: its
/// style is in it, its pictures are inline, and it runs no script. All that comes from a run's
/// files is escaped.
/// </summary>
internal sealed partial class ReportPage
{
    private const int Colours = 8, MostMessages = 200;

    private readonly IReadOnlyList<RunRecord> _runs;
    private readonly StringBuilder _html = new();

    private ReportPage(IReadOnlyList<RunRecord> runs) => _runs = runs;

    /// <summary>The page of these runs.</summary>
    public static string Of(IReadOnlyList<RunRecord> runs) => new ReportPage(runs).Page();

    private string Page()
    {
        string title = _runs.Count == 1
            ? _runs[0].Name : $"{_runs.Count} runs: {string.Join(", ", _runs.Select(r => r.Name))}";
        _html.Append("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">")
            .Append("<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; ")
            .Append("style-src 'unsafe-inline'; img-src data:\">")
            .Append("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">")
            .Append($"<title>{Text(title)}</title><style>{Style()}</style></head><body>\n")
            .Append($"<h1>{Text(title)}</h1>\n");
        if (_runs.Count == 1) Head(_runs[0]);
        else Overview();
        Charts();
        Evaluations();
        foreach (RunRecord run in _runs) Samples(run);
        foreach (RunRecord run in _runs) Data(run);
        foreach (RunRecord run in _runs) Messages(run);
        if (_runs.Count > 1) Differences();
        foreach (RunRecord run in _runs) Settings(run);
        return _html.Append("</body></html>\n").ToString();
    }

    private void Head(RunRecord run)
    {
        _html.Append($"<p class=\"soft\">{Text(Outcome(run))}</p>\n<div class=\"tiles\">");
        foreach (var (name, value) in Figures(run))
            _html.Append($"<div class=\"card tile\"><b>{Text(value)}</b>")
                .Append($"<span>{Text(name)}</span></div>");
        _html.Append("</div>\n");
    }

    private void Overview()
    {
        List<(RunRecord Run, List<(string Name, string Value)> Figures)> all =
            [.. _runs.Select(run => (run, Figures(run).ToList()))];
        string[] names = [.. all.SelectMany(r => r.Figures.Select(f => f.Name)).Distinct()];
        _html.Append("<div class=\"card scroll\"><table><tr><th>run</th>");
        foreach (string name in names) _html.Append($"<th class=\"n\">{Text(name)}</th>");
        _html.Append("</tr>");
        foreach (var ((run, figures), i) in all.Select((r, i) => (r, i)))
        {
            _html.Append("<tr><td class=\"name\"><span class=\"legend "
                + $"c{i % Colours}\"><span><i></i>")
                .Append($"{Text(run.Name)}</span></span></td>");
            foreach (string name in names)
                _html.Append("<td class=\"n\">")
                    .Append(Text(figures.Find(f => f.Name == name).Value ?? "")).Append("</td>");
            _html.Append("</tr>");
        }

        _html.Append("</table></div>\n");
    }

    private static string Outcome(RunRecord run)
    {
        double steps = LastStep(run);
        string model = run.Setting("model_name_or_path") is { } path
            ? $" of {Path.GetFileName(Path.TrimEndingDirectorySeparator(path))}" : "";
        string kind = run.Setting("use_lora") == "true"
            ? "Adapters" + model : "Full fine-tuning" + model;
        return run.Series("train_runtime").Count > 0
            ? Invariant($"{kind}: done after {steps:N0} steps")
            : Invariant($"{kind}: not at its end, {steps:N0} steps so far");
    }

    private static IEnumerable<(string Name, string Value)> Figures(RunRecord run)
    {
        yield return ("steps", Invariant($"{LastStep(run):N0}"));
        foreach (var (key, name, write) in (IEnumerable<(string, string, Func<double, string>)>)[
            ("loss", "loss, last", Number), ("train_loss", "loss, mean", Number),
            ("eval_loss", "evaluation loss, last", Number),
            ("eval_token_accuracy", "tokens right", Percent),
            ("eval_answer_accuracy", "whole answers right", Percent),
            ("train_runtime", "time", Duration)])
            if (double.IsFinite(run.Last(key))) yield return (name, write(run.Last(key)));
        if (run.Series("tokens_per_second") is { Count: > 0 } speed)
        {
            double[] sorted = [.. speed.Select(s => s.Value).Order()];
            yield return ("tokens/s, median", Invariant($"{sorted[sorted.Length / 2]:N0}"));
        }

        if (run.Series("memory_bytes") is { Count: > 0 } memory)
            yield return ("memory, most", Gib(memory.Max(m => m.Value)));
    }

    private void Charts()
    {
        _html.Append("<h2>Steps</h2><div class=\"charts\">\n");
        Chart("Loss", ChartAxis.Fitted, Number, ("loss", "training"), ("eval_loss", "evaluation"));
        Chart("Learning rate", ChartAxis.FromZero, Number, ("learning_rate", ""));
        Chart("Gradient norm", ChartAxis.Fitted, Number, ("grad_norm", ""));
        Chart("Tokens per second", ChartAxis.FromZero, y => Invariant($"{y:N0}"),
            ("tokens_per_second", ""));
        // In its unit, so that the axis has round numbers.
        double most = _runs.SelectMany(r => r.Series("memory_bytes")).Select(p => p.Value)
            .DefaultIfEmpty(0).Max(), unit = most >= 1 << 30 ? 1 << 30 : 1 << 20;
        Chart("Memory", ChartAxis.FromZero, y => Gib(y * unit), unit, ("memory_bytes", ""));
        Chart("Right answers of the evaluation", ChartAxis.FromZero, Percent,
            ("eval_token_accuracy", "tokens"), ("eval_answer_accuracy", "whole answers"));
        foreach (string name in EvaluationNames().Where(n => n is not ("eval_loss"
            or "eval_token_accuracy" or "eval_answer_accuracy")))
            Chart(name["eval_".Length..].Replace('_', ' '), ChartAxis.FromZero, Number,
                (name, ""));
        _html.Append("</div>\n");
    }

    private void Chart(
        string title, ChartAxis axis, Func<double, string> value,
        params (string Name, string Label)[] series) => Chart(title, axis, value, 1, series);

    private void Chart(
        string title, ChartAxis axis, Func<double, string> value, double unit,
        params (string Name, string Label)[] series)
    {
        var lines = new List<ChartLine>();
        for (int r = 0; r < _runs.Count; r++)
        {
            for (int s = 0; s < series.Length; s++)
            {
                List<(double, double)> points =
                    [.. _runs[r].Series(series[s].Name).Select(p => (p.Step, p.Value / unit))];
                if (points.Count == 0) continue;
                string label = _runs.Count == 1 ? series[s].Label
                    : series.Length == 1 ? _runs[r].Name : $"{_runs[r].Name}, {series[s].Label}";
                int colour = _runs.Count == 1 ? s : r;
                lines.Add(new ChartLine(label, colour % Colours, s > 0, points));
            }
        }

        if (lines.Count == 0) return;
        _html.Append($"<div class=\"card\"><h3>{Text(title)}</h3>")
            .Append(LineChart.Draw(title, lines, axis, value));
        if (lines.Any(l => l.Label.Length > 0))
        {
            _html.Append("<div class=\"legend\">");
            foreach (ChartLine line in lines)
                _html.Append($"<span class=\"c{line.Colour}\"><i{(line.Dashed
                    ? " class=\"dashed\"" : "")}></i>{Text(line.Label)}</span>");
            _html.Append("</div>");
        }

        _html.Append("</div>\n");
    }

    private string[] EvaluationNames() => [.. _runs.SelectMany(r => r.Names).Distinct()
        .Where(n => n.StartsWith("eval_", StringComparison.Ordinal)
            && !n.StartsWith("eval_rows", StringComparison.Ordinal)
            && n is not ("eval_runtime" or "eval_samples_per_second"))];

    private static double LastStep(RunRecord run) => run.Names
        .SelectMany(run.Series).Select(p => p.Step).DefaultIfEmpty(0).Max();

    private static string Style()
    {
        using var css = new StreamReader(
            typeof(ReportPage).Assembly.GetManifestResourceStream("report.css")!);
        return css.ReadToEnd();
    }

    private static string Number(double value) => !double.IsFinite(value) ? "none"
        : value == 0 ? "0"
        : Math.Abs(value) is < 1e-3 or >= 1e5 ? Invariant($"{value:0.##e+0}")
        : Math.Abs(value) < 10 ? Invariant($"{value:0.####}") : Invariant($"{value:#,0.##}");

    private static string Percent(double value) => Invariant($"{100 * value:0.#} %");

    private static string Gib(double bytes) => bytes >= 1 << 30
        ? Invariant($"{bytes / (1 << 30):0.##} GiB") : Invariant($"{bytes / (1 << 20):0} MiB");

    private static string Duration(double seconds) => seconds < 120
        ? Invariant($"{seconds:0.#} s")
        : seconds < 7200 ? Invariant($"{seconds / 60:0.#} min")
        : Invariant($"{seconds / 3600:0.#} h");
}
