using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Updates;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// What a run takes of a GPU's memory, counted before it begins: every micro-batch that may need
/// the most goes once through a <see cref="DryRun"/>. Where the configuration leaves it open, as
/// little is computed again in backward as fits, and frozen layers stay in the machine's memory
/// where nothing else does.
/// </summary>
public sealed class MemoryPlan
{
    // With more of them in each try, a plan would take long.
    private const int Searched = 8;

    // Micro-batches that share a layer's way over the bus: a few hide it.
    private const int MostTogether = 16;

    private MemoryPlan(DryRun dry, Need most)
    {
        (Parts, Recomputation, Streamed, Together) =
            (dry.Parts(most.Bytes), dry.Recomputation, dry.StreamedBytes, dry.Together);
        (Rows, Size, Fullest, Trains) =
            (most.Planned.Rows, most.Planned.Size, most.Fullest, most.Planned.Trains);
    }

    public MemoryParts Parts { get; }

    public Recomputation Recomputation { get; }

    /// <summary>Bytes of frozen layers that stay in the machine's memory.</summary>
    public long Streamed { get; }

    /// <summary>Micro-batches that go through the layers together.</summary>
    public int Together { get; }

    /// <summary>The rows that set the peak.</summary>
    public string Rows { get; }

    public RowSize Size { get; }

    /// <summary>The operation in which the peak is reached.</summary>
    public string Fullest { get; }

    /// <summary>Whether it is reached in training, not in evaluation.</summary>
    public bool Trains { get; }

    /// <summary>Of a run on rows that were checked.</summary>
    /// <param name="arguments">The run's configuration.</param>
    /// <param name="model">What is trained.</param>
    /// <param name="card">The card, or one like it.</param>
    /// <param name="rows">Training rows.</param>
    /// <param name="evaluation">Evaluation rows, if there are any.</param>
    /// <param name="plan">The steps.</param>
    /// <param name="allowed">Bytes that the run may take; null for any.</param>
    /// <exception cref="RunException">It does not fit: says what is needed, and what takes
    /// less.</exception>
    public static MemoryPlan Make(
        TrainArguments arguments, PlannedModel model, CardFigures card, DataRows rows,
        DataRows? evaluation, StepPlan plan, long? allowed)
    {
        using Candidate run = Choose(arguments, model, card, rows, evaluation, plan, allowed);
        return Make(run.Arguments, run.Dry, run.Batches, allowed);
    }

    /// <summary>A run as it may be, on a device that counts.</summary>
    internal sealed record Candidate(TrainArguments Arguments, DryRun Dry,
        IReadOnlyList<PlannedBatches.Planned> Batches) : IDisposable
    {
        public void Dispose() => Dry.Dispose();
    }

    /// <summary>
    /// The run with streamed layers where that is asked for, or left open and it does not fit
    /// otherwise; then as many micro-batches go through them together as fit.
    /// </summary>
    internal static Candidate Choose(
        TrainArguments arguments, PlannedModel model, CardFigures card, DataRows rows,
        DataRows? evaluation, StepPlan plan, long? allowed)
    {
        bool isOpen = arguments.StreamWeights is null && allowed is not null
            && arguments.Recompute is Recompute.Auto or Recompute.Block;
        if (!arguments.Streams)
        {
            Candidate apart = Of(1);
            if (!isOpen) return apart;
            int before = apart.Dry.Recomputation.Amount;
            apart.Dry.Recomputation.Amount = apart.Dry.Recomputation.Most;
            bool fits = Fits(apart.Dry, All(apart.Dry, apart.Batches), allowed);
            apart.Dry.Recomputation.Amount = before;
            if (fits) return apart;
            apart.Dispose();
            arguments = arguments with { StreamWeights = true };
        }

        for (int together = Math.Min(MostTogether, plan.MostBatches); ; together /= 2)
        {
            Candidate run = Of(together);
            if (together == 1 || Fits(run.Dry, All(run.Dry, run.Batches), allowed)) return run;
            run.Dispose();
        }

        Candidate Of(int together) => new(arguments, new DryRun(arguments, model, card, together),
            PlannedBatches.Of(arguments, rows, evaluation, plan, together));
    }

    /// <summary>The configuration with what was planned.</summary>
    public TrainArguments Of(TrainArguments arguments) =>
        Streamed > 0 ? arguments with { StreamWeights = true } : arguments;

    /// <summary>Lets a model that has not run yet take what was planned.</summary>
    public void Apply(TunedModel model)
    {
        model.Recomputation.Amount = Recomputation.Amount;
        if (model.Device is CudaDevice device) device.StepBytes = Parts.Activations;
    }

    private sealed record Need(PlannedBatches.Planned Planned, long Bytes, string Fullest);

