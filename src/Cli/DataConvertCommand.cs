using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;

namespace MiniCpmNative.Cli;

/// <summary>cpmx data convert IN [IN ...] OUT</summary>
internal static class DataConvertCommand
{
    private const string Usage = """
        usage: cpmx data convert IN [IN ...] OUT.json [--box_format text|tokens] [--on_bad_row skip]

        Writes rows of any format that is read (docs/data.md) in the official one: OUT.json as a
        list, OUT.jsonl a row on each line. IN is a file, a folder, a pattern with *, or
        dataset_info.json#NAME. Pictures inside the rows become files in OUT_pictures.
        """;

    public static int Run(string[] args, bool help, TextWriter output)
    {
        if (help)
        {
            output.WriteLine(Usage);
            return 0;
        }

        var options = new Options("data convert", args, ["box_format", "on_bad_row"], []);
        if (options.Plain.Count < 2)
            throw new InputException("data convert: expected IN and OUT, two names at least");
        string[] from = [.. options.Plain.SkipLast(1).Select(Path.GetFullPath)];
        var convert = new DataConvert(new DataSources(from), Path.GetFullPath(options.Plain[^1]),
            Choice("box_format", "text", "tokens") ? BoxFormat.Tokens : BoxFormat.Text,
            Choice("on_bad_row", "error", "skip"));
        return convert.Run(output) ? 0 : 2;

        // Whether the second of the two is chosen.
        bool Choice(string name, string plain, string other) => options.Find(name) switch
        {
            null => false,
            var given when given == plain => false,
            var given when given == other => true,
            var given => throw new InputException($"data convert: --{name} is "
                + $"{Messages.Quote(given)}, expected {plain} or {other}"),
        };
    }
}
