using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Train;

namespace MiniCpmNative.Cli;

/// <summary>cpmx data check CONFIG.json [--name value ...]</summary>
internal static class DataCheckCommand
{
    private const string Usage = """
        usage: cpmx data check [CONFIG.json] [--name value ...]

        Reads every row that the training configuration names and says what is wrong with which row
        and turn; prints token lengths, how many rows would be cut, and one row with its labels.
        """;

    public static int Run(string[] args, bool help, TextWriter output, Runners runners)
    {
        if (help)
        {
            output.WriteLine(Usage);
            return 0;
        }

        var arguments = TrainReader.Read(args, Environment.CurrentDirectory, output.WriteLine);
        var check = runners.CheckData ?? throw new RunException("this build of cpmx cannot check data");
        var stop = new StopRequest();
        using var signals = new StopSignals(stop, static _ => { });
        check(arguments, output, stop);
        return (int)stop.Reason;
    }
}
