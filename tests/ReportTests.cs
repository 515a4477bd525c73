using System.Globalization;
using System.Net;
using System.Text.Json.Nodes;
using System.Text.RegularExpressions;
using System.Xml.Linq;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Report;
using MiniCpmNative.Engine.Train;
using NUnit.Framework;
using static MiniCpmNative.Tests.SafetensorsTests;

namespace MiniCpmNative.Tests;

[TestFixture]
public sealed partial class ReportTests
{
    private const string Hostile = "\"'><script>alert(1)</script><img src=http://x/y "
        + "onerror=z>\u0001&";

    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void ALineGoesThroughItsPoints()
    {
        string svg = LineChart.Draw("x", [new ChartLine("a", 0, false,
            [(0, 0), (5, 25), (10, 100)])], ChartAxis.FromZero, y => $"{y}");
        // The frame is 66 to 468 and, upside down, 10 to 214.
        Assert.That(Paths(svg)[0], Is.EqualTo("M66 214L267 163L468 10"));
        string log = LineChart.Draw("x", [new ChartLine("a", 0, false,
            [(1, 0.1), (2, 10), (3, 1000)])], ChartAxis.Fitted, y => $"{y}");
        Assert.That(Paths(log)[0], Is.EqualTo("M66 214L267 112L468 10"), "decades are even");
    }

    [Test]
    public void WhatIsNotFiniteBreaksTheLineAndNothingElse()
    {
        string svg = LineChart.Draw("x", [new ChartLine("a", 0, false,
            [(0, 1), (1, double.NaN), (2, double.PositiveInfinity), (3, 2), (4, 2)])],
            ChartAxis.FromZero, y => $"{y}");
        Assert.That(Paths(svg)[0].Count(c => c == 'M'), Is.EqualTo(2));
        Assert.That(svg, Does.Not.Contain("NaN").And.Not.Contain("\u221E"));
        Assert.That(LineChart.Draw("x", [new ChartLine("a", 0, false, [(0, double.NaN)])],
            ChartAxis.Fitted, y => $"{y}"), Does.Contain("no numbers"));
        Assert.That(() => LineChart.Draw("x", [new ChartLine("a", 0, false, [(7, -3)])],
            ChartAxis.Fitted, y => $"{y}"), Throws.Nothing);
    }

    [Test]
    public void ALongRunKeepsItsPeaks()
    {
        var points = Enumerable.Range(0, 200_000)
            .Select(i => ((double)i, i == 123_457 ? 100.0 : 1 + (i % 7))).ToList();
        string svg = LineChart.Draw("x", [new ChartLine("a", 0, false, points)],
            ChartAxis.FromZero, y => $"{y}");
        Assert.That(svg, Has.Length.LessThan(30_000));
        double[] heights = [.. Number().Matches(Paths(svg)[0]).Where((_, i) => i % 2 == 1)
            .Select(m => double.Parse(m.Value, CultureInfo.InvariantCulture))];
        Assert.That(heights.Min(), Is.EqualTo(10), "the peak");
        Assert.That(heights.Count(h => h < 150), Is.EqualTo(1));
    }

    [Test]
    public void HostileTextStaysText()
    {
        string run = Run("<b>" + "run", settings: new JsonObject { [Hostile] = Hostile });
        File.AppendAllText(Path.Combine(run, RunRecord.LogFile), string.Join('\n', new JsonObject[]
        {
            new() { ["step"] = 3, ["epoch"] = 1, ["eval_" + Hostile] = 3 },
            new() { ["step"] = 3, ["epoch"] = 1, ["message"] = Hostile },
        }.Select(line => line.ToJsonString())) + "\n");
        File.WriteAllText(Path.Combine(run, RunRecord.AnswersFile), new JsonObject
        {
            ["step"] = 3,
            ["row"] = 1,
            ["id"] = Hostile,
            ["question"] = Hostile,
            ["expected"] = Hostile,
            ["answer"] = Hostile,
            ["pictures"] = new JsonArray(Hostile),
        }.ToJsonString());
        string page = Page(run);
        Assert.That(page, Does.Not.Contain("<script").And.Not.Contain("<img src=h"));
        Assert.That(page, Does.Not.Contain("\u0001"));
        Assert.That(Regex.Count(page, "&lt;script&gt;alert\\(1\\)"), Is.GreaterThanOrEqualTo(9));
        foreach (Match svg in Svg().Matches(page))
            Assert.DoesNotThrow(() => XDocument.Parse(svg.Value));
    }

