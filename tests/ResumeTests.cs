using System.Diagnostics;
using System.Runtime.InteropServices;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Runs that end early, by request, by a signal or by force, and go on: every file of every later
/// checkpoint has the bytes that an uninterrupted run gives it. Steps that are not finite.
/// </summary>
[TestFixture]
public sealed class ResumeTests
{
    private const int Hangup = 1, Interrupt = 2, Kill = 9, User1 = 10, Terminate = 15,
        ProcessorTime = 24;

    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [TestCase("lora", 1)]
    [TestCase("full", 2)]
    [TestCase("lora", 3, OptimizerKind.AdamwBf16)]
    [TestCase("full", 3, OptimizerKind.PagedAdamw8bit)]
    [TestCase("lora", 4, OptimizerKind.Adafactor)]
    public void FromEachCheckpointARunGoesOnBitForBit(
        string name, int every, OptimizerKind optim = OptimizerKind.AdamwTorch)
    {
        TrainArguments arguments = (name != "full"
            ? V26.Lora with
            {
                LoraDropout = 0.2,
                GradientCheckpointing = true,
                NeftuneNoiseAlpha = 5,
            }
            : V26.Full with { Bf16 = true, WarmupSteps = 2 }) with
        {
            DataPath = Runs.Data(_folder, "one", "turns", "words"),
            OutputDir = Path.Combine(_folder, "whole"),
            GradientAccumulationSteps = 2,
            MaxSteps = 6,
            LearningRate = 1e-3,
            WeightDecay = 0.1,
            Optim = optim,
            SaveSteps = new Interval(every),
            LoggingSteps = new Interval(4),
            LoggingFirstStep = true,
            DataloaderNumWorkers = 1,
            Threads = 1,
        };
        Runs.Train(arguments);
        for (int step = every; step < arguments.MaxSteps; step += every)
        {
            TrainArguments resumed = arguments with
            {
                OutputDir = Path.Combine(_folder, $"from-{step}"),
                ResumeFromCheckpoint =
                    new ResumePoint(RunFolder.Checkpoint(arguments.OutputDir, step)),
                DataloaderNumWorkers = 3,
                Threads = 2,
            };
            string said = Runs.Train(resumed);
            Assert.That(said, Does.Contain($"resumed after step {step} from "));
            AssertSameFiles(
                RunFolder.Checkpoint(resumed.OutputDir, arguments.MaxSteps),
                RunFolder.Checkpoint(arguments.OutputDir, arguments.MaxSteps), least: 5);
            Assert.That(Runs.Losses(resumed), Is.EqualTo(Runs.Losses(arguments)));
            Directory.Delete(resumed.OutputDir, recursive: true);
        }
    }

    [Test]
    public void OtherRowsSeedsOrPartsAreRefused()
    {
        TrainArguments arguments = Short("out", steps: 1);
        Runs.Train(arguments);
        TrainArguments resumed = arguments with
        {
            MaxSteps = 2,
            ResumeFromCheckpoint = new ResumePoint(null),
        };
        Assert.That(Refusal(resumed with { Seed = 7 }), Does.Contain("was made with seed 42"));
        Assert.That(Refusal(resumed with { LoraR = 4 }),
            Does.EndWith("was made with lora_r 8 and lora_alpha 16, this run has 4 and 16"));
        Assert.That(Refusal(resumed with { Optim = OptimizerKind.AdamwBf16 }),
            Does.Contain("is F32, this run keeps BF16 (optim)"));
        Assert.That(Refusal(resumed with { Optim = OptimizerKind.Lion }),
            Does.Contain("second_moment.").And.Contain("another optim's"));
        Assert.That(Refusal(resumed with { LoraBias = LoraBias.All }),
            Does.Contain("optimizer.safetensors").And.Contain("first_moment."));
        Assert.That(Refusal(resumed with { LoraTargetModules = new TargetModules(["q_proj"]) }),
            Does.Contain("lora_A.weight is not trained in this run"));
        File.WriteAllText(arguments.DataPath!, File.ReadAllText(arguments.DataPath!) + " ");
        Assert.That(Refusal(resumed), Does.Contain("other training rows"));

        static string Refusal(TrainArguments with) =>
            Assert.Throws<InputException>(() => Runs.Train(with))!.Message;
    }

