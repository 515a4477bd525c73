using MiniCpmNative.Engine.Export;

namespace MiniCpmNative.Cli;

/// <summary>cpmx export gguf MODEL [--adapter DIR] --out DIR [--type TYPE]</summary>
internal static class ExportCommand
{
    private const string Usage = """
        usage: cpmx export gguf MODEL [--adapter DIR] --out DIR [--type TYPE]

        Writes what llama.cpp reads: the language model, and the vision tower with the resampler
        (mmproj) beside it, with an adapter put in where one is given. --type is that of the language
        model's matrices: f16 (the default), bf16, q8_0 or q4_0; the mmproj's are always f16.
        """;

    public static int Run(string[] args, bool help, TextWriter output, Runners runners)
    {
        if (help)
        {
            output.WriteLine(Usage);
            return 0;
        }

        var options = new Options("export gguf", args, ["adapter", "out", "type"], []);
        runners.ExportGguf(new GgufRequest(
            options.Only("the model's folder"), options.Find("adapter"),
            options.Require("out", "the folder to make"),
            options.Find("type") ?? GgufRun.DefaultType), output);
        return 0;
    }
}
