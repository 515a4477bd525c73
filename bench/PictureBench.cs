using System.Diagnostics;
using MiniCpmNative.Engine.Data.Images;

namespace MiniCpmNative.Bench;

/// <summary>
/// Pictures per second from file to patches (decode, slice, resize, normalise), one thread and two,
/// each thread on its own pictures, as the data workers run; and the parts of one thread's time.
/// Usage: bench pictures FILE... [--seconds 3] [--slices 9]
/// </summary>
public static class PictureBench
{
    private static readonly float[] s_half = [0.5f, 0.5f, 0.5f];

    public static int Run(string[] args)
    {
        var files = new List<string>();
        double seconds = 3;
        int slices = 9;
        for (int i = 0; i < args.Length; i++)
        {
            if (args[i] == "--seconds") seconds = double.Parse(args[++i]);
            else if (args[i] == "--slices") slices = int.Parse(args[++i]);
            else files.Add(args[i]);
        }

        if (files.Count == 0)
        {
            Console.Error.WriteLine("bench pictures: expected picture files");
            return 2;
        }

        Measure(files, seconds, slices, 2); // warms up: code in its final form, buffers in the pool
        var (one, cpu) = Measure(files, seconds, slices, 1);
        var (two, _) = Measure(files, seconds, slices, 2);
        Console.WriteLine($"1 thread: {one:f2} pictures/s, {cpu:f2} per second of processor time; "
            + $"2 threads: {two:f2} ({two / one:f2} times)");
        Parts(files, seconds, slices);
        return 0;
    }

    // Pictures per second, and per second of processor time: the fairer one on a shared machine.
    private static (double, double) Measure(
        List<string> files, double seconds, int slices, int threads)
    {
        long start = Stopwatch.GetTimestamp();
        var cpu = Environment.CpuUsage.TotalTime;
        int[] counts = new int[threads];
        var workers = new Thread[threads];
        for (int t = 0; t < threads; t++)
        {
            int own = t;
            workers[t] = new Thread(() =>
            {
                var strips = new PatchStrips(s_half, s_half);
                float[] patches = [];
                while (Stopwatch.GetElapsedTime(start).TotalSeconds < seconds)
                {
                    foreach (string file in files)
                    {
                        using var picture = PictureDecoder.Decode(file);
                        Patches(strips, picture, slices, ref patches);
                        counts[own]++;
                    }
                }
            });
            workers[t].Start();
        }

        foreach (var worker in workers) worker.Join();
        double all = counts.Sum();
        return (all / Stopwatch.GetElapsedTime(start).TotalSeconds,
            all / (Environment.CpuUsage.TotalTime - cpu).TotalSeconds);
    }

    private static void Parts(List<string> files, double seconds, int slices)
    {
        var strips = new PatchStrips(s_half, s_half);
        float[] patches = [];
        foreach (string file in files)
        {
            long decoding = 0, cutting = 0, allocated = 0;
            int n = -1;
            for (; TimeSpan.FromTicks(decoding + cutting).TotalSeconds < seconds / files.Count; n++)
            {
                // The first time is left out.
                if (n == 0)
                    (decoding, cutting, allocated) = (0, 0, GC.GetAllocatedBytesForCurrentThread());
                long start = Stopwatch.GetTimestamp();
                using var picture = PictureDecoder.Decode(file);
                decoding += Stopwatch.GetElapsedTime(start).Ticks;
                start = Stopwatch.GetTimestamp();
                Patches(strips, picture, slices, ref patches);
                cutting += Stopwatch.GetElapsedTime(start).Ticks;
            }

            allocated = GC.GetAllocatedBytesForCurrentThread() - allocated;
            Console.WriteLine($"{Path.GetFileName(file)}: decode {Milliseconds(decoding, n):f2} ms, "
                + $"slice, resize, normalise {Milliseconds(cutting, n):f2} ms, "
                + $"{allocated / n / 1024} KiB allocated");
        }
    }

    private static double Milliseconds(long ticks, int n) => TimeSpan.FromTicks(ticks).TotalMilliseconds / n;

    private static void Patches(PatchStrips strips, Picture picture, int slices, ref float[] patches)
    {
        var plan = Slicer.Plan(picture.Size, slices);
        long length = strips.Patches(plan) * strips.PatchLength;
        if (patches.Length < length) patches = GC.AllocateUninitializedArray<float>((int)length);
        strips.Write(picture, plan, patches);
    }
}
