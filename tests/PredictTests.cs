using System.Text.Json;
using System.Text.Json.Nodes;
using MiniCpmNative.Cli;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Generate;
using MiniCpmNative.Engine.Metrics;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>Answers to data files: cpmx eval, cpmx predict, and in evaluations of a run.</summary>
[TestFixture]
public sealed class PredictTests
{
    private string _folder = "";

    private static string Model { get; } = Path.Combine(ReferenceFile.Root, "v26", "model");

    private static string Adapter { get; } =
        Path.Combine(ReferenceFile.Root, "v26", "adapters", "trained_lora_only");

    private TrainArguments Arguments => new()
    {
        ModelNameOrPath = Model,
        Device = DeviceChoice.Cpu,
        PerDeviceEvalBatchSize = 2,
        MaxNewTokens = 8,
        OutputDir = _folder,
    };

    [SetUp]
    public void MakeFolder() =>
        _folder = Directory.CreateTempSubdirectory("cpmx-predict-").FullName;

    [TearDown]
    public void RemoveFolder() => Directory.Delete(_folder, recursive: true);

    // chat()'s own answers to these, as far as 8 tokens go.
    [Test]
    public void RowsAreAnsweredAsTheOfficialChatDoes()
    {
        string picture = Path.Combine(ReferenceFile.Root, "v26", "data", "images", "p0.png");
        string data = Rows($$"""
            [{"id": "one", "image": "{{picture}}", "references": ["signhohohohohohoho", "x"],
              "conversations": [{"role": "user", "content": "<image>\nWhat is in the picture?"}]},
             {"id": "text", "conversations": [
              {"role": "user", "content": "Read the text on the sign."},
              {"role": "assistant", "content": "Z"}]}]
            """);
        PredictResult result = Run(Request(data, "exact_match", "contains"))!;
        Assert.That(result.Scores.Select(score => score.Metric),
            Is.EqualTo((string[])["exact_match", "contains"]));
        // The base model's answers are known: one is right, and both hold a right one.
        Assert.That(result.Scores[0].Scores, Is.EqualTo((double[])[0.5, 0]));
        Assert.That(result.Scores[1].Scores[0], Is.EqualTo(1));
        JsonElement[] lines = Lines("answers.jsonl");
        JsonElement batches = ReferenceText.Json("generation/batches.json")[0].GetProperty("rows");
        Assert.That(lines.Select(line => line.GetProperty("id").GetString()),
            Is.EqualTo((string[])["one", "text"]));
        Assert.That(lines[0].GetProperty("base").GetString(), Is.EqualTo("signhohohohohohoho"));
        Assert.That(lines[1].GetProperty("base").GetString(), Is.EqualTo(PythonText.Strip(
            V26.Format.Tokenizer.Decode(ReferenceText.Ints(batches[4].GetProperty("ids"))[..8]))));
        Assert.That(lines[0].GetProperty("base_cut").GetBoolean());
        Assert.That(lines[0].GetProperty("base_exact_match").GetDouble(), Is.EqualTo(1));
        Assert.That(lines[0].GetProperty("tuned").GetString(), Does.StartWith("A").And.Contain(
            "yellow"), "the tuned model's ids begin with 32, 89, 458");
        Assert.That(lines[0].TryGetProperty("expected", out _), Is.False);
    }

    [Test]
    public void AStoppedRunGoesOnWhereItWas()
    {
        string data = Rows(Questions(5));
        PredictRequest request = Request(data, "exact_match");
        Run(request);
        string whole = File.ReadAllText(request.Out);
        File.Delete(request.Out);
        // Stopped in the second side's first batch, then with a torn line at the end.
        var seen = new List<PredictProgress>();
        Assert.That(Run(request, seen, () => seen.Count(p => p.Side == "tuned") < 2), Is.Null);
        Assert.That(File.Exists(request.Out), Is.False);
        File.AppendAllText(request.Out + ".partial", "{\"side\": \"tun");
        var said = new List<string>();
        var again = new List<PredictProgress>();
        Assert.That(Run(request, again, say: said.Add), Is.Not.Null);
        Assert.That(said, Has.Member("base: 5 of 5 rows are answered already"));
        Assert.That(again.Select(p => p.Side).Distinct(), Is.EqualTo((string[])["tuned"]));
        Assert.That(again, Has.Count.LessThan(5));
        Assert.That(File.ReadAllText(request.Out), Is.EqualTo(whole));
        Assert.That(File.Exists(request.Out + ".partial"), Is.False);
    }

