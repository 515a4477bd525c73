namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// A share of the memory that pictures of all threads may take while they are decoded and until
/// they are disposed of. A picture that does not fit beside the others waits for them; one that
/// alone is larger than the limit waits until it is alone. A thread that holds a picture already is
/// let in, because it might wait for itself.
/// </summary>
internal sealed class PictureMemory : IDisposable
{
    private static readonly object s_gate = new();

    [ThreadStatic]
    private static Holder? s_holder;

    private static long s_taken;

    private readonly Holder _holder;
    private long _bytes;

    private PictureMemory(Holder holder, long bytes) => (_holder, _bytes) = (holder, bytes);

    // A share that nobody gave back must not keep others out for ever.
    ~PictureMemory() => Dispose();

    /// <summary>Bytes that all threads together may hold: the largest picture of three bytes a
    /// pixel, and 100 MiB.</summary>
    internal static long Limit { get; set; } = (3 * PictureDecoder.MaxPixels) + (100 << 20);

    /// <summary>Bytes held now.</summary>
    internal static long Taken
    {
        get
        {
            lock (s_gate) return s_taken;
        }
    }

    /// <summary>Waits until there is room, and takes it.</summary>
    public static PictureMemory Enter(long bytes)
    {
        var holder = s_holder ??= new Holder();
        lock (s_gate)
        {
            while (s_taken > 0 && s_taken + bytes > Limit && holder.Shares == 0)
                Monitor.Wait(s_gate);
            s_taken += bytes;
            holder.Shares++;
            return new PictureMemory(holder, bytes);
        }
    }

    /// <summary>Gives back what is above a number of bytes.</summary>
    public void Shrink(long bytes)
    {
        lock (s_gate)
        {
            if (bytes >= _bytes) return;
            s_taken -= _bytes - bytes;
            _bytes = bytes;
            Monitor.PulseAll(s_gate);
        }
    }

    public void Dispose()
    {
        lock (s_gate)
        {
            if (_bytes < 0) return;
            s_taken -= _bytes;
            _bytes = -1;
            _holder.Shares--;
            Monitor.PulseAll(s_gate);
        }

        GC.SuppressFinalize(this);
    }

    // One for each thread; a share may be given back by another.
    private sealed class Holder
    {
        public int Shares { get; set; }
    }
}
