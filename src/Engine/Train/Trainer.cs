using System.Diagnostics;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Updates;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// The training loop. A step takes its micro-batches from the loader, runs forward and backward on
/// each, and updates the trained values once. Losses are divided by the supervised tokens of the
/// whole step, so that accumulating equals a larger batch.
/// Nothing in here knows the device or the model's parts.
///
/// A step is queued, and its result taken when it is there: at once on a device that is done when a
/// call returns, else while the next step is already queued. Whether a step is applied is decided
/// on the device, by the count of elements that are not finite. The host learns it before it queues
/// the next step's update, whose bias corrections depend on it, and behind that step's forward and
/// backward, so that the device is never without work.
/// A warm step allocates nothing on the managed heap.
/// </summary>
public sealed class Trainer
{
    private readonly TrainArguments _arguments;
    private readonly LoadedModel _model;
    private readonly Optimizer _optimizer;
    // Of the step that is queued next, and of the last one that was.
    private double[] _seeds = [], _weights = [];
    private Tensor[] _passes = [];
    private Tensor _losses;
    private Readback? _results;
    private Queued _queued;
    private StepResult _settled;
    private bool _isQueued, _isSettled;
    private long _lastSettled;

    public Trainer(TrainArguments arguments, TunedModel model)
        : this(arguments, model.Loaded, model.ParameterRanges)
    {
    }

    internal Trainer(TrainArguments arguments, LoadedModel model, ParameterRanges trainables)
    {
        (_arguments, _model) = (arguments, model);
        _optimizer = new Optimizer(model.Device, trainables, arguments);
        Reserve(arguments.GradientAccumulationSteps);
    }

    public Optimizer Optimizer => _optimizer;

    /// <summary>
    /// How many micro-batches at most go through the model together, layer by layer.
    /// </summary>
    public int Together { get; set; } = 1;

    /// <summary>Steps in a row whose loss or gradient was not finite.</summary>
    public int SkippedInARow { get; set; }

    /// <summary>
    /// Whether the trained values are those after whole steps; false when a failure left an update
    /// of which it is not known how far it came.
    /// </summary>
    public bool IsWhole { get; private set; } = true;

    /// <summary>As Queue, then waits for its result.</summary>
    public StepResult Step(int step, ReadOnlySpan<Batch> batches, double learningRate)
    {
        Queue(step, batches, learningRate);
        StepResult last = default;
        while (TryTake(wait: true, out StepResult result)) last = result;
        return last;
    }

    /// <summary>
    /// Queues one optimizer step over the batches, which may change once this returns; results are
    /// taken after each. step counts from 0; the masks of dropout, and noise, follow from it.
    /// </summary>
    public void Queue(int step, ReadOnlySpan<Batch> batches, double learningRate)
    {
        long started = Stopwatch.GetTimestamp();
        if (batches.Length > _weights.Length) Reserve(batches.Length);
        long tokens = 0, supervised = 0;
        foreach (Batch batch in batches)
        {
            tokens += batch.Tokens.Count;
            supervised += batch.LabelRows.Count;
        }

        bool isWeighted = true;
        _model.Graph.ClearGradients();
        for (int i = 0; i < batches.Length; i++)
        {
            _seeds[i] = Weight(batches, i, supervised);
            isWeighted &= double.IsFinite(_seeds[i]);
        }

        int together = _model.Model.RunsTogether ? Together : 1;
        for (int i = 0; i < batches.Length; i += together)
        {
            var random = new Randomness(
                (ulong)_arguments.Seed,
                ((ulong)step * (ulong)_arguments.GradientAccumulationSteps) + (ulong)i,
                Dropout: true);
            Backward(batches.Slice(i, Math.Min(together, batches.Length - i)), random, i);
        }

        _model.Graph.ZeroUnreachedGradients();
        Tensor losses = _losses.Slice(0, batches.Length);
        _optimizer.Measure(losses);
        if (_isQueued) Settle();
        // Without a supervised token there is no mean, and nothing to learn.
        IsWhole = false;
        if (isWeighted) _optimizer.Step(learningRate);
        _results!.Start(_optimizer.Norm, losses);
        _seeds.AsSpan(0, batches.Length).CopyTo(_weights);
        _queued = new(step + 1, batches.Length, learningRate, tokens, supervised, isWeighted,
            started);
        (_isQueued, IsWhole) = (true, true);
    }

