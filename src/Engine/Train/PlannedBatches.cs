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
    private const int MostTried = 96, Searched = 8;

    /// <summary>Batches that are on the device together, whether they are trained on, what they
    /// bring in all, and their rows in words.</summary>
    public sealed record Planned(Batch[] Batches, bool Trains, RowSize Size, string Rows);

    public static List<Planned> Of(TrainArguments arguments, DataRows rows, DataRows? evaluation,
        StepPlan plan, int together = 1)
    {
        List<Planned> found = Make(rows, trains: true, Steps(arguments, rows, plan), together);
        if (evaluation is null) return found;
        int size = arguments.PerDeviceEvalBatchSize;
        found.AddRange(Make(evaluation, trains: false, Enumerable.Range(0, evaluation.Count)
            .Chunk(size).Select(batch => (int[][])[batch]), 1));
        return found;
    }

    // The rows of each micro-batch of each step; rows that are all left out are no batch.
    private static IEnumerable<int[][]> Steps(
        TrainArguments arguments, DataRows rows, StepPlan plan)
    {
        var sampler = new Sampler(arguments, rows.Count);
        for (int step = 1; step <= plan.MaxSteps; step++)
        {
            StepBatches its = plan.Batches(step);
            yield return [.. Enumerable.Range(its.First, its.Count)
                .Select(i => sampler.Batch(its.Epoch, i).ToArray())
                .Where(batch => SizeOf(rows, batch) != default)];
        }
    }

    private static RowSize SizeOf(DataRows rows, int[] batch)
    {
        RowSize size = default;
        foreach (int row in batch) size += rows.Size(row);
        return size;
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
        DataRows rows, bool trains, IEnumerable<int[][]> steps, int together)
    {
        // In all, and the most of one, where they are several.
        var largest = new List<(RowSize Sum, RowSize Most, int[][] Rows)>();
        foreach (int[][] group in steps.SelectMany(step => step.Chunk(together)))
        {
            RowSize sum = default, most = default;
            foreach (int[] batch in group)
            {
                RowSize size = SizeOf(rows, batch);
                (sum, most) = (sum + size, most.Max(size));
            }

            if (sum == default
                || largest.Exists(l => l.Sum.Covers(sum) && l.Most.Covers(most))) continue;
            largest.RemoveAll(l => sum.Covers(l.Sum) && most.Covers(l.Most));
            largest.Add((sum, most, group));
        }

        // Far more than there are in most sets; those of the most patches and tokens go first.
        return [.. largest.OrderByDescending(l => l.Sum.Tokens + l.Sum.Patches)
            .Take(Math.Max(Searched, MostTried / together))
            .Select(l => new Planned(Array.ConvertAll(l.Rows, batch => Outline(rows, batch)),
                trains, l.Sum, Names(rows, [.. l.Rows.SelectMany(batch => batch)])))];
    }

    /// <summary>Rows as messages name them.</summary>
    public static string Names(DataRows rows, ReadOnlySpan<int> batch)
    {
        var names = new List<string>();
        foreach (int row in batch)
            names.Add($"{rows[row].Number}"
                + (rows[row].Id is { } id ? $" (id {Messages.Quote(id)})" : ""));
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
