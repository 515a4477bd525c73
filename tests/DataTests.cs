using System.Text.Json;
using MiniCpmNative.Cli;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// From a data file to the batch that the model takes: ids, labels, bounds, grids and pixels
/// against the official data set; what `cpmx data check` says; and rows that cannot be used.
/// </summary>
[TestFixture]
public sealed class DataTests
{
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [TestCase("slices9", 16)]
    [TestCase("slices4", 16)]
    [TestCase("slices1", 16)]
    [TestCase("slices2_short", 8)]
    public void BatchesAreTheOfficialDataSet(string setting, int usable)
    {
        var expected = ReferenceText.Json("v26/data/dataset.json").GetProperty(setting);
        TrainArguments arguments = V26.Full with
        {
            MaxSliceNums = expected.GetProperty("max_slice_nums").GetInt32(),
            ModelMaxLength = expected.GetProperty("max_length").GetInt32(),
        };
        var rows = DataRows.Read(V26.Rows, arguments, V26.Format);
        RowCheck[] checks = rows.Check(decode: false);
        int seen = 0;
        foreach (var line in expected.GetProperty("rows").EnumerateArray())
        {
            string id = line.GetProperty("id").GetString()!;
            int row = rows.Find(id);
            if (line.TryGetProperty("error", out _))
            {
                Assert.That(checks[row].Bad, Is.Not.Null, id);
                continue;
            }

            Assert.That(checks[row].Bad, Is.Null, id);
            AssertRow(rows, row, line, id);
            seen++;
        }

        Assert.That(seen, Is.EqualTo(usable));
    }

    [Test]
    public void AFailureInParallelIsThatOfOneRow()
    {
        var failure = Assert.Throws<InputException>(() => DataRows.InParallel(100, i =>
        {
            if (i % 2 == 1) throw new InputException($"row {i}");
        }))!;
        Assert.That(failure.Message, Does.StartWith("row "));
    }

    [Test]
    public void ThePixelsDoNotDependOnTheScheme()
    {
        // The two schemes write different texts around the same views of the same pictures.
        var official = V26.Batch(V26.Full, "two-small", "wide");
        var strict = V26.Batch(V26.Full with { OfficialCompat = false }, "two-small", "wide");
        Assert.That(strict.Patches.Span.SequenceEqual(official.Patches.Span), Is.True);
        Assert.That(strict.Grids.Span.SequenceEqual(official.Grids.Span), Is.True);
        Assert.That(strict.Tokens.Span.SequenceEqual(official.Tokens.Span), Is.False);
        Assert.That(strict.Slots.Count, Is.EqualTo(official.Slots.Count));
        Assert.That(strict.Targets.Span.SequenceEqual(official.Targets.Span), Is.True);
    }

    [Test]
    public void ACheckShowsWhatTrainingSees()
    {
        string report =
            Check(0, "--data_path", Runs.Data(_folder, "two-small", "sliced-jpeg", "words"));
        string[] lines = report.Split('\n');
        Assert.That(lines[0], Does.EndWith("rows.json: 3 rows, 0 bad"));
        // Image numbers on all pictures, no line ends around them: the shipped processor's scheme.
        Assert.That(report, Does.Contain("<|im_start|>user\n    <image_id>0</image_id><image>"
            + "(64 picture features)</image>\n    <image_id>1</image_id><image>"));
        Assert.That(report, Does.Contain(
            "assistant\n    [[No: the second one has no orange cross.<|im_end|>]]"));
        Assert.That(report, Does.Contain("[[The second.<|im_end|>]]"));
        Assert.That(report, Does.Contain("pictures: 4, 0 with an EXIF orientation"));
        Assert.That(report, Does.Contain("longer than model_max_length 2,048, would be cut: 0"));
        Assert.That(lines, Has.None.Contains("bad:"));
    }

    [Test]
    public void ACheckCountsRowsThatWouldBeCut()
    {
        string data = Runs.Data(_folder, "one", "turns");
        string report = Check(0, "--data_path", data, "--model_max_length", "150");
        Assert.That(report, Does.Contain("longer than model_max_length 150, would be cut: 1"));
    }

