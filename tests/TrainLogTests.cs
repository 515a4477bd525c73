using System.Buffers.Binary;
using System.Text;
using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Train;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

public sealed class TrainLogTests
{
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-").FullName;

    [TearDown]
    public void RemoveFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void TrainerStateHasTheTrainersKeysAndUnroundedNumbers()
    {
        RunSteps(1, 4, save: 4);
        using var json =
            JsonDocument.Parse(File.ReadAllBytes(Path.Combine(_folder, "trainer_state.json")));
        var root = json.RootElement;
        Assert.That(root.EnumerateObject().Select(p => p.Name), Is.EqualTo((string[])[
            "best_global_step", "best_metric", "best_model_checkpoint", "epoch", "eval_steps",
            "global_step", "is_hyper_param_search", "is_local_process_zero",
            "is_world_process_zero",
            "log_history", "logging_steps", "max_steps", "num_input_tokens_seen",
            "num_train_epochs",
            "save_steps", "stateful_callbacks", "total_flos", "train_batch_size", "trial_name",
            "trial_params"]));
        var entry = root.GetProperty("log_history")[0];
        Assert.That(entry.GetProperty("step").GetInt32(), Is.EqualTo(2));
        Assert.That(entry.GetProperty("epoch").GetDouble(), Is.EqualTo(0.5));
        Assert.That(entry.GetProperty("loss").GetDouble(), Is.EqualTo((Loss(1) + Loss(2)) / 2));
        Assert.That(entry.GetProperty("grad_norm").GetDouble(), Is.EqualTo(1 / 6.0));
        Assert.That(entry.GetProperty("learning_rate").GetDouble(), Is.EqualTo(1e-4 / 6));
        Assert.That(root.GetProperty("global_step").GetInt32(), Is.EqualTo(4));
        Assert.That(root.GetProperty("num_input_tokens_seen").GetInt64(), Is.EqualTo(400));
        Assert.That(root.GetProperty("total_flos").GetDouble(), Is.EqualTo(6 * 400 * 1000.0));
    }

    [Test]
    public void ResumedLogsEqualUninterruptedOnes()
    {
        RunSteps(1, 12, save: 12);
        string whole = State(_folder);
        string[] lines = Lines();
        // Saved in the middle of a logging interval, then killed five steps later.
        RunSteps(1, 5, save: 5);
        string checkpoint =
            Directory.CreateDirectory(Path.Combine(_folder, "checkpoint-5")).FullName;
        File.Copy(Path.Combine(_folder, "trainer_state.json"),
            Path.Combine(checkpoint, "trainer_state.json"));
        RunSteps(1, 10, save: 0);
        File.AppendAllText(Path.Combine(_folder, "train_log.jsonl"), "{\"step\": 1");
        Assert.That(Lines(), Has.Length.EqualTo(7),
            "entries of 2, 4, 6, 8, 10, the evaluation, a torn line");
        RunSteps(6, 12, save: 12, checkpoint);
        Assert.That(State(_folder), Is.EqualTo(whole));
        Assert.That(Lines(), Is.EqualTo(lines));
    }

    /// <summary>A million entries: what is saved has the newest, what goes on reads the
    /// end.</summary>
    [Test]
    public void LogsOfAnyLengthAreSavedAndGoneOnWithInTheSameTime()
    {
        const int entries = 1_000_000, step = entries - 10;
        var state = new LogState();
        for (int i = 1; i <= entries; i++)
            state.Add(new LogEntry(i, i / 100.0, [("loss", 1.0 / i)], []));
        state.Save(_folder, entries, Report(null));
        string file = Path.Combine(_folder, LogState.FileName);
        Assert.That(new FileInfo(file).Length, Is.LessThan(4 << 20));
        using (JsonDocument json = JsonDocument.Parse(File.ReadAllBytes(file)))
        {
            JsonElement history = json.RootElement.GetProperty("log_history");
            Assert.That(history.GetArrayLength(), Is.EqualTo(10_000));
            Assert.That(history[9_999].GetProperty("step").GetInt32(), Is.EqualTo(entries));
        }

        string lines = Path.Combine(_folder, LogLines.FileName);
        using (var writer = new StreamWriter(lines))
            for (int i = 1; i <= entries; i++)
                writer.Write($"{{\"step\":{i},\"epoch\":{i / 100}.5,\"loss\":1.25}}\n");
        var watch = System.Diagnostics.Stopwatch.StartNew();
        new LogLines(_folder, step).Dispose();
        Assert.That(watch.ElapsedMilliseconds, Is.LessThan(500), "all of it takes longer to read");
        Assert.That(File.ReadLines(lines).Last(), Does.StartWith($"{{\"step\":{step},"));
        new LogLines(_folder, 0).Dispose();
        Assert.That(new FileInfo(lines).Length, Is.Zero);
    }

