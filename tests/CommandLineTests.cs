using System.Runtime.InteropServices;
using MiniCpmNative.Cli;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

public sealed partial class CommandLineTests
{
    private static readonly string[] s_least = ["--model_name_or_path=m", "--data_path=d"];

    [TestCase("", 2, "")]
    [TestCase("--help", 0, "usage: cpmx COMMAND")]
    [TestCase("--version", 0, "cpmx 0.1.0")]
    [TestCase("train --help", 0, "--lora_r 64")]
    [TestCase("data check --help", 0, "usage: cpmx data check")]
    [TestCase("trace --help", 0, "usage: cpmx trace")]
    [TestCase("merge --help", 0, "usage: cpmx merge")]
    [TestCase("export --help", 0, "usage: cpmx export gguf")]
    [TestCase("report --help", 0, "usage: cpmx report")]
    [TestCase("chat --help", 0, "--repetition_penalty")]
    [TestCase("doctor --help", 0, "usage: cpmx doctor")]
    public void HelpIsThere(string line, int code, string expected)
    {
        var (result, output, error) = Run(new Runners(), line.Split(' '));
        Assert.That(result, Is.EqualTo(code));
        Assert.That(output, Does.Contain(expected));
        Assert.That(error, code == 0 ? Is.Empty : Does.StartWith("usage"));
    }

    [TestCase("trian",
        "cpmx: unknown command \"trian\" (did you mean \"train\"?); see cpmx --help")]
    [TestCase("data", "cpmx: data: expected the command data check CONFIG.json")]
    [TestCase("train --lora_rank 3", "cpmx: \"lora_rank\" is not used here: set lora_r")]
    [TestCase("train none.json", "there is no such file")]
    [TestCase("doctor now", "cpmx: doctor takes no arguments, got now")]
    [TestCase("trace --out=x", "cpmx: --rows is missing: the rows to run, as ID,ID")]
    [TestCase("export", "cpmx: export: expected the command export gguf MODEL")]
    [TestCase("export gguf m", "cpmx: export gguf: --out is missing: the folder to make")]
    [TestCase("report", "cpmx: report: expected output folders of runs")]
    [TestCase("merge", "cpmx: merge: expected one argument, the model's folder, got 0")]
    [TestCase("merge m --adaptor a", "unknown option \"--adaptor\" (did you mean \"--adapter\"?)")]
    [TestCase("merge m --adapter a", "cpmx: merge: --out is missing: the folder to make")]
    [TestCase("merge m --adapter a --out", "cpmx: merge: --out has no value")]
    [TestCase("merge m --adapter a --adapter=b", "cpmx: merge: --adapter is given twice")]
    [TestCase("merge m --no-check=1", "cpmx: merge: --no-check takes no value")]
    [TestCase("merge m --adapter a --out b", "cpmx: m: there is no such directory")]
    [TestCase("trace --rows 1 --out", "cpmx: --out has no value")]
    [TestCase("trace --rows 1", "cpmx: --out is missing: the safetensors file to write")]
    [TestCase("chat", "cpmx: chat: the folder of a model is missing: cpmx chat MODEL")]
    [TestCase("chat m --learning_rate 1", "cpmx: unknown key \"learning_rate\"")]
    [TestCase("chat m --temperature 0",
        "cpmx: temperature is \"0\", expected a number above 0")]
    [TestCase("chat nowhere", "nowhere")]
    public void WrongArgumentsAreOneLineAndExitCode2(string line, string expected)
    {
        var (result, _, error) = Run(new Runners(), line.Split(' '));
        Assert.That(result, Is.EqualTo(2));
        Assert.That(error, Does.Contain(expected));
        Assert.That(error.TrimEnd().Split('\n'), Has.Length.EqualTo(1));
    }

    [Test]
    public void FailuresAreOneLineAndExitCode1()
    {
        foreach (var failure in (Exception[])[
            new RunException("disk full"), new DeviceMemoryException("no memory"),
            new OutOfMemoryException(), new InvalidOperationException("bug\nin two lines")])
        {
            var runners = new Runners { Train = (_, _, _) => throw failure };
            var (result, _, error) = Run(runners, ["train", .. s_least]);
            Assert.That(result, Is.EqualTo(1));
            Assert.That(error.TrimEnd().Split('\n'), Has.Length.EqualTo(1));
            Assert.That(error, Does.StartWith("cpmx: "));
        }
    }

