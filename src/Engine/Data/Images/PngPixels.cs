using System.Buffers;
using System.IO.Compression;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// The filtered rows of a PNG, inflated. Where libdeflate is there and inflates the whole data to
/// exactly the length that the header says, all rows are at hand at once. In every other case, so
/// also for damaged data and very large pictures, ZLibStream gives batches that stay in the cache
/// and decides what is an error.
/// </summary>
internal sealed class PngPixels : IDisposable
{
    private const int BatchBytes = 1 << 16;

    private readonly ByteSource _source;
    private readonly PngDataStream _data;
    private readonly ZLibStream? _inflate;
    private byte[] _buffer = [];
    private int _at;

    /// <summary>
    /// stored and length are the bytes of the compressed data and of all filtered rows; streamed
    /// leaves libdeflate out.
    /// </summary>
    public PngPixels(
        ByteSource source, byte[] file, PngHeader header, long stored, long length, bool streamed)
    {
        _source = source;
        _data = new PngDataStream(header, file, (int)source.Length);
        var data = new PngDataStream(header, file, (int)source.Length);
        if (!streamed && LibDeflate.Available && length <= Picture.LargestPooled - Picture.Slack
            && InflateWhole(data, (int)stored, (int)length))
            return;
        _inflate = new ZLibStream(_data, CompressionMode.Decompress);
    }

    /// <summary>All rows were inflated at once.</summary>
    public bool Whole => _inflate == null;

    /// <summary>Rows of a length that one Read may give.</summary>
    public static int Batch(int stride) => Math.Max(1, BatchBytes / stride);

    /// <summary>
    /// The next rows, with Picture.Slack readable bytes behind them, valid until the next call;
    /// fewer when the stream ends, completely, after a whole row.
    /// </summary>
    /// <exception cref="InputException">The data is damaged or cut off.</exception>
    public ReadOnlySpan<byte> Read(int stride, int rows)
    {
        int length = rows * stride;
        if (Whole)
        {
            _at += length;
            return _buffer.AsSpan(_at - length, length);
        }

        if (_buffer.Length < length + Picture.Slack)
        {
            ArrayPool<byte>.Shared.Return(_buffer);
            _buffer = ArrayPool<byte>.Shared.Rent(length + Picture.Slack);
        }

        int got = 0;
        try
        {
            for (int n; got < length && (n = _inflate!.Read(_buffer, got, length - got)) > 0;)
                got += n;
        }
        catch (Exception e) when (Damaged(e) && !_data.Exhausted)
        {
            throw Broken("compressed data is damaged", e);
        }
        catch (Exception e) when (Damaged(e))
        {
            throw Truncated();
        }

        if (got < length && (_data.Exhausted || got % stride != 0)) throw Truncated();
        return _buffer.AsSpan(0, got);
    }

    /// <summary>
    /// Where the chunk ends that the last pixel or the checksum was in. Surplus rows are passed
    /// over; a wrong checksum of the data is an error, a missing one is not.
    /// </summary>
    /// <exception cref="InputException">The checksum is wrong.</exception>
    public long End()
    {
        try
        {
            _inflate?.ReadByte();
        }
        catch (Exception e) when (Damaged(e) && _data.Exhausted)
        {
        }
        catch (Exception e) when (Damaged(e))
        {
            throw Broken("compressed data is damaged", e);
        }

        return _data.ChunkEnd;
    }

    public InputException Truncated() => Broken("its pixels are cut off");

    public InputException Broken(string what, Exception? inner = null) =>
        _source.Error($"damaged PNG: {what}", inner);

    public void Dispose()
    {
        _inflate?.Dispose();
        ArrayPool<byte>.Shared.Return(_buffer);
        _buffer = [];
    }

    // A stream that asks for a dictionary is an IOException to ZLibStream.
    private static bool Damaged(Exception e) => e is InvalidDataException or IOException;

    // libdeflate wants the chunks' data in one piece.
    private bool InflateWhole(PngDataStream data, int stored, int length)
    {
        byte[] packed = ArrayPool<byte>.Shared.Rent(stored);
        _buffer = ArrayPool<byte>.Shared.Rent(length + Picture.Slack);
        int got = data.ReadAtLeast(packed.AsSpan(0, stored), stored, throwOnEndOfStream: false);
        int took = LibDeflate.Inflate(packed.AsSpan(0, got), _buffer.AsSpan(0, length));
        ArrayPool<byte>.Shared.Return(packed);
        for (int left = took; left > 0;) left -= _data.Next(left).Length;
        return took >= 0;
    }
}
