using MiniCpmNative.GpuEmulator.Memory;

namespace MiniCpmNative.GpuEmulator.Machine;

/// <summary>Runs the blocks of a launch on the host's cores.</summary>
internal static class GridRunner
{
    /// <exception cref="FaultException">A check found something; the other blocks are
    /// abandoned.</exception>
    public static LaunchCounters Run(Launch launch)
    {
        launch.Memory.BeginLaunch(launch.Blocks);
        if (launch.Options.Footprint)
            foreach (var allocation in launch.Memory.Live) allocation.TrackSectors();
        var run = new GridRun(launch, Step(launch));
        int threads = launch.Options.Threads > 0 ? launch.Options.Threads
            : Environment.ProcessorCount;
        threads = (int)Math.Min(threads, launch.Blocks);
        if (threads == 1) run.Work();
        else
        {
            var workers = new Thread[threads - 1];
            for (int t = 0; t < workers.Length; t++) (workers[t] = new(run.Work)).Start();
            run.Work();
            foreach (var worker in workers) worker.Join();
        }
        if (run.Fault != null) throw new FaultException(run.Fault.Fault);
        if (launch.Options.Footprint) CountFootprint(launch.Memory, run.Counters);
        return run.Counters;
    }

    // A step without a common factor visits every block once, in an order that looks shuffled.
    private static long Step(Launch launch)
    {
        if (launch.Seed == 0 || launch.Blocks < 3) return 1;
        long step = (long)(launch.Seed % (ulong)launch.Blocks) | 1;
        while (Divisor(step, launch.Blocks) != 1) step++;
        return step;
    }

    private static long Divisor(long a, long b) => b == 0 ? a : Divisor(b, a % b);

    private static unsafe void CountFootprint(DeviceMemory memory, LaunchCounters counters)
    {
        foreach (var allocation in memory.Live.Where(a => !a.ReadOnly))
        {
            var touched = new Span<byte>(allocation.Touched, (int)((allocation.Size / 32 + 1) * 2));
            for (int s = 0; s < touched.Length; s += 2)
            {
                counters.DramReadBytes += touched[s] * 32;
                counters.DramWriteBytes += touched[s + 1] * 32;
            }
            touched.Clear();
        }
    }
}
