using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Report;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// Everything a run tells, in one place: screen, train_log.jsonl, TensorBoard, trainer_state.json,
/// and at its end report.html.
/// The loss of an entry is the mean over the steps since the last one; grad_norm and learning_rate
/// are the last step's, the rate being the one it used.
/// </summary>
public sealed class TrainLog : ITrainLog
{
    /// <summary>The name of an evaluation's loss in its entry.</summary>
    internal const string EvaluationLoss = "eval_loss";

    /// <summary>Seconds, in the last entry of a run.</summary>
    internal const string RunTime = "train_runtime";

    private readonly TimeProvider _clock;
    private readonly Progress _progress;
    private readonly Lock _turn = new();
    private readonly List<string> _early = [];
    private RunReport? _run;
    private LogState _state = new();
    private LogLines? _lines, _answers;
    private TensorBoardWriter? _board;
    private double _seconds;
    private long _tokens;
    private int _firstStep, _lastStep;
    private bool _isStarted, _isSaved;
    private EvaluationReport? _firstEvaluation;
    private EvaluationReport _lastEvaluation;

    /// <param name="output">The screen.</param>
    /// <param name="isTerminal">Whether lines can be rewritten on it.</param>
    /// <param name="width">Columns of the terminal, asked for at each drawing.</param>
    /// <param name="clock">The system's clock, or a test's.</param>
    public TrainLog(TextWriter output, bool isTerminal, Func<int> width, TimeProvider clock)
    {
        _clock = clock;
        _progress = new Progress(output, isTerminal, width, clock);
    }

    private RunReport Run => _run ?? throw new InvalidOperationException("the log was not started");

    public void Start(RunReport run)
    {
        _run = run;
        int? resumed = null;
        if (run.ResumedFrom is { } folder)
        {
            _state = LogState.Load(folder);
            resumed = _state.Step;
            _isSaved = true;
        }

        var arguments = run.Arguments;
        _lines = new LogLines(arguments.OutputDir, resumed);
        if (arguments.EvalGenerate > 0)
            _answers = new LogLines(arguments.OutputDir, resumed, LogLines.AnswersName);
        if (arguments.ReportTo != ReportTo.None)
            _board = new TensorBoardWriter(arguments.LogFolder, _clock, resumed);
        _firstStep = _lastStep = resumed ?? 0;
        double percent = 100.0 * run.Trainable / Math.Max(1, run.Parameters);
        _progress.Message(FormattableString.Invariant(
            $"{run.Parameters:N0} parameters, {run.Trainable:N0} trained ({percent:0.00} %), on {run.Device}"));
        _progress.Message(FormattableString.Invariant(
            $"{run.Plan.Rows:N0} rows, {run.Plan.MaxSteps:N0} steps, {run.Plan.StepsPerEpoch:N0} per epoch"));
        Tell(run.Rows, arguments.DataPath, "rows", resumed is null);
        Tell(run.EvaluationRows, arguments.EvaluationData, "eval_rows", resumed is null);
        lock (_turn)
        {
            _isStarted = true;
            foreach (string line in _early) Note(line);
        }

        if (resumed is { } step)
            _progress.Message($"resumed after step {step} from {run.ResumedFrom}");
        _progress.Start(_firstStep, run.Plan.MaxSteps);
    }

    public void Message(string line)
    {
        _progress.Message(line);
        Note(line);
    }

    public void Step(in StepReport report)
    {
        _state.Pending = (_state.Pending.Sum + report.Loss, _state.Pending.Count + 1);
        _state.Total = (_state.Total.Sum + report.Loss, _state.Total.Count + 1);
        Count(report);
        if ((Run.Plan.After(report.Step) & StepActions.Log) != 0) Log(report, report.GradNorm);
        _progress.Step(report);
    }

    public void Skipped(in StepReport report, string what)
    {
        Count(report);
        Message(FormattableString.Invariant(
            $"step {report.Step} skipped: {what} (loss {report.Loss}, grad_norm {report.GradNorm})"));
        if ((Run.Plan.After(report.Step) & StepActions.Log) != 0) Log(report, double.NaN);
    }