    /// <param name="arguments">The run's configuration.</param>
    /// <param name="dry">The model on a device that counts.</param>
    /// <param name="batches">What may need the most.</param>
    /// <param name="allowed">Bytes that the run may take; null for any.</param>
    /// <exception cref="RunException">It does not fit: says what is needed, and what takes
    /// less.</exception>
    internal static MemoryPlan Make(
        TrainArguments arguments, DryRun dry, IReadOnlyList<PlannedBatches.Planned> batches,
        long? allowed)
    {
        Recomputation recomputation = dry.Recomputation;
        Need[] needs = All(dry, batches);
        bool isFree = arguments.Recomputes == Recompute.Auto && recomputation.Most > 0;
        if (isFree && !Fits(dry, needs, allowed))
        {
            // Which batches need the most may change with what is kept.
            List<PlannedBatches.Planned> worst = [.. needs.Take(Searched).Select(n => n.Planned)];
            recomputation.Amount = recomputation.Most;
            needs = All(dry, batches);
            worst.AddRange(needs.Take(Searched).Select(n => n.Planned).Except(worst));
            if (Fits(dry, needs, allowed)) needs = Search(dry, batches, worst, allowed);
        }

        if (!Fits(dry, needs, allowed))
            throw new RunException("out of memory: the run takes "
                + $"{RunPlaces.Gib(dry.Parts(needs[0].Bytes).Total)}, most "
                + $"of it in {needs[0].Planned.Rows}, and may take {RunPlaces.Gib(allowed!.Value)}; "
                + Advice(arguments));
        return new MemoryPlan(dry, needs[0]);
    }

    /// <summary>Settings that are still open and take less.</summary>
    public static string Advice(TrainArguments a)
    {
        var open = new List<string>();
        void Add(bool isOpen, string setting)
        {
            if (isOpen) open.Add(setting);
        }

        Add(a.Recomputes is not (Recompute.Auto or Recompute.Block), "gradient_checkpointing=true");
        Add(a.StreamWeights == false, "stream_weights=true");
        Add(a.PerDeviceTrainBatchSize > 1,
            "a smaller per_device_train_batch_size (with more gradient_accumulation_steps)");
        Add(a.MaxSliceNums > 1, "a smaller max_slice_nums");
        Add(true, "a smaller model_max_length");
        Add(!a.Bf16, "bf16=true");
        OptimizerForm optimizer = TunedModel.OptimizerOf(a);
        Add(optimizer.Moments == DType.F32 && !optimizer.Paged, "optim=adamw_8bit");
        Add(!optimizer.Paged, "optim=paged_adamw_8bit");
        Add(!a.UseLora, "use_lora=true");
        Add(a.TrainedWhole.Count > 0, "fewer modules_to_save");
        return "open are " + string.Join(", ", open);
    }

    /// <summary>The plan in one line.</summary>
    public override string ToString() =>
        $"GPU memory: {RunPlaces.Gib(Parts.Total)} (weights {RunPlaces.Gib(Parts.Weights)}, trained "
        + $"{RunPlaces.Gib(Parts.Trained)}, gradients {RunPlaces.Gib(Parts.Gradients)}, moments "
        + $"{RunPlaces.Gib(Parts.Moments)}, activations {RunPlaces.Gib(Parts.Activations)}, "
        + $"workspace {RunPlaces.Gib(Parts.Workspace)}), the most in {Rows}; {Recomputation}"
        + (Streams is { } line ? $"; {line}" : "");

    /// <summary>What is streamed, in words; null where nothing is.</summary>
    public string? Streams => Streamed == 0 ? null
        : $"{RunPlaces.Gib(Streamed)} of frozen layers stay in the machine's memory and pass through "
            + "two buffers (stream_weights), once for "
            + (Together == 1 ? "each micro-batch" : $"{Together} micro-batches together");

    // The least amount that fits; amounts between need no less than larger ones.
    private static Need[] Search(
        DryRun dry, IReadOnlyList<PlannedBatches.Planned> batches,
        List<PlannedBatches.Planned> worst, long? allowed)
    {
        int low = 1, high = dry.Recomputation.Most;
        while (low < high)
        {
            dry.Recomputation.Amount = (low + high) / 2;
            if (Fits(dry, All(dry, worst), allowed)) high = dry.Recomputation.Amount;
            else low = dry.Recomputation.Amount + 1;
        }

        while (true)
        {
            dry.Recomputation.Amount = high;
            Need[] needs = All(dry, batches);
            if (high == dry.Recomputation.Most || Fits(dry, needs, allowed)) return needs;
            high++;
        }
    }

    private static bool Fits(DryRun dry, Need[] needs, long? allowed) =>
        allowed is null || dry.Parts(needs[0].Bytes).Total <= allowed;

    private static Need[] All(DryRun dry, IReadOnlyList<PlannedBatches.Planned> batches) =>
    [
        .. batches.Select(b => new Need(
            b, b.Trains ? dry.Train(b.Batches) : dry.Evaluate(b.Batches[0]), dry.Fullest))
            .OrderByDescending(n => n.Bytes),
    ];
}