    [Test]
    public void ARowThatFillsTheMemoryIsRefused()
    {
        string data = Path.Combine(_folder, "long.json"), text = new(' ', 2_000_000);
        File.WriteAllText(data, $$"""
            [{"conversations": [{"role": "user", "content": "{{text}}"},
              {"role": "assistant", "content": "1"}]}]
            """);
        Assert.That(Check(2, "--data_path", data), Does.Contain("long.json row 1: has 2,000,001 "
            + "characters, at most 2,000,000 can be read"));
    }

    [Test]
    public void ACheckNamesEachBadRow()
    {
        string report = Check(2, "--data_path", Path.Combine(V26.Folder, "data", "rows_bad.json"));
        var bad = report.Split('\n').Where(l => l.Contains("rows_bad.json row ")).ToArray();
        foreach (string id in (string[])["assistant-first", "one-turn", "no-answer", "unknown-tag",
            "missing-file", "twice"])
            Assert.That(bad.Count(l => l.Contains($"(id \"{id}\")")), Is.EqualTo(1), id);
        Assert.That(report, Does.Contain("10 rows, "));
    }

    [Test]
    public void BadRowsAreRefusedOrSkippedButNeverReplaced()
    {
        string data = Path.Combine(V26.Folder, "data", "rows_bad.json");
        TrainArguments arguments = V26.Full with { OfficialCompat = false };
        var said = new List<string>();
        var refused = Assert.Throws<InputException>(
            () => DataRows.Open(data, arguments, V26.Format, said.Add))!;
        Assert.That(refused.Message,
            Does.Contain("of 10 rows are bad: ").And.Contain("on_bad_row=skip"));
        Assert.That(refused.Message, Does.Not.Contain("\n"));
        var rows = DataRows.Open(
            data, arguments with { OnBadRow = BadRows.Skip }, V26.Format, said.Add);
        Assert.That(said, Has.Count.EqualTo(10 - rows.Count));
        Assert.That(said, Is.All.StartsWith("skipped: " + data + " row "));
        // Text-only rows and later turns work here, though not in the official script.
        Assert.That(Enumerable.Range(0, rows.Count).Select(i => rows[i].Id),
            Is.SupersetOf(new[] { "no-image", "later-turn" }));
    }

    [Test]
    public void BothSharesAreOfOneReading()
    {
        string data = Path.Combine(_folder, "rows.jsonl");
        File.WriteAllLines(data, Enumerable.Range(0, 9).Select(i =>
            $$"""{"query": "q", "response": "a{{i}}"}"""));
        TrainArguments arguments = V26.Lora with
        {
            DataPath = data,
            OfficialCompat = false,
            EvalSplit = 3,
        };
        var said = new List<string>();
        var training = DataRows.Open(arguments.TrainingData, arguments, V26.Format, said.Add);
        // Replaced by another file before the second share is taken.
        File.WriteAllText(data, """{"query": "q", "response": "other"}""");
        var evaluation = DataRows.Open(
            arguments.EvaluationData!, arguments, V26.Format, said.Add, training);
        Assert.That(Enumerable.Range(0, training.Count).Select(i => training[i].Expected)
            .Concat(Enumerable.Range(0, evaluation.Count).Select(i =>
                evaluation[i].Expected)).Order(),
            Is.EqualTo(Enumerable.Range(0, 9).Select(i => $"a{i}")));
        Assert.That(evaluation.Digest, Is.EqualTo(training.Digest));
        Assert.That(said.Count(line => line.Contains("read as")), Is.EqualTo(1));
    }

    [Test]
    public void APictureThatIsCutIsFoundInTraining()
    {
        string data = Cut();
        var arguments = V26.Lora with
        {
            DataPath = data,
            OutputDir = Path.Combine(_folder, "out"),
            MaxSteps = 2,
            TrainSamplingStrategy = SamplingStrategy.Sequential,
        };
        var failure = Assert.Throws<InputException>(() => Runs.Train(arguments))!;
        Assert.That(failure.Message, Does.Contain("row 2 (id \"cut\")").And.Contain("cut.png"));
        Assert.That(failure.Message, Does.Not.Contain("\n"));
        string said = Runs.Train(arguments with { OnBadRow = BadRows.Skip });
        Assert.That(said, Does.Contain("skipped: " + data + " row 2 (id \"cut\")"));
        Assert.That(said, Does.Contain("1 rows, 2 steps"));
        string report = Check(2, "--data_path", data);
        Assert.That(report, Does.Contain("row 2 (id \"cut\")").And.Contain("2 rows, 1 bad"));
    }

