using System.Buffers.Binary;
using MiniCpmNative.Engine.Data.Images;

namespace MiniCpmNative.Engine.Report;

/// <summary>
/// A picture small enough to stand in a page: at most so many pixels a side, as a BMP file, which
/// every browser shows and which needs no encoder.
/// </summary>
internal static class Thumbnail
{
    private const int Side = 160, HeaderBytes = 54;

    /// <summary>A data: address, or null where the picture cannot be read.</summary>
    public static string? Read(string path)
    {
        try
        {
            using Picture picture = PictureDecoder.Decode(path);
            return "data:image/bmp;base64," + Convert.ToBase64String(Bitmap(picture));
        }
        catch (Exception failure) when (failure is InputException or IOException
            or InvalidDataException or UnauthorizedAccessException)
        {
            return null;
        }
    }

    private static byte[] Bitmap(Picture picture)
    {
        double scale = Math.Min(1, (double)Side / Math.Max(picture.Width, picture.Height));
        int width = Math.Max(1, (int)(picture.Width * scale)),
            height = Math.Max(1, (int)(picture.Height * scale)), stride = ((width * 3) + 3) & ~3;
        var file = new byte[HeaderBytes + (stride * height)];
        Span<byte> header = file;
        "BM"u8.CopyTo(header);
        BinaryPrimitives.WriteInt32LittleEndian(header[2..], file.Length);
        BinaryPrimitives.WriteInt32LittleEndian(header[10..], HeaderBytes);
        BinaryPrimitives.WriteInt32LittleEndian(header[14..], 40);
        BinaryPrimitives.WriteInt32LittleEndian(header[18..], width);
        BinaryPrimitives.WriteInt32LittleEndian(header[22..], height);
        header[26] = 1;
        header[28] = 24;
        var resize = new Bicubic();
        resize.Start(picture, new PictureSize(width, height));
        for (int y = 0; y < height; y++)
        {
            // Rows from the bottom up, blue first.
            Span<byte> to = file.AsSpan(HeaderBytes + ((height - 1 - y) * stride));
            ReadOnlySpan<byte> from = resize.Row(y);
            for (int x = 0; x < width * 3; x += 3)
                (to[x], to[x + 1], to[x + 2]) = (from[x + 2], from[x + 1], from[x]);
        }

        return file;
    }
}