    [Test]
    public void ARunThatIsStoppedBeforeItsFirstStepSaysSo()
    {
        var stop = new StopRequest();
        stop.TryRequest(StopReason.Interrupt);
        TrainArguments arguments = Short("out", steps: 3);
        Assert.That(Runs.Train(arguments, stop),
            Does.Contain("stopped after step 0 of 3; nothing was saved"));
        Assert.That(RunFolder.Checkpoints(arguments.OutputDir), Is.Empty);
    }

    [Test]
    public void AStoppedRunSavesItsStepWhateverTheSaveStrategy()
    {
        var stop = new StopRequest();
        TrainArguments arguments = Short("out", steps: 5) with
        {
            SaveStrategy = When.No,
            LoggingSteps = new Interval(1),
        };
        string said = Runs.Train(arguments, stop, new StopAt("step 2/5", stop));
        Assert.That(said, Does.Contain("stopped after step 2 of 5; go on with"));
        Assert.That(RunFolder.Checkpoints(arguments.OutputDir).Select(c => c.Step),
            Is.EqualTo([2]));
    }

    /// <summary>A screen that asks for a stop when a text appears on it.</summary>
    private sealed class StopAt(string text, StopRequest stop) : StringWriter
    {
        public override void Flush()
        {
            if (ToString().Contains(text, StringComparison.Ordinal))
                stop.TryRequest(StopReason.Interrupt);
        }
    }

    [Test]
    public void EvaluationsAndCheckpointsChangeNothing()
    {
        TrainArguments plain = Short("plain", steps: 6) with { SaveStrategy = When.No };
        TrainArguments busy = Short("busy", steps: 6) with
        {
            EvalDataPath = plain.DataPath,
            EvalStrategy = When.Steps,
            EvalSteps = new Interval(2),
            EvalOnStart = true,
            PerDeviceEvalBatchSize = 3,
        };
        Runs.Train(plain);
        Runs.Train(busy);
        Assert.That(Runs.Losses(busy), Is.EqualTo(Runs.Losses(plain)));
        AssertSameFiles(
            RunFolder.Checkpoint(busy.OutputDir, 6), plain.OutputDir, "adapter_model.safetensors");
        var evaluations = Runs.History(busy).Where(e => e.TryGetProperty("eval_loss", out _))
            .ToList();
        Assert.That(evaluations.Select(e => e.GetProperty("step").GetInt32()),
            Is.EqualTo([0, 2, 4, 6]));
        double[] losses = [.. evaluations.Select(e => e.GetProperty("eval_loss").GetDouble())];
        Assert.That(losses, Is.Ordered.Descending, "the rows it is trained on");
    }