    [Test]
    public void PromptsMustBeTheModels()
    {
        var failure = Assert.Throws<InputException>(() => DataRows.Read(
            V26.Rows, V26.Full with { LlmType = "llama3" }, V26.Format))!;
        Assert.That(failure.Message,
            Does.StartWith("llm_type is \"llama3\"").And.Contain("\"qwen\""));
        DataRows.Read(V26.Rows, V26.Full with { LlmType = "qwen" }, V26.Format);
    }

    private static void AssertRow(DataRows rows, int row, JsonElement expected, string id)
    {
        var batch = new Batch();
        batch.Clear();
        rows.Append(row, batch);
        int[] labels = [.. Enumerable.Repeat(-100, batch.Tokens.Count)];
        for (int i = 0; i < batch.LabelRows.Count; i++)
            labels[batch.LabelRows[i]] = batch.Targets[i];
        Assert.That(batch.Tokens.Span.ToArray(),
            Is.EqualTo(ReferenceText.Ints(expected.GetProperty("input_ids"))), id);
        Assert.That(labels, Is.EqualTo(ReferenceText.Ints(expected.GetProperty("labels"))), id);
        Assert.That(batch.ImageBounds.Span.ToArray(), Is.EqualTo(Flat("image_bound")), id);
        Assert.That(batch.Grids.Span.ToArray(), Is.EqualTo(Flat("tgt_sizes")), id);
        int picture = 0;
        foreach (var tile in expected.GetProperty("tiles").EnumerateArray())
        {
            var wanted = Fingerprint.Read(tile.GetProperty("strip"));
            var got = Fingerprint.Of(Strip(batch, picture++), wanted.Shape);
            // The same floats: only the sums are rounded. One pixel off by one would give 1e-5.
            Assert.That(got.NormError(wanted), Is.LessThan(1e-10), $"{id}, tile {picture}");
            Assert.That(got.Max, Is.EqualTo(wanted.Max));
        }

        Assert.That(picture, Is.EqualTo(batch.Grids.Count / 2), id);

        IEnumerable<int> Flat(string name) =>
            expected.GetProperty(name).EnumerateArray().SelectMany(ReferenceText.Ints);
    }

    /// <summary>Patches [N, 3, 14, 14] of a view as the official strip [3, 14, 14 N].</summary>
    private static float[] Strip(Batch batch, int view)
    {
        int begin = batch.PictureStarts[view], patches = batch.PictureStarts[view + 1] - begin;
        ReadOnlySpan<float> from = batch.Patches.Span.Slice(begin * 588, patches * 588);
        var strip = new float[from.Length];
        for (int i = 0; i < patches; i++)
            for (int cy = 0; cy < 42; cy++)
                from.Slice((i * 588) + (cy * 14), 14).CopyTo(
                    strip.AsSpan((cy * 14 * patches) + (i * 14)));
        return strip;
    }

    // A row whose picture has a good header and half its bytes, behind a good row.
    private string Cut()
    {
        byte[] whole = File.ReadAllBytes(Path.Combine(V26.Folder, "data", "images", "p1.png"));
        File.WriteAllBytes(Path.Combine(_folder, "cut.png"), whole[..(whole.Length / 2)]);
        string path = Path.Combine(_folder, "cut.json");
        string good = JsonSerializer.Serialize(
            Path.GetFullPath(Path.Combine(V26.Folder, "data", "images", "p0.png")));
        File.WriteAllText(path, $$"""
            [{"id": "good", "image": {{good}}, "conversations": [
               {"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]},
             {"id": "cut", "image": "cut.png", "conversations": [
               {"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]}]
            """);
        return path;
    }

    private static string Check(int code, params string[] arguments)
    {
        var (output, error) = (new StringWriter(), new StringWriter());
        int got = new CommandLine(output, error, new Runners()).Run(
            ["data", "check", "--model_name_or_path", V26.Model, .. arguments]);
        Assert.That(error.ToString(), Is.Empty);
        Assert.That(got, Is.EqualTo(code), output.ToString());
        return output.ToString();
    }
}
