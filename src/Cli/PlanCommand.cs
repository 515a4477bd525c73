using System.Globalization;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Train;

namespace MiniCpmNative.Cli;

/// <summary>cpmx plan CONFIG.json [--gpu CARD] [--tflops N] [--gbs N] [--bus N]</summary>
internal static class PlanCommand
{
    private const string Usage = """
        usage: cpmx plan [CONFIG.json] [--name value ...] [--gpu CARD] [--tflops N] [--gbs N]
                         [--bus N]

        Says, on any machine, what the training takes of a GPU: memory by part, the row that sets the
        peak, what is computed again in backward so that it fits, what other settings take, and the
        time that it needs at least (an estimate from counted bytes and FLOPs). The model's weights
        need not be there. --gpu is a card (H100, A100-40GB, RTX-4090 ...) or its memory (24GB);
        --tflops and --gbs are what a card reaches in products of bfloat16 and copies, --bus what comes
        over from page-locked memory (GB/s), where that was measured. Exit code 1 when the training does not fit.
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
        var own = new OwnOptions(args, ["--gpu", "--tflops", "--gbs", "--bus"], []);
        var request = new PlanRequest();
        if (own.Text("--gpu") is { } gpu) request = request with { Gpu = gpu };
        if (own.Text("--tflops") is { } tflops)
            request = request with { Tflops = Number("--tflops", tflops) };
        if (own.Text("--gbs") is { } gbs)
            request = request with { GigabytesPerSecond = Number("--gbs", gbs) };
        if (own.Text("--bus") is { } bus) request = request with { Bus = Number("--bus", bus) };
        return (request, own.Rest);
    }

    private static double Number(string name, string value) =>
        double.TryParse(value, NumberStyles.Float, CultureInfo.InvariantCulture, out double number)
        && number > 0 && double.IsFinite(number) ? number
            : throw new InputException(
                $"{name} is {Messages.Quote(value)}, expected a number above 0");
}