    [Test]
    public void OtherSettingsStartAnew()
    {
        PredictRequest request = Request(Rows(Questions(2)), "exact_match") with { };
        var seen = new List<PredictProgress>();
        Run(request, seen, () => seen.Count < 1);
        var again = new List<PredictProgress>();
        PredictRun.Run(Arguments with { RepetitionPenalty = 1.2 }, request, _ => { }, again.Add,
            () => true);
        Assert.That(again, Has.Count.EqualTo(4));
    }

    [Test]
    public void RowsWithoutAnswersAreForPredict()
    {
        string data = Rows("""
            [{"conversations": [{"role": "user", "content": "Hi"}]}]
            """);
        Assert.That(() => Run(Request(data, "contains")), Throws.TypeOf<InputException>()
            .With.Message.EndsWith(
                "row 1: no answer to compare with: cpmx predict answers such rows"));
        PredictResult result = Run(Request(data) with { Rows = 1 })!;
        Assert.That((result.Rows, result.Scores.Count), Is.EqualTo((1, 0)));
        Assert.That(Lines("answers.jsonl")[0].GetProperty("question").GetString(),
            Is.EqualTo("Hi"));
    }

    [Test]
    public void ARowThatCannotBeAskedIsNamed()
    {
        string data = Rows("""
            [{"conversations": [{"role": "user", "content": "Hi"}]},
             {"image": "none.png", "conversations": [{"role": "user", "content": "Hi"}]}]
            """);
        Assert.That(() => Run(Request(data)), Throws.TypeOf<InputException>()
            .With.Message.Contains("1 of 2 rows are bad").And.Message.Contains("row 2"));
        var said = new List<string>();
        PredictRun.Run(Arguments with { OnBadRow = BadRows.Skip }, Request(data), said.Add,
            _ => { }, () => true);
        Assert.That(said, Has.Some.StartsWith("skipped: ").And.Some.Contains("none.png"));
        Assert.That(Lines("answers.jsonl"), Has.Length.EqualTo(1));
    }

    [Test]
    public void TheCommandTakesTheResultAndPrintsScores()
    {
        string data = Rows(Questions(2)), config = Path.Combine(_folder, "config.json");
        File.WriteAllText(config, JsonSerializer.Serialize(new
        {
            model_name_or_path = Model,
            data_path = data,
            eval_data_path = data,
            output_dir = Adapter,
            max_new_tokens = 4,
            device = "cpu",
            metrics = new[] { "contains", "bleu" },
        }));
        var output = new StringWriter();
        string answers = Path.Combine(_folder, "a.jsonl");
        Assert.That(PredictCommand.Run([config, "--base", "--out", answers], help: false,
            scores: true, output, new Runners(), terminal: false), Is.Zero);
        Assert.That(output.ToString(), Does.Contain($"2 rows answered: {answers}")
            .And.Match("(?m)^ +base +tuned$").And.Match(@"(?m)^bleu +\d\.\d{4} +\d\.\d{4}$"));
        Assert.That(() => PredictCommand.Run([config, "--output_dir", _folder + "/x"], false, true,
            output, new Runners(), false), Throws.TypeOf<InputException>()
            .With.Message.Contains("has no result yet"));
        Assert.That(() => PredictCommand.Run([config, "--rows", "0"], false, true, output,
            new Runners(), false), Throws.TypeOf<InputException>()
            .With.Message.EqualTo("--rows is \"0\", expected a whole number above 0"));
    }

