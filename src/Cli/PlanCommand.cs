using System.Globalization;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Train;

namespace MiniCpmNative.Cli;

/// <summary>cpmx plan CONFIG.json [--gpu CARD] [--tflops N] [--gbs N]</summary>
internal static class PlanCommand
{
    private const string Usage = """
        usage: cpmx plan [CONFIG.json] [--name value ...] [--gpu CARD] [--tflops N] [--gbs N]

        Says, on any machine, what the training takes of a GPU: memory by part, the row that sets the
        peak, what is computed again in backward so that it fits, what other settings take, and the
        time that it needs at least (an estimate from counted bytes and FLOPs). The model's weights
        need not be there. --gpu is a card (H100, A100-40GB, RTX-4090 ...) or its memory (24GB);
        --tflops and --gbs are what a card reaches in products of bfloat16 and copies, where that was
        measured. Exit code 1 when the training does not fit.
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
        return runners.Plan(arguments, request, output) ? 0 : 1;
    }

    /// <summary>
    /// Takes the options of this command out of the arguments of a configuration.
    /// </summary>
    internal static (PlanRequest Request, string[] Others) Split(string[] args)
    {
        var request = new PlanRequest();
        var rest = new List<string>();
        for (int i = 0; i < args.Length; i++)
        {
            string name = args[i].Split('=', 2)[0];
            if (name is not ("--gpu" or "--tflops" or "--gbs"))
            {
                rest.Add(args[i]);
                continue;
            }

            string? value = args[i].Length > name.Length ? args[i][(name.Length + 1)..]
                : i + 1 < args.Length ? args[++i] : null;
            if (string.IsNullOrEmpty(value)) throw new InputException($"{name} has no value");
            request = name switch
            {
                "--gpu" => request with { Gpu = value },
                "--tflops" => request with { Tflops = Number(name, value) },
                _ => request with { GigabytesPerSecond = Number(name, value) },
            };
        }

        return (request, [.. rest]);
    }

    private static double Number(string name, string value) =>
        double.TryParse(value, NumberStyles.Float, CultureInfo.InvariantCulture, out double number)
        && number > 0 && double.IsFinite(number) ? number
            : throw new InputException(
                $"{name} is {Messages.Quote(value)}, expected a number above 0");
}
