using MiniCpmNative.Engine.Export;

namespace MiniCpmNative.Cli;

/// <summary>cpmx merge MODEL --adapter DIR --out DIR [--no-check] [--dequantize]</summary>
internal static class MergeCommand
{
    private const string Usage = """
        usage: cpmx merge MODEL --adapter DIR --out DIR [--no-check] [--dequantize]

        Puts an adapter into the weights of the model it was trained on and writes the whole model,
        in the model's own names, layout and types, with its configuration, tokenizer and code. Says
        how far each tensor moved, and compares the logits of a small prompt with those of model and
        adapter. --no-check leaves the comparison out, which loads the model three times.

        --dequantize makes a quantised model (bitsandbytes, AWQ, GPTQ) whole, in 16 bits, and puts the
        adapter in where one is given.
        """;

    public static int Run(string[] args, bool help, TextWriter output, Runners runners)
    {
        if (help)
        {
            output.WriteLine(Usage);
            return 0;
        }

        var options = new Options("merge", args, ["adapter", "out"], ["no-check", "dequantize"]);
        bool dequantize = options.Has("dequantize");
        runners.Merge(new MergeRequest(
            options.Only("the model's folder"),
            dequantize ? options.Find("adapter")
                : options.Require("adapter", "the adapter's folder"),
            options.Require("out", "the folder to make"), !options.Has("no-check"), dequantize),
            output);
        return 0;
    }
}
