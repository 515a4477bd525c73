using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Bench.Real;

/// <summary>
/// Time by kernel: an event before and behind everything that is queued, so that a profiled step is
/// slower than others by some microseconds a launch.
/// </summary>
/// <param name="device">Whose work is timed.</param>
/// <param name="pairs">Pairs of a query and a key that it sees: of an attention, its queries and
/// keys.</param>
internal sealed class StepProfile(CudaDevice device, Func<Attention, int, int, double> pairs)
    : ILaunchWatch, IDisposable
{
    private readonly List<(QueuedWork Work, CudaEvent Start, CudaEvent End)> _queued = [];
    private double _attention;
    private string _kernel = "";

    public void Operation(Op op, in OpCall call, bool backward)
    {
        // All of the operation's on one kernel: how several share it is their own affair.
        _kernel = backward ? "attention_backward" : "attention_forward";
        _attention = op is Attention attention
            ? StepWork.AttentionFlops(attention, backward)
                * pairs(attention, call.Inputs[0].Shape[0], call.Inputs[1].Shape[0])
            : 0;
    }

    public void Begin(in QueuedWork work)
    {
        QueuedWork own = work;
        if (_attention > 0 && work.Name.StartsWith(_kernel, StringComparison.Ordinal))
            (own, _attention) = (work with { Flops = _attention }, 0);
        var start = new CudaEvent(device.Context, timing: true);
        var end = new CudaEvent(device.Context, timing: true);
        _queued.Add((own, start, end));
        start.Record(device.Stream);
    }

    public void End() => _queued[^1].End.Record(device.Stream);

    /// <summary>Waits for the work, and sums it by name.</summary>
    public IReadOnlyList<KernelTime> Take()
    {
        device.Stream.Synchronise();
        var times = _queued.GroupBy(q => q.Work.Name).Select(g => new KernelTime(
            g.Key, g.Count(), g.Sum(q => 1e3 * q.End.MillisecondsSince(q.Start)),
            g.Select(q => q.Work).ToArray())).OrderByDescending(t => t.Microseconds).ToArray();
        Dispose();
        return times;
    }

    public void Dispose()
    {
        foreach ((_, CudaEvent start, CudaEvent end) in _queued)
        {
            start.Dispose();
            end.Dispose();
        }

        _queued.Clear();
    }
}

/// <summary>Launches of one name in a step.</summary>
internal sealed record KernelTime(
    string Name, int Launches, double Microseconds, IReadOnlyList<QueuedWork> Works)
{
    public double Bound(Peaks peaks) => Works.Sum(w => peaks.Bound(w.Bytes, w.Flops));

    public static void Print(
        IReadOnlyList<KernelTime> times, Peaks peaks, double stepSeconds, double leastMilliseconds)
    {
        Console.WriteLine(FormattableString.Invariant(
            $"{"kernel",-52} {"n",5} {"us each",9} {"ms",8} {"bound",8} {"%",4}"));
        double rest = 0, restBound = 0, sum = 0, bound = 0;
        int restLaunches = 0, launches = 0;
        foreach (KernelTime time in times)
        {
            double own = time.Bound(peaks);
            sum += time.Microseconds;
            bound += own;
            launches += time.Launches;
            if (time.Microseconds < 1e3 * leastMilliseconds)
            {
                rest += time.Microseconds;
                restBound += own;
                restLaunches += time.Launches;
                continue;
            }

            Line(time.Name, time.Launches, time.Microseconds, own);
        }

        if (restLaunches > 0) Line("others", restLaunches, rest, restBound);
        Line("all", launches, sum, bound);
        if (stepSeconds > 0)
            Console.WriteLine(FormattableString.Invariant(
                $"the same step without events: {1e3 * stepSeconds:f2} ms"));

        static void Line(string name, int launches, double us, double bound) =>
            Console.WriteLine(FormattableString.Invariant(
                $"{name,-52} {launches,5} {us / launches,9:f1} {us / 1e3,8:f3} {bound / 1e3,8:f3} ")
                + FormattableString.Invariant($"{100 * bound / us,4:f0}"));
    }
}
