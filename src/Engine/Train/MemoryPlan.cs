using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Updates;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// What a run takes of a GPU's memory, counted before it begins: every micro-batch that may need
/// the most goes once through a <see cref="DryRun"/>. Where the configuration leaves it open, as
/// little is computed again in backward as fits, and only what does not fit otherwise stays in the
/// machine's memory.
/// </summary>
public sealed class MemoryPlan
{
    // With more of them in each try, a plan would take long.
    private const int Searched = 8;

    // Micro-batches that share a layer's way over the bus: a few hide it.
    private const int MostTogether = 16;

    private readonly TrainArguments _choice;

    private MemoryPlan(DryRun dry, Need most)
    {
        (Parts, Recomputation, Streamed, Kept, Together, _choice) =
            (dry.Parts(most.Bytes), dry.Recomputation, dry.StreamedBytes, dry.HostBytes,
                dry.Together, dry.Arguments);
        Unpacked = dry.KeepsUnpacked ? dry.UnpackedBytes : 0;
        Held = dry.UnpackedRoom;
        (Rows, Size, Fullest, Trains) =
            (most.Planned.Rows, most.Planned.Size, most.Fullest, most.Planned.Trains);
    }

    public MemoryParts Parts { get; }

    public Recomputation Recomputation { get; }

    /// <summary>Bytes of frozen layers that stay in the machine's memory.</summary>
    public long Streamed { get; }

    /// <summary>Bytes of other tensors there, which kernels reach over the bus.</summary>
    public long Kept { get; }

    /// <summary>Bytes of what a layer's weights are unpacked to, where a layer that is computed
    /// again keeps that for its gradients; else 0.</summary>
    public long Unpacked { get; }

    /// <summary>Bytes of what weights are unpacked to once for the whole run, among those of
    /// weights.</summary>
    public long Held { get; }

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
    /// The run with as little in the machine's memory as fits, of what the configuration leaves
    /// open; where layers are streamed, with as many micro-batches together as fit. Rows of
    /// embeddings take the bus less time than the GPU takes to compute or unpack anything again, so
    /// that these go there before.
    /// </summary>
    internal static Candidate Choose(
        TrainArguments arguments, PlannedModel model, CardFigures card, DataRows rows,
        DataRows? evaluation, StepPlan plan, long? allowed)
    {
        ParameterTable table = model.Spec.Parameters;
        bool hasLookups = table.All.Any(p => table.IsLookedUp(p.Name)
            && model.Parts.Tensors.All(t => t.Name != p.Name));
        TrainArguments[] choices = [.. Choices(arguments, hasLookups)];
        if (allowed is null) choices = choices[..1];
        for (int i = 0; ; i++)
        {
            TrainArguments choice = choices[i];
            int together = choice.Streams ? Math.Min(MostTogether, plan.MostBatches) : 1;
            for (; together > 0; together /= 2)
            {
                var run = new Candidate(choice, new DryRun(choice, model, card, together),
                    PlannedBatches.Of(choice, rows, evaluation, plan, together));
                bool isLast = together == 1 && i == choices.Length - 1;
                bool isBeforeEmbeddings = !isLast && !choice.EmbeddingsInHost
                    && choices[i + 1].StreamWeights == StreamedWeights.Embeddings;
                if (FitsAtLeast(run, allowed, recomputes: !isBeforeEmbeddings) || isLast)
                    return run;
                run.Dispose();
            }
        }
    }

