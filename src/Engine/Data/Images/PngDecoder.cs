using System.Buffers;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// PNG to RGB as Pillow's Image.open(..).convert("RGB"): alpha and transparency are dropped, 16-bit
/// samples keep their high byte, except that 16-bit grey is clipped at 255; gamma and profiles are
/// not applied. Filters of 8-bit RGB are undone on the way into the picture, those of other rows on
/// the way into a line, which is then widened. Rows that a complete stream does not have stay at
/// sample value 0, as in Pillow.
/// </summary>
internal sealed class PngDecoder
{
    // Deflate's best case: 258 bytes from 2 bits. A header that claims more than that lies.
    private const long DeflateRatio = 1032, DeflateSlack = 1 << 16;

    private const int LongestRow = 1 << 28;

    private readonly PngHeader _header;
    private readonly PngPixels _pixels;
    private readonly PngRows _rows;

    private PngDecoder(PngHeader header, PngPixels pixels, PngRows rows) =>
        (_header, _pixels, _rows) = (header, pixels, rows);

    /// <summary>streamed inflates with ZLibStream even where libdeflate is there; the outcome is
    /// the same.</summary>
    /// <exception cref="InputException">Damaged in a way that Pillow refuses, or not enough
    /// data.</exception>
    public static Picture Decode(ByteSource source, byte[] file, PngHeader header, bool streamed,
        bool overWhite = false)
    {
        long raw = FilteredBytes(header);
        if (RowBytes(header, header.Width) > LongestRow)
            throw source.Error(
                $"PNG of {header.Width}x{header.Height} pixels has rows too long to decode");
        long stored = PngDataStream.Available(header, source.Length);
        if (raw > (stored * DeflateRatio) + DeflateSlack)
            throw source.Error(
                $"damaged PNG: {header.Width}x{header.Height} pixels need {raw} bytes, "
                + $"which {stored} compressed bytes cannot hold");
        using var pixels = new PngPixels(source, file, header, stored, raw, streamed);
        var decoder = new PngDecoder(header, pixels, new PngRows(header, source, overWhite));
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

    /// <summary>Bytes of all rows of all passes, each with its filter byte.</summary>
    internal static long FilteredBytes(PngHeader header)
    {
        long sum = 0;
        foreach (var pass in PngPass.All(header))
            sum += pass.Rows * (1 + RowBytes(header, pass.Columns));
        return sum;
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
            if (!any) throw _pixels.Truncated();
            if (!cleared) _rows.Clear(picture, done);
            break;
        }

        _header.ReadTail(_pixels.End());
    }

    // Rows of one pass; fewer when the stream ends, completely, after a whole row.
    private int ReadPass(Picture picture, PngPass pass)
    {
        int length = (int)RowBytes(_header, pass.Columns), stride = 1 + length;
        int batch = Math.Min(pass.Rows, PngPixels.Batch(stride));
        bool direct = _header is { Colour: 2, Depth: 8 } && !pass.Interlaced
            && !_rows.HasKey;

        // Two lines, this row's and the one above; at first the latter is zero.
        int line = length + Picture.Slack;
        byte[] lines = ArrayPool<byte>.Shared.Rent(2 * line);
        try
        {
            lines.AsSpan(line, line).Clear();
            ReadOnlySpan<byte> above = lines.AsSpan(line, line);
            int bytesPerPixel = Math.Max(1, _header.BitsPerPixel / 8);
            for (int y = 0; y < pass.Rows;)
            {
                int wanted = Math.Min(batch, pass.Rows - y);
                var filtered = _pixels.Read(stride, wanted);
                int rows = filtered.Length / stride;
                for (int r = 0; r < rows; r++, y++)
                {
                    var from = filtered.Slice(r * stride, stride);
                    var row = direct ? picture.Row(y) : lines.AsSpan((y & 1) * line, length);
                    if (!PngFilters.Undo(from, above, row, bytesPerPixel))
                        throw _pixels.Broken($"row {y} has filter {from[0]}, expected 0 to 4");
                    if (!direct) _rows.Write(row, picture, pass, y);
                    above = row;
                }

                if (rows < wanted) return y;
            }

            return pass.Rows;
        }
        finally
        {
            ArrayPool<byte>.Shared.Return(lines);
        }
    }
}