    public void Evaluation(in EvaluationReport report)
    {
        EvaluationReport r = report;
        Add(new LogEntry(
            r.Step, Run.Plan.EpochAfter(r.Step),
            [(EvaluationLoss, r.Loss), ("eval_token_accuracy", r.TokenAccuracy),
                ("eval_answer_accuracy", r.AnswerAccuracy),
                .. (r.Generated?.Scores ?? []).Select(score =>
                    ("eval_generated_" + score.Metric, score.Value))],
            [("eval_runtime", r.Seconds),
                ("eval_samples_per_second", r.Rows / Math.Max(1e-9, r.Seconds))]));
        _progress.Message(FormattableString.Invariant(
            $"evaluation after step {r.Step}: loss {r.Loss:0.0000}, {100 * r.TokenAccuracy:0.00} % of ")
            + FormattableString.Invariant(
                $"tokens and {100 * r.AnswerAccuracy:0.00} % of whole answers right, ")
            + FormattableString.Invariant($"{r.Rows:N0} rows in {r.Seconds:0.0} s"));
        _firstEvaluation ??= r;
        _lastEvaluation = r;
        if (r.Generated is not { } generated) return;
        _progress.Message(FormattableString.Invariant(
            $"answers generated for {generated.Rows.Count:N0} rows in {generated.Seconds:0.0} s: ")
            + string.Join(", ", generated.Scores.Select(score =>
                FormattableString.Invariant($"{score.Metric} {score.Value:0.0000}"))));
        foreach (GeneratedRow row in generated.Rows)
            _answers = Written(_answers, file => file.Write(r.Step, row));
    }

    public bool HasEvaluation(int step) => _state.HasEvaluation(step);

    public (int Step, double Value)? Best => _state.Best;

    public void SaveState(string folder, int step)
    {
        _state.Consider(step, Run.Arguments);
        _state.Save(folder, step, Run);
    }

    public void Saved(string folder)
    {
        _isSaved = true;
        _progress.Message($"saved {folder}");
    }

    public void End(int step, StopReason reason)
    {
        _progress.End();
        int done = step - _firstStep;
        if (reason == StopReason.None)
        {
            double elapsed = Math.Max(1e-9, _progress.Elapsed);
            double rows = (double)done * Run.Arguments.PerDeviceTrainBatchSize
                * Run.Arguments.GradientAccumulationSteps;
            double loss = _state.Total.Count == 0
                ? double.NaN : _state.Total.Sum / _state.Total.Count;
            Add(new LogEntry(
                step, Run.Plan.EpochAfter(step),
                [
                    ("total_flos", 6.0 * _state.TokensSeen * Run.Parameters), ("train_loss", loss),
                    (RunTime, elapsed), ("train_samples_per_second", rows / elapsed),
                    ("train_steps_per_second", done / elapsed),
                ],
                []));
            _progress.Message(FormattableString.Invariant(
                $"done: {done:N0} steps in {elapsed:0.0} s, mean loss {loss:0.0000}"));
            if (_firstEvaluation is { } first && _lastEvaluation.Step > first.Step)
                _progress.Message(FormattableString.Invariant(
                    $"evaluation rows answered right, every token: {100 * first.AnswerAccuracy:0.0} % ")
                    + FormattableString.Invariant($"after step {first.Step}, ")
                    + FormattableString.Invariant(
                        $"{100 * _lastEvaluation.AnswerAccuracy:0.0} % now"));
            TellHowToAsk();
        }
        else
        {
            _progress.Message($"stopped after step {step} of {Run.Plan.MaxSteps}; " + (_isSaved
                ? "go on with --resume_from_checkpoint true"
                : "nothing was saved"));
        }

        _state.Save(Run.Arguments.OutputDir, step, Run);
        Report(Run.Arguments.OutputDir);
    }

