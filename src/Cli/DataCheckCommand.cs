using MiniCpmNative.Engine.Config;

namespace MiniCpmNative.Cli;

/// <summary>cpmx data check CONFIG.json [--name value ...]</summary>
internal static class DataCheckCommand
{
    private const string Usage = """
        usage: cpmx data check [CONFIG.json] [--name value ...]

        Reads every row that the training configuration names and says what is wrong with which row
        and turn; prints token lengths, how many rows would be cut, and one row with its labels.
        Exit code 2 when a row is bad.
        """;

    public static int Run(string[] args, bool help, TextWriter output, Runners runners)
    {
        if (help)
        {
            output.WriteLine(Usage);
            return 0;
        }

        var arguments = TrainReader.Read(args, Environment.CurrentDirectory, output.WriteLine);
        return runners.CheckData(arguments, output) ? 0 : 2;
    }
}