    [Test]
    public void ThePageNeedsNothingElse()
    {
        string picture = Path.Combine(V26.Folder, "data", "images", "p3.png");
        string run = Run("run");
        File.WriteAllText(Path.Combine(run, RunRecord.AnswersFile), string.Join('\n',
            Answer(0, 7, "That.", picture, "/none.png"), Answer(0, 8, "Other."),
            Answer(2, 7, "This.", picture, "/none.png"), "{\"step\": 2, \"ro"));
        string page = Page(run);
        Assert.That(Regex.Matches(page, "(src|href)=\"([^\"]*)").Select(m => m.Groups[2].Value),
            Has.All.StartsWith("data:image/bmp;base64,").And.Exactly(1).Items);
        Assert.That(page, Does.Not.Contain("url(").And.Not.Contain("@import"));
        Assert.That(page, Does.Contain("/none.png: cannot be read"));
        Assert.That(Regex.Matches(page, "<th>(step \\d)</th><td class=\"text\">([^<]*)")
            .Select(m => $"{m.Groups[1]}: {m.Groups[2]}"),
            Is.EqualTo(["step 0: That.", "step 2: This.", "step 0: Other."]));
        string file = Path.Combine(_folder, "thumbnail.bmp");
        File.WriteAllBytes(file, Convert.FromBase64String(
            Regex.Match(page, "base64,([^\"]*)").Groups[1].Value));
        using var whole = Engine.Data.Images.PictureDecoder.Decode(picture);
        using var small = Engine.Data.Images.PictureDecoder.Decode(file);
        Assert.That(Math.Max(small.Width, small.Height), Is.EqualTo(160));
        double[] means = [Mean(whole.Rgb, 0), Mean(whole.Rgb, 1), Mean(whole.Rgb, 2)];
        for (int c = 0; c < 3; c++)
            Assert.That(Mean(small.Rgb, c), Is.EqualTo(means[c]).Within(2), "colours in order");
    }

    [Test]
    public void FiguresAreThoseOfTheLog()
    {
        string run = Run("run", new JsonObject { ["use_lora"] = true, ["lora_r"] = 8 });
        string page = WebUtility.HtmlDecode(Page(run));
        foreach (string figure in (string[])["<b>2</b><span>steps", "<b>0.5</b><span>loss, last",
            "<b>0.25</b><span>evaluation loss", "<b>62.5 %</b><span>tokens right",
            "<b>3 GiB</b><span>memory, most", "<b>200</b><span>tokens/s", "not at its end",
            "<td class=\"n\">1,234</td>", "lora_r"])
            Assert.That(page, Does.Contain(figure));
        // A torn end, as while the run goes on, and what is done.
        string log = Path.Combine(run, RunRecord.LogFile);
        File.AppendAllText(log, """{"step":2,"epoch":1,"train_runtime":90,"train_loss":0.75}""" + "\n{\"st");
        Assert.That(Page(run), Does.Contain("done after 2 steps").And.Contain("<b>90 s</b>"));
    }

