using System.Diagnostics;
using System.Runtime.CompilerServices;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// Work over an index range; a struct of pointers and numbers, so that running it allocates
/// nothing.
/// </summary>
public interface IRangeBody
{
    /// <summary>
    /// Does the items begin (included) to end (excluded); worker numbers the thread from 0.
    /// </summary>
    void Run(int begin, int end, int worker);
}

/// <summary>
/// The threads of the CPU device. The threads, the caller among them, take chunks of a range in
/// turn from a counter: each a share of what is left (guided self-scheduling), so that the last
/// chunks are the smallest and the threads end at about the same time. Which thread runs a chunk
/// varies from run to run, so results must not depend on it: a body writes only what its items own,
/// and sums over items happen in a fixed order afterwards. Nested calls run on the calling thread,
/// under its worker number.
///
/// A thread without work spins for a millisecond, longer than one waits within a step, and then
/// sleeps: waking it takes 50 microseconds and more, on a virtual machine now and then some
/// milliseconds, in which the others do its work. Posting to a spinning thread costs one atomic
/// exchange. A thread that has not begun when the caller runs out of chunks is told to stay away,
/// so a slow wake-up delays nobody.
/// </summary>
public sealed unsafe class Workers : IDisposable
{
    private static readonly long s_spinTicks = Stopwatch.Frequency / 1000;

    private readonly Slot[] _slots;
    private readonly ManualResetEventSlim _done = new(false);
    private readonly Lock _turn = new();
    private delegate*<void*, int, int, int, void> _run;
    private void* _body;
    private int _count, _minChunk, _next, _busy;
    private Exception? _failure;
    private volatile bool _stop;

    // One above the worker number of the body that runs on this thread; 0 outside of any.
    [ThreadStatic]
    private static int t_inside;

    /// <param name="threads">
    /// Threads to use, the caller's among them; null takes all processors.
    /// </param>
    public Workers(int? threads = null)
    {
        Count = Math.Max(1, threads ?? Environment.ProcessorCount);
        // The event makes its lock when first waited for;
        // later that would be an allocation in a step.
        _ = _done.Wait(millisecondsTimeout: 1);
        _slots = new Slot[Count - 1];
        for (int i = 0; i < _slots.Length; i++)
        {
            int worker = i + 1;
            var slot = _slots[i] = new Slot();
            slot.Thread = new Thread(() => Loop(slot, worker))
            {
                IsBackground = true,
                Name = $"cpu-{worker}",
            };
            slot.Thread.Start();
        }
    }

    private enum State
    {
        Spinning,
        Sleeping,
        Posted,
        Running,
    }

    /// <summary>Worker number of the body that runs on this thread, or -1 outside of any.</summary>
    public static int Current => t_inside - 1;

    /// <summary>Threads at work, the caller's among them; worker numbers are below it.</summary>
    public int Count { get; }

    /// <summary>
    /// Runs body over 0..count-1 in chunks of at least minChunk items and returns when all is done.
    /// </summary>
    public void For<TBody>(int count, TBody body, int minChunk = 1)
        where TBody : unmanaged, IRangeBody
    {
        if (count <= 0) return;
        if (t_inside != 0)
        {
            body.Run(0, count, Current);
            return;
        }

        lock (_turn)
        {
            t_inside = 1;
            try
            {
                if (Count == 1 || minChunk >= count) body.Run(0, count, 0);
                else Share(count, minChunk, &body, &Invoke<TBody>);
            }
            finally
            {
                t_inside = 0;
            }
        }
    }

    public void Dispose()
    {
        _stop = true;
        foreach (var slot in _slots)
        {
            Post(slot);
            slot.Thread!.Join();
            slot.Wake.Dispose();
        }

        _done.Dispose();
    }

    private static void Post(Slot slot)
    {
        var before = Interlocked.Exchange(ref slot.State, State.Posted);
        if (before == State.Sleeping) slot.Wake.Release();
    }

    private static void Invoke<TBody>(void* body, int begin, int end, int worker)
        where TBody : unmanaged, IRangeBody => Unsafe.AsRef<TBody>(body).Run(begin, end, worker);

    private void Share(
        int count, int minChunk, void* body, delegate*<void*, int, int, int, void> run)
    {
        _run = run;
        _body = body;
        _count = count;
        _minChunk = minChunk;
        _next = 0;
        _failure = null;
        int helpers = Math.Min(_slots.Length, ((count + minChunk - 1) / minChunk) - 1);
        Volatile.Write(ref _busy, helpers);
        _done.Reset();
        for (int i = 0; i < helpers; i++) Post(_slots[i]);
        try
        {
            Work(0);
        }
        finally
        {
            // Nobody may touch this frame's body after it returns, not even when Work has thrown.
            Volatile.Write(ref _next, count);
            for (int i = 0; i < helpers; i++)
            {
                if (Interlocked.CompareExchange(ref _slots[i].State, State.Spinning, State.Posted)
                    == State.Posted)
                {
                    Interlocked.Decrement(ref _busy);
                }
            }

            long end = Stopwatch.GetTimestamp() + s_spinTicks;
            while (Volatile.Read(ref _busy) > 0)
            {
                if (Stopwatch.GetTimestamp() < end) Thread.SpinWait(8);
                else _done.Wait();
            }
        }

        if (_failure is { } failure) throw new InvalidOperationException(failure.Message, failure);
    }

    private void Loop(Slot slot, int worker)
    {
        t_inside = worker + 1;
        while (!_stop)
        {
            if (!Await(slot)) continue;
            if (_stop) return;
            try
            {
                Work(worker);
            }
            catch (Exception failure)
            {
                _failure = failure;
            }

            slot.State = State.Spinning;
            if (Interlocked.Decrement(ref _busy) == 0) _done.Set();
        }
    }

    /// <summary>
    /// Waits until something is posted; false when it was taken back before this thread began.
    /// </summary>
    private static bool Await(Slot slot)
    {
        long end = Stopwatch.GetTimestamp() + s_spinTicks;
        while (slot.State != State.Posted)
        {
            Thread.SpinWait(8);
            if (Stopwatch.GetTimestamp() < end) continue;
            if (Interlocked.CompareExchange(ref slot.State, State.Sleeping, State.Spinning)
                == State.Spinning)
            {
                slot.Wake.Wait();
            }
        }

        var before = Interlocked.CompareExchange(ref slot.State, State.Running, State.Posted);
        return before == State.Posted;
    }

    private void Work(int worker)
    {
        while (true)
        {
            int begin = Volatile.Read(ref _next), left = _count - begin;
            if (left <= 0) return;
            // Half of an even share: small enough to end together, large enough to call seldom.
            int share = (left + (2 * Count) - 1) / (2 * Count);
            int end = begin + Math.Min(left, Math.Max(_minChunk, share));
            if (Interlocked.CompareExchange(ref _next, end, begin) == begin)
                _run(_body, begin, end, worker);
        }
    }

    private sealed class Slot
    {
        public readonly SemaphoreSlim Wake = new(0);
        public volatile State State;
        public Thread? Thread;
    }
}