    // In the order of what they bring over the bus for the bytes that they save.
    private static IEnumerable<TrainArguments> Choices(TrainArguments a, bool hasLookups)
    {
        bool isFree = a.Recompute is Recompute.Auto or Recompute.Block;
        const StreamedWeights none = StreamedWeights.False, lookups = StreamedWeights.Embeddings,
            layers = StreamedWeights.True;
        bool mayLookups = hasLookups && a.StreamWeights is null;
        bool[] Open(bool? key, bool mayBe = true) =>
            key is { } given ? (bool[])[given] : mayBe ? (bool[])[false, true] : [false];
        IEnumerable<StreamedWeights> Streamed(bool param) =>
            param ? [layers] : a.StreamWeights is { } given ? [given]
            : ((StreamedWeights[])[none, lookups, layers]).Where(
                streams => streams == none || (streams == lookups ? mayLookups : isFree));
        foreach (bool param in Open(
            a.OffloadParam, isFree && a.StreamWeights is null or layers))
            foreach (StreamedWeights streams in Streamed(param))
                foreach (bool optimizer in Open(a.OffloadOptimizer))
                {
                    // Embeddings go before moments; trained layers where their moments are already,
                    // unless they are told to.
                    if (streams == none && optimizer && mayLookups && a.OffloadOptimizer is null)
                        continue;
                    if (param && !optimizer && a.OffloadOptimizer != false
                        && a.OffloadParam != true)
                        continue;
                    yield return a with
                    {
                        OffloadParam = param,
                        StreamWeights = streams,
                        OffloadOptimizer = optimizer,
                    };
                }
    }

    // With the least that it may take, or without doing anything twice that it need not.
    private static bool FitsAtLeast(Candidate run, long? allowed, bool recomputes)
    {
        if (allowed is null) return true;
        Recomputation recomputation = run.Dry.Recomputation;
        int before = recomputation.Amount;
        if (recomputes && run.Arguments.Recomputes == Recompute.Auto)
            recomputation.Amount = recomputation.Most;
        run.Dry.KeepsUnpacked = !recomputes;
        bool fits = Fits(run.Dry, All(run.Dry, run.Batches), allowed);
        run.Dry.KeepsUnpacked = false;
        recomputation.Amount = before;
        return fits;
    }

    /// <summary>The configuration with what was planned.</summary>
    public TrainArguments Of(TrainArguments arguments) => arguments with
    {
        StreamWeights = _choice.StreamWeights ?? StreamedWeights.False,
        OffloadOptimizer = _choice.OffloadOptimizer == true,
        OffloadParam = _choice.OffloadParam == true,
    };

    /// <summary>Refuses what does not fit into the machine's memory.</summary>
    /// <param name="free">Bytes of it that are free.</param>
    /// <param name="arguments">The run's configuration.</param>
    /// <exception cref="RunException">Says what is needed, and what takes less.</exception>
    public void MustFitBeside(long free, TrainArguments arguments)
    {
        if (Streamed + Kept <= free) return;
        var open = new List<string> { "an end of other programs" };
        void Add(bool isOpen, string setting)
        {
            if (isOpen) open.Add(setting);
        }

        Add(arguments.MemoryLimit is not null, "a larger memory_limit");
        Add(_choice.StreamWeights == StreamedWeights.Embeddings
            || (arguments.StreamWeights is not null and not StreamedWeights.False),
            "stream_weights=false");
        Add(arguments.OffloadParam == true, "offload_param=false");
        Add(arguments.OffloadOptimizer == true, "offload_optimizer=false");
        Add(Streamed > 0 && arguments.UseLora && !arguments.Quantises, "q_lora=true");
        Add(TunedModel.OptimizerOf(_choice) is { Paged: true, Moments: DType.F32 },
            "optim=adamw_8bit");
        Add(!arguments.UseLora, "use_lora=true");
        throw new RunException("out of memory: the run needs "
            + $"{RunPlaces.Gib(Streamed + Kept)} of the machine's memory, {RunPlaces.Gib(free)} "
            + $"are free; {InHost}; open are {string.Join(", ", open)}");
    }

    /// <summary>Lets a model that has not run yet take what was planned.</summary>
    public void Apply(TunedModel model)
    {
        model.Recomputation.Amount = Recomputation.Amount;
        if (model.Device is not CudaDevice device) return;
        device.StepBytes = Parts.Activations;
        device.KeepsUnpacked = Unpacked > 0;
        device.HoldUnpacked(Held);
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
        dry.KeepsUnpacked = false;
        dry.HoldUnpacked(0);
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
                + $"of it in {needs[0].Planned.Rows}, and may take "
                + $"{RunPlaces.Gib(allowed!.Value)}; "
                + Advice(arguments));
        // A run takes no more than it needs, unless it was told what it may take.
        bool holds = arguments.MemoryLimit is not null && !arguments.Streams && allowed is not null;
        long Left(Need need) => allowed!.Value - dry.Parts(need.Bytes).Total;
        if (holds && Left(needs[0]) >= dry.UnpackedWanted)
        {
            dry.HoldUnpacked(dry.UnpackedWanted);
            return new MemoryPlan(dry, needs[0]);
        }