    [Test]
    public void RunsStandSideBySide()
    {
        string one = Run("a/run", new JsonObject { ["lora_r"] = 8, ["seed"] = 1 });
        string two = Run("b/run", new JsonObject { ["lora_r"] = 16, ["seed"] = 1 });
        string path = Path.Combine(_folder, "both.html");
        ReportFile.Write([one, two], path);
        string page = File.ReadAllText(path);
        Assert.That(page, Does.Contain("2 runs: run (1), run (2)"));
        string differ = page[page.IndexOf("Settings that differ",
            StringComparison.Ordinal)..page.IndexOf("Settings of", StringComparison.Ordinal)];
        Assert.That(differ, Does.Contain("lora_r").And.Not.Contain("seed"));
        Assert.That(Paths(Svg().Match(page).Value), Has.Length.EqualTo(4), "two losses a run");
        Assert.That(() => ReportFile.Write([_folder], path),
            Refuses("has no train_log.jsonl, expected the output_dir of a run"));
    }

    [TestCase(StopReason.None)]
    [TestCase(StopReason.Terminate)]
    public void ARunEndsWithAReport(StopReason reason)
    {
        var arguments = new TrainArguments
        {
            ModelNameOrPath = "model",
            OutputDir = _folder,
            LoggingSteps = new Interval(1),
            ReportTo = ReportTo.None,
        };
        using (var log = new TrainLog(
            TextWriter.Null, isTerminal: false, () => 80, TimeProvider.System))
        {
            log.Message("said before the log is there");
            log.Start(new RunReport(arguments, new StepPlan(arguments, 8), "cpu", 1000, 10, null));
            log.Step(new StepReport(1, 0.5, 1, 1e-4, 10, 1, 1));
            log.Message("said after a step");
            log.End(1, reason);
        }

        string page = File.ReadAllText(Path.Combine(_folder, ReportFile.FileName));
        Assert.That(page, Does.Contain("<li>said before the log is there</li>"));
        Assert.That(page, Does.Contain("after step 1</span> said after a step"));
        Assert.That(page, Does.Contain(reason == StopReason.None
            ? "done after 1 steps" : "not at its end, 1 steps so far"));
    }

    private string Run(string name, JsonObject? settings = null)
    {
        string folder = Directory.CreateDirectory(Path.Combine(_folder, name)).FullName;
        File.WriteAllText(Path.Combine(folder, RunRecord.LogFile), """
            {"step":0,"epoch":0,"rows":1234,"rows_left_out":0}
            {"step":1,"epoch":0.5,"grad_norm":1,"learning_rate":1e-4,"loss":1,"tokens_per_second":100,"memory_bytes":3221225472}
            {"step":1,"epoch":0.5,"eval_loss":0.25,"eval_token_accuracy":0.625,"eval_answer_accuracy":0.5,"eval_runtime":3}
            {"step":2,"epoch":1,"grad_norm":null,"learning_rate":1e-5,"loss":0.5,"tokens_per_second":200,"memory_bytes":2147483648}

            """);
        File.WriteAllText(Path.Combine(folder, RunRecord.SettingsFile),
            (settings ?? []).ToJsonString());
        return folder;
    }

    private static string Answer(int step, int row, string text, params string[] pictures) =>
        new JsonObject
        {
            ["step"] = step,
            ["row"] = row,
            ["answer"] = text,
            ["pictures"] = new JsonArray([.. pictures.Select(p => (JsonNode)p)]),
        }.ToJsonString();

    private static string Page(string run)
    {
        string path = Path.Combine(run, ReportFile.FileName);
        ReportFile.Write([run], path);
        return File.ReadAllText(path);
    }

    private static double Mean(ReadOnlySpan<byte> rgb, int channel)
    {
        double sum = 0;
        for (int i = channel; i < rgb.Length; i += 3) sum += rgb[i];
        return sum / (rgb.Length / 3);
    }

    private static string[] Paths(string svg) =>
        [.. XDocument.Parse(svg).Descendants("path").Select(p => p.Attribute("d")!.Value)];

    [GeneratedRegex(@"<svg.*?</svg>", RegexOptions.Singleline)]
    private static partial Regex Svg();

    [GeneratedRegex(@"[\d.]+")]
    private static partial Regex Number();
}
