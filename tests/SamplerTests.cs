using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Train;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

public sealed class SamplerTests
{
    [Test]
    public void EveryEpochIsAnotherPermutationThatSeedAndEpochDecide(
        [Values(1, 2, 7, 1023)] int rows, [Values(1, 4)] int batch)
    {
        var orders = new List<int[]>();
        var sampler = new Sampler(rows, batch, shuffle: true, seed: 3);
        foreach (int epoch in (int[])[0, 1, 2])
        {
            int[] order = Order(sampler, epoch, rows, batch);
            Assert.That(order.Order(), Is.EqualTo(Enumerable.Range(0, rows)));
            var fresh = new Sampler(rows, batch, shuffle: true, seed: 3);
            Assert.That(Order(fresh, epoch, rows, batch), Is.EqualTo(order), "resumed");
            orders.Add(order);
        }

        if (rows < 100) return;
        orders.Add(Order(new Sampler(rows, batch, shuffle: true, seed: 4), 0, rows, batch));
        for (int i = 0; i < orders.Count; i++)
        {
            // A random pair of permutations agrees in one place on average.
            for (int j = 0; j < i; j++)
                Assert.That(orders[i].Zip(orders[j]).Count(p => p.First == p.Second),
                    Is.LessThan(12));
        }
    }

    [Test]
    public void EveryPositionIsEquallyLikely()
    {
        var counts = new int[4, 4];
        const int epochs = 4000;
        var sampler = new Sampler(4, 4, shuffle: true, seed: 42);
        for (int epoch = 0; epoch < epochs; epoch++)
        {
            var order = sampler.Batch(epoch, 0);
            for (int i = 0; i < 4; i++) counts[i, order[i]]++;
        }

        // Six standard deviations of a binomial with p = 1/4.
        double limit = 6 * Math.Sqrt(epochs * 0.25 * 0.75);
        foreach (int count in counts) Assert.That(count, Is.EqualTo(epochs / 4).Within(limit));
    }

    [Test]
    public void SequentialKeepsTheFilesOrderAndAllocatesNothing()
    {
        var sampler = new Sampler(5, 2, shuffle: false, seed: 1);
        Assert.That(Order(sampler, 3, 5, 2), Is.EqualTo([0, 1, 2, 3, 4]));
        long before = GC.GetAllocatedBytesForCurrentThread();
        int sum = 0;
        for (int epoch = 0; epoch < 10; epoch++) sum += sampler.Batch(epoch, 2)[0];
        Assert.That(GC.GetAllocatedBytesForCurrentThread() - before, Is.Zero);
        Assert.That(sum, Is.EqualTo(40));
    }

    // Numbers worked out by hand from the Trainer's rule: rows / batch rounded up, then /
    // accumulation rounded up, times epochs rounded up.
    [TestCase(10, 3, 2, 3.0, -1, 4, 2, 6, 3)]
    [TestCase(10, 3, 1, 1.5, -1, 4, 4, 6, 2)]
    [TestCase(10, 3, 8, 3.0, -1, 4, 1, 3, 3)]
    [TestCase(10, 3, 2, 3.0, 5, 4, 2, 5, 3)]
    [TestCase(10, 3, 2, 3.0, 4, 4, 2, 4, 2)]
    [TestCase(1, 8, 1, 0.25, 0, 1, 1, 1, 1)]
    public void StepsAreCountedAsTheTrainerDoes(
        int rows, int batch, int accumulation, double epochs, int maxSteps,
        int microBatches, int perEpoch, int total, int begun)
    {
        var plan = new StepPlan(
            new TrainArguments
            {
                PerDeviceTrainBatchSize = batch,
                GradientAccumulationSteps = accumulation,
                NumTrainEpochs = epochs,
                MaxSteps = maxSteps,
            }, rows);
        Assert.That(
            (plan.MicroBatches, plan.StepsPerEpoch, plan.MaxSteps, plan.Epochs),
            Is.EqualTo((microBatches, perEpoch, total, begun)));
    }

    [Test]
    public void StepsOfAnEpochCoverItsMicroBatchesOnce()
    {
        var plan = new StepPlan(
            new TrainArguments { PerDeviceTrainBatchSize = 3, GradientAccumulationSteps = 3 }, 11);
        Assert.That(plan.Batches(1), Is.EqualTo(new StepBatches(0, 0, 3)));
        Assert.That(plan.Batches(2), Is.EqualTo(new StepBatches(0, 3, 1)));
        Assert.That(plan.Batches(3), Is.EqualTo(new StepBatches(1, 0, 3)));
        Assert.That(
            new[] { 0, 1, 2, 3, 4 }.Select(plan.EpochAfter), Is.EqualTo([0, 0.75, 1, 1.75, 2]));
    }

    [Test]
    public void DropLastLeavesTheRestOut()
    {
        var arguments =
            new TrainArguments { PerDeviceTrainBatchSize = 3, DataloaderDropLast = true };
        Assert.That(new StepPlan(arguments, 11).MicroBatches, Is.EqualTo(3));
        Assert.That(
            () => new StepPlan(arguments with { DataPath = "t.json" }, 2),
            Throws.TypeOf<InputException>().With.Message.StartsWith("t.json: 2 rows, too few"));
    }

    [Test]
    public void ActionsFollowStrategiesAndSharesOfTheRun()
    {
        var arguments = new TrainArguments
        {
            PerDeviceTrainBatchSize = 1,
            MaxSteps = 10,
            LoggingSteps = new Interval(4),
            LoggingFirstStep = true,
            EvalStrategy = When.Epoch,
            SaveSteps = new Interval(0.25),
        };
        var plan = new StepPlan(arguments, 5);
        var done = Enumerable.Range(1, 10).Select(plan.After).ToArray();
        int[] Steps(StepActions action) =>
            [.. Enumerable.Range(1, 10).Where(s => done[s - 1].HasFlag(action))];
        Assert.That(Steps(StepActions.Log), Is.EqualTo([1, 4, 8]));
        Assert.That(Steps(StepActions.Evaluate), Is.EqualTo([5, 10]));
        Assert.That(Steps(StepActions.Save), Is.EqualTo([3, 6, 9, 10]),
            "ceil(0.25 * 10), and the last");
        Assert.That(plan.Every, Is.EqualTo((4, 4, 3)));
    }

    private static int[] Order(Sampler sampler, int epoch, int rows, int batch)
    {
        var order = new List<int>();
        for (int i = 0; i * batch < rows; i++) order.AddRange(sampler.Batch(epoch, i));
        return [.. order];
    }
}
