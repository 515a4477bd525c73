using System.Globalization;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Export;

namespace MiniCpmNative.Cli;

/// <summary>cpmx combine ADAPTER [ADAPTER ...] --out DIR [--kind KIND] [--weights W,...]</summary>
internal static class CombineCommand
{
    private const string Usage = """
        usage: cpmx combine ADAPTER [ADAPTER ...] --out DIR [--weights 0.7,0.3] [--kind cat] [--rank N]

        Makes one adapter of several of the same model, as PEFT's add_weighted_adapter does.

        --weights   one for each adapter, below 0 too; 1 where none are given
        --kind      cat: exactly the weighted sum, of the sum of the ranks (the default)
                    svd: the best approximation of that sum by --rank (the largest rank given)
                    linear: A and B are summed each for itself, which is not the sum of the
                    adapters; all of one rank
        """;

    public static int Run(string[] args, bool help, TextWriter output)
    {
        if (help)
        {
            output.WriteLine(Usage);
            return 0;
        }

        var options = new Options("combine", args, ["out", "weights", "kind", "rank"], []);
        if (options.Plain.Count == 0)
            throw new InputException("combine: expected the adapters' folders, got none");
        string kind = options.Find("kind") ?? "cat";
        if (!Enum.TryParse(kind, ignoreCase: true, out Combination combination)
            || !Enum.IsDefined(combination) || char.IsDigit(kind[0]))
            throw new InputException(
                $"combine: --kind is {Messages.Quote(kind)}, expected cat, svd or linear");
        CombineRun.Run(new CombineRequest(options.Plain, Weights(options), combination,
            Rank(options), options.Require("out", "the folder to make")), output);
        return 0;
    }

    private static double[] Weights(Options options)
    {
        if (options.Find("weights") is not { } text)
            return [.. options.Plain.Select(_ => 1.0)];
        string[] parts = text.Split(',');
        double[] weights = [.. parts.Select(part => double.TryParse(
            part, NumberStyles.Float, CultureInfo.InvariantCulture, out double weight)
            && double.IsFinite(weight) ? weight : throw new InputException(
                $"combine: --weights has {Messages.Quote(part)}, expected numbers as 0.7,0.3"))];
        return weights.Length == options.Plain.Count ? weights : throw new InputException(
            $"combine: --weights has {weights.Length} numbers, expected {options.Plain.Count}, one "
            + "for each adapter");
    }

    private static int? Rank(Options options) => options.Find("rank") is not { } text ? null
        : int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out int rank)
            && rank is > 0 and <= 1 << 16 ? rank : throw new InputException(
                $"combine: --rank is {Messages.Quote(text)}, expected a whole number from 1");
}