    // The bundled example, shorter: it has learned enough to say most of the new words.
    [Test]
    public void TheExamplesAdapterAnswersInItsNewLanguage()
    {
        string examples = Path.Combine(ArchitectureTests.Root, "examples"),
            rows = Path.Combine(_folder, "test.json");
        // One picture stands in its row.
        JsonArray test = JsonNode.Parse(File.ReadAllText(Path.Combine(examples, "test.json")))!
            .AsArray();
        foreach (JsonNode? row in test)
        {
            if (row!["image"] is JsonObject several)
                foreach (string tag in several.Select(picture => picture.Key).ToArray())
                    several[tag] = Path.Combine(examples, several[tag]!.GetValue<string>());
            else row["image"] = Path.Combine(examples, row["image"]!.GetValue<string>());
        }

        test[0]!["image"] = "data:image/png;base64," + Convert.ToBase64String(
            File.ReadAllBytes(test[0]!["image"]!.GetValue<string>()));
        File.WriteAllText(rows, test.ToJsonString());
        TrainArguments arguments = TrainReader.Read(
            [Path.Combine(examples, "lora.json"), "--device", "cpu", "--output_dir",
                Path.Combine(_folder, "lora"), "--eval_data_path", rows, "--num_train_epochs", "4",
                "--eval_generate", "10",
                "--save_strategy", "no", "--metrics", "exact_match", "--max_new_tokens", "16"],
            _folder);
        string said = Runs.Train(arguments);
        Assert.That(said, Does.Match(
            @"answers generated for 10 rows in [\d.]+ s: exact_match 0\.0"));
        string result = arguments.OutputDir;
        Assert.That(said.TrimEnd().Split('\n')[^2..], Is.EqualTo((string[])[
            $"the adapter is in {result}",
            $"ask it: cpmx chat {Path.Combine(examples, "model")} --adapter {result}"]));
        JsonElement[] generated = [.. File.ReadLines(Path.Combine(result, "eval_answers.jsonl"))
            .Select(line => JsonDocument.Parse(line).RootElement)];
        Assert.That(generated, Has.Length.EqualTo(50), "before, and after each epoch");
        JsonElement[] last = generated[^10..];
        double right = last.Count(line => line.GetProperty("answer").GetString()
            == line.GetProperty("expected").GetString()) / 10.0;
        Assert.That(Runs.History(arguments).Last(e =>
            e.TryGetProperty("eval_generated_exact_match", out _))
            .GetProperty("eval_generated_exact_match").GetDouble(), Is.EqualTo(right).Within(1e-9));
        Assert.That(right, Is.GreaterThanOrEqualTo(0.5));
        var output = new StringWriter();
        Assert.That(ChatCommand.Run(
            [arguments.ModelNameOrPath!, "--adapter", result, "--device", "cpu", "--do_sample",
                "false", "--image", Path.Combine(examples, "pictures", "test", "0000.png")],
            help: false, new StringReader("Describe the picture in Tolu.\n/base\n"), output,
            new StringWriter(), new Runners(), terminal: false), Is.Zero);
        Assert.That(output.ToString(), Is.EqualTo("rano bimo\nred circle top left\n"));
    }

    private static string Questions(int count) => JsonSerializer.Serialize(
        Enumerable.Range(0, count).Select(i => new
        {
            conversations = new[]
            {
                new { role = "user", content = string.Concat(Enumerable.Repeat("What? ", i + 1)) },
                new { role = "assistant", content = "Z" },
            },
        }));

    private string Rows(string json)
    {
        string path = Path.Combine(_folder, "rows.json");
        File.WriteAllText(path, json);
        return path;
    }

    private PredictRequest Request(string data, params string[] metrics) => new(
        data, Path.Combine(_folder, "answers.jsonl"),
        [new("base", Model, null), new("tuned", Model, Adapter)], Metric.Of(metrics));

    private PredictResult? Run(PredictRequest request, List<PredictProgress>? progress = null,
        Func<bool>? goesOn = null, Action<string>? say = null) => PredictRun.Run(
        Arguments, request, say ?? (_ => { }), (progress ?? []).Add, goesOn ?? (() => true));

    private JsonElement[] Lines(string name) =>
        [.. File.ReadLines(Path.Combine(_folder, name))
            .Select(line => JsonDocument.Parse(line).RootElement)];
}
