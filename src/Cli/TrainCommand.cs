using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Train;

namespace MiniCpmNative.Cli;

/// <summary>cpmx train [CONFIG.json] [--name value ...]</summary>
internal static class TrainCommand
{
    private const string Usage = """
        usage: cpmx train [CONFIG.json] [--name value | --name=value | --name ...]

        Trains as the configuration says; arguments override the file, and a bare --name is true.
        Keys have the names of the official script and of Hugging Face's TrainingArguments. Relative
        paths start at the file's folder, those of arguments at the working directory.
        """;

    public static int Run(string[] args, bool help, TextWriter output, Runners runners)
    {
        if (help)
        {
            output.WriteLine(Usage);
            output.Write(TrainWriter.Help());
            return 0;
        }

        var notices = new List<string>();
        var arguments = TrainReader.Read(args, Environment.CurrentDirectory, notices.Add);
        bool bar = Terminal.IsThere && arguments.DisableTqdm != true;
        using var log = new TrainLog(output, bar, Terminal.Columns, TimeProvider.System);
        foreach (string line in notices) log.Message(line);
        var stop = new StopRequest();
        using var signals = new StopSignals(stop, log.Message);
        runners.Train(arguments, log, stop);
        return (int)stop.Reason;
    }
}
