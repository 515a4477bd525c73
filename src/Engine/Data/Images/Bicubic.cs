namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// Pillow's bicubic resize (9.4 to 12.0), or torchvision's of bytes, to the byte: across first,
/// into bytes, then down; a pass is left out where that side keeps its length. Rows come one after
/// the other: only the rows
/// that the next output needs are kept, in a ring that stays in the cache, and nobody has to store
/// the result. One object per worker; its buffers are reused and only grow.
/// </summary>
public sealed unsafe class Bicubic
{
    private readonly BicubicWeights _across = new(), _down = new();
    private byte[] _ring = [], _row = [];
    private nint[] _rows = [];
    private Picture? _from;
    private PictureSize _to;
    private int _ringRows, _stride, _made;

    /// <summary>Takes torchvision's weights of 16 bits in place of Pillow's of 22.</summary>
    public bool Narrow { get; init; }

    /// <summary>Takes the plain kernels in place of the vector ones; for tests.</summary>
    internal bool Plain { get; init; }

    /// <summary>A resized copy.</summary>
    public static Picture Resize(Picture from, PictureSize to, bool narrow = false)
    {
        var result = new Picture(to.Width, to.Height);
        new Bicubic { Narrow = narrow }.Resize(from, result);
        return result;
    }

    internal void Resize(Picture from, Picture to)
    {
        Start(from, to.Size);
        for (int y = 0; y < to.Height; y++) Row(y).CopyTo(to.Row(y));
        _from = null;
    }

    /// <summary>Begins a resize; Row then gives its rows, top to bottom.</summary>
    internal void Start(Picture from, PictureSize to)
    {
        (_from, _to, _made) = (from, to, 0);
        bool across = from.Width != to.Width, down = from.Height != to.Height;
        if (across) _across.Compute(from.Width, to.Width, Narrow);
        if (down) _down.Compute(from.Height, to.Height, Narrow);

        // Four rows are made at a time, so that many more than one output's taps have to fit.
        _ringRows = down ? Math.Min(_down.MaxTaps + 4, from.Height + 4) : 4;
        _stride = ((to.Width * 3) + Picture.Slack) & ~31;
        if (across) Grow(ref _ring, ((long)_ringRows * _stride) + Picture.Slack);
        if (down) Grow(ref _row, _stride + Picture.Slack);
        int pointers = down ? _down.Groups * 4 : 0;
        if (_rows.Length < pointers) _rows = new nint[pointers];
    }

    /// <summary>
    /// Row y of the result, with Picture.Slack readable bytes behind it; valid until the next call.
    /// y may not go back.
    /// </summary>
    internal ReadOnlySpan<byte> Row(int y)
    {
        var from = _from!;
        int bytes = _to.Width * 3;
        bool across = from.Width != _to.Width, down = from.Height != _to.Height;
        if (!across && !down) return from.Row(y);
        if (!down)
        {
            MakeAcross(y + 1);
            return _ring.AsSpan(y % _ringRows * _stride, bytes);
        }

        int first = _down.First[y], last = first + _down.MaxTaps - 1;
        if (across) MakeAcross(last + 1);
        fixed (byte* source = across ? _ring : from.Bytes, row = _row)
        fixed (nint* rows = _rows)
        {
            for (int t = 0; t < _down.Groups * 4; t++)
            {
                int r = Math.Min(first + t, last);
                rows[t] = (nint)(source
                    + (across ? (long)(r % _ringRows) * _stride : (long)r * bytes));
            }

            BicubicKernels.Down(_down, y, (byte**)rows, row, bytes, Plain);
        }

        return _row.AsSpan(0, bytes);
    }

    // Rows of the first pass up to a bound, four at a time; the last one fills up a group.
    private void MakeAcross(int upTo)
    {
        if (_made >= upTo) return;
        var from = _from!;
        byte** sources = stackalloc byte*[4], targets = stackalloc byte*[4];
        fixed (byte* source = from.Bytes, ring = _ring)
        {
            for (; _made < upTo; _made += 4)
            {
                for (int r = 0; r < 4; r++)
                {
                    int y = Math.Min(_made + r, from.Height - 1);
                    sources[r] = source + ((long)y * from.Stride);
                    targets[r] = ring + ((long)(y % _ringRows) * _stride);
                }

                BicubicKernels.Across(_across, sources, targets, _to.Width, Plain);
            }
        }
    }

    private static void Grow(ref byte[] buffer, long length)
    {
        if (buffer.Length < length)
            buffer = GC.AllocateUninitializedArray<byte>(checked((int)length));
    }
}