    /// <summary>Checkpoints of versions that kept all entries are above what other files may
    /// be.</summary>
    [Test]
    public void ALogHistoryAbove16MiBIsRead()
    {
        RunSteps(1, 4, save: 4);
        string text = State(_folder);
        int entry = text.IndexOf('{', text.IndexOf("log_history", StringComparison.Ordinal));
        string first = text[entry..(text.IndexOf('}', entry) + 1)];
        var all = new System.Text.StringBuilder(text);
        all.Insert(entry, string.Concat(Enumerable.Repeat(first + ",", (17 << 20) / first.Length)));
        File.WriteAllText(Path.Combine(_folder, "trainer_state.json"), all.ToString());
        Assert.That(LogState.Load(_folder).Step, Is.EqualTo(4));
    }

    [TestCase("", 3)]
    [TestCase("{\"step\":3", 3)]
    [TestCase("\0\0\0\0\n", 3)]
    [TestCase("{\"step\":3,\"train_runtime\":1}\n", 3)]
    [TestCase("{\"step\":3,\"message\":\"m\"}\n", 4)]
    [TestCase("{\"step\":3,\"train_runtime\":1}\n{\"step\":3,\"message\":\"m\"}\n", 3)]
    public void WhatARunLeftBehindItsCheckpointIsCutOff(string tail, int kept)
    {
        string file = Path.Combine(_folder, LogLines.FileName);
        File.WriteAllText(file, "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n" + tail);
        new LogLines(_folder, 3).Dispose();
        Assert.That(File.ReadAllLines(file), Has.Length.EqualTo(kept));
    }

    [Test]
    public void SkippedStepsAreNamedAndInNoMean()
    {
        var screen = new StringWriter();
        using (var log = NewLog(screen))
        {
            log.Start(Report(null));
            log.Step(Step(1));
            log.Skipped(Step(2) with { Loss = double.NaN, GradNorm = double.PositiveInfinity },
                "loss is NaN");
            log.SaveState(_folder, 2);
        }

        Assert.That(screen.ToString(),
            Does.Contain("step 2 skipped: loss is NaN (loss NaN, grad_norm "));
        Assert.That(Lines()[^1], Does.Contain($"\"grad_norm\":null").And.Contain("\"loss\":1,"));
    }

    [Test]
    public void TensorBoardFilesHoldChecksummedScalars()
    {
        RunSteps(1, 4, save: 4);
        string file = Directory.GetFiles(Path.Combine(_folder, "runs"), "events.out.tfevents.*")
            .Single();
        var events = ReadEvents(File.ReadAllBytes(file));
        Assert.That(events[0].Text, Is.EqualTo("brain.Event:2"));
        Assert.That(events[1].Step, Is.EqualTo(2));
        Assert.That(events[1].Scalars["train/loss"], Is.EqualTo((float)((Loss(1) + Loss(2)) / 2)));
        Assert.That(events[1].Scalars["train/learning_rate"], Is.EqualTo((float)(1e-4 / 6)));
        Assert.That(events[1].Scalars["train/epoch"], Is.EqualTo(0.5f));
        Assert.That(events[2].Step, Is.EqualTo(4));
        Assert.That(events[3].Scalars["eval/loss"], Is.EqualTo(0.25f));
    }

    [Test]
    public void MaskedChecksumIsTheStandardOne()
    {
        // The check value of CRC-32C (RFC 3720), rotated right by 15 plus 0xa282ead8.
        const uint check = 0xE3069283;
        uint masked = unchecked(((check >> 15) | (check << 17)) + 0xA282EAD8);
        Assert.That(TensorBoardWriter.MaskedCrc("123456789"u8), Is.EqualTo(masked));
    }

