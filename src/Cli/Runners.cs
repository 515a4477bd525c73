using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Doctor;
using MiniCpmNative.Engine.Export;
using MiniCpmNative.Engine.Generate;
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
            arguments, ModelSpec.Read(arguments.ModelNameOrPath!).Hearing(arguments.InitAudio)
                .Rows(), output);

    public Action<TrainArguments, TraceRequest, TextWriter> Trace { get; init; } = TraceRun.Run;

    public Action<MergeRequest, TextWriter> Merge { get; init; } = MergeRun.Run;

    public Action<GgufRequest, TextWriter> ExportGguf { get; init; } = GgufRun.Run;

    /// <summary>Opens a model with an adapter, or null, and tells about the device.</summary>
    public Func<TrainArguments, string?, Action<string>, AskedModel> Ask { get; init; } =
        (arguments, adapter, say) => AskedModel.Open(arguments, adapter, say: say);

    public Func<TrainArguments, PredictRequest, Action<string>, Action<PredictProgress>, Func<bool>,
        PredictResult?> Predict
    { get; init; } = (arguments, request, say, progress, goesOn) =>
        PredictRun.Run(arguments, request, say, progress, goesOn);

    public Func<TextWriter, bool> Diagnose { get; init; } = output => Diagnosis.Run(output);
}
