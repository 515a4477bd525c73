using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// What fails in the middle of a run costs no step: pictures that are damaged later, logs that
/// cannot be written, stops in evaluations, exceptions, steps that are never applied.
/// </summary>
[TestFixture]
public sealed class LateFailureTests
{
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void APictureThatIsDamagedLaterCostsNoStepAndCanBeLeftOut()
    {
        TrainArguments arguments = Sequential("error", pictures: 10);
        var failure = Assert.Throws<RunException>(
            () => Runs.Train(arguments, screen: new At("step 1/", () => Damage(8))))!;
        Assert.That(failure.Message, Does.Contain("rows.json row 9 (id \"8\"): ")
            .And.Contain("8.png").And.Contain("cpmx data check").And.Contain("--on_bad_row skip")
            .And.EndWith("go on with --resume_from_checkpoint true"));
        Assert.That(failure.Message, Does.Not.Contain("\n"));
        // Whoever makes batches ahead finds it before the step that would meet it.
        int saved = RunFolder.Checkpoints(arguments.OutputDir).Single().Step;
        Assert.That(saved, Is.InRange(5, 8));

        // It goes on without the row, to the bits of a run that left it out when it met it.
        string said = Runs.Train(arguments with
        {
            OnBadRow = BadRows.Skip,
            ResumeFromCheckpoint = new ResumePoint(null),
        });
        Assert.That(said, Does.Contain($"resumed after step {saved}").And.Contain("skipped: "));
        Assert.That(said, Does.Contain("step 9: all of its rows are left out"));
        Repair(8);
        TrainArguments skipping = Sequential("skip", pictures: 10) with { OnBadRow = BadRows.Skip };
        var screen = new At("step 1/", () => Damage(8));
        said = Runs.Train(skipping, screen: screen);
        Assert.That(said, Does.Contain("skipped: ").And.Contain("row 9 (id \"8\"): "));
        foreach (string file in (string[])["adapter_model.safetensors", "optimizer.safetensors",
            "run_state.json", "trainer_state.json"])
            Assert.That(File.ReadAllBytes(Path.Combine(Last(arguments), file)), Is.EqualTo(
                File.ReadAllBytes(Path.Combine(Last(skipping), file))), file);
    }

    [TestCase(true)]
    [TestCase(false)]
    public void ARowThatIsMissingOrBackWhenARunGoesOnMovesNoOther(bool missing)
    {
        TrainArguments arguments = Sequential("out", pictures: 6) with
        {
            OnBadRow = BadRows.Skip,
            PerDeviceTrainBatchSize = 2,
            TrainSamplingStrategy = SamplingStrategy.Random,
            MaxSteps = 2,
        };
        if (!missing) File.Delete(Picture(5));
        Runs.Train(arguments);
        if (missing) File.Delete(Picture(5));
        else Repair(5);
        string said = Runs.Train(arguments with
        {
            MaxSteps = 6,
            ResumeFromCheckpoint = new ResumePoint(null),
        });
        Assert.That(said, Does.Contain("resumed after step 2"));
        Assert.That(said, Does.Contain(missing ? "6 rows, 6 steps" : "5 rows, 6 steps"));
    }

    [Test]
    public void AnEvaluationRowThatIsDamagedLaterCostsNoStep()
    {
        TrainArguments arguments = Sequential("out", pictures: 4);
        string data = Path.Combine(_folder, "eval", "rows.json");
        Directory.CreateDirectory(Path.GetDirectoryName(data)!);
        File.Copy(arguments.DataPath!, data);
        foreach (string picture in Directory.GetFiles(_folder, "*.png"))
            File.Copy(picture, Path.Combine(_folder, "eval", Path.GetFileName(picture)));
        arguments = arguments with
        {
            EvalDataPath = data,
            EvalStrategy = When.Steps,
            EvalSteps = new Interval(2),
        };
        void Delete() => File.Delete(Path.Combine(_folder, "eval", "2.png"));
        Assert.That(() => Runs.Train(arguments, screen: new At("step 1/", Delete)),
            Throws.TypeOf<RunException>().With.Message.Contains("eval/rows.json row 3 (id \"2\")"));
        Assert.That(RunFolder.Checkpoints(arguments.OutputDir).Select(c => c.Step),
            Is.EqualTo([2]));
        File.Copy(Picture(2), Path.Combine(_folder, "eval", "2.png"));
        string said = Runs.Train(
            arguments with { OutputDir = arguments.OutputDir + "2", OnBadRow = BadRows.Skip },
            screen: new At("step 1/", Delete));
        Assert.That(said, Does.Contain("3 rows in ").And.Contain("skipped: " + data + " row 3"));
    }

