using System.Diagnostics;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// The training loop. A step takes its micro-batches from the loader, runs forward and backward on each,
/// and updates the trained values once. Losses are divided by the supervised tokens of the whole step,
/// so that accumulating equals a larger batch. Nothing in here knows the device or the model's parts.
/// A warm step allocates nothing on the managed heap.
/// </summary>
public sealed class Trainer
{
    private readonly TrainArguments _arguments;
    private readonly TrainingModel _model;
    private readonly Optimizer _optimizer;
    private readonly Stopwatch _clock = new();

    public Trainer(TrainArguments arguments, TrainingModel model)
    {
        (_arguments, _model) = (arguments, model);
        _optimizer = new Optimizer(model.Device, model.Trainables, arguments);
    }

    public Optimizer Optimizer => _optimizer;

    /// <summary>Steps in a row whose loss or gradient was not finite.</summary>
    public int SkippedInARow { get; set; }

    /// <summary>
    /// One optimizer step over the first count of the batches. step counts from 0; the masks of dropout
    /// follow from it.
    /// </summary>
    public StepResult Step(int step, ReadOnlySpan<Batch> batches, double learningRate)
    {
        _clock.Restart();
        long tokens = 0, supervised = 0;
        foreach (Batch batch in batches)
        {
            tokens += batch.Tokens.Count;
            supervised += batch.LabelRows.Count;
        }

        bool mean = _arguments.LossNormalization == LossNormalization.MicroBatchMean;
        _model.Graph.ClearGradients();
        double loss = 0;
        for (int i = 0; i < batches.Length; i++)
        {
            Batch batch = batches[i];
            double weight = mean
                ? 1.0 / batches.Length / batch.LabelRows.Count
                : 1.0 / supervised;
            _model.Device.Random = new Randomness(
                (ulong)_arguments.Seed,
                ((ulong)step * (ulong)_arguments.GradientAccumulationSteps) + (ulong)i, Dropout: true);
            loss += weight * Backward(batch, weight);
        }

        _model.Graph.ZeroUnreachedGradients();
        double norm = _optimizer.GradientNorm();
        bool finite = double.IsFinite(loss) && double.IsFinite(norm);
        if (finite) _optimizer.Step(learningRate);
        SkippedInARow = finite ? 0 : SkippedInARow + 1;
        return new StepResult(
            loss, norm, learningRate, tokens, supervised, _clock.Elapsed.TotalSeconds, !finite);
    }

    private double Backward(Batch batch, double weight)
    {
        Tensor loss = _model.Loss(batch);
        Span<float> value = stackalloc float[1];
        _model.Device.Read(loss, value);
        // Text alone reaches nothing that is trained when only picture features are: no gradient.
        if (loss.Variable != 0) _model.Graph.Backward(loss, weight);
        _model.Graph.EndStep();
        return value[0];
    }
}

/// <summary>
/// What one optimizer step did: the loss per supervised token, the global gradient norm before clipping,
/// the learning rate used, tokens and supervised tokens, seconds, and whether it was skipped because
/// loss or gradients were not finite.
/// </summary>
public readonly record struct StepResult(
    double Loss, double GradientNorm, double LearningRate, long Tokens, long SupervisedTokens,
    double Seconds, bool Skipped);
