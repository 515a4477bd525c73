using System.Runtime.ExceptionServices;

namespace MiniCpmNative.Engine.Data;

/// <summary>Makes one row's tokens and pixels; called by several threads at once.</summary>
public interface IRowLoader
{
    /// <summary>Appends the row to the batch.</summary>
    /// <exception cref="BadRowException">
    /// The row cannot be used; a part of it may be in the batch.
    /// </exception>
    void Append(int row, Batch batch);

    /// <summary>Whether batches are made without this row.</summary>
    bool IsLeftOut(int row) => false;

    /// <summary>Leaves a row out that turned out bad; false when it must not be.</summary>
    bool LeaveOut(int row, BadRow why) => false;
}

/// <summary>
/// Micro-batches in a fixed order, decoded, sliced and tokenised ahead of their use by worker
/// threads. A ring of batches: worker threads fill the next ones in turn, the training thread takes
/// them strictly in order and gives them back, so any number of workers yields the same sequence.
/// What a worker throws is thrown again when its batch is taken; a row that may be left out leaves
/// its batch smaller, or empty, and is never replaced. Workers that wait for room do idle work.
/// </summary>
public sealed class BatchLoader : IDisposable
{
    // How often a waiting thread looks for a stop, and how long the end waits for a worker that
    // hangs in a read.
    private const int LookMilliseconds = 50, EndMilliseconds = 2000;

    private readonly IRowLoader _rows;
    private readonly Func<long, int[], int> _order;
    private readonly Slot[] _ring;
    private readonly Thread[] _threads;
    private readonly Lock _orderLock = new();
    private readonly SemaphoreSlim _free;
    private readonly long _count;
    private readonly Func<bool>? _stopped;
    private Func<bool>? _idle;
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
    /// <param name="stopped">Ends the waiting for a batch when it turns true.</param>
    /// <param name="idle">A piece of other work; false when there is none left.</param>
    public BatchLoader(IRowLoader rows, int batchSize, long count, int workers, int ahead,
        Func<long, int[], int> order, Func<bool>? stopped = null, Func<bool>? idle = null)
    {
        (_rows, _count, _order, _stopped, _idle) = (rows, count, order, stopped, idle);
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
    /// <exception cref="OperationCanceledException">A stop came while waiting.</exception>
    public Batch Take(out ReadOnlySpan<int> rows)
    {
        if (_taken >= _count) throw new InvalidOperationException("no batches are left");
        Slot slot = _ring[_taken++ % _ring.Length];
        while (!slot.Ready.Wait(LookMilliseconds))
            if (_stopped?.Invoke() == true) throw new OperationCanceledException();
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
        foreach (Thread thread in _threads)
            if (!thread.Join(EndMilliseconds)) return;
        _free.Dispose();
        foreach (Slot slot in _ring) slot.Ready.Dispose();
    }

    private void Work()
    {
        while (true)
        {
            WaitForRoom();
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

    private void WaitForRoom()
    {
        while (!_free.Wait(0))
        {
            if (_idle?.Invoke() == true) continue;
            _idle = null;
            _free.Wait();
            return;
        }
    }

    private void Fill(Slot slot)
    {
        slot.Failure = null;
        try
        {
            while (!TryFill(slot)) continue;
        }
        catch (Exception failure)
        {
            slot.Failure = failure;
        }

        slot.Ready.Release();
    }

    // False when a row was left out: what there is of it in the batch must go.
    private bool TryFill(Slot slot)
    {
        slot.Batch.Clear();
        int kept = 0;
        for (int i = 0; i < slot.RowCount; i++)
            if (!_rows.IsLeftOut(slot.Rows[i])) slot.Rows[kept++] = slot.Rows[i];
        slot.RowCount = kept;
        for (int i = 0; i < slot.RowCount && !_stop; i++)
        {
            try
            {
                _rows.Append(slot.Rows[i], slot.Batch);
            }
            catch (BadRowException bad) when (_rows.LeaveOut(slot.Rows[i], bad.Row))
            {
                return false;
            }
        }

        return true;
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