    [TestCase(BadRows.Error)]
    [TestCase(BadRows.Skip)]
    public void PicturesOfALargeSetAreCheckedByWhoeverIsIdle(BadRows onBadRow)
    {
        TrainArguments arguments = Sequential("out", pictures: 5) with { OnBadRow = onBadRow };
        Damage(3);
        var said = new List<string>();
        var rows = DataRows.Open(
            arguments.DataPath!, arguments, V26.Format, said.Add, manyPixels: 100);
        Assert.That(said.Single(), Does.EndWith(
            "rows.json: idle threads check its 5 pictures in full while training"));
        Assert.That(rows.Count, Is.EqualTo(5));
        int decoded = 0;
        while (rows.CheckPicture()) decoded++;
        Assert.That(decoded, Is.EqualTo(5));
        Assert.That(rows.LeftOut, Is.EqualTo(onBadRow == BadRows.Skip ? new[] { 4 } : []));
        Assert.That(rows.Failure?.Number,
            onBadRow == BadRows.Skip ? Is.Null : Is.EqualTo(4));
    }

    [Test]
    public void AFileIsDecodedOnceHoweverManyRowsShowIt()
    {
        TrainArguments arguments = Sequential("out", pictures: 3);
        string text = File.ReadAllText(arguments.DataPath!).Replace("1.png", "0.png");
        File.WriteAllText(arguments.DataPath!, text);
        var rows = DataRows.Open(
            arguments.DataPath!, arguments, V26.Format, _ => { }, manyPixels: 100);
        Assert.That(Enumerable.Range(0, 9).Count(_ => rows.CheckPicture()), Is.EqualTo(2));
        Damage(0);
        Assert.That(() =>
            DataRows.Open(arguments.DataPath!, arguments, V26.Format, _ => { }),
            Throws.TypeOf<InputException>().With.Message.StartsWith("2 of 3 rows are bad: "));
    }

    [Test]
    public void WhatTrainingCutsAndTurnsIsSaidAndLogged()
    {
        TrainArguments arguments = Text("out") with { ModelMaxLength = 45, MaxSteps = 1 };
        string said = Runs.Train(arguments);
        Assert.That(said, Does.Contain(
            "text.json: 2 of 3 rows are longer than model_max_length 45 and cut, 2 answers lose "
                + "their end\n"));
        string line = File.ReadLines(Path.Combine(arguments.OutputDir, "train_log.jsonl")).First();
        Assert.That(line, Is.EqualTo("""
            {"step":0,"epoch":0,"rows":3,"rows_left_out":0,"rows_cut":2,"rows_answers_cut":2,"rows_pictures":0,"rows_pictures_turned":0}
            """));
        Assert.That(new RowCounts(7, 1, 0, 0, 5, 2, false, 100).ToString(), Is.EqualTo(
            "1 bad rows are left out; 2 of 5 pictures with an EXIF orientation, which is not "
            + "applied (apply_exif_orientation=true does)"));
        Assert.That(new RowCounts(7, 0, 0, 0, 5, 0, false, 100).ToString(), Is.Empty);
    }

    [Test]
    public void ARunWithoutAnAppliedStepFailsAndReplacesNothing()
    {
        TrainArguments arguments = Text("out") with { SaveSteps = new Interval(1) };
        string adapter = Path.Combine(_folder, "huge");
        using (var model = TunedModel.Open(arguments))
        {
            string name = model.ParameterRanges.List[0].Name;
            float[] values = model.Device.ReadFloats(model.ParameterRanges.Value(name));
            Array.Fill(values, float.MaxValue);
            model.ParameterRanges.Write(name, values);
            ModelFiles.Save(adapter, model, arguments);
        }

        Runs.Train(arguments);
        string file = Path.Combine(arguments.OutputDir, "adapter_model.safetensors");
        byte[] before = File.ReadAllBytes(file);
        var failure = Assert.Throws<RunException>(() => Runs.Train(arguments with
        {
            LoraWeightPath = adapter,
            OverwriteOutputDir = true,
        }))!;
        Assert.That(failure.Message, Does.StartWith("none of 3 steps was applied"));
        Assert.That(File.ReadAllBytes(file), Is.EqualTo(before));
        // The first run's, which no checkpoint of the second has replaced.
        Assert.That(RunFolder.Checkpoints(arguments.OutputDir).Select(c => c.Step),
            Is.EqualTo([1, 2, 3]));
        Assert.That(File.ReadAllBytes(Path.Combine(
            arguments.OutputDir, "checkpoint-3", "adapter_model.safetensors")), Is.EqualTo(before));
    }

