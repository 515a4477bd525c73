using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Batches made ahead by several threads: their order, their failures, their end.
/// </summary>
[TestFixture]
public sealed class BatchLoaderTests
{
    [TestCase(1, 1)]
    [TestCase(2, 1)]
    [TestCase(3, 4)]
    [TestCase(4, 2)]
    public void AnyNumberOfWorkersGivesTheSameSequence(int workers, int ahead)
    {
        const int batches = 60;
        using var loader = Loader(new FakeRows(), batches, workers, ahead);
        for (int i = 0; i < batches; i++)
        {
            Batch batch = loader.Take(out var rows);
            int[] wanted = [.. Enumerable.Range(0, (i % 3) + 1).Select(k => (10 * i) + k)];
            Assert.That(rows.ToArray(), Is.EqualTo(wanted));
            Assert.That(batch.Tokens.Span.ToArray(), Is.EqualTo(wanted));
            Assert.That(batch.SequenceStarts.Span.ToArray(), Is.EqualTo(new[] { 0 }));
            loader.Return();
        }

        Assert.That(() => loader.Take(out _), Throws.InvalidOperationException);
    }

    [Test]
    public void SeveralBatchesMayBeHeldAtOnce()
    {
        using var loader = Loader(new FakeRows(), batches: 12, workers: 2, ahead: 4);
        for (int step = 0; step < 3; step++)
        {
            Batch[] held = [.. Enumerable.Range(0, 4).Select(_ => loader.Take(out var _))];
            Assert.That(held.Select(b => b.Tokens[0]), Is.EqualTo(
                Enumerable.Range(4 * step, 4).Select(i => 10 * i)));
            loader.Return(4);
        }
    }

    [Test]
    public void AFailureIsThrownAtItsBatchAndNowhereElse()
    {
        using var loader = Loader(new FakeRows { Bad = 40 }, batches: 8, workers: 3, ahead: 2);
        for (int i = 0; i < 8; i++)
        {
            if (i == 4)
                Assert.That(() => loader.Take(out _),
                    Throws.TypeOf<InputException>().With.Message.EqualTo("row 40 is bad"));
            else
                Assert.That(loader.Take(out _).Tokens[0], Is.EqualTo(10 * i));
            loader.Return();
        }
    }

    [TestCase(1)]
    [TestCase(3)]
    public void ABadRowThatMayBeLeftOutLeavesTheOthersWhereTheyWere(int workers)
    {
        // Row 40 fails behind row 41's batch mates; batch 3 has row 30 alone, which was known.
        using var loader = Loader(
            new FakeRows { Unusable = [41, 60], Known = [30] }, batches: 8, workers, ahead: 2);
        for (int i = 0; i < 8; i++)
        {
            Batch batch = loader.Take(out var rows);
            int[] wanted = [.. Enumerable.Range(0, (i % 3) + 1).Select(k => (10 * i) + k)
                .Where(row => row is not (41 or 60 or 30))];
            Assert.That(rows.ToArray(), Is.EqualTo(wanted));
            Assert.That(batch.Tokens.Span.ToArray(), Is.EqualTo(wanted));
            loader.Return();
        }
    }

    [Test]
    public void WhoeverWaitsForRoomDoesIdleWork()
    {
        int left = 20;
        using var loader = new BatchLoader(
            new FakeRows(), 3, 100, 2, 1, (batch, rows) => 1,
            idle: () => Interlocked.Decrement(ref left) >= 0);
        Assert.That(() => Volatile.Read(ref left), Is.LessThan(0).After(20_000, 5));
        for (int i = 0; i < 100; i++)
        {
            loader.Take(out _);
            loader.Return();
        }
    }

    [Test]
    public void AStopEndsTheWaitingForARowThatHangs()
    {
        bool stopped = false;
        var rows = new FakeRows { Slow = new ManualResetEventSlim() };
        var loader = new BatchLoader(
            rows, 3, 10, 1, 1, (batch, numbers) => 1, () => Volatile.Read(ref stopped));
        var waits = Task.Run(() => loader.Take(out _));
        Assert.That(waits.Wait(100), Is.False);
        Volatile.Write(ref stopped, true);
        Assert.That(() => waits.Wait(20_000), Throws.TypeOf<AggregateException>()
            .With.InnerException.TypeOf<OperationCanceledException>()
            .Or.InnerException.TypeOf<TaskCanceledException>());
        rows.Slow.Set();
        loader.Dispose();
    }

    [Test]
    public void WorkersEndWhenTheyWaitForRoom()
    {
        var rows = new FakeRows();
        using (Loader(rows, batches: 1000, workers: 4, ahead: 1))
            Assert.That(() => rows.Made, Is.GreaterThanOrEqualTo(5).After(20_000, 5));
        int made = rows.Made;
        // A ring of ahead + workers batches was filled, and nobody works on.
        Assert.That(made, Is.LessThanOrEqualTo(5 * 3));
        Thread.Sleep(20);
        Assert.That(rows.Made, Is.EqualTo(made));
    }

    [Test]
    public void DisposingWaitsForTheRowInWorkOnly()
    {
        var rows = new FakeRows { Slow = new ManualResetEventSlim() };
        var loader = Loader(rows, batches: 1000, workers: 2, ahead: 8);
        Assert.That(() => rows.Begun, Is.EqualTo(2).After(20_000, 5));
        var end = Task.Run(loader.Dispose);
        Assert.That(end.Wait(30), Is.False, "a row is being made");
        rows.Slow.Set();
        Assert.That(end.Wait(20_000), Is.True);
        Assert.That(rows.Begun, Is.LessThanOrEqualTo(4));
    }

    // Batch i has the rows 10 i, 10 i + 1, ...: one to three of them.
    private static BatchLoader Loader(IRowLoader rows, int batches, int workers, int ahead)
    {
        long next = 0;
        return new BatchLoader(rows, 3, batches, workers, ahead, (batch, numbers) =>
        {
            Assert.That(batch, Is.EqualTo(next++), "asked for in ascending order");
            int count = (int)(batch % 3) + 1;
            for (int k = 0; k < count; k++) numbers[k] = (int)(10 * batch) + k;
            return count;
        });
    }

    /// <summary>Rows whose only token is their number, made in irregular time.</summary>
    private sealed class FakeRows : IRowLoader
    {
        private int _begun, _made;

        public int Bad { get; init; } = -1;

        public HashSet<int> Unusable { get; init; } = [];

        public HashSet<int> Known { get; init; } = [];

        public bool IsLeftOut(int row)
        {
            lock (Known) return Known.Contains(row);
        }

        public bool LeaveOut(int row, BadRow why)
        {
            lock (Known) return Known.Add(row);
        }

        public ManualResetEventSlim? Slow { get; init; }

        public int Begun => Volatile.Read(ref _begun);

        public int Made => Volatile.Read(ref _made);

        public void Append(int row, Batch batch)
        {
            Interlocked.Increment(ref _begun);
            Slow?.Wait();
            if (row * 7919 % 5 == 0) Thread.Sleep(1);
            else Thread.Yield();
            if (row == Bad) throw new InputException($"row {row} is bad");
            batch.Tokens.Add(row);
            if (Unusable.Contains(row))
                throw new BadRowException(new BadRow("f", row, null, null, "is bad"));
            Interlocked.Increment(ref _made);
        }
    }
}