    /// <summary>
    /// The next result, in the order of the steps, if it is there or waited for; false when there
    /// is none. Call it after each Queue until it is false.
    /// </summary>
    public bool TryTake(bool wait, out StepResult result)
    {
        if (!_isSettled && _isQueued && (wait || _results!.IsReady)) Settle();
        result = _settled;
        bool taken = _isSettled;
        _isSettled = false;
        return taken;
    }

    private double Weight(ReadOnlySpan<Batch> batches, int index, long supervised) =>
        _arguments.LossNormalization == LossNormalization.MicroBatchMean
            ? 1.0 / batches.Length / batches[index].LabelRows.Count
            : 1.0 / supervised;

    private void Backward(ReadOnlySpan<Batch> batches, Randomness random, int first)
    {
        Span<Tensor> losses = _passes.AsSpan(0, batches.Length);
        _model.Losses(batches, random, losses, _arguments.NeftuneNoiseAlpha ?? 0);
        bool learns = false;
        for (int i = 0; i < losses.Length; i++)
        {
            // The loss outlives its pass: the host reads the losses of all passes at once.
            _model.Device.Copy(losses[i] with { Variable = 0 },
                new Tensor(_losses.Slice(first + i, 1).Data, losses[i].Spec));
            learns |= losses[i].Variable != 0;
        }

        // Text alone reaches nothing that is trained when only picture features are: no gradient.
        if (learns) _model.Graph.Backward(losses, _seeds.AsSpan(first, losses.Length));
        _model.Graph.EndStep();
    }

    // What the queued step did, once the device has done it.
    private void Settle()
    {
        ReadOnlySpan<byte> bytes = _results!.Wait();
        long now = Stopwatch.GetTimestamp();
        var norm = MemoryMarshal.Read<GradientNorm>(bytes);
        ReadOnlySpan<float> losses =
            MemoryMarshal.Cast<byte, float>(bytes[Unsafe.SizeOf<GradientNorm>()..]);
        double loss = 0;
        for (int i = 0; i < _queued.Passes; i++) loss += _weights[i] * losses[i];
        bool applied = _queued.IsUpdated && norm.NonFinite == 0;
        if (applied) _optimizer.Updates++;
        SkippedInARow = applied ? 0 : SkippedInARow + 1;
        // Steps overlap: one's time begins when the one before was done.
        long begin = Math.Max(_queued.Started, _lastSettled);
        _settled = new StepResult(
            _queued.Step, loss, double.IsFinite(norm.Norm) ? norm.Norm : double.NaN,
            _queued.LearningRate, _queued.Tokens, _queued.SupervisedTokens,
            Stopwatch.GetElapsedTime(begin, now).TotalSeconds, !applied);
        (_isQueued, _isSettled, _lastSettled) = (false, true, now);
    }

    private void Reserve(int passes)
    {
        if (_isQueued) throw new InvalidOperationException("a larger step while one is under way");
        (_seeds, _weights, _passes) = (new double[passes], new double[passes], new Tensor[passes]);
        _losses = _model.Device.Allocate(new Spec(DType.F32, new Shape(passes)), "losses");
        _results = _model.Device.NewReadback(
            (int)(GradientNorm.Spec.Bytes + _losses.Spec.Bytes));
    }

    private readonly record struct Queued(
        int Step, int Passes, double LearningRate, long Tokens, long SupervisedTokens,
        bool IsUpdated, long Started);
}

/// <summary>
/// What one optimizer step did: its number from 1, the loss per supervised token, the global
/// gradient norm before clipping, the learning rate used, tokens and supervised tokens, seconds,
/// and whether it was skipped because loss or gradients were not finite.
/// </summary>
public readonly record struct StepResult(
    int Step, double Loss, double GradientNorm, double LearningRate, long Tokens,
    long SupervisedTokens, double Seconds, bool Skipped);
