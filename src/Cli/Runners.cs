using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Doctor;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;

namespace MiniCpmNative.Cli;

/// <summary>
/// The engine's entry points behind the commands; tests put others in their place.
/// </summary>
internal sealed record Runners
{
    public Action<TrainArguments, ITrainLog, StopRequest> Train { get; init; } = TrainRun.Run;

    public Func<TrainArguments, PlanRequest, TextWriter, bool> Plan { get; init; } = PlanRun.Run;

    public Func<TrainArguments, TextWriter, bool> CheckData { get; init; } =
        (arguments, output) => DataCheck.Run(
            arguments, ModelSpec.Read(arguments.ModelNameOrPath!).Rows(), output);

    public Action<TrainArguments, TraceRequest, TextWriter> Trace { get; init; } = TraceRun.Run;

    public Func<TextWriter, bool> Diagnose { get; init; } = output => Diagnosis.Run(output);
}