    [Test]
    public void AnExceptionInAStepIsToldAfterItsCheckpoint()
    {
        TrainArguments arguments = Text("out") with { MaxSteps = 9 };
        var screen = new At("step 4/", () => throw new InvalidOperationException("a bug"));
        Assert.That(() => Runs.Train(arguments, screen: screen),
            Throws.InvalidOperationException.With.Message.EqualTo("a bug"));
        Assert.That(RunFolder.Checkpoints(arguments.OutputDir).Select(c => c.Step),
            Is.EqualTo([4]));
        Assert.That(screen.ToString(), Does.Contain(
            "failed after step 4; go on with --resume_from_checkpoint true"));
    }

    [Test]
    public void ACheckpointThatIsAskedForEndsNothing()
    {
        var stop = new StopRequest();
        TrainArguments arguments = Text("out") with { MaxSteps = 4 };
        Runs.Train(arguments, stop, new At("step 2/", stop.RequestCheckpoint));
        Assert.That(RunFolder.Checkpoints(arguments.OutputDir).Select(c => c.Step),
            Is.EqualTo([2, 4]));
    }

    [Test]
    public void AnEvaluationIsLeftForAStopAndMadeUpForLater()
    {
        var stop = new StopRequest();
        TrainArguments arguments = Text("out") with
        {
            EvalDataPath = Text("out").DataPath,
            EvalStrategy = When.Steps,
            EvalSteps = new Interval(2),
            MaxSteps = 4,
        };
        string said = Runs.Train(arguments, stop,
            new At("step 2/", () => stop.TryRequest(StopReason.Terminate)));
        Assert.That(said, Does.Contain("the evaluation after step 2 is left unfinished"));
        Assert.That(said, Does.Contain("stopped after step 2 of 4; go on with"));
        Runs.Train(arguments with { ResumeFromCheckpoint = new ResumePoint(null) });
        TrainArguments whole = arguments with { OutputDir = Path.Combine(_folder, "whole") };
        Runs.Train(whole);
        static IEnumerable<(int, double)> Evaluations(TrainArguments a) => Runs.History(a)
            .Where(e => e.TryGetProperty("eval_loss", out _))
            .Select(e =>
                (e.GetProperty("step").GetInt32(), e.GetProperty("eval_loss").GetDouble()));
        Assert.That(Evaluations(arguments), Is.EqualTo(Evaluations(whole)));
        Assert.That(Evaluations(whole).Count(), Is.EqualTo(2));
    }

    [Test]
    public void ALogOnAFullDiskEndsAloneAndIsMentionedOnce()
    {
        if (!File.Exists("/dev/full")) Assert.Ignore("needs /dev/full");
        TrainArguments arguments = Text("out");
        Directory.CreateDirectory(arguments.OutputDir);
        string log = Path.Combine(arguments.OutputDir, "train_log.jsonl");
        File.CreateSymbolicLink(log, "/dev/full");
        string said = Runs.Train(arguments);
        Assert.That(said.Split('\n').Where(line => line.Contains("cannot write")),
            Is.EqualTo([$"{log}: cannot write: No space left on device; training goes on without "
                + "this log"]));
        Assert.That(said, Does.Contain("done: 3 steps"));
    }

    [Test]
    public void ARunOfTheMostStepsBeginsAtOnce()
    {
        var stop = new StopRequest();
        TrainArguments arguments = Text("out") with
        {
            MaxSteps = int.MaxValue,
            GradientAccumulationSteps = 1 << 20,
        };
        string said = Runs.Train(arguments, stop,
            new At("step 2/", () => stop.TryRequest(StopReason.Terminate)));
        Assert.That(said, Does.Contain("stopped after step 2 of 2147483647"));
    }

