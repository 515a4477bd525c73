using MiniCpmNative.Cli;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// `cpmx trace` and evaluation: what they say about a batch, and what they refuse.
/// </summary>
[TestFixture]
public sealed class TraceTests
{
    private string _folder = "";

    private string Out => Path.Combine(_folder, "trace.safetensors");

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void TheFileHasTheNamesAndPackingOfTheReference()
    {
        string said = Trace("one,3", "--gradients");
        Assert.That(said, Does.Contain(Out + ": ").And.Contains("2 row(s), loss 6.58"));
        var dataset = ReferenceText.Json("v26/data/dataset.json").GetProperty("slices9");
        var rows = dataset.GetProperty("rows").EnumerateArray().Where(
            r => r.GetProperty("id").GetString() is "one" or "two-small").ToArray();
        var file = ReferenceFile.Open(Out[..^".safetensors".Length]);
        foreach (string name in (string[])["input_ids", "labels"])
            Assert.That(file.Ints(name), Is.EqualTo(
                rows.SelectMany(r => ReferenceText.Ints(r.GetProperty(name)))), name);
        foreach (string name in (string[])["image_bound", "tgt_sizes"])
            Assert.That(file.Ints(name), Is.EqualTo(rows.SelectMany(
                r => r.GetProperty(name).EnumerateArray().SelectMany(ReferenceText.Ints))), name);
        Assert.That(file.Shape("image_bound"), Is.EqualTo(new[] { 3, 2 }));
        Assert.That(file.Shape("loss"), Is.Empty);
        // The activations' names are the reference file's, and every parameter has its gradient.
        var wanted = ReferenceText.Json("v26/forward/case_a.json").GetProperty("gradients");
        Assert.That(file.Names,
            Is.SupersetOf(wanted.EnumerateObject().Select(p => "grad." + p.Name)));
        Assert.That(file.Names, Is.SupersetOf((string[])["vision.position_ids", "vision.embeddings",
            "vision.layer.0", "vision.layer.1", "vision.layer.2", "vision.post_layernorm",
            "resampler",
            "inputs_embeds", "llm.layer.0", "llm.layer.1", "llm.norm", "logits", "grad.resampler",
            "grad.inputs_embeds"]));
        V26.AssertClose("grad", (new(576, 256), file.Floats("grad.llm.model.embed_tokens.weight")),
            wanted.GetProperty("llm.model.embed_tokens.weight"), 1e-4);
    }

    [Test]
    public void WithoutGradientsThereAreNone()
    {
        Trace("1");
        using var file = SafetensorsFile.Open(Out);
        Assert.That(file.Tensors.Select(t => t.Name), Has.None.StartsWith("grad."));
        Assert.That(file.Get("logits").Sizes, Is.EqualTo(new long[] { 106, 576 }));
    }

    [TestCase("nobody", "rows.json: no row has the id or number \"nobody\"")]
    [TestCase("99", "rows.json: no row has the id or number \"99\"")]
    public void UnknownRowsAreOneLine(string row, string message)
    {
        var (code, error) = Fails(["trace", "--rows", row, "--out", Out, .. Arguments(V26.Rows)]);
        Assert.That(code, Is.EqualTo(2));
        Assert.That(error, Does.EndWith(message + "\n"));
        Assert.That(error.Count(c => c == '\n'), Is.EqualTo(1));
        Assert.That(File.Exists(Out), Is.False);
    }

    [Test]
    public void ABadRowIsNamedWithItsReason()
    {
        string rows = Path.Combine(V26.Folder, "data", "rows_bad.json");
        var (code, error) =
            Fails(["trace", "--rows", "one-turn", "--out", Out, .. Arguments(rows)]);
        Assert.That(code, Is.EqualTo(2));
        Assert.That(error, Does.Match("row 3 \\(id \"one-turn\"\\).*: .+\n$"));
    }

