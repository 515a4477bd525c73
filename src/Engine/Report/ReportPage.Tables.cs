using static MiniCpmNative.Engine.Report.Html;

namespace MiniCpmNative.Engine.Report;

/// <summary>What is said in words and tables.</summary>
internal sealed partial class ReportPage
{
    private const int MostSamples = 24, MostPictures = 4;

    private void Evaluations()
    {
        string[] names = EvaluationNames();
        if (names.Length == 0) return;
        _html.Append("<h2>Evaluations</h2><div class=\"card scroll\"><table><tr>");
        if (_runs.Count > 1) _html.Append("<th>run</th>");
        _html.Append("<th class=\"n\">step</th>");
        foreach (string name in names)
            _html.Append($"<th class=\"n\">{Text(name["eval_".Length..].Replace('_', ' '))}</th>");
        _html.Append("</tr>");
        foreach (RunRecord run in _runs)
        {
            foreach (double step in names.SelectMany(run.Series).Select(p => p.Step).Distinct()
                .Order())
            {
                _html.Append("<tr>");
                if (_runs.Count > 1) _html.Append($"<td class=\"name\">{Text(run.Name)}</td>");
                _html.Append(Invariant($"<td class=\"n\">{step:N0}</td>"));
                foreach (string name in names)
                {
                    var found = run.Series(name).Where(p => p.Step == step).ToList();
                    string value = found.Count == 0 ? ""
                        : name.EndsWith("_accuracy", StringComparison.Ordinal)
                            ? Percent(found[^1].Value) : Number(found[^1].Value);
                    _html.Append($"<td class=\"n\">{Text(value)}</td>");
                }

                _html.Append("</tr>");
            }
        }

        _html.Append("</table></div>\n");
    }

    private void Samples(RunRecord run)
    {
        if (run.Samples.Count == 0) return;
        Heading("Answers", run);
        _html.Append("<div class=\"samples\">");
        var rows = run.Samples.GroupBy(s => s.Row).ToList();
        foreach (var row in rows.Take(MostSamples))
        {
            SampleAnswer first = row.First(), last = row.Last();
            _html.Append($"<div class=\"card\"><h3>{Text(first.Id)}</h3>");
            foreach (string picture in first.Pictures.Take(MostPictures))
                _html.Append(Thumbnail.Read(picture) is { } data
                    ? $"<img alt=\"{Text(Path.GetFileName(picture))}\" src=\"{data}\">"
                    : $"<p class=\"soft\">{Text(picture)}: cannot be read</p>");
            if (first.Question.Length > 0)
                _html.Append($"<p class=\"text\">{Text(first.Question)}</p>");
            _html.Append("<table>");
            if (first.Expected.Length > 0) Row("expected", first.Expected);
            Row(Invariant($"step {first.Step:N0}"), first.Answer);
            if (last.Step != first.Step) Row(Invariant($"step {last.Step:N0}"), last.Answer);
            _html.Append("</table></div>\n");
        }

        _html.Append("</div>\n");
        if (rows.Count > MostSamples)
            _html.Append(Invariant(
                $"<p class=\"soft\">and {rows.Count - MostSamples:N0} more in the log</p>\n"));

        void Row(string name, string answer) => _html.Append($"<tr><th>{Text(name)}</th>")
            .Append($"<td class=\"text\">{Text(answer)}</td></tr>");
    }

    private void Data(RunRecord run)
    {
        var kinds = new (string Key, string Name)[]
        {
            ("rows", "training rows"), ("eval_rows", "evaluation rows"),
        }.Where(k => run.Series(k.Key).Count > 0).ToList();
        if (kinds.Count == 0) return;
        Heading("Data", run);
        _html.Append("<div class=\"card scroll\"><table><tr><th></th><th class=\"n\">rows</th>")
            .Append("<th class=\"n\">left out</th><th class=\"n\">cut</th>")
            .Append("<th class=\"n\">answers cut</th><th class=\"n\">pictures</th>")
            .Append("<th class=\"n\">pictures turned</th></tr>");
        foreach (var (key, name) in kinds)
        {
            _html.Append($"<tr><td>{Text(name)}</td>");
            foreach (string part in (string[])["", "_left_out", "_cut", "_answers_cut",
                "_pictures", "_pictures_turned"])
            {
                double value = run.Last(key + part);
                _html.Append("<td class=\"n\">")
                    .Append(double.IsFinite(value) ? Invariant($"{value:N0}") : "")
                    .Append("</td>");
            }

            _html.Append("</tr>");
        }

        _html.Append("</table></div>\n");
    }

    private void Messages(RunRecord run)
    {
        if (run.Messages.Count == 0) return;
        Heading("Messages and warnings", run);
        _html.Append("<div class=\"card\"><ul>");
        foreach (var (step, text) in run.Messages.Take(MostMessages))
            _html.Append("<li>").Append(step > 0
                ? Invariant($"<span class=\"soft\">after step {step:N0}</span> ") : "")
                .Append($"{Text(text)}</li>");
        if (run.Messages.Count > MostMessages)
            _html.Append(Invariant(
                $"<li>and {run.Messages.Count - MostMessages:N0} more in the log</li>"));
        _html.Append("</ul></div>\n");
    }

    private void Differences()
    {
        string[] keys = [.. _runs.SelectMany(r => r.Settings.Select(s => s.Key)).Distinct()
            .Where(k => _runs.Select(r => r.Setting(k)).Distinct().Count() > 1)];
        if (keys.Length == 0) return;
        _html.Append("<h2>Settings that differ</h2><div class=\"card "
            + "scroll\"><table><tr><th></th>");
        foreach (RunRecord run in _runs) _html.Append($"<th>{Text(run.Name)}</th>");
        _html.Append("</tr>");
        foreach (string key in keys)
        {
            _html.Append($"<tr><td class=\"key\">{Text(key)}</td>");
            foreach (RunRecord run in _runs)
                _html.Append($"<td class=\"value\">{Text(run.Setting(key) ?? "")}</td>");
            _html.Append("</tr>");
        }

        _html.Append("</table></div>\n");
    }

    private void Settings(RunRecord run)
    {
        if (run.Settings.Count == 0) return;
        Heading("Settings", run);
        _html.Append(Invariant(
            $"<details class=\"card\"><summary>{run.Settings.Count:N0} settings</summary><table>"));
        foreach (var (key, value) in run.Settings)
            _html.Append($"<tr><td class=\"key\">{Text(key)}</td>")
                .Append($"<td class=\"value\">{Text(value)}</td></tr>");
        _html.Append("</table></details>\n");
    }

    private void Heading(string text, RunRecord run) => _html.Append("<h2>").Append(
        Text(_runs.Count == 1 ? text : $"{text} of {run.Name}")).Append("</h2>");
}
