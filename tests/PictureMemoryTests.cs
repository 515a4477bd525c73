using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data.Images;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>Pictures that many threads decode at once stay below one limit of memory.</summary>
[NonParallelizable]
public class PictureMemoryTests
{
    private long _limit;

    [SetUp]
    public void Keep() => _limit = PictureMemory.Limit;

    [TearDown]
    public void Restore() => PictureMemory.Limit = _limit;

    [Test]
    public void ThreadsWaitForEachOther()
    {
        PictureMemory.Limit = PictureMemory.Taken + 100;
        long before = PictureMemory.Taken;
        var first = PictureMemory.Enter(60);
        var waiting = Task.Factory.StartNew(
            () => PictureMemory.Enter(60), TaskCreationOptions.LongRunning);
        Assert.That(waiting.Wait(200), Is.False, "does not fit beside the first");
        first.Shrink(40);
        Assert.That(waiting.Wait(10_000), "fits now");
        Assert.That(PictureMemory.Taken - before, Is.EqualTo(100));

        // The thread that holds the first share would wait for itself.
        using (PictureMemory.Enter(1000))
            Assert.That(PictureMemory.Taken - before, Is.EqualTo(1100));
        first.Dispose();
        first.Dispose();
        waiting.Result.Dispose();
        Assert.That(PictureMemory.Taken, Is.EqualTo(before));
    }

    [Test]
    public void DecodingStaysBelowTheLimit()
    {
        string folder = Path.Combine(ImageReference.Folder, "decode");
        string[] files = [.. Directory.GetFiles(folder, "*.png"),
            .. Directory.GetFiles(folder, "*.gif"), .. Directory.GetFiles(folder, "*.bmp")];
        long before = PictureMemory.Taken;
        PictureMemory.Limit = before + 60_000; // 61 x 45 pixels are 8 kB
        long most = 0;
        int decoded = 0;
        var threads = Enumerable.Range(0, 8).Select(t => new Thread(() =>
        {
            for (int i = t; i < files.Length * 4; i += 8)
            {
                using var picture = PictureDecoder.Decode(files[i % files.Length]);
                InterlockedMax(ref most, PictureMemory.Taken);
                Interlocked.Increment(ref decoded);
            }
        })).ToList();
        threads.ForEach(t => t.Start());
        Assert.That(threads.All(t => t.Join(60_000)));
        Assert.That(decoded, Is.EqualTo(files.Length * 4));
        Assert.That(most, Is.GreaterThan(before).And.LessThanOrEqualTo(before + 60_000));
        Assert.That(PictureMemory.Taken, Is.EqualTo(before), "all is given back");
    }

    [Test]
    public void LargePicturesFollowEachOtherInOnePlace()
    {
        // Above what the shared pool takes, each larger than the one before: 75 to 108 MB.
        long before = GC.GetTotalMemory(forceFullCollection: true), most = 0;
        for (int i = 0; i < 5; i++)
        {
            using var picture = new Picture(5000 + (i * 250), 5000 + (i * 250));
            picture.Rgb.Clear();
            most = Math.Max(most, GC.GetTotalMemory(forceFullCollection: false) - before);
        }

        // Nothing new where an earlier test has left a buffer that serves.
        Assert.That(most, Is.LessThan(125_000_000));
    }

    [Test]
    public void RefusedPicturesHoldNothing()
    {
        long before = PictureMemory.Taken;
        foreach (string path in Directory.GetFiles(Path.Combine(ImageReference.Folder, "broken")))
        {
            try
            {
                PictureDecoder.Decode(path).Dispose();
            }
            catch (InputException)
            {
            }
        }

        Assert.That(PictureMemory.Taken, Is.EqualTo(before));
    }

    private static void InterlockedMax(ref long most, long value)
    {
        for (long seen = most; value > seen; seen = most)
            if (Interlocked.CompareExchange(ref most, value, seen) == seen) return;
    }
}