    /// <summary>
    /// Fifteen moments (CPMX_KILLS sets another number): while starting, in steps, while
    /// checkpoints are written, renamed and removed.
    /// </summary>
    [Test]
    public void ARunThatIsKilledLeavesWholeCheckpoints()
    {
        string? asked = Environment.GetEnvironmentVariable("CPMX_KILLS");
        int kills = int.TryParse(asked, out int number) ? number : 15;
        TrainArguments whole = Short("whole", steps: 60);
        Runs.Train(whole);
        TrainArguments killed = Short("killed", steps: 60) with { SaveTotalLimit = 3 };
        var random = new Random(5);
        int seen = 0, unfinished = 0;
        for (int i = 0; i < kills; i++)
        {
            using Process process = Start(killed);
            bool early = random.Next(5) == 0;
            if (!early) WaitFor(process, "saved ");
            process.WaitForExit(random.Next(early ? 400 : 150));
            if (!process.HasExited) Send(process.Id, Kill);
            process.WaitForExit();
            unfinished += Directory.Exists(killed.OutputDir)
                ? Directory.GetDirectories(killed.OutputDir, "*" + RunFolder.Unfinished).Length : 0;
            foreach (var (step, path) in RunFolder.Checkpoints(killed.OutputDir))
            {
                AssertSameFiles(path, RunFolder.Checkpoint(whole.OutputDir, step), least: 5);
                seen++;
            }

            if (process.ExitCode == 0) Directory.Delete(killed.OutputDir, recursive: true);
            else Assert.That(process.ExitCode, Is.EqualTo(128 + Kill));
        }

        TestContext.Out.WriteLine(
            $"{kills} kills, {seen} checkpoints found, {unfinished} unfinished");
        Assert.That(seen, Is.GreaterThan(kills));
        using Process last = Start(killed);
        last.StandardOutput.ReadToEnd();
        last.WaitForExit();
        Assert.That(last.ExitCode, Is.Zero);
        Assert.That(RunFolder.Checkpoints(killed.OutputDir).Select(c => c.Step),
            Is.EqualTo([58, 59, 60]));
        Assert.That(Directory.GetDirectories(killed.OutputDir, "*" + RunFolder.Unfinished),
            Is.Empty);
        AssertSameFiles(
            RunFolder.Checkpoint(killed.OutputDir, 60), RunFolder.Checkpoint(whole.OutputDir, 60),
            least: 5);
        AssertSameFiles(
            killed.OutputDir, whole.OutputDir, "adapter_model.safetensors", "adapter_config.json");
    }

    [TestCase(Terminate, 143, "SIGTERM")]
    [TestCase(Interrupt, 130, "Ctrl-C")]
    [TestCase(Hangup, 129, "SIGHUP")]
    [TestCase(ProcessorTime, 152, "SIGXCPU")]
    public void ASignalEndsTheRunAfterItsStep(int signal, int code, string name)
    {
        // What is left to say fills the pipe, so that the run cannot end before it gets the signal.
        TrainArguments stopped = Short("stopped", steps: 5000) with
        {
            SaveSteps = new Interval(5000),
            LrSchedulerType = LrSchedule.Constant,
        };
        using (Process process = Start(stopped))
        {
            WaitFor(process, "step 3/");
            Send(process.Id, signal);
            string rest = process.StandardOutput.ReadToEnd();
            process.WaitForExit();
            Assert.That(process.ExitCode, Is.EqualTo(code), rest);
            Assert.That(rest, Does.Contain($"{name}: finishing this step, then saving"));
            Assert.That(rest, Does.Contain("go on with --resume_from_checkpoint true"));
        }

        var saved = RunFolder.Checkpoints(stopped.OutputDir);
        Assert.That(saved, Has.Count.EqualTo(1));
        Assert.That(File.Exists(Path.Combine(stopped.OutputDir, "adapter_model.safetensors")),
            Is.False);
        int end = saved[0].Step + 3;
        TrainArguments whole =
            stopped with { OutputDir = Path.Combine(_folder, "whole"), MaxSteps = end };
        Runs.Train(whole);
        Runs.Train(stopped with { MaxSteps = end, ResumeFromCheckpoint = new ResumePoint(null) });
        AssertSameFiles(
            RunFolder.Checkpoint(stopped.OutputDir, end),
            RunFolder.Checkpoint(whole.OutputDir, end), least: 5);
    }

    /// <summary>A kill between the last save and the removal of what it replaces.</summary>
    [Test]
    public void AnInterruptedRotationIsFinishedByTheNextRun()
    {
        TrainArguments arguments = Short("out", steps: 3) with { SaveTotalLimit = 2 };
        Runs.Train(arguments with { SaveTotalLimit = null });
        Assert.That(RunFolder.Checkpoints(arguments.OutputDir), Has.Count.EqualTo(3));
        Runs.Train(arguments with { ResumeFromCheckpoint = new ResumePoint(null) });
        Assert.That(RunFolder.Checkpoints(arguments.OutputDir).Select(c => c.Step),
            Is.EqualTo([2, 3]));
    }