    [Test]
    public void StepsThatPrintNothingAllocateNothing([Values] bool terminal)
    {
        var arguments =
            new TrainArguments { OutputDir = _folder, LoggingSteps = new Interval(100_000) };
        var clock = new ManualClock();
        using var log = new TrainLog(TextWriter.Null, terminal, () => 80, clock);
        log.Start(new RunReport(
            arguments, new StepPlan(arguments with { MaxSteps = 50_000 }, 64), "cpu", 1000,
            10, null));
        for (int step = 1; step <= 100; step++) log.Step(Step(step));
        long before = GC.GetAllocatedBytesForCurrentThread();
        for (int step = 101; step <= 1100; step++) log.Step(Step(step));
        Assert.That(GC.GetAllocatedBytesForCurrentThread() - before, Is.Zero);
    }

    [Test]
    public void ProgressLineIsRewrittenWithinTheWidth([Values(20, 40, 80, 200)] int columns)
    {
        var clock = new ManualClock();
        var screen = new StringWriter();
        var progress = new Progress(screen, true, () => columns, clock);
        progress.Start(0, 100);
        for (int step = 1; step <= 100; step++)
        {
            clock.Seconds += 0.25;
            progress.Count(Step(step));
            progress.Step(Step(step));
        }

        progress.Message("note");
        progress.End();
        string text = screen.ToString();
        string[] draws = text.Split('\r');
        foreach (string draw in draws)
            Assert.That(draw.TrimEnd('\n', ' ', '\b'), Has.Length.LessThan(Math.Max(columns, 21)));
        Assert.That(draws, Has.Length.GreaterThan(100));
        Assert.That(text, Does.Contain("100% 100/100").And.EndsWith("\rnote\n"));
        if (columns == 80) Assert.That(draws[50], Does.Contain("lr 1.9e-6 1000 tok/s 2.0 GiB"));
        if (columns >= 200)
        {
            Assert.That(draws[50], Does.StartWith(
                " 50% 50/100  [###############...............]  0:12<0:12  loss 0.0200  "));
            Assert.That(draws[50], Does.Contain("lr 1.85e-06  1,000 tokens/s  2.00 GiB"));
        }
    }

    [Test]
    public void ProgressLineIsDrawnTenTimesASecondAtMost()
    {
        var clock = new ManualClock();
        var screen = new StringWriter();
        var progress = new Progress(screen, true, () => 80, clock);
        progress.Start(0, 10_000);
        for (int step = 1; step <= 1000; step++)
        {
            clock.Seconds += 0.001;
            progress.Count(Step(step));
            progress.Step(Step(step));
        }

        Assert.That(screen.ToString().Count(c => c == '\r'), Is.InRange(9, 11));
    }

    [Test]
    public void OtherwiseALogEntryIsAPlainLine()
    {
        var screen = new StringWriter();
        using (var log = NewLog(screen))
        {
            log.Start(Report(null));
            for (int step = 1; step <= 4; step++) log.Step(Step(step));
            log.Saved("checkpoint-4");
            log.End(4, StopReason.Interrupt);
        }

        string[] lines = screen.ToString().TrimEnd().Split('\n');
        Assert.That(lines[0], Is.EqualTo("1,000 parameters, 10 trained (1.00 %), on cpu"));
        Assert.That(lines[2], Does.StartWith(
            "step 2/12  0:00<0:00  loss 0.7500  grad_norm 0.167  lr 1.67e-05  1,000 tokens/s"));
        Assert.That(lines[^1], Does.StartWith("stopped after step 4 of 12; go on with"));
        Assert.That(screen.ToString(), Does.Not.Contain("\r"));
    }

    [Test]
    public void DamagedStateOfACheckpointIsOneClearLine()
    {
        RunSteps(1, 4, save: 4);
        byte[] whole = File.ReadAllBytes(Path.Combine(_folder, "trainer_state.json"));
        string checkpoint = Directory.CreateDirectory(Path.Combine(_folder, "c")).FullName;
        var random = new Random(3);
        for (int i = 0; i < 300; i++)
        {
            byte[] damaged =
                whole[..(random.Next(2) == 0 ? whole.Length : random.Next(whole.Length))];
            if (damaged.Length > 0) damaged[random.Next(damaged.Length)] = (byte)random.Next(256);
            File.WriteAllBytes(Path.Combine(checkpoint, "trainer_state.json"), damaged);
            try
            {
                LogState.Load(checkpoint);
            }
            catch (InputException problem)
            {
                Assert.That(problem.Message,
                    Does.Contain("trainer_state.json").And.Not.Contain("\n"));
            }
        }
    }

    private static double Loss(int step) => 1.0 / step;

