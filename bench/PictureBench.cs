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

    // The least processor time of a picture is what other programs' load disturbs least.
    private static void Parts(List<string> files, double seconds, int slices)
    {
        var strips = new PatchStrips(s_half, s_half);
        float[] patches = [];
        foreach (string file in files)
        {
            TimeSpan decoding = TimeSpan.MaxValue, cutting = decoding, all = decoding;
            long allocated = GC.GetAllocatedBytesForCurrentThread();
            long end = Stopwatch.GetTimestamp()
                + (long)(Stopwatch.Frequency * seconds / files.Count);
            int n = 0;
            for (; n == 0 || Stopwatch.GetTimestamp() < end; n++)
            {
                var begun = Environment.CpuUsage.TotalTime;
                using var picture = PictureDecoder.Decode(file);
                var decoded = Environment.CpuUsage.TotalTime;
                Patches(strips, picture, slices, ref patches);
                var cut = Environment.CpuUsage.TotalTime;
                decoding = Least(decoding, decoded - begun);
                cutting = Least(cutting, cut - decoded);
                all = Least(all, cut - begun);
            }

            allocated = GC.GetAllocatedBytesForCurrentThread() - allocated;
            Console.WriteLine($"{Path.GetFileName(file)}: least processor time "
                + $"{all.TotalMilliseconds:f2} ms: decode {decoding.TotalMilliseconds:f2} ms, "
                + "slice, resize, normalise "
                + $"{cutting.TotalMilliseconds:f2} ms; {allocated / n / 1024} KiB allocated");
        }
    }

    private static TimeSpan Least(TimeSpan a, TimeSpan b) => a < b ? a : b;

    private static void Patches(PatchStrips strips, Picture picture, int slices,
        ref float[] patches)
    {
        var plan = Slicer.Plan(picture.Size, slices);
        long length = strips.Patches(plan) * strips.PatchLength;
        if (patches.Length < length) patches = GC.AllocateUninitializedArray<float>((int)length);
        strips.Write(picture, plan, patches);
    }
}