    public void Dispose()
    {
        _progress.End();
        _lines?.Dispose();
        _answers?.Dispose();
        _board?.Dispose();
    }

    private void TellHowToAsk()
    {
        string result = Shown(Run.Arguments.OutputDir);
        string model = Shown(Run.Arguments.ModelNameOrPath!);
        bool adapter = Run.Arguments.UseLora;
        _progress.Message($"the {(adapter ? "adapter" : "model")} is in {result}");
        _progress.Message(
            "ask it: cpmx chat " + (adapter ? $"{model} --adapter {result}" : result));

        // From where the user is, as a word of a command line.
        static string Shown(string path)
        {
            string near = Path.GetRelativePath(Environment.CurrentDirectory, path);
            string name = near.StartsWith("..", StringComparison.Ordinal) ? path : near;
            return name.All(c => char.IsLetterOrDigit(c) || "/._-+:@%".Contains(c))
                ? name : "'" + name.Replace("'", "'\\''") + "'";
        }
    }

    private void Count(in StepReport report)
    {
        _lastStep = report.Step;
        _state.TokensSeen += report.Tokens;
        _tokens += report.Tokens;
        _seconds += report.Seconds;
        _progress.Count(report);
    }

    private void Log(in StepReport report, double gradNorm)
    {
        // Skipped steps are in no mean; an interval with none else has no loss.
        double loss = _state.Pending.Count == 0
            ? double.NaN
            : _state.Pending.Sum / _state.Pending.Count;
        Add(new LogEntry(
            report.Step, Run.Plan.EpochAfter(report.Step),
            [("grad_norm", gradNorm), ("learning_rate", report.LearningRate), ("loss", loss)],
            [
                ("tokens_per_second", _tokens / Math.Max(1e-9, _seconds)),
                ("memory_bytes", report.MemoryBytes),
            ]));
        _progress.Logged(report with { Loss = loss, GradNorm = gradNorm });
        _state.Pending = (0, 0);
        (_tokens, _seconds) = (0, 0);
    }

    private void Add(LogEntry entry)
    {
        _state.Add(entry);
        lock (_turn) _lines = Written(_lines, file => file.Write(entry));
        _board = Written(_board, file => file.Write(entry));
    }

    // For the report, from any thread; what was said before the log is there comes first in it.
    private void Note(string line)
    {
        lock (_turn)
        {
            if (!_isStarted) _early.Add(line);
            else
                _lines = Written(_lines, lines => lines.Write(_lastStep, json =>
                {
                    json.WriteNumber("epoch", Run.Plan.EpochAfter(_lastStep));
                    json.WriteString("message", line);
                }));
        }
    }

    // The result does not depend on it.
    private void Report(string folder)
    {
        if (_lines is null) return;
        try
        {
            ReportFile.Write([folder], Path.Combine(folder, ReportFile.FileName));
        }
        catch (Exception failure) when (failure is RunException or InputException)
        {
            _progress.Message($"{failure.Message}; there is no report of this run");
        }
    }

    // A log that cannot be written ends, not the training.
    private T? Written<T>(T? file, Action<T> write)
        where T : class, ILogFile
    {
        try
        {
            if (file is not null) write(file);
            return file;
        }
        catch (RunException failure)
        {
            _progress.Message($"{failure.Message}; training goes on without this log");
            file!.Dispose();
            return null;
        }
    }

    // What the rows are like does not belong into the history of the steps.
    private void Tell(RowCounts? counts, DataSources? path, string name, bool isNew)
    {
        if (counts is null) return;
        if ($"{counts}" is { Length: > 0 } text) _progress.Message($"{path}: {text}");
        if (!isNew) return;
        _lines = Written(_lines, file => file.Write(new LogEntry(0, 0, [], [
            (name, counts.Rows), ($"{name}_left_out", counts.LeftOut),
            ($"{name}_cut", counts.Cut), ($"{name}_answers_cut", counts.AnswersCut),
            ($"{name}_pictures", counts.Pictures), ($"{name}_pictures_turned", counts.Turned)])));
    }
}