    private static StepReport Step(int step) =>
        new(step, Loss(step), Loss(step) / 3, 1e-4 / (step + 4), 100, 0.1, 2L << 30);

    private static TrainLog NewLog(TextWriter screen) =>
        new(screen, false, () => 80, new ManualClock());

    private RunReport Report(string? resumedFrom)
    {
        var arguments = new TrainArguments
        {
            OutputDir = _folder,
            LoggingSteps = new Interval(2),
            PerDeviceTrainBatchSize = 2,
        };
        return new RunReport(arguments, new StepPlan(arguments, 8), "cpu", 1000, 10, resumedFrom);
    }

    // Saves the state into the folder after the step "save" (0: never).
    private void RunSteps(int from, int to, int save, string? resumedFrom = null)
    {
        using var log = NewLog(TextWriter.Null);
        log.Start(Report(resumedFrom));
        for (int step = from; step <= to; step++)
        {
            log.Step(Step(step));
            if (step == 4) log.Evaluation(new EvaluationReport(4, 0.25, 0.5, 0.4, 3, 1));
            if (step == save) log.SaveState(_folder, step);
        }
    }

    private static string State(string folder) =>
        File.ReadAllText(Path.Combine(folder, "trainer_state.json"));

    private string[] Lines() => File.ReadAllLines(Path.Combine(_folder, "train_log.jsonl"));

    private sealed record BoardEvent(long Step, string Text, Dictionary<string, float> Scalars);

    // A reader of its own, with the checksum bit by bit, so that it shares nothing with the writer.
    private static List<BoardEvent> ReadEvents(byte[] file)
    {
        var events = new List<BoardEvent>();
        for (int at = 0; at < file.Length;)
        {
            int length = (int)BinaryPrimitives.ReadInt64LittleEndian(file.AsSpan(at));
            uint head = BinaryPrimitives.ReadUInt32LittleEndian(file.AsSpan(at + 8));
            uint tail = BinaryPrimitives.ReadUInt32LittleEndian(file.AsSpan(at + 12 + length));
            Assert.That(head, Is.EqualTo(Masked(file.AsSpan(at, 8))));
            Assert.That(tail, Is.EqualTo(Masked(file.AsSpan(at + 12, length))));
            var read = new BoardEvent(0, "", []);
            foreach (var (field, number, bytes) in Fields(file.AsSpan(at + 12, length)))
            {
                if (field == 2) read = read with { Step = number };
                if (field == 3) read = read with { Text = Encoding.UTF8.GetString(bytes) };
                if (field != 5) continue;
                foreach (var (_, _, value) in Fields(bytes))
                {
                    var parts = Fields(value);
                    read.Scalars[Encoding.UTF8.GetString(parts[0].Bytes)] =
                        BinaryPrimitives.ReadSingleLittleEndian(parts[1].Bytes);
                }
            }

            events.Add(read);
            at += 16 + length;
        }

        return events;
    }

    private static List<(int Field, long Number, byte[] Bytes)> Fields(ReadOnlySpan<byte> message)
    {
        var fields = new List<(int, long, byte[])>();
        for (int at = 0; at < message.Length;)
        {
            long Varint(ReadOnlySpan<byte> m)
            {
                long value = 0;
                for (int shift = 0; ; shift += 7)
                {
                    byte b = m[at++];
                    value |= (long)(b & 0x7F) << shift;
                    if (b < 0x80) return value;
                }
            }

            int key = (int)Varint(message);
            int kind = key & 7;
            long number = kind is 0 or 2 ? Varint(message) : 0;
            int length = kind switch { 0 => 0, 1 => 8, 2 => (int)number, _ => 4 };
            fields.Add((key >> 3, number, message.Slice(at, length).ToArray()));
            at += length;
        }

        return fields;
    }

    private static uint Masked(ReadOnlySpan<byte> data)
    {
        uint crc = ~0u;
        foreach (byte b in data)
        {
            crc ^= b;
            for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ ((crc & 1) == 0 ? 0 : 0x82F63B78);
        }

        crc = ~crc;
        return unchecked(((crc >> 15) | (crc << 17)) + 0xA282EAD8);
    }

    private sealed class ManualClock : TimeProvider
    {
        public double Seconds { get; set; } = 1;

        public override long TimestampFrequency => 1_000_000;

        public override long GetTimestamp() => (long)(Seconds * 1e6);

        public override DateTimeOffset GetUtcNow() => DateTimeOffset.UnixEpoch.AddSeconds(Seconds);
    }
}
