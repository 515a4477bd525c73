using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Engine.Train;

/// <summary>What `cpmx plan` was asked for.</summary>
/// <param name="Gpu">A card's name, or its memory.</param>
/// <param name="Tflops">What its products reach, where that was measured.</param>
/// <param name="GigabytesPerSecond">What it copies, where that was measured.</param>
/// <param name="Bus">What comes over from page-locked memory, 10^9 bytes a second, where that was
/// measured.</param>
public sealed record PlanRequest(
    string Gpu = "H100", double? Tflops = null, double? GigabytesPerSecond = null,
    double? Bus = null);

/// <summary>
/// `cpmx plan`: what a training will take of a GPU, and how long at least, on a machine that need
/// not have one. Memory is counted by the run's own code; times follow from counted bytes and
/// FLOPs.
/// </summary>
public static class PlanRun
{
    // What PCI Express x16 brings over from page-locked memory, 10^9 bytes a second.
    private const double Gen5 = 55.7, Gen4 = 25;

    // Of a card's memory, what its driver and libraries take.
    private const long Libraries = 600L << 20;

    // Of the gibibytes that a card is named after, what its driver shows.
    private const double Shown = 0.985 * (1 << 30);

    // Micro-batches of a step whose work is added up; more of them take as long each.
    private const int MostTimed = 16;

    private sealed record Card(
        CardFigures Figures, double Tflops, double Gigabytes, string Source, double Bus)
    {
        public double NamedAfter => Math.Round(Figures.Memory / Shown);
    }

    // BF16 products summed in float, without sparsity, and bytes copied, 10^9 each.
    private static readonly Card[] s_cards =
    [
        New("H100", 132, 90, 80, 785, 3020, "measured on an H100 SXM", bus: Gen5),
        New("H200", 132, 90, 141, 989, 4800, "datasheet", bus: Gen5),
        New("A100-80GB", 108, 80, 80, 312, 2039, "datasheet"),
        New("A100-40GB", 108, 80, 40, 312, 1555, "datasheet"),
        New("L40S", 142, 89, 48, 362, 864, "datasheet"),
        New("A6000", 84, 86, 48, 155, 768, "datasheet"),
        New("RTX-4090", 128, 89, 24, 165, 1008, "datasheet"),
        New("RTX-3090", 82, 86, 24, 71, 936, "datasheet"),
        New("RTX-4080", 76, 89, 16, 97, 717, "datasheet"),
        New("RTX-3060", 28, 86, 12, 51, 360, "datasheet"),
    ];

    /// <summary>Writes the plan; false when the run does not fit the card.</summary>
    /// <exception cref="InputException">What the user gave cannot be used.</exception>
    public static bool Run(TrainArguments arguments, PlanRequest request, TextWriter output)
    {
        Card card = Find(request);
        PlannedModel model = Model(arguments, output, out ModelSpec spec);
        RowFormat format = spec.Rows();
        var rows = DataRows.Open(
            arguments.TrainingData, arguments, format, output.WriteLine);
        DataRows? evaluation = arguments.Evaluates ? DataRows.Open(
            arguments.EvaluationData!, arguments, format, output.WriteLine, rows) : null;
        var plan = new StepPlan(arguments, rows.Count);
        long memory = card.Figures.Memory;
        long allowed = Math.Min(
            memory - Libraries, arguments.MemoryLimit?.Bytes(memory) ?? long.MaxValue);
        using MemoryPlan.Candidate run = MemoryPlan.Choose(
            arguments, model, card.Figures, rows, evaluation, plan, allowed);
        (arguments, DryRun dry, IReadOnlyList<PlannedBatches.Planned> batches) = run;
        long trained = model.Parts.Tensors.Sum(t => t.Shape.Count);
        output.WriteLine($"{spec.Family}: {Messages.Number(spec.Parameters.Count)} parameters, "
            + $"{Messages.Number(trained)} trained; {Messages.Number(rows.Count)} rows, "
            + $"{Messages.Number(plan.MaxSteps)} steps; {batches.Count} micro-batches tried of all");
        bool fits = Take(arguments, dry, batches, allowed, card, output);
        Times(arguments, dry, rows, plan, card, output);
        Others(arguments, dry, model, batches, card, output);
        return fits;
    }