        Need most = KeepUnpacked(dry, batches, allowed) ?? needs[0];
        if (holds) HoldUnpacked(dry, batches, Left(most));
        return new MemoryPlan(dry, most);
    }

    // Weights that are unpacked once for the whole run, in the memory that is left. A step needs no
    // less for them: the first forward finds none of them there.
    private static void HoldUnpacked(
        DryRun dry, IReadOnlyList<PlannedBatches.Planned> batches, long left)
    {
        dry.HoldUnpacked(Math.Min(left, dry.UnpackedWanted));
        dry.Train(batches.First(b => b.Trains).Batches);
        // Those that found no room leave some.
        dry.HoldUnpacked(dry.UnpackedHeld);
    }

    // Weights that are unpacked once for a layer's second forward and its gradients, where that
    // fits too. Without a limit a plan says the least.
    private static Need? KeepUnpacked(
        DryRun dry, IReadOnlyList<PlannedBatches.Planned> batches, long? allowed)
    {
        if (allowed is null || dry.Recomputation.Amount == 0) return null;
        dry.KeepsUnpacked = true;
        dry.Train(batches.First(b => b.Trains).Batches);
        Need[] needs = dry.UnpackedBytes > 0 ? All(dry, batches) : [];
        if (needs.Length > 0 && Fits(dry, needs, allowed)) return needs[0];
        dry.KeepsUnpacked = false;
        return null;
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
        Add(a.StreamWeights is not null and not StreamedWeights.True, "stream_weights=true");
        Add(a.OffloadOptimizer == false, "offload_optimizer=true");
        Add(a.OffloadParam == false, "offload_param=true");
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
        $"GPU memory: {RunPlaces.Gib(Parts.Total)} (weights {RunPlaces.Gib(Parts.Weights)}, "
        + "trained "
        + $"{RunPlaces.Gib(Parts.Trained)}, gradients {RunPlaces.Gib(Parts.Gradients)}, moments "
        + $"{RunPlaces.Gib(Parts.Moments)}, activations {RunPlaces.Gib(Parts.Activations)}, "
        + $"workspace {RunPlaces.Gib(Parts.Workspace)}), the most in {Rows}; {Recomputation}"
        + UnpackedOnce
        + (InHost is { } line ? $"; {line}" : "");

    /// <summary>What there is to say of <see cref="Unpacked"/> and <see cref="Held"/>.</summary>
    public string UnpackedOnce =>
        (Unpacked == 0 ? ""
            : $", its weights unpacked once for that and its gradients ({RunPlaces.Gib(Unpacked)})")
        + (Held == 0 ? "" : $"; {RunPlaces.Gib(Held)} of weights stay unpacked");

    /// <summary>What lies in the machine's memory, in words; null where nothing does.</summary>
    public string? InHost
    {
        get
        {
            if (Streamed + Kept == 0) return null;
            var parts = new List<string>();
            if (Streamed > 0)
                parts.Add($"{RunPlaces.Gib(Streamed)} of frozen layers, which pass through two "
                    + "buffers once for " + (Together == 1 ? "each micro-batch"
                        : $"{Together} micro-batches together") + " (stream_weights)");
            if (Kept > 0)
                parts.Add($"{RunPlaces.Gib(Kept)} of " + (_choice.OffloadParam == true
                    ? "trained layers, gradients, moments and embeddings (offload_param"
                        + (_choice.OffloadOptimizer == true ? ", offload_optimizer)" : ")")
                    : !TunedModel.OptimizerOf(_choice).Paged
                        ? "embeddings, whose rows are read over the bus (stream_weights"
                            + (_choice.Streams ? ")" : "=embeddings)")
                    : "moments and masters (" + (_choice.OffloadOptimizer == true
                        ? "offload_optimizer)" : "optim)")
                        + (_choice.EmbeddingsInHost ? " and embeddings (stream_weights)" : "")));
            return "in the machine's memory: " + string.Join("; ", parts);
        }
    }

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
