using System.Buffers;
using System.IO.Compression;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// PNG to RGB as Pillow's Image.open(..).convert("RGB"): alpha and transparency are dropped, 16-bit
/// samples keep their high byte, except that 16-bit grey is clipped at 255; gamma and profiles are
/// not applied. Rows are inflated in batches that stay in the cache, unfiltered there in place and
/// widened into the picture. Rows that a complete stream does not have stay at sample value 0, as
/// in Pillow.
/// </summary>
internal sealed class PngDecoder
{
    private const int BatchBytes = 1 << 16;

    // Deflate's best case: 258 bytes from 2 bits. A header that claims more than that lies.
    private const long DeflateRatio = 1032;

    private const int LongestRow = 1 << 28;

    private readonly ByteSource _source;
    private readonly PngHeader _header;
    private readonly PngDataStream _data;
    private readonly ZLibStream _inflate;
    private readonly PngRows _rows;

    private PngDecoder(ByteSource source, byte[] file, PngHeader header)
    {
        (_source, _header) = (source, header);
        _data = new PngDataStream(header, file, (int)source.Length);
        _inflate = new ZLibStream(_data, CompressionMode.Decompress);
        _rows = new PngRows(header, source);
    }

    /// <exception cref="InputException">Damaged in a way that Pillow refuses, or not enough
    /// data.</exception>
    public static Picture Decode(ByteSource source, byte[] file, PngHeader header)
    {
        long raw = 0;
        foreach (var pass in PngPass.All(header)) raw += pass.Rows * (1 + RowBytes(header, pass.Columns));
        if (RowBytes(header, header.Width) > LongestRow)
            throw source.Error($"PNG of {header.Width}x{header.Height} pixels has rows too long to decode");
        long stored = PngDataStream.Available(header, source.Length);
        if (raw > (stored * DeflateRatio) + BatchBytes)
            throw source.Error($"damaged PNG: {header.Width}x{header.Height} pixels need {raw} bytes, "
                + $"which {stored} compressed bytes cannot hold");
        var decoder = new PngDecoder(source, file, header);
        using var inflate = decoder._inflate;
        var picture = new Picture((int)header.Width, (int)header.Height);
        try
        {
            decoder.Fill(picture);
            return picture;
        }
        catch
        {
            picture.Dispose();
            throw;
        }
    }

    private static long RowBytes(PngHeader header, long columns) =>
        ((columns * header.BitsPerPixel) + 7) / 8;

    private void Fill(Picture picture)
    {
        bool cleared = false, any = false;
        foreach (var pass in PngPass.All(_header))
        {
            if (pass.Interlaced && !cleared)
            {
                _rows.Clear(picture, 0);
                cleared = true;
            }

            int done = ReadPass(picture, pass);
            any |= done > 0;
            if (done == pass.Rows) continue;
            if (!any) throw Truncated();
            if (!cleared) _rows.Clear(picture, done);
            break;
        }

        CheckEnd();
        _header.ReadTail(_data.ChunkEnd);
    }

    // Rows of one pass; fewer when the stream ends, completely, after a whole row.
    private int ReadPass(Picture picture, PngPass pass)
    {
        int stride = 1 + (int)RowBytes(_header, pass.Columns);
        int batch = Math.Min(pass.Rows, Math.Max(1, BatchBytes / stride));

        // The row before the batch stands at its start; the first one of a pass is zero. The slack
        // in front and behind is for pixel-wide loads.
        byte[] buffer = ArrayPool<byte>.Shared.Rent(Picture.Slack + ((batch + 1) * stride) + Picture.Slack);
        try
        {
            var work = buffer.AsSpan(Picture.Slack);
            work[..stride].Clear();
            int bytesPerPixel = Math.Max(1, _header.BitsPerPixel / 8);
            for (int y = 0; y < pass.Rows; y += batch)
            {
                int wanted = Math.Min(batch, pass.Rows - y);
                int rows = Inflate(work.Slice(stride, wanted * stride)) / stride;
                for (int r = 1; r <= rows; r++)
                {
                    var row = work.Slice(r * stride, stride);
                    if (!PngFilters.Undo(row, work.Slice((r - 1) * stride, stride), bytesPerPixel))
                        throw Broken($"row {y + r - 1} has filter {row[0]}, expected 0 to 4");
                    _rows.Write(row[1..], picture, pass, y + r - 1);
                }

                if (rows < wanted) return y + rows;
                work.Slice(rows * stride, stride).CopyTo(work);
            }

            return pass.Rows;
        }
        finally
        {
            ArrayPool<byte>.Shared.Return(buffer);
        }

        int Inflate(Span<byte> into)
        {
            int got = 0;
            try
            {
                for (int n; got < into.Length && (n = _inflate.Read(into[got..])) > 0;) got += n;
            }
            catch (InvalidDataException e) when (!_data.Exhausted)
            {
                throw Broken("compressed data is damaged", e);
            }
            catch (InvalidDataException)
            {
                throw Truncated();
            }

            if (got < into.Length && (_data.Exhausted || got % stride != 0)) throw Truncated();
            return got;
        }
    }

    // Surplus rows are passed over; a wrong checksum of the data is an error, a missing one is not.
    private void CheckEnd()
    {
        try
        {
            _inflate.ReadByte();
        }
        catch (InvalidDataException) when (_data.Exhausted)
        {
        }
        catch (InvalidDataException e)
        {
            throw Broken("compressed data is damaged", e);
        }
    }

    private InputException Truncated() => Broken("its pixels are cut off");

    private InputException Broken(string what, Exception? inner = null) =>
        _source.Error($"damaged PNG: {what}", inner);
}