    [Test]
    public void AccuraciesAreThoseOfTheLogits()
    {
        // A model that has learned a little, so that some answers are right and others are not.
        TrainArguments arguments = V26.Full with
        {
            DataPath = Runs.Data(_folder, "one", "turns"),
            OutputDir = Path.Combine(_folder, "out"),
            SaveStrategy = When.No,
            MaxSteps = 24,
            LearningRate = 1e-3,
        };
        Runs.Train(arguments);
        arguments = arguments with
        {
            ModelNameOrPath = arguments.OutputDir,
            DataPath = Runs.Data(_folder, "one", "two-small", "turns", "tall", "corner"),
        };
        using var model = TunedModel.Open(arguments);
        var rows = DataRows.Read(arguments.DataPath!, arguments, model.Spec.Rows());
        var expected = Counted(model, rows);
        foreach (int size in (int[])[1, 2, 5])
        {
            int batches = (rows.Count + size - 1) / size;
            using var loader = new BatchLoader(rows, size, batches, 2, 2, (batch, numbers) =>
            {
                int begin = (int)batch * size, count = Math.Min(size, rows.Count - begin);
                for (int i = 0; i < count; i++) numbers[i] = begin + i;
                return count;
            });
            Evaluation found = Evaluation.Run(model, loader, batches, () => true)!;
            TestContext.Out.WriteLine($"{found}");
            Assert.That((found.Rows, found.Tokens, found.Answers),
                Is.EqualTo((rows.Count, expected.Tokens, expected.Answers)));
            Assert.That(found.TokenAccuracy, Is.EqualTo((double)expected.Hits / expected.Tokens));
            Assert.That(found.AnswerAccuracy,
                Is.EqualTo((double)expected.Right / expected.Answers));
            Assert.That(found.Loss, Is.EqualTo(expected.Loss).Within(1e-5 * expected.Loss));
            Assert.That(model.Graph.Recording, Is.True);
            Assert.That(model.Device.Step.IsEmpty, Is.True);
        }

        Assert.That(expected.Right, Is.InRange(1, expected.Answers - 1),
            "else this test tells nothing");
    }

    // Row by row from all logits: the answers are the runs of labels.
    private static (long Tokens, long Hits, long Answers, long Right, double Loss) Counted(
        TunedModel model, DataRows rows)
    {
        long tokens = 0, hits = 0, answers = 0, right = 0;
        double loss = 0;
        for (int row = 0; row < rows.Count; row++)
        {
            var batch = new Batch();
            batch.Clear();
            rows.Append(row, batch);
            Trace trace = Engine.Train.Trace.Run(model, batch, gradients: false);
            var (shape, logits) = trace.Floats["logits"];
            int[] labels = trace.Ints["labels"].Values;
            bool inside = false, all = true;
            for (int t = 0; t <= labels.Length; t++)
            {
                bool labelled = t < labels.Length && labels[t] != -100;
                if (inside && !labelled)
                {
                    answers++;
                    if (all) right++;
                    all = true;
                }

                inside = labelled;
                if (!labelled) continue;
                float[] line = logits[(t * shape.Cols)..((t + 1) * shape.Cols)];
                double largest = line.Max();
                loss += largest + Math.Log(line.Sum(v => Math.Exp(v - largest))) - line[labels[t]];
                bool hit = Array.IndexOf(line, line.Max()) == labels[t];
                tokens++;
                if (hit) hits++;
                all &= hit;
            }
        }

        return (tokens, hits, answers, right, loss / tokens);
    }

    private static string[] Arguments(string rows) =>
        ["--model_name_or_path", V26.Model, "--data_path", rows, "--official_compat"];

    private string Trace(string rows, params string[] more)
    {
        var (output, error) = (new StringWriter(), new StringWriter());
        int code = new CommandLine(output, error, new Runners()).Run(
            ["trace", "--rows", rows, "--out", Out, .. more, .. Arguments(V26.Rows)]);
        Assert.That(code, Is.Zero, error.ToString());
        return output.ToString();
    }

    private static (int Code, string Error) Fails(string[] arguments)
    {
        var (output, error) = (new StringWriter(), new StringWriter());
        return (new CommandLine(output, error, new Runners()).Run(arguments), error.ToString());
    }
}
