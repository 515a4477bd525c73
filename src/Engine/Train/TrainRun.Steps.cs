using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Text;
using MiniCpmNative.Engine.Generate;
using MiniCpmNative.Engine.Metrics;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// The steps of a run, and what follows each: log, evaluation, checkpoint. A stop request ends them
/// after the step or the evaluation's batch that it came in, with a checkpoint; whatever fails in
/// them, the steps that were done are saved before it is told.
/// </summary>
public sealed partial class TrainRun
{
    // What Slurm (KillWait) and Kubernetes leave between SIGTERM and SIGKILL, and the bytes that
    // any disk takes in a second.
    private const int NoticeSeconds = 30;
    private const double SurelyWritten = 200e6;

    private Batch[] _batches = [];
    private StopReason _ended;

    // Steps: the last one saved, and the last one whose saving was begun.
    private int _saved, _saving;
    private int _updatesBefore;

    // A step whose numbers are not finite changes nothing, and there is nothing to save then.
    private bool IsAnyApplied => _trainer.Optimizer.Updates > _updatesBefore;

    private int Steps(int begin)
    {
        int done = begin;
        (_saved, _saving, _updatesBefore) = (begin, begin, _trainer.Optimizer.Updates);
        using BatchLoader loader = Loader(begin);
        _stop.IsTraining = true;
        try
        {
            EvaluateFirst(begin);
            bool stop = _stop.Requested;
            while (done < _plan.MaxSteps && !stop)
            {
                if (!TryStep(loader, done)) break;
                stop = Follow(++done);
            }

            _ended = _stop.Reason;
            if (_ended != StopReason.None) SaveNow(done);
        }
        catch (Exception failure)
        {
            Rescue(done, failure);
            throw;
        }

        if (done > begin && _ended == StopReason.None && !IsAnyApplied)
            throw new RunException(
                $"none of {done - begin:N0} steps was applied, each gave a loss or gradients that "
                + "are not finite; nothing was saved: lower learning_rate, or look at the rows");
        return done;
    }

    // An evaluation that a stop had cut short is made up for when the run goes on.
    private void EvaluateFirst(int begin)
    {
        bool due = begin == 0
            ? _arguments.EvalOnStart : _plan.After(begin).HasFlag(StepActions.Evaluate);
        if (due && !_log.HasEvaluation(begin)) Evaluate(begin);
    }

    /// <summary>Queues one step; false when a stop came while its rows were waited for.</summary>
    private bool TryStep(BatchLoader loader, int done)
    {
        int micro = _plan.Batches(done + 1).Count, filled = 0;
        try
        {
            for (int i = 0; i < micro; i++)
            {
                Batch batch = loader.Take(out _);
                if (batch.Samples > 0) _batches[filled++] = batch;
            }
        }
        catch (OperationCanceledException)
        {
            return false;
        }

        if ((_rows.Failure ?? _evaluationRows?.Failure) is { } bad) throw new BadRowException(bad);
        if (filled > 0)
        {
            try
            {
                _trainer.Queue(done, _batches.AsSpan(0, filled), _schedule.At(done));
            }
            catch (DeviceMemoryException full)
            {
                throw new RunException(
                    $"step {done + 1}, {StepRows(done + 1)}: {full.Message}; "
                    + MemoryPlan.Advice(_arguments), full);
            }
        }
        else
        {
            Report(all: true);
            _log.Message($"step {done + 1}: all of its rows are left out, nothing is learned");
        }

        loader.Return(micro);
        return true;
    }

    private string StepRows(int step)
    {
        StepBatches batches = _plan.Batches(step);
        var order = new Sampler(_arguments, _rows.Count);
        var rows = new List<int>();
        for (int i = 0; i < batches.Count; i++)
            rows.AddRange(order.Batch(batches.Epoch, batches.First + i));
        return PlannedBatches.Names(_rows, rows.ToArray());
    }

    /// <summary>What follows a step; true when a stop was asked for.</summary>
    private bool Follow(int done)
    {
        // Steps are reported when the device is done with them, all of them before what needs it.
        StepActions after = _plan.After(done);
        bool evaluate = after.HasFlag(StepActions.Evaluate),
            save = after.HasFlag(StepActions.Save);
        Report(all: evaluate || save || done == _plan.MaxSteps);
        if (evaluate) Evaluate(done);
        bool stop = _stop.Requested;
        if (_stop.TakeCheckpoint() || save) SaveNow(done);
        return stop;
    }

    private void SaveNow(int done)
    {
        Report(all: true);
        if (done == _saved || !IsAnyApplied) return;
        _saving = done;
        Save(done);
    }

    /// <summary>
    /// Saves the steps done, then tells the failure: a bad row as one that was found while running.
    /// </summary>
    private void Rescue(int done, Exception failure)
    {
        try
        {
            while (_trainer.TryTake(wait: true, out StepResult result)) Tell(result);
            if (!_trainer.IsWhole)
                throw new RunException("it failed in the middle of an update");
            if (done != _saving) SaveNow(done);
        }
        catch (Exception second)
        {
            _log.Message($"what was trained since step {_saved} cannot be saved: "
                + Messages.OneLine(second.Message));
        }

        string goOn = _saved > 0 ? "; go on with --resume_from_checkpoint true" : "";
        if (failure is BadRowException bad)
            throw new RunException(
                $"{bad.Message}: bad since the run began, or not checked before (cpmx data check "
                + "lists all such rows); repair it, or leave it out with --on_bad_row skip"
                + goOn, bad);
        // The input was good when the run began.
        if (failure is InputException) throw new RunException(failure.Message + goOn, failure);
        if (_saved > 0) _log.Message($"failed after step {done}{goOn}");
    }