    [Test]
    public void TooFewOpenFilesAreOneLine()
    {
        using Process process = Start(Short("out", steps: 3), "ulimit -n 60; exec \"$@\" 2>&1");
        string said = process.StandardOutput.ReadToEnd();
        process.WaitForExit();
        Assert.That(process.ExitCode, Is.EqualTo(1), said);
        Assert.That(said.TrimEnd(), Is.EqualTo(
            "cpmx: only 60 files may be open at a time (ulimit -n), 128 are needed"));
    }

    [Test]
    public void ASignalAsksForACheckpointAndTheRunGoesOn()
    {
        if (!OperatingSystem.IsLinux()) Assert.Ignore("the signal's number is Linux's");
        TrainArguments arguments = Short("out", steps: 300) with { SaveSteps = new Interval(300) };
        using Process process = Start(arguments);
        WaitFor(process, "step 3/");
        Send(process.Id, User1);
        string rest = process.StandardOutput.ReadToEnd();
        process.WaitForExit();
        Assert.That(process.ExitCode, Is.Zero, rest);
        Assert.That(rest, Does.Contain("SIGUSR1: saving a checkpoint after this step"));
        var saved = RunFolder.Checkpoints(arguments.OutputDir);
        Assert.That(saved, Has.Count.EqualTo(2));
        Assert.That(saved[0].Step, Is.InRange(3, 299));
    }

    [Test]
    public void AStepThatIsNotFiniteIsSkippedAndChangesNothing()
    {
        using var model = TunedModel.Open(V26.Full);
        var trainer = new Trainer(V26.Full, model);
        Batch good = V26.Batch(V26.Full, "one"), bad = V26.Batch(V26.Full, "one");
        bad.Patches.Clear();
        bad.Patches.Extend(good.Patches.Count).Fill(float.NaN);
        Assert.That(trainer.Step(0, [good], 1e-3).Skipped, Is.False);
        string before = State(model);
        for (int i = 1; i <= 2; i++)
        {
            StepResult result = trainer.Step(i, [bad], 1e-3);
            Assert.That(result.Skipped, Is.True);
            Assert.That(double.IsFinite(result.Loss), Is.False);
            Assert.That(trainer.SkippedInARow, Is.EqualTo(i));
            Assert.That(State(model), Is.EqualTo(before));
            Assert.That(trainer.Optimizer.Updates, Is.EqualTo(1));
        }

        Assert.That(trainer.Step(3, [good], 1e-3).Skipped, Is.False);
        Assert.That(trainer.SkippedInARow, Is.Zero);
        Assert.That(State(model), Is.Not.EqualTo(before));
    }

    [Test]
    public void SeveralStepsThatAreNotFiniteStopTheRun()
    {
        string adapter = Path.Combine(_folder, "nan");
        TrainArguments arguments = Short("out", steps: 20) with { MaxNonfiniteSteps = 3 };
        using (var model = TunedModel.Open(arguments))
        {
            string name = model.ParameterRanges.List[0].Name;
            float[] values = model.Device.ReadFloats(model.ParameterRanges.Value(name));
            // Finite, but no product with it is.
            Array.Fill(values, float.MaxValue);
            model.ParameterRanges.Write(name, values);
            ModelFiles.Save(adapter, model, arguments);
        }

        var screen = new StringWriter();
        using var log = new TrainLog(screen, isTerminal: false, () => 80, TimeProvider.System);
        var failure = Assert.Throws<RunException>(() => TrainRun.Run(
            arguments with { LoraWeightPath = adapter }, log, new StopRequest()))!;
        Assert.That(failure.Message,
            Does.StartWith("3 steps in a row gave a loss or gradients that are not "
            + "finite, the last one step 3"));
        for (int step = 1; step <= 3; step++)
            Assert.That(screen.ToString(), Does.Contain($"step {step} skipped: loss (loss NaN"));
        Assert.That(File.Exists(Path.Combine(arguments.OutputDir, "adapter_model.safetensors")),
            Is.False);
    }