    [Test]
    public void BatchesBeforeAStepAreThoseOfTheStepsBeforeIt()
    {
        foreach (int rows in (int[])[1, 2, 7, 12])
            foreach (int accumulation in (int[])[1, 2, 5, 100])
            {
                var plan = new StepPlan(new TrainArguments
                {
                    PerDeviceTrainBatchSize = 2,
                    GradientAccumulationSteps = accumulation,
                    MaxSteps = 40,
                }, rows);
                long sum = 0;
                for (int steps = 0; steps <= 40; steps++)
                {
                    Assert.That(plan.BatchesBefore(steps), Is.EqualTo(sum));
                    int count = plan.Batches(steps + 1).Count;
                    Assert.That(count, Is.LessThanOrEqualTo(plan.MostBatches));
                    sum += count;
                }
            }
    }

    [Test]
    public void WhatFailsInOneOfManyThreadsComesOutAsItself()
    {
        Assert.That(() => DataRows.InParallel(100, i =>
        {
            if (i > 3) throw new InputException("tokenizer.json: is too slow");
        }), Throws.TypeOf<InputException>());
    }

    [Test]
    public void TheNoticeThatACheckpointNeedsIsSaid()
    {
        // 8 billion parameters in BF16 with F32 masters and moments, within 30 s.
        Assert.That(TrainRun.LargeCheckpoint(8_000_000_000L * 14), Does.StartWith(
            "a checkpoint has 112.0 GB: saved within 30 s of SIGTERM only if output_dir takes "
            + "3.7 GB a second; "));
        Assert.That(TrainRun.LargeCheckpoint(5_000_000_000), Is.Null);
    }

    [TestCase("0")]
    [TestCase("1e-46")]
    public void AnEpsilonOfZeroIsRefused(string epsilon) =>
        Assert.That(() => TrainReader.Read(
            ["--model_name_or_path=m", "--data_path=d", "--adam_epsilon", epsilon], "/", _ => { }),
            Throws.TypeOf<InputException>().With.Message.Contains("adam_epsilon is "));

    private static string Last(TrainArguments arguments) =>
        RunFolder.Checkpoints(arguments.OutputDir)[^1].Path;

    private string Picture(int number) => Path.Combine(_folder, $"{number}.png");

    private void Damage(int number)
    {
        byte[] whole = File.ReadAllBytes(Picture(number));
        File.WriteAllBytes(Picture(number), whole[..(whole.Length / 2)]);
    }

    private void Repair(int number) => File.Copy(
        Path.Combine(V26.Folder, "data", "images", "p0.png"), Picture(number), overwrite: true);

    // A row for each picture of its own, one after the other; batches are made three ahead.
    private TrainArguments Sequential(string name, int pictures)
    {
        string data = Path.Combine(_folder, "rows.json");
        for (int i = 0; i < pictures; i++) Repair(i);
        File.WriteAllText(data, JsonSerializer.Serialize(Enumerable.Range(0, pictures).Select(i =>
            new
            {
                id = $"{i}",
                image = $"{i}.png",
                conversations = new[]
                {
                    new { role = "user", content = "What?" },
                    new { role = "assistant", content = $"Number {i}." },
                },
            })));
        return V26.Lora with
        {
            OfficialCompat = false,
            DataPath = data,
            OutputDir = Path.Combine(_folder, name),
            MaxSteps = pictures,
            LoggingSteps = new Interval(1),
            DataloaderNumWorkers = 1,
            TrainSamplingStrategy = SamplingStrategy.Sequential,
        };
    }

    // Three rows of text: 33, 49 and 72 tokens.
    private TrainArguments Text(string name)
    {
        string data = Path.Combine(_folder, "text.json");
        File.WriteAllText(data, JsonSerializer.Serialize(Enumerable.Range(0, 3).Select(i => new
        {
            conversations = new[]
            {
                new { role = "user", content = "Count." },
                new
                {
                    role = "assistant",
                    content = string.Join(' ', Enumerable.Range(0, (8 * i) + 1)),
                },
            },
        })));
        return V26.Lora with
        {
            OfficialCompat = false,
            DataPath = data,
            OutputDir = Path.Combine(_folder, name),
            PerDeviceTrainBatchSize = 2,
            MaxSteps = 3,
            LoggingSteps = new Interval(1),
        };
    }

    /// <summary>A screen on which something happens when a text first appears.</summary>
    private sealed class At(string text, Action what) : StringWriter
    {
        private bool _hasHappened;

        public override void Flush()
        {
            if (_hasHappened || !ToString().Contains(text, StringComparison.Ordinal)) return;
            _hasHappened = true;
            what();
        }
    }
}
