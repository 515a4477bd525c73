using MiniCpmNative.GpuEmulator.Memory;

namespace MiniCpmNative.GpuEmulator.Machine;

/// <summary>
/// The blocks of one launch, begun in order. A block that only waits for what others write is put
/// aside while its worker runs the next one, as on a device that holds many at a time; when every
/// block begun waits, all that fit are there, and nothing changes any more, that is a deadlock.
/// </summary>
internal sealed class GridRun(Launch launch, long step)
{
    private const int Multiprocessors = 132;

    private readonly Lock _gate = new();
    private readonly long _most = Resident(launch);
    private long _next, _begun, _changes, _idleSince = -1;
    private int _working, _idle;
    private FaultException? _fault;

    public LaunchCounters Counters { get; } = new(launch.Program.Kernel.Name);
    public FaultException? Fault => _fault;

    // Blocks a device holds at once; in a shuffled order any block may have to wait for the last.
    private static long Resident(Launch launch)
    {
        if (launch.Seed != 0) return long.MaxValue;
        int shared = launch.Program.StaticShared + launch.DynamicShared + 1024;
        return Multiprocessors * (long)Math.Max(1,
            Math.Min(2048 / Math.Max(launch.Threads, 64), (228 << 10) / shared));
    }

    /// <summary>One worker; several may run at once.</summary>
    public void Work()
    {
        var waiting = new List<Block>();
        var free = new Stack<Block>();
        lock (_gate) _working++;
        try
        {
            while (Volatile.Read(ref _fault) == null)
            {
                bool progress = Resume(waiting, free);
                if (progress) continue;
                if (TryBegin(free, out var block))
                {
                    if (block.Run()) End(block, free);
                    else waiting.Add(block);
                }
                else if (waiting.Count == 0) break;
                else WaitForOthers(waiting);
            }
        }
        catch (FaultException e)
        {
            Interlocked.CompareExchange(ref _fault, e, null);
        }
        catch (Exception e)
        {
            // Nothing may leave a thread of ours, nor the driver's entry points.
            var report = new Fault(Check.Internal, e.ToString(), launch.Program.Kernel.Name);
            Interlocked.CompareExchange(ref _fault, new(report), null);
        }
        lock (_gate) _working--;
        foreach (var block in waiting.Concat(free)) Drop(block);
    }

    // Lets the blocks that were put aside look again, the oldest first; true when one got on.
    private bool Resume(List<Block> waiting, Stack<Block> free)
    {
        bool progress = false;
        for (int n = 0; n < waiting.Count; n++)
        {
            long events = waiting[n].Events;
            if (waiting[n].Run())
            {
                End(waiting[n], free);
                waiting.RemoveAt(n--);
                progress = true;
            }
            else progress |= waiting[n].Events != events;
        }
        return progress;
    }

    private bool TryBegin(Stack<Block> free, out Block block)
    {
        block = null!;
        long n;
        lock (_gate)
        {
            if (_next >= launch.Blocks || _begun >= _most) return false;
            n = _next++;
            _begun++;
            _changes++;
        }
        block = free.Count > 0 ? free.Pop() : new(launch);
        block.Begin((long)((UInt128)n * (ulong)step % (ulong)launch.Blocks));
        return true;
    }

    private void End(Block block, Stack<Block> free)
    {
        free.Push(block);
        lock (_gate)
        {
            _begun--;
            _changes++;
        }
    }

    // All blocks of this worker wait: for other workers' blocks, or for nothing. They have looked
    // in vain since the change numbered Seen; when every worker says so of the last change, it is
    // over.
    private void WaitForOthers(List<Block> waiting)
    {
        long seen = Changes();
        if (waiting.TrueForAll(b => b.Seen == seen))
        {
            lock (_gate)
            {
                if (_idleSince != seen) (_idleSince, _idle) = (seen, 0);
                _idle++;
            }
            while (Changes() == seen && Volatile.Read(ref _fault) == null)
            {
                lock (_gate)
                    if (_idleSince == seen && _idle == _working && Changes() == seen)
                        Interlocked.CompareExchange(ref _fault, waiting[0].Deadlock(), null);
                Thread.Sleep(0);
            }
        }
        foreach (var block in waiting) block.Seen = seen;
    }

    private long Changes() => Volatile.Read(ref _changes) + Interlocked.Read(ref launch.Changes[0]);

    private void Drop(Block block)
    {
        block.Count();
        lock (Counters) Counters.Add(block.Counters);
        block.Dispose();
    }
}
