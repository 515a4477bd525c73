using System.Buffers;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// One picture in memory: RGB, one byte each, row-major [Height, Width, 3]. The bytes come from a
/// pool and go back with Dispose; a picture that is never disposed is merely collected. New pixels
/// are not cleared: whoever makes a picture writes all of it.
/// </summary>
public sealed class Picture : IDisposable
{
    /// <summary>Readable bytes behind the last pixel, so that vector loads need no special
    /// end.</summary>
    internal const int Slack = 64;

    // The shared pool rounds up to a power of two; large pictures have buffers of their own.
    internal const int LargestPooled = 1 << 26;

    private byte[]? _bytes;
    private PictureMemory? _memory;

    /// <exception cref="ArgumentOutOfRangeException">A side below 1, or more than 2 GiB of
    /// pixels.</exception>
    public Picture(int width, int height)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(width, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(height, 1);
        long length = 3L * width * height;
        ArgumentOutOfRangeException.ThrowIfGreaterThan(length, Array.MaxLength - Slack);
        (Width, Height) = (width, height);
        int needed = (int)length + Slack;
        _bytes = needed <= LargestPooled
            ? ArrayPool<byte>.Shared.Rent(needed)
            : LargeBuffers.Rent(needed);
    }

    public int Width { get; }

    public int Height { get; }

    public PictureSize Size => new(Width, Height);

    /// <summary>Bytes of one row.</summary>
    public int Stride => Width * 3;

    /// <summary>The pixels, [Height, Width, 3].</summary>
    public Span<byte> Rgb => Bytes.AsSpan(0, Stride * Height);

    /// <summary>The pixels and the slack behind them.</summary>
    internal byte[] Bytes => _bytes ?? throw new ObjectDisposedException(nameof(Picture));

    public Span<byte> Row(int y) => Bytes.AsSpan(y * Stride, Stride);

    /// <summary>
    /// This picture as an EXIF orientation (1 to 8) wants it shown: 2 mirrored, 3 turned by 180
    /// degrees, 4 upside down, 5 transposed, 6 turned right, 7 transposed over the other diagonal,
    /// 8 turned left. A new picture, also for 1.
    /// </summary>
    /// <exception cref="ArgumentOutOfRangeException">The orientation is not 1 to 8.</exception>
    public Picture Oriented(int orientation)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(orientation, 1);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(orientation, 8);
        bool turned = orientation >= 5;
        var result = turned ? new Picture(Height, Width) : new Picture(Width, Height);

        // Pixel (x, y) of the result is the source's pixel first + x * across + y * down.
        int right = Width - 1, bottom = (Height - 1) * Width;
        var (first, across, down) = orientation switch
        {
            1 => (0, 1, Width),
            2 => (right, -1, Width),
            3 => (bottom + right, -1, -Width),
            4 => (bottom, 1, -Width),
            5 => (0, Width, 1),
            6 => (bottom, -Width, 1),
            7 => (bottom + right, -Width, -1),
            _ => (right, Width, -1),
        };
        ReadOnlySpan<byte> from = Rgb;
        for (int y = 0; y < result.Height; y++)
        {
            var row = result.Row(y);
            int pixel = first + (y * down);
            for (int x = 0; x < row.Length; x += 3, pixel += across)
                from.Slice(pixel * 3, 3).CopyTo(row[x..]);
        }

        return result;
    }

    /// <summary>A copy of a part.</summary>
    public Picture Cut(int left, int top, PictureSize size)
    {
        var part = new Picture(size.Width, size.Height);
        for (int y = 0; y < size.Height; y++)
            Row(top + y).Slice(3 * left, part.Stride).CopyTo(part.Row(y));
        return part;
    }

    /// <summary>A share of memory that is given back when the picture is disposed of.</summary>
    internal void Holds(PictureMemory memory) => _memory = memory;

    public void Dispose()
    {
        // Before others are let in.
        if (Interlocked.Exchange(ref _bytes, null) is { } bytes)
        {
            if (bytes.Length <= LargestPooled) ArrayPool<byte>.Shared.Return(bytes);
            else LargeBuffers.Return(bytes);
        }

        _memory?.Dispose();
    }
}