    [TestCase(15, 143, "SIGTERM")]
    [TestCase(2, 130, "Ctrl-C")]
    [TestCase(3, 131, "SIGQUIT")]
    public void SignalsAskForAStopAndDecideTheExitCode(int signal, int code, string name)
    {
        if (OperatingSystem.IsWindows()) Assert.Ignore("signals of POSIX systems");
        bool stopped = false;
        var runners = new Runners
        {
            Train = (_, _, stop) =>
            {
                stop.IsTraining = true;
                Assert.That(Kill(Environment.ProcessId, signal), Is.Zero);
                stopped = SpinWait.SpinUntil(() => stop.Requested, TimeSpan.FromSeconds(20));
                // The line is said after the request is there.
                Thread.Sleep(50);
            },
        };
        var (result, output, _) = Run(runners, ["train", .. s_least]);
        Assert.That(stopped);
        Assert.That(result, Is.EqualTo(code));
        Assert.That(output, Does.Contain($"{name}: finishing this step"));
    }

    [Test]
    public void AScreenThatCannotBeWrittenEndsNoTraining()
    {
        var error = new StringWriter();
        var screen = new Screen(new FullWriter(), error.WriteLine);
        bool ended = false;
        var runners = new Runners
        {
            Train = (_, log, _) =>
            {
                for (int i = 0; i < 3; i++) log.Message("one more line");
                ended = true;
            },
        };
        int code = new CommandLine(screen, error, runners).Run(["train", .. s_least]);
        Assert.That((code, ended), Is.EqualTo((0, true)));
        Assert.That(error.ToString().TrimEnd(), Is.EqualTo("cpmx: the output cannot be written: "
            + "No space left on device; going on without it"));
        // Of other commands the output is the result.
        Assert.That(new CommandLine(screen, error, runners).Run(["--version"]), Is.EqualTo(1));
        // Nobody to tell.
        var mute = new Screen(new FullWriter());
        Assert.That(new CommandLine(mute, mute, runners).Run(["trian"]), Is.EqualTo(2));
    }

    [TestCase("a\u001b[2Jb\u009b1m\u0007\u007f\0", "a\\u001b[2Jb\\u009b1m\\u0007\\u007f\\u0000")]
    [TestCase("\rline\b\tends\n", "\rline\b\tends\n")]
    public void ATerminalGetsNoOrdersFromAText(string text, string seen)
    {
        var console = new StringWriter();
        var screen = new Screen(console);
        screen.Write(text);
        foreach (char c in text) screen.Write(c);
        screen.Write(new System.Text.StringBuilder(text));
        Assert.That(console.ToString(), Is.EqualTo(seen + seen + seen));
    }

    [Test]
    public void AMessageShowsTheOrdersOfAnArgument()
    {
        var (code, _, error) = Run(new Runners(), ["train", "\u001b]0;title\u0007.json"]);
        Assert.That(code, Is.EqualTo(2));
        Assert.That(error.Where(char.IsControl), Is.EqualTo("\n"));
    }

    private sealed class FullWriter : StringWriter
    {
        public override void Write(ReadOnlySpan<char> buffer) =>
            throw new IOException("No space left on device");
    }

    [Test]
    public void OnlyTheFirstStopCounts()
    {
        var stop = new StopRequest();
        Assert.That(stop.TryRequest(StopReason.Terminate));
        Assert.That(stop.TryRequest(StopReason.Interrupt), Is.False);
        Assert.That(stop.Reason, Is.EqualTo(StopReason.Terminate));
    }

    [Test]
    public void TraceTakesItsOptionsOutOfTheConfigurations()
    {
        TraceRequest? seen = null;
        var runners = new Runners
        {
            Trace = (a, request, _) =>
            {
                Assert.That(a.Seed, Is.EqualTo(3));
                seen = request;
            },
        };
        var (result, _, error) = Run(runners,
            ["trace", "--rows", "a, 7", "--seed", "3", "--gradients", "--out=f.safetensors",
                .. s_least]);
        Assert.That((result, error), Is.EqualTo((0, "")));
        Assert.That(seen!.Rows, Is.EqualTo(["a", "7"]));
        Assert.That(seen.Out, Is.EqualTo(Path.GetFullPath("f.safetensors")));
        Assert.That(seen.Gradients);
    }

    private static (int Code, string Output, string Error) Run(Runners runners, string[] args)
    {
        var (output, error) = (new StringWriter(), new StringWriter());
        int code = new CommandLine(output, error, runners).Run(args is [""] ? [] : args);
        return (code, output.ToString(), error.ToString());
    }

    [LibraryImport("libc", EntryPoint = "kill")]
    private static partial int Kill(int process, int signal);
}
