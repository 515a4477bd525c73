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
        string? rows = null, file = null;
        bool gradients = false;
        var rest = new List<string>();
        for (int i = 0; i < args.Length; i++)
        {
            string name = args[i].Split('=', 2)[0];
            if (name is not ("--rows" or "--out" or "--gradients"))
            {
                rest.Add(args[i]);
                continue;
            }

            string? value = args[i].Length > name.Length ? args[i][(name.Length + 1)..] : null;
            if (name == "--gradients")
            {
                if (value is not null) throw new InputException("--gradients takes no value");
                gradients = true;
                continue;
            }

            if (value is null && i + 1 < args.Length) value = args[++i];
            if (name == "--rows") rows = value;
            else file = value;
        }

        string[] ids = (rows ?? "").Split(
            ',', StringSplitOptions.RemoveEmptyEntries | StringSplitOptions.TrimEntries);
        if (ids.Length == 0)
            throw new InputException("--rows is missing: the rows to run, as ID,ID");
        if (string.IsNullOrEmpty(file) || file.Any(char.IsControl))
            throw new InputException("--out is missing: the safetensors file to write");
        return (new TraceRequest(ids, Path.GetFullPath(file), gradients), [.. rest]);
    }
}
