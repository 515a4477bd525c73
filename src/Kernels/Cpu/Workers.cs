using System.Runtime.CompilerServices;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>Work over an index range; a struct of pointers and numbers, so that running it allocates nothing.</summary>
public interface IRangeBody
{
    /// <summary>Does the items begin (included) to end (excluded); worker numbers the thread from 0.</summary>
    void Run(int begin, int end, int worker);
}

/// <summary>
/// The threads of the CPU device. A range is cut into chunks which the threads, the caller among them,
/// take in turn from a counter. Which thread runs a chunk varies from run to run, so results must not
/// depend on it: a body writes only what its items own, and sums over items happen in a fixed order
/// afterwards. Nested calls run on the calling thread. Waiting spins shortly, then sleeps.
/// </summary>
public sealed unsafe class Workers : IDisposable
{
    private readonly Thread[] _threads;
    private readonly SemaphoreSlim _wake = new(0);
    private readonly ManualResetEventSlim _done = new(false);
    private readonly Lock _turn = new();
    private delegate*<void*, int, int, int, void> _run;
    private void* _body;
    private int _count, _chunk, _next, _busy;
    private Exception? _failure;
    private volatile bool _stop;

    // Number of the worker that this thread is, plus one; 0 outside: nested calls run in place.
    [ThreadStatic]
    private static int t_inside;

    /// <param name="threads">Threads to use, the caller's among them; null takes all processors.</param>
    public Workers(int? threads = null)
    {
        Count = Math.Max(1, threads ?? Environment.ProcessorCount);
        _threads = new Thread[Count - 1];
        for (int i = 0; i < _threads.Length; i++)
        {
            int worker = i + 1;
            _threads[i] = new Thread(() => Loop(worker)) { IsBackground = true, Name = $"cpu-{worker}" };
            _threads[i].Start();
        }
    }

    /// <summary>Threads at work, the caller's among them; worker numbers are below it.</summary>
    public int Count { get; }

    /// <summary>Runs body over 0..count-1 in chunks of at least minChunk items and returns when all is done.</summary>
    public void For<TBody>(int count, TBody body, int minChunk = 1)
        where TBody : unmanaged, IRangeBody
    {
        if (count <= 0) return;
        int chunk = Math.Max(minChunk, (count + (Count * 4) - 1) / (Count * 4));
        if (Count == 1 || chunk >= count || t_inside > 0)
        {
            body.Run(0, count, Math.Max(0, t_inside - 1));
            return;
        }

        lock (_turn)
        {
            t_inside = 1;
            _run = &Invoke<TBody>;
            _body = &body;
            _count = count;
            _chunk = chunk;
            _next = 0;
            _failure = null;
            int helpers = Math.Min(_threads.Length, ((count + chunk - 1) / chunk) - 1);
            Volatile.Write(ref _busy, helpers);
            _done.Reset();
            _wake.Release(helpers);
            try
            {
                Work(0);
            }
            finally
            {
                var spin = new SpinWait();
                while (Volatile.Read(ref _busy) > 0)
                {
                    if (!spin.NextSpinWillYield) spin.SpinOnce();
                    else _done.Wait();
                }

                t_inside = 0;
            }

            if (_failure is { } failure)
                throw new InvalidOperationException(failure.Message, failure);
        }
    }

    public void Dispose()
    {
        _stop = true;
        if (_threads.Length > 0) _wake.Release(_threads.Length);
        foreach (var thread in _threads) thread.Join();
        _wake.Dispose();
        _done.Dispose();
    }

    private void Loop(int worker)
    {
        t_inside = worker + 1;
        while (true)
        {
            _wake.Wait();
            if (_stop) return;
            try
            {
                Work(worker);
            }
            catch (Exception failure)
            {
                _failure = failure;
            }

            if (Interlocked.Decrement(ref _busy) == 0) _done.Set();
        }
    }

    private void Work(int worker)
    {
        while (true)
        {
            int begin = Interlocked.Add(ref _next, _chunk) - _chunk;
            if (begin >= _count) return;
            _run(_body, begin, Math.Min(begin + _chunk, _count), worker);
        }
    }

    private static void Invoke<TBody>(void* body, int begin, int end, int worker)
        where TBody : unmanaged, IRangeBody => Unsafe.AsRef<TBody>(body).Run(begin, end, worker);
}