    /// <summary>Micro-batches in the plan's order, after those of the steps done.</summary>
    private BatchLoader Loader(int done)
    {
        long first = _plan.BatchesBefore(done);
        _batches = new Batch[_plan.MostBatches];
        // Called in ascending order, so the place in the plan only moves on.
        int epoch = (int)(first / _plan.MicroBatches);
        long index = first % _plan.MicroBatches;
        return new BatchLoader(
            _rows, _arguments.PerDeviceTrainBatchSize,
            _plan.BatchesBefore(_plan.MaxSteps) - first, _workers, _plan.MostBatches * 2,
            (_, rows) =>
            {
                if (index == _plan.MicroBatches) (epoch, index) = (epoch + 1, 0);
                ReadOnlySpan<int> batch = _sampler.Batch(epoch, (int)index++);
                batch.CopyTo(rows);
                return batch.Length;
            },
            () => _stop.Requested,
            () => _rows.CheckPicture() || _evaluationRows?.CheckPicture() == true);
    }

    private void Report(bool all)
    {
        while (_trainer.TryTake(all, out StepResult result))
        {
            Tell(result);
            if (result.Skipped && _trainer.SkippedInARow >= _arguments.MaxNonfiniteSteps)
                throw new RunException(
                    $"{_trainer.SkippedInARow} steps in a row gave a loss or gradients that are not "
                    + $"finite, the last one step {result.Step}: lower learning_rate, or look at "
                    + "the rows of these steps");
        }
    }

    private void Tell(in StepResult result)
    {
        var report = new StepReport(
            result.Step, result.Loss, result.GradientNorm, result.LearningRate, result.Tokens,
            result.Seconds, _model.Device.MemoryInUse);
        if (!result.Skipped) _log.Step(report);
        else _log.Skipped(report, double.IsFinite(result.Loss) ? "gradient" : "loss");
    }

    private void Evaluate(int step)
    {
        DataRows rows = _evaluationRows!;
        int size = _arguments.PerDeviceEvalBatchSize;
        long batches = (rows.Count + (long)size - 1) / size;
        using var loader =
            new BatchLoader(rows, size, batches, _workers, ahead: 2, (batch, numbers) =>
        {
            int begin = (int)(batch * size), count = Math.Min(size, rows.Count - begin);
            for (int i = 0; i < count; i++) numbers[i] = begin + i;
            return count;
        }, () => _stop.Requested);
        Evaluation? found = Evaluation.Run(_model, loader, batches, () =>
        {
            if (step > 0 && _stop.TakeCheckpoint()) SaveNow(step);
            return !_stop.Requested;
        });
        GeneratedReport? generated = found is null ? null : Generate();
        if (found is null || (_answerer is not null && generated is null))
        {
            _log.Message($"the evaluation after step {step} is left unfinished");
            return;
        }

        _log.Evaluation(new EvaluationReport(
            step, found.Loss, found.TokenAccuracy, found.AnswerAccuracy, found.Rows,
            found.Seconds)
        {
            Generated = generated,
        });
    }

    // Answers to the first rows that expect one; null when it was stopped.
    private GeneratedReport? Generate()
    {
        if (_answerer is null) return null;
        DataRows rows = _evaluationRows!;
        var started = System.Diagnostics.Stopwatch.StartNew();
        var answers = new SortedDictionary<int, RowAnswer>();
        _answerer.Run(
            Enumerable.Range(0, rows.Count).Where(row =>
                !rows.IsLeftOut(row) && rows[row].Expected is not null)
                .Take(_arguments.EvalGenerate),
            _arguments.PerDeviceEvalBatchSize, answers.Add, () => !_stop.Requested);
        if (_stop.Requested) return null;
        Tokenizer tokenizer = rows.Format.Tokenizer;
        ScoredAnswer[] scored = [.. answers.Select(
            answer => RowAnswerer.Scored(rows[answer.Key], answer.Value, tokenizer))];
        return new GeneratedReport(
            [.. _metrics.Select(metric => (metric.Name, metric.Score(scored).All))],
            [.. answers.Select(answer => new GeneratedRow(rows[answer.Key], answer.Value.Text))],
            started.Elapsed.TotalSeconds);
    }

    // A scheduler's notice must be long enough for the checkpoint that it asks for.
    private void WarnOfLargeCheckpoints()
    {
        SavedBytes saved = _model.Base.SavedBytes;
        long bytes = saved.Result + (_arguments.SaveOnlyModel ? 0 : saved.State);
        if (LargeCheckpoint(bytes) is { } warning) _log.Message(warning);
    }

    internal static string? LargeCheckpoint(long bytes) => bytes < NoticeSeconds * SurelyWritten
        ? null
        : FormattableString.Invariant(
            $"a checkpoint has {bytes / 1e9:0.0} GB: saved within {NoticeSeconds} s of SIGTERM only ")
            + "if "
            + FormattableString.Invariant(
                $"output_dir takes {bytes / 1e9 / NoticeSeconds:0.0} GB a second; else ask for a ")
            + "longer notice (Slurm: --signal=TERM@SECONDS, Kubernetes: "
            + "terminationGracePeriodSeconds)";
}