    // Text alone, so that a step takes milliseconds; a checkpoint after each.
    private TrainArguments Short(string name, int steps)
    {
        string data = Path.Combine(_folder, "text.json");
        if (!File.Exists(data))
        {
            File.WriteAllText(data, "[" + string.Join(",", Enumerable.Range(0, 5).Select(i => $$"""
                {"conversations": [{"role": "user", "content": "Count to {{i}}."},
                  {"role": "assistant", "content": "{{string.Join(' ', Enumerable.Range(0, i + 1))}}"}]}
                """)) + "]");
        }

        return V26.Lora with
        {
            OfficialCompat = false,
            DataPath = data,
            OutputDir = Path.Combine(_folder, name),
            PerDeviceTrainBatchSize = 2,
            LoraDropout = 0.1,
            LearningRate = 1e-3,
            MaxSteps = steps,
            SaveSteps = new Interval(1),
            LoggingSteps = new Interval(1),
        };
    }

    // script: a line of sh that begins the program, "$@", in surroundings of its own.
    private static Process Start(TrainArguments arguments, string script = "exec \"$@\"")
    {
        string file = arguments.OutputDir + ".json";
        TrainArguments now = RunFolder.Checkpoints(arguments.OutputDir).Count == 0
            ? arguments
            : arguments with { ResumeFromCheckpoint = new ResumePoint(null) };
        File.WriteAllBytes(file, TrainWriter.ToJson(now));
        string dotnet = Environment.GetEnvironmentVariable("DOTNET_HOST_PATH") ?? "dotnet";
        string program = Path.Combine(AppContext.BaseDirectory, "cpmx.dll");
        return Process.Start(new ProcessStartInfo(
            "/bin/sh", ["-c", script, "sh", dotnet, program, "train", file])
        {
            RedirectStandardOutput = true,
            WorkingDirectory = Path.GetDirectoryName(file),
        })!;
    }

    // Then nothing is read any more: the pipe holds what a short run goes on to say.
    private static void WaitFor(Process process, string text)
    {
        while (process.StandardOutput.ReadLine() is { } line)
            if (line.Contains(text, StringComparison.Ordinal)) return;
    }

    private static void AssertSameFiles(string folder, string expected, params string[] names)
    {
        foreach (string name in names)
            Assert.That(File.ReadAllBytes(Path.Combine(folder, name)).AsSpan().SequenceEqual(
                File.ReadAllBytes(Path.Combine(expected, name))), Is.True, $"{folder}: {name}");
    }

    private static void AssertSameFiles(string folder, string expected, int least)
    {
        string[] names =
            [.. Directory.GetFiles(expected).Select(f => Path.GetFileName(f)!).Order()];
        Assert.That(names, Has.Length.GreaterThanOrEqualTo(least));
        Assert.That(Directory.GetFiles(folder).Select(f => Path.GetFileName(f)!).Order(),
            Is.EqualTo(names));
        AssertSameFiles(folder, expected, names);
    }

    /// <summary>Everything a step may change, as one text.</summary>
    private static string State(TunedModel model)
    {
        var bytes = new List<byte>();
        foreach (TunedTensor tensor in model.ParameterRanges.List)
            foreach (var part in (Kernels.Tensor[])[model.ParameterRanges.Value(tensor.Name),
                .. model.ParameterRanges.States(tensor.Name).Select(state => state.Tensor)])
                bytes.AddRange(MemoryMarshal.AsBytes<float>(model.Device.ReadFloats(part)));
        return Convert.ToHexString(System.Security.Cryptography.SHA256.HashData(bytes.ToArray()));
    }

    private static void Send(int process, int signal) =>
        Assert.That(SendSignal(process, signal), Is.Zero, "the process is there");

    [DllImport("libc", EntryPoint = "kill")]
    private static extern int SendSignal(int process, int signal);
}