    private static bool Take(
        TrainArguments arguments, DryRun dry, IReadOnlyList<PlannedBatches.Planned> batches,
        long allowed,
        Card card, TextWriter output)
    {
        MemoryPlan plan;
        bool fits = true;
        try
        {
            plan = MemoryPlan.Make(arguments, dry, batches, allowed);
        }
        catch (RunException)
        {
            // The least that it can be.
            fits = false;
            plan = MemoryPlan.Make(
                arguments with { Recompute = Recompute.Block }, dry, batches, allowed: null);
        }

        MemoryParts parts = plan.Parts;
        foreach (var (name, bytes) in ((string, long)[])[
            ("weights", parts.Weights), ("trained values", parts.Trained),
            ("gradients", parts.Gradients), ("moments", parts.Moments),
            ("activations", parts.Activations), ("workspace", parts.Workspace),
            ("all", parts.Total)])
            output.WriteLine(FormattableString.Invariant(
                $"  {name,-16}{bytes / (double)(1 << 30),8:f2} GiB"));
        RowSize size = plan.Size;
        output.WriteLine(
            $"the most in {plan.Rows}: {Messages.Number(size.Tokens)} tokens, "
            + $"{Messages.Number(size.Labels)} supervised, {size.Views} views of "
            + $"{Messages.Number(size.Patches)} patches, "
            + $"{(plan.Trains ? "in training" : "in evaluation")}, at {plan.Fullest}");
        output.WriteLine($"{plan.Recomputation}{plan.UnpackedOnce}");
        if (plan.InHost is { } line) output.WriteLine(line);
        string room = $"{card.Figures.Name}, of whose {RunPlaces.Gib(card.Figures.Memory)} the run "
            + $"may take {RunPlaces.Gib(allowed)}";
        output.WriteLine(fits ? $"fits into {room}"
            : $"does NOT fit into {room}: {MemoryPlan.Advice(arguments)}");
        return fits;
    }

    // Of a step of micro-batches of the size nearest to the mean. Copies of blocks overlap with all
    // else, one way with the other.
    private static void Times(
        TrainArguments arguments, DryRun dry, DataRows rows, StepPlan plan, Card card,
        TextWriter output)
    {
        Batch typical = PlannedBatches.Typical(arguments, rows, plan);
        double mean = (double)plan.BatchesBefore(plan.MaxSteps) / plan.MaxSteps;
        var batches = new Batch[Math.Clamp((int)Math.Round(mean), 1, MostTimed)];
        Array.Fill(batches, typical);
        var work = new StepWork(card.Gigabytes * 1e9, card.Tflops * 1e12, card.Bus * 1e9);
        work.Begin(typical);
        // What the first step finds is not what the others do.
        dry.Train(batches);
        var (up, back) = (dry.StreamedSoFar, dry.StreamedBack);
        dry.Watch = work;
        dry.Train(batches);
        dry.Watch = null;
        double copies =
            Math.Max(dry.StreamedSoFar - up, dry.StreamedBack - back) / (card.Bus * 1e9);
        double step = Math.Max(work.Seconds, copies) * mean / batches.Length;
        var whole = TimeSpan.FromSeconds(step * plan.MaxSteps);
        output.WriteLine(FormattableString.Invariant(
            $"estimate, no less than: {step:g3} s a step, {Words(whole)} for all of them, without ")
            + "loading, evaluating and saving; at "
            + FormattableString.Invariant($"{card.Tflops:g4} TFLOP/s and {card.Gigabytes:g4} GB/s ")
            + $"({card.Source}), {work.Launches:N0} launches for {batches.Length} micro-batches, "
            + FormattableString.Invariant($"{typical.Tokens.Count * mean / step:f0} tokens/s"));
        if (copies + work.BusSeconds > 0)
            output.WriteLine(FormattableString.Invariant(
                $"of such a step the bus takes {copies + work.BusSeconds:g3} s at {card.Bus:g4} GB/s, ")
                + FormattableString.Invariant($"{copies:g3} s of them while the GPU computes for ")
                + FormattableString.Invariant($"{work.Seconds - work.BusSeconds:g3} s, ")
                + FormattableString.Invariant(
                    $"{work.BusSeconds:g3} s for the optimizer and lookups"));
    }

