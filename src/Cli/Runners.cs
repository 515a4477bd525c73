using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Train;

namespace MiniCpmNative.Cli;

/// <summary>What `cpmx trace` was asked for.</summary>
/// <param name="Rows">IDs of rows, or their numbers.</param>
/// <param name="Out">The safetensors file to write.</param>
/// <param name="Gradients">Whether gradients are written too.</param>
internal sealed record TraceRequest(IReadOnlyList<string> Rows, string Out, bool Gradients);

/// <summary>The engine's entry points behind the commands; null is a command this build lacks.</summary>
internal sealed record Runners(
    Action<TrainArguments, ITrainLog, StopRequest>? Train = null,
    Action<TrainArguments, TextWriter, StopRequest>? CheckData = null,
    Action<TrainArguments, TraceRequest, TextWriter>? Trace = null)
{
    public static Runners Installed { get; } = new();
}
