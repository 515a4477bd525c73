using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Train;

namespace MiniCpmNative.Cli;

/// <summary>cpmx trace CONFIG.json --rows ID,ID --out FILE.safetensors [--gradients]</summary>
internal static class TraceCommand
{
    private const string Usage = """
        usage: cpmx trace [CONFIG.json] [--name value ...] --rows ID,ID --out FILE.safetensors
                          [--gradients]

        Runs the named rows as one batch and writes its intermediate tensors, to compare with another
        implementation. A row's ID is its "id", or its number from 1. --gradients adds grad.PARAMETER.
        """;

    public static int Run(string[] args, bool help, TextWriter output, Runners runners)
    {
        if (help)
        {
            output.WriteLine(Usage);
            return 0;
        }

        var (request, others) = Split(args);
        var arguments = TrainReader.Read(others, Environment.CurrentDirectory, output.WriteLine);
        runners.Trace(arguments, request, output);
        return 0;
    }

    /// <summary>
    /// Takes the three options of this command out of the arguments of a configuration.
    /// </summary>
    internal static (TraceRequest Request, string[] Others) Split(string[] args)
    {
        var own = new OwnOptions(args, ["--rows", "--out"], ["--gradients"]);
        string? file = own.Text("--out");
        string[] ids = (own.Text("--rows") ?? "").Split(
            ',', StringSplitOptions.RemoveEmptyEntries | StringSplitOptions.TrimEntries);
        if (ids.Length == 0)
            throw new InputException("--rows is missing: the rows to run, as ID,ID");
        if (file is null)
            throw new InputException("--out is missing: the safetensors file to write");
        return (new TraceRequest(ids, Path.GetFullPath(file), own.Has("--gradients")), own.Rest);
    }
}
