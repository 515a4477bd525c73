using MiniCpmNative.Kernels.Cpu;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

public sealed unsafe class WorkersTests
{
    [Test]
    public void EveryItemRunsOnce([Values(1, 2, 5)] int threads)
    {
        using var workers = new Workers(threads);
        int* hits = stackalloc int[300];
        for (int run = 0; run < 3000; run++)
        {
            int count = run % 300;
            new Span<int>(hits, 300).Clear();
            workers.For(count, new Count { Hits = hits, Threads = threads });
            for (int i = 0; i < 300; i++) Assert.That(hits[i], Is.EqualTo(i < count ? 1 : 0));

            // Long enough now and then for the threads to fall asleep, or to be caught on the way.
            if (run % 100 == 0) Thread.Sleep(1);
        }
    }

    /// <summary>
    /// Items that take long, as the blocks of a product do, must not pile up on one thread: no
    /// chunk is above its share of what is left, and the last ones are single items.
    /// </summary>
    [Test]
    public void ChunksAreSharesOfWhatIsLeft(
        [Values(2, 3)] int threads, [Values(2, 10, 50, 299)] int count, [Values(1, 7)] int minChunk)
    {
        using var workers = new Workers(threads);
        int* sizes = stackalloc int[count];
        new Span<int>(sizes, count).Clear();
        workers.For(count, new Chunks { Sizes = sizes }, minChunk);
        int sum = 0;
        for (int i = 0; i < count; i++)
        {
            if (sizes[i] == 0) continue;
            int share = Math.Max(minChunk, (int)Math.Ceiling((count - i) / (2.0 * threads)));
            Assert.That(sizes[i], Is.EqualTo(Math.Min(share, count - i)), $"chunk at {i}");
            sum += sizes[i];
        }

        Assert.That(sum, Is.EqualTo(count));
    }

    [Test]
    public void NestedCallsKeepTheirWorker()
    {
        using var workers = new Workers(3);
        int* hits = stackalloc int[64];
        new Span<int>(hits, 64).Clear();
        s_workers = workers;
        workers.For(64, new Outer { Hits = hits });
        for (int i = 0; i < 64; i++) Assert.That(hits[i], Is.EqualTo(1));
        Assert.That(Workers.Current, Is.EqualTo(-1));
    }

    [Test]
    public void AFailureReachesTheCallerAndTheThreadsGoOn([Values(1, 2, 4)] int threads)
    {
        using var workers = new Workers(threads);
        int* hits = stackalloc int[40];
        for (int bad = 0; bad < 40; bad++)
        {
            int item = bad;
            var failure = Assert.Catch(() => workers.For(40, new Fail { Item = item }));
            Assert.That(failure!.Message, Is.EqualTo($"item {item}"));
            new Span<int>(hits, 40).Clear();
            workers.For(40, new Count { Hits = hits, Threads = threads });
            for (int i = 0; i < 40; i++) Assert.That(hits[i], Is.EqualTo(1));
        }
    }

    private static Workers? s_workers;

    private struct Count : IRangeBody
    {
        public int* Hits;
        public int Threads;

        public readonly void Run(int begin, int end, int worker)
        {
            if (worker < 0 || worker >= Threads)
                throw new InvalidOperationException($"worker {worker} of {Threads}");
            for (int i = begin; i < end; i++) Interlocked.Increment(ref Hits[i]);
        }
    }

    private struct Chunks : IRangeBody
    {
        public int* Sizes;

        public readonly void Run(int begin, int end, int worker) => Sizes[begin] = end - begin;
    }

    private struct Outer : IRangeBody
    {
        public int* Hits;

        public readonly void Run(int begin, int end, int worker)
        {
            for (int i = begin; i < end; i++)
                s_workers!.For(1, new Inner { Hits = Hits + i, Worker = worker });
        }
    }

    private struct Inner : IRangeBody
    {
        public int* Hits;
        public int Worker;

        public readonly void Run(int begin, int end, int worker)
        {
            if (worker != Worker || Workers.Current != Worker)
                throw new InvalidOperationException($"worker {worker} in a body of {Worker}");
            Interlocked.Add(ref Hits[0], end - begin);
        }
    }

    private struct Fail : IRangeBody
    {
        public int Item;

        public readonly void Run(int begin, int end, int worker)
        {
            for (int i = begin; i < end; i++)
                if (i == Item) throw new InvalidOperationException($"item {i}");
        }
    }
}
