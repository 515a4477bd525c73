using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Report;

namespace MiniCpmNative.Cli;

/// <summary>cpmx report DIR... [--out FILE.html]</summary>
internal static class ReportCommand
{
    private const string Usage = """
        usage: cpmx report DIR [DIR ...] [--out FILE.html]

        Writes a page on one run, or on several side by side, from what is in their output folders:
        curves, evaluations, sample answers, messages, settings. The page needs no network and runs
        no script. A run writes its own when it ends; without --out, one DIR has it written anew,
        and several give report.html in the working directory.
        """;

    public static int Run(string[] args, bool help, TextWriter output)
    {
        if (help)
        {
            output.WriteLine(Usage);
            return 0;
        }

        var options = new Options("report", args, ["out"], []);
        if (options.Plain.Count == 0)
            throw new InputException("report: expected output folders of runs");
        string path = options.Find("out") ?? (options.Plain.Count == 1
            ? Path.Combine(options.Plain[0], ReportFile.FileName) : ReportFile.FileName);
        ReportFile.Write(options.Plain, path);
        output.WriteLine($"the report is in {path}");
        return 0;
    }
}
