using System.Runtime.ExceptionServices;

namespace MiniCpmNative.Engine.Data;

/// <summary>Makes one row's tokens and pixels; called by several threads at once.</summary>
public interface IRowLoader
{
    /// <summary>Appends the row to the batch.</summary>
    void Append(int row, Batch batch);
}

/// <summary>
/// Micro-batches in a fixed order, decoded, sliced and tokenised ahead of their use by worker
/// threads. A ring of batches: worker threads fill the next ones in turn, the training thread takes
/// them strictly in order and gives them back, so any number of workers yields the same sequence.
/// What a worker throws is thrown again when its batch is taken:
/// no row is ever skipped or replaced here.
/// </summary>
public sealed class BatchLoader : IDisposable
{
    private readonly IRowLoader _rows;
    private readonly Func<long, int[], int> _order;
    private readonly Slot[] _ring;
    private readonly Thread[] _threads;
    private readonly Lock _orderLock = new();
    private readonly SemaphoreSlim _free;
    private readonly long _count;
    private long _given;
    private long _taken;
    private volatile bool _stop;

    /// <param name="rows">Makes the rows.</param>
    /// <param name="batchSize">Rows of a micro-batch at most.</param>
    /// <param name="count">Micro-batches in all.</param>
    /// <param name="workers">Threads, at least 1.</param>
    /// <param name="ahead">Micro-batches kept ready or in use; at least the accumulation
    /// steps.</param>
    /// <param name="order">
    /// Writes the row numbers of a micro-batch, counted from 0, and returns how many; called under
    /// a lock in ascending order.
    /// </param>
    public BatchLoader(IRowLoader rows, int batchSize, long count, int workers, int ahead,
        Func<long, int[], int> order)
    {
        (_rows, _count, _order) = (rows, count, order);
        _ring = new Slot[ahead + workers];
        for (int i = 0; i < _ring.Length; i++) _ring[i] = new Slot(batchSize);
        _free = new SemaphoreSlim(_ring.Length);
        _threads = new Thread[workers];
        for (int i = 0; i < workers; i++)
        {
            _threads[i] = new Thread(Work) { IsBackground = true, Name = $"data-{i}" };
            _threads[i].Start();
        }
    }

    /// <summary>
    /// The next micro-batch, and its row numbers in the batch; waits for it. It stays filled until
    /// it is given back: batches are given back in the order they were taken.
    /// </summary>
    public Batch Take(out ReadOnlySpan<int> rows)
    {
        if (_taken >= _count) throw new InvalidOperationException("no batches are left");
        Slot slot = _ring[_taken++ % _ring.Length];
        slot.Ready.Wait();
        rows = slot.Rows.AsSpan(0, slot.RowCount);
        if (slot.Failure is { } failure) ExceptionDispatchInfo.Throw(failure);
        return slot.Batch;
    }

    /// <summary>Gives the oldest taken batches back to be filled again.</summary>
    public void Return(int count = 1) => _free.Release(count);

    public void Dispose()
    {
        _stop = true;
        _free.Release(_threads.Length);
        foreach (Thread thread in _threads) thread.Join();
        _free.Dispose();
        foreach (Slot slot in _ring) slot.Ready.Dispose();
    }

    private void Work()
    {
        while (true)
        {
            _free.Wait();
            if (_stop) return;
            Slot slot;
            lock (_orderLock)
            {
                if (_given >= _count) return;
                slot = _ring[_given % _ring.Length];
                slot.RowCount = _order(_given, slot.Rows);
                _given++;
            }

            Fill(slot);
        }
    }

    private void Fill(Slot slot)
    {
        slot.Failure = null;
        slot.Batch.Clear();
        try
        {
            for (int i = 0; i < slot.RowCount && !_stop; i++)
                _rows.Append(slot.Rows[i], slot.Batch);
        }
        catch (Exception failure)
        {
            slot.Failure = failure;
        }

        slot.Ready.Release();
    }

    private sealed class Slot(int batchSize)
    {
        public Batch Batch { get; } = new();

        public int[] Rows { get; } = new int[batchSize];

        public int RowCount { get; set; }

        public SemaphoreSlim Ready { get; } = new(0);

        public Exception? Failure { get; set; }
    }
}