    // What less memory would take, by what is computed again.
    private static void Others(
        TrainArguments arguments, DryRun dry, PlannedModel model,
        IReadOnlyList<PlannedBatches.Planned> batches, Card card, TextWriter output)
    {
        output.WriteLine("with other settings:");
        foreach (Recompute kind in arguments.Streams ? [] : (Recompute[])[
            Recompute.Nothing, Recompute.Norms, Recompute.Mlp, Recompute.Block])
        {
            dry.Recomputation.Amount = dry.Recomputation.Of(kind);
            Line($"recompute={TrainKeys.SnakeCase(kind.ToString())}", MemoryPlan.Make(
                arguments with { Recompute = kind, GradientCheckpointing = false }, dry, batches,
                null));
        }

        foreach (var (name, other) in ((string, TrainArguments)[])[
            ("stream_weights=embeddings",
                arguments with { StreamWeights = StreamedWeights.Embeddings }),
            ("stream_weights=true", arguments with { StreamWeights = StreamedWeights.True }),
            ("offload_optimizer=true", arguments with { OffloadOptimizer = true }),
            ("offload_optimizer=true offload_param=true",
                arguments with { OffloadOptimizer = true, OffloadParam = true })])
        {
            TrainArguments open = other.Streams
                ? other with { Recompute = Recompute.Auto } : other;
            if (arguments == other || (arguments.Streams && !other.Streams)) continue;
            using var less = new DryRun(open, model, card.Figures);
            Line(name, MemoryPlan.Make(open, less, batches, null));
        }

        foreach (var (kind, name) in ((OptimizerKind, string)[])[
            (OptimizerKind.Adamw8bit, "adamw_8bit"),
            (OptimizerKind.PagedAdamw8bit, "paged_adamw_8bit")])
        {
            TrainArguments other = arguments with
            {
                Optim = kind,
                Recompute = Recompute.Block,
                GradientCheckpointing = false,
            };
            if (TunedModel.OptimizerOf(arguments) == TunedModel.OptimizerOf(other)) continue;
            using var less = new DryRun(other, model, card.Figures);
            Line($"recompute=block optim={name}", MemoryPlan.Make(other, less, batches, null));
        }

        void Line(string setting, MemoryPlan plan)
        {
            long all = plan.Parts.Total + Libraries;
            Card? least = s_cards.OrderBy(c => c.Figures.Memory)
                .FirstOrDefault(c => c.Figures.Memory >= all);
            output.WriteLine(FormattableString.Invariant(
                $"  {setting,-42}{plan.Parts.Total / (double)(1 << 30),8:f2} GiB: ")
                + (least is null ? "more than any card has" : FormattableString.Invariant(
                    $"a card of {least.NamedAfter:f0} GB")));
        }
    }

    // A folder without weights has those that the family's models are released with.
    private static PlannedModel Model(
        TrainArguments arguments, TextWriter output, out ModelSpec spec)
    {
        string folder = arguments.ModelNameOrPath!;
        if (Checkpoint.IsThere(folder))
        {
            using BaseModel source = BaseModel.Open(arguments, output.WriteLine);
            spec = source.Spec;
            return source.Planned;
        }

        spec = ModelSpec.Read(folder).Hearing(arguments.InitAudio)
            .Replicated(arguments.LoraLayerReplication, null);
        DType storage = TunedModel.StorageOf(arguments);
        TunedParts parts = TunedParts.Choose(
            spec, arguments, TunedParts.AdapterOf(arguments, spec), storage);
        output.WriteLine($"{folder} has no weights: taken as bfloat16");
        return new(spec, parts, _ => ModelWeights.StoredAs(DType.BF16, storage),
            new QuantisedKind(spec.Parameters, storage, Quantisation.Of(arguments), null));
    }

    private static Card Find(PlanRequest request)
    {
        string wanted = request.Gpu;
        Card? found = Array.Find(s_cards, c => Same(c.Figures.Name, wanted));
        if (found is null && MemoryLimit.Parse(wanted) is { Value: > 1 } size)
        {
            // "24GB" is what cards are named after, other units are bytes. The other figures are
            // those of the smallest card that has as much.
            long memory = (long)(wanted.EndsWith("GB", StringComparison.OrdinalIgnoreCase)
                ? size.Value / 1e9 * Shown : size.Value);
            Card like = s_cards.OrderBy(c => c.Figures.Memory)
                .FirstOrDefault(c => c.Figures.Memory >= memory) ?? s_cards[1];
            found = like with
            {
                Figures = like.Figures with
                {
                    Name = $"a card of {wanted} like the {like.Figures.Name}",
                    Memory = memory,
                },
            };
        }

        if (found is null)
            throw new InputException($"--gpu is {Messages.Quote(wanted)}, expected its memory such "
                + $"as 24GB, or one of {string.Join(", ", s_cards.Select(c => c.Figures.Name))}");
        if (request.Bus is { } bus) found = found with { Bus = bus };
        if (request.Tflops is null && request.GigabytesPerSecond is null) return found;
        return found with
        {
            Tflops = request.Tflops ?? found.Tflops,
            Gigabytes = request.GigabytesPerSecond ?? found.Gigabytes,
            Source = "as given",
        };

        static bool Same(string a, string b) => string.Equals(
            a.Replace("-", ""), b.Replace("-", "").Replace(" ", ""),
            StringComparison.OrdinalIgnoreCase);
    }

    private static Card New(string name, int multiprocessors, int architecture, long gigabytes,
        double tflops, double bandwidth, string source, double bus = Gen4) => new(
        new(name, multiprocessors, architecture, (long)(gigabytes * Shown)), tflops, bandwidth,
        source, bus);

    private static string Words(TimeSpan time) => time.TotalHours >= 1
        ? FormattableString.Invariant($"{(int)time.TotalHours} h {time.Minutes} min")
        : time.TotalMinutes >= 1 ? $"{time.Minutes} min {time.Seconds} s"
        : FormattableString.Invariant($"{time.TotalSeconds:g3} s");
}
