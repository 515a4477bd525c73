using MiniCpmNative.Cli.Serve;
using MiniCpmNative.Engine;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Cli;

/// <summary>
/// Finds the command and turns its outcome into an exit code: 0 done, 1 failed while running, 2
/// wrong configuration or arguments, 128 + signal stopped by one. Errors are one line
/// on the error stream; CPMX_TRACE=1 adds the stack. The official arguments are free (--name value
/// for any key), which is why no argument library stands here.
/// </summary>
internal sealed class CommandLine(TextWriter output, TextWriter error, Runners runners)
{
    private const string Usage = """
        usage: cpmx COMMAND ...

          train [CONFIG.json] [--name value ...]   fine-tune a model (cpmx train --help lists all keys)
          plan CONFIG.json [--gpu 24GB]            what a training takes of a GPU, without one
          data check CONFIG.json [--name value ...]
                                                   read every row; name bad ones, show statistics
          data convert IN [IN ...] OUT.json        write rows of other formats in the official one
          trace CONFIG.json --rows ID,ID --out FILE.safetensors [--gradients]
                                                   write the intermediate tensors of some rows
          merge MODEL --adapter DIR --out DIR      put an adapter into the model's weights
          combine ADAPTER ADAPTER ... --out DIR    one adapter of several, weighted
          export gguf MODEL [--adapter DIR] --out DIR [--type TYPE]
                                                   write the files that llama.cpp reads
          report DIR [DIR ...] [--out FILE.html]   write a page on one run, or on several
          chat MODEL [--adapter DIR] [--image FILE]
                                                   ask a model, with or without an adapter
          serve MODEL [--adapter DIR] [--port N]   OpenAI's API and a page that ask it
          eval [CONFIG.json] [--adapter DIR] [--base]
                                                   answer the evaluation rows and score the answers
          predict [CONFIG.json] --data FILE        answer rows
          doctor                                   show processor, libraries and GPU, and test them
          --version                                print the version

        exit codes: 0 done, 1 failed while running, 2 wrong configuration or arguments,
        129, 130, 131, 143, 152 stopped by SIGHUP, Ctrl-C, SIGQUIT, SIGTERM, SIGXCPU; a training is
        saved then (SIGUSR1: saves and goes on)
        """;

    private static readonly string[] s_commands =
    [
        "train", "plan", "data", "trace", "chat", "serve", "eval", "predict", "merge", "combine",
        "export", "report", "doctor", "help",
    ];

    public int Run(IReadOnlyList<string> args)
    {
        try
        {
            MustBeSomewhere();
            int code = Dispatch(args);
            // A training goes on unseen; of the other commands what they say is the result.
            return output is Screen { HasFailed: true } && args[0] != "train" ? 1 : code;
        }
        catch (InputException problem)
        {
            return Fail(problem, problem.Message, 2);
        }
        catch (Exception failure) when (failure is RunException or DeviceMemoryException
            or CudaException)
        {
            return Fail(failure, failure.Message, 1);
        }
        catch (AggregateException several)
            when (several.GetBaseException() is InputException problem)
        {
            return Fail(several, problem.Message, 2);
        }
        catch (OutOfMemoryException failure)
        {
            return Fail(failure, "out of memory", 1);
        }
        catch (Exception failure)
        {
            return Fail(failure, $"internal error, please report it: {failure.GetType().Name}: "
                + failure.Message, 1);
        }
    }

    // Relative paths have no meaning in a folder that was removed.
    private static void MustBeSomewhere()
    {
        try
        {
            _ = Directory.GetCurrentDirectory();
        }
        catch (IOException gone)
        {
            throw new InputException(
                "the working directory was removed: change to one that is there", gone);
        }
    }

    private int Dispatch(IReadOnlyList<string> args)
    {
        string command = args.Count > 0 ? args[0] : "";
        bool help = args.Skip(1).Any(a => a is "--help" or "-h");
        switch (command)
        {
            case "":
                error.WriteLine(Usage);
                return 2;
            case "help" or "--help" or "-h":
                output.WriteLine(Usage);
                return 0;
            case "--version":
                var version = typeof(CommandLine).Assembly.GetName().Version!;
                output.WriteLine($"cpmx {version.ToString(3)}");
                return 0;
            case "train":
                return TrainCommand.Run(Rest(args, 1), help, output, runners);
            case "plan":
                return PlanCommand.Run(Rest(args, 1), help, output, runners);
            case "data" when args.Count > 1 && args[1] == "convert":
                return DataConvertCommand.Run(Rest(args, 2), help, output);
            case "data" when args.Count > 1 && (args[1] == "check" || help):
                return DataCheckCommand.Run(Rest(args, 2), help, output, runners);
            case "data":
                throw new InputException(
                    "data: expected the command data check CONFIG.json or data convert IN OUT");
            case "trace":
                return TraceCommand.Run(Rest(args, 1), help, output, runners);
            case "merge":
                return MergeCommand.Run(Rest(args, 1), help, output, runners);
            case "combine":
                return CombineCommand.Run(Rest(args, 1), help, output);
            case "export" when args.Count > 1 && (args[1] == "gguf" || help):
                return ExportCommand.Run(Rest(args, 2), help, output, runners);
            case "export":
                throw new InputException("export: expected the command export gguf MODEL");
            case "report":
                return ReportCommand.Run(Rest(args, 1), help, output);
            case "chat":
                return ChatCommand.Run(Rest(args, 1), help, Console.In, output, error, runners,
                    Terminal.IsThere && !Console.IsInputRedirected);
            case "serve":
                return ServeCommand.Run(Rest(args, 1), help, output, error, runners);
            case "eval" or "predict":
                return PredictCommand.Run(Rest(args, 1), help, scores: command == "eval", output,
                    runners, Terminal.IsThere);
            case "doctor":
                return DoctorCommand.Run(Rest(args, 1), help, output, runners);
            default:
                throw new InputException($"unknown command {Messages.Quote(command)} (did you mean "
                    + $"\"{Engine.Config.TrainKeys.Nearest(command, s_commands)}\"?); "
                    + "see cpmx --help");
        }
    }

    private static string[] Rest(IReadOnlyList<string> args, int from) => [.. args.Skip(from)];

    private int Fail(Exception failure, string message, int code)
    {
        error.WriteLine("cpmx: " + Messages.Visible(Messages.Cut(message.ReplaceLineEndings(" "))));
        if (Environment.GetEnvironmentVariable("CPMX_TRACE") == "1") error.WriteLine(failure);
        return code;
    }
}
