using MiniCpmNative.Engine.Config;

namespace MiniCpmNative.Engine.Train;

/// <summary>What follows an optimizer step.</summary>
[Flags]
public enum StepActions { None = 0, Log = 1, Evaluate = 2, Save = 4 }

/// <summary>
/// The micro-batches [First, First + Count) of an epoch that one optimizer step accumulates.
/// </summary>
public readonly record struct StepBatches(int Epoch, int First, int Count);

/// <summary>
/// How many steps a run has and what each one covers, counted as the Hugging Face Trainer does: an
/// epoch ends with a smaller micro-batch and a shorter accumulation rather than dropping rows
/// (unless dataloader_drop_last), and max_steps decides over num_train_epochs. Steps are numbered
/// from 1.
/// </summary>
public sealed class StepPlan
{
    private readonly TrainArguments _arguments;
    private readonly int _logging, _evaluation, _saving;

    /// <exception cref="InputException">No row is left to train on, or too many steps.</exception>
    public StepPlan(TrainArguments arguments, int rows)
    {
        _arguments = arguments;
        Rows = rows;
        int size = arguments.PerDeviceTrainBatchSize;
        MicroBatches = arguments.DataloaderDropLast
            ? rows / size : (int)(((long)rows + size - 1) / size);
        if (MicroBatches == 0)
        {
            throw new InputException(
                $"{arguments.DataPath}: {rows} rows, too few for one batch of {size}; "
                + "lower per_device_train_batch_size or set dataloader_drop_last to false");
        }

        int accumulation = arguments.GradientAccumulationSteps;
        StepsPerEpoch = (int)(((long)MicroBatches + accumulation - 1) / accumulation);
        double steps = arguments.MaxSteps > 0
            ? arguments.MaxSteps
            : Math.Ceiling(arguments.NumTrainEpochs * StepsPerEpoch);
        if (steps > int.MaxValue)
            throw new InputException(
                $"num_train_epochs {arguments.NumTrainEpochs} gives {steps:N0} steps, "
                + $"more than {int.MaxValue:N0}");
        MaxSteps = (int)steps;
        Epochs = arguments.MaxSteps > 0
            ? ((MaxSteps - 1) / StepsPerEpoch) + 1
            : (int)Math.Ceiling(arguments.NumTrainEpochs);
        _logging = arguments.LoggingSteps.Steps(MaxSteps);
        _evaluation = arguments.EvalSteps?.Steps(MaxSteps) ?? _logging;
        _saving = arguments.SaveSteps.Steps(MaxSteps);
    }

    public int Rows { get; }

    /// <summary>Micro-batches of one epoch.</summary>
    public int MicroBatches { get; }

    public int StepsPerEpoch { get; }

    /// <summary>Micro-batches of a step at most.</summary>
    public int MostBatches => Math.Min(_arguments.GradientAccumulationSteps, MicroBatches);

    /// <summary>Optimizer steps of the whole run.</summary>
    public int MaxSteps { get; }

    /// <summary>Epochs that are begun.</summary>
    public int Epochs { get; }

    /// <summary>Steps between checkpoints, where steps are saved.</summary>
    public int SavingSteps => _saving;

    /// <summary>Checkpoints that the whole run saves.</summary>
    public int Checkpoints => _arguments.SaveStrategy switch
    {
        When.Steps => ((MaxSteps - 1) / _saving) + 1,
        When.Epoch => ((MaxSteps - 1) / StepsPerEpoch) + 1,
        _ => 0,
    };

    /// <summary>What the step accumulates; 1 is the first step.</summary>
    public StepBatches Batches(int step)
    {
        int accumulation = _arguments.GradientAccumulationSteps;
        int epoch = (step - 1) / StepsPerEpoch;
        int first = (step - 1) % StepsPerEpoch * accumulation;
        return new StepBatches(epoch, first, Math.Min(accumulation, MicroBatches - first));
    }

    /// <summary>Micro-batches of the first steps together.</summary>
    public long BatchesBefore(int steps) =>
        ((long)(steps / StepsPerEpoch) * MicroBatches)
        + ((long)(steps % StepsPerEpoch) * _arguments.GradientAccumulationSteps);

    /// <summary>Passes over the data after a step, as logged: a fraction within an epoch.</summary>
    public double EpochAfter(int step)
    {
        if (step == 0) return 0;
        var batches = Batches(step);
        return batches.Epoch + ((double)(batches.First + batches.Count) / MicroBatches);
    }

    /// <summary>
    /// What follows a step. The last one is saved too when steps are saved at all.
    /// </summary>
    public StepActions After(int step)
    {
        bool epochEnds = step % StepsPerEpoch == 0 || step == MaxSteps;
        var actions = StepActions.None;
        if (Due(_arguments.LoggingStrategy, _logging, step, epochEnds)
            || (step == 1 && _arguments.LoggingFirstStep))
            actions |= StepActions.Log;
        if (Due(_arguments.EvalStrategy, _evaluation, step, epochEnds))
            actions |= StepActions.Evaluate;
        if (Due(_arguments.SaveStrategy, _saving, step, epochEnds)
            || (step == MaxSteps && _arguments.SaveStrategy != When.No))
            actions |= StepActions.Save;
        return actions;
    }

    /// <summary>
    /// Resolved numbers of steps between log entries, evaluations and checkpoints.
    /// </summary>
    public (int Logging, int Evaluation, int Saving) Every => (_logging, _evaluation, _saving);

    private static bool Due(When when, int every, int step, bool epochEnds) => when switch
    {
        When.Steps => step % every == 0,
        When.Epoch => epochEnds,
        _ => false,
    };
}
