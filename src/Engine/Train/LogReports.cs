using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;

namespace MiniCpmNative.Engine.Train;

/// <summary>What a run is, told once to its log.</summary>
/// <param name="Arguments">The resolved configuration.</param>
/// <param name="Plan">Steps and what follows them.</param>
/// <param name="Device">The device, in words.</param>
/// <param name="Parameters">All parameters of the model with its adapters.</param>
/// <param name="Trainable">Those that are trained.</param>
/// <param name="ResumedFrom">Checkpoint folder, or null for a new run.</param>
/// <param name="Rows">What the training rows are like.</param>
/// <param name="EvaluationRows">What the evaluation rows are like, if there are any.</param>
public sealed record RunReport(
    TrainArguments Arguments, StepPlan Plan, string Device, long Parameters, long Trainable,
    string? ResumedFrom, RowCounts? Rows = null, RowCounts? EvaluationRows = null);

/// <summary>One optimizer step that was done.</summary>
/// <param name="Step">Number of the step, from 1.</param>
/// <param name="Loss">Loss of the whole accumulated batch.</param>
/// <param name="GradNorm">Global norm before clipping.</param>
/// <param name="LearningRate">The rate used in this step.</param>
/// <param name="Tokens">Input tokens of the step.</param>
/// <param name="Seconds">Time the step took.</param>
/// <param name="MemoryBytes">Memory in use at its peak, as the device counts it.</param>
public readonly record struct StepReport(
    int Step, double Loss, double GradNorm, double LearningRate, long Tokens, double Seconds,
    long MemoryBytes);

/// <summary>One pass over the evaluation rows.</summary>
/// <param name="Step">Steps done before it.</param>
/// <param name="Loss">Mean over all supervised tokens.</param>
/// <param name="TokenAccuracy">Share of supervised tokens that are the most likely one, 0 to
/// 1.</param>
/// <param name="AnswerAccuracy">Share of answers whose every token is, 0 to 1.</param>
/// <param name="Rows">Rows evaluated.</param>
/// <param name="Seconds">Time it took.</param>
public readonly record struct EvaluationReport(
    int Step, double Loss, double TokenAccuracy, double AnswerAccuracy, int Rows, double Seconds)
{
    /// <summary>Answers that were generated (eval_generate), or null.</summary>
    public GeneratedReport? Generated { get; init; }
}

/// <summary>Answers that were generated in an evaluation, and their scores.</summary>
public sealed record GeneratedReport(
    IReadOnlyList<(string Metric, double Value)> Scores, IReadOnlyList<GeneratedRow> Rows,
    double Seconds);

/// <summary>A row's generated answer beside the one it expects.</summary>
public sealed record GeneratedRow(Row Row, string Answer);

/// <summary>
/// What the trainer tells while it works. Step allocates nothing unless the step is logged or a
/// progress line is due.
/// </summary>
public interface ITrainLog : IDisposable
{
    /// <summary>
    /// Opens the log files; when resuming reads the log so far and cuts off what came later. A file
    /// that cannot be written later is given up, in a message, and the others go on.
    /// </summary>
    /// <exception cref="RunException">A log file cannot be opened.</exception>
    void Start(RunReport run);

    /// <summary>A line for the user.</summary>
    void Message(string line);

    void Step(in StepReport report);

    /// <summary>A step that was not applied because its loss or gradients are not finite.</summary>
    void Skipped(in StepReport report, string what);

    void Evaluation(in EvaluationReport report);

    /// <summary>Whether an evaluation after this step is in the log.</summary>
    bool HasEvaluation(int step);

    /// <summary>The best checkpoint so far, and its value; null without one.</summary>
    (int Step, double Value)? Best { get; }

    /// <summary>
    /// Writes trainer_state.json as of a step into a checkpoint folder that is being made.
    /// </summary>
    void SaveState(string folder, int step);

    /// <summary>Tells that a checkpoint is there whole.</summary>
    void Saved(string folder);

    /// <summary>
    /// Ends the run after a step: the summary when it is complete, else why it stopped; writes
    /// trainer_state.json into output_dir.
    /// </summary>
    void End(int step, StopReason reason);
}

/// <summary>One entry of the logs, under the names of the Hugging Face Trainer.</summary>
/// <param name="Values">Results, which depend on the data and the seed alone.</param>
/// <param name="Timing">Speed and memory; not part of trainer_state.json, which can be
/// compared.</param>
internal sealed record LogEntry(
    int Step, double Epoch, (string Name, double Value)[] Values,
    (string Name, double Value)[] Timing);

/// <summary>A file that entries are added to.</summary>
internal interface ILogFile : IDisposable
{
    /// <exception cref="RunException">The file cannot be written.</exception>
    void Write(LogEntry entry);
}
