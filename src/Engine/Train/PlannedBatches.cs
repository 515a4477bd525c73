using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// The micro-batches of a run that may need the most memory: those that no other one covers in
/// tokens, labels, views and patches at once. All batches of all epochs are looked at; only these
/// are made, without pixels.
/// </summary>
internal static class PlannedBatches
{
    private const int MostTried = 96;

    /// <summary>A batch, whether it is trained on, and its rows in words.</summary>
    public sealed record Planned(Batch Batch, bool Trains, RowSize Size, string Rows);

    public static List<Planned> Of(
        TrainArguments arguments, DataRows rows, DataRows? evaluation, StepPlan plan)
    {
        var sampler = new Sampler(arguments, rows.Count);
        long count = plan.BatchesBefore(plan.MaxSteps);
        List<Planned> found = Make(rows, trains: true, count, i =>
            sampler.Batch((int)(i / plan.MicroBatches), (int)(i % plan.MicroBatches)).ToArray());
        if (evaluation is null) return found;
        int size = arguments.PerDeviceEvalBatchSize;
        found.AddRange(Make(
            evaluation, trains: false, (evaluation.Count + (long)size - 1) / size, i =>
            [
                .. Enumerable.Range((int)(i * size), (int)Math.Min(size, evaluation.Count - (i * size))),
            ]));
        return found;
    }

    /// <summary>The micro-batch of the first epoch whose size is nearest to the mean.</summary>
    public static Batch Typical(TrainArguments arguments, DataRows rows, StepPlan plan)
    {
        var sampler = new Sampler(arguments, rows.Count);
        double mean = Enumerable.Range(0, rows.Count)
            .Average(i => (double)Weight(rows.Size(i))) * rows.Count / plan.MicroBatches;
        int[] nearest = Enumerable.Range(0, plan.MicroBatches)
            .Select(i => sampler.Batch(0, i).ToArray())
            .MinBy(batch => Math.Abs(batch.Sum(row => (double)Weight(rows.Size(row))) - mean))!;
        return Outline(rows, nearest);

        static long Weight(RowSize size) => (long)size.Tokens + size.Patches;
    }

    private static List<Planned> Make(
        DataRows rows, bool trains, long count, Func<long, int[]> order)
    {
        var largest = new List<(RowSize Size, int[] Rows)>();
        for (long i = 0; i < count; i++)
        {
            int[] batch = order(i);
            RowSize size = default;
            foreach (int row in batch) size += rows.Size(row);
            // Rows that are all left out are no batch.
            if (size == default || largest.Exists(other => other.Size.Covers(size))) continue;
            largest.RemoveAll(other => size.Covers(other.Size));
            largest.Add((size, batch));
        }

        // Far more than there are in most sets; those of the most patches and tokens go first.
        return [.. largest.OrderByDescending(l => l.Size.Tokens + l.Size.Patches).Take(MostTried)
            .Select(l => new Planned(Outline(rows, l.Rows), trains, l.Size, Names(rows, l.Rows)))];
    }

    /// <summary>Rows as messages name them.</summary>
    public static string Names(DataRows rows, ReadOnlySpan<int> batch)
    {
        var names = new List<string>();
        foreach (int row in batch)
            names.Add($"{rows[row].Number}" + (rows[row].Id is { } id ? $" (id {Messages.Quote(id)})" : ""));
        return $"{(names.Count == 1 ? "row" : "rows")} {Messages.List(names)}";
    }

    private static Batch Outline(DataRows rows, int[] numbers)
    {
        var batch = new Batch();
        batch.Clear();
        foreach (int row in numbers)
            if (!rows.IsLeftOut(row)) rows.Outline(row, batch);
        return batch;
    }
}
