using System.Buffers;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>What a picture file's header says. Orientation is EXIF's, 1 (upright) to 8.</summary>
public readonly record struct PictureInfo(PictureFormat Format, PictureSize Size, int Orientation);

/// <summary>
/// Picture files to RGB, byte for byte what Pillow's Image.open(path).convert("RGB") gives: the
/// official script's input. The format is told by the content. PNG is managed code, faster with
/// the system's libdeflate; JPEG and WebP go to its libturbojpeg and libwebp. These are looked for
/// when the first such picture comes. Not applied, as in Pillow: EXIF orientation (see
/// Picture.Oriented), gamma, colour profiles.
/// </summary>
public static class PictureDecoder
{
    /// <summary>Pillow's limit; more pixels than this are taken for an attack.</summary>
    public const long MaxPixels = 178_956_970;

    /// <summary>Reads size and orientation from a file's header without decoding it.</summary>
    /// <exception cref="InputException">Missing, unreadable, not a JPEG, PNG or WebP, or
    /// damaged.</exception>
    public static PictureInfo Probe(string path)
    {
        using var file = Open(path, out long length);
        return Guard(path, () => Parse(new ByteSource(file, length, path), orientation: true).Info);
    }

    /// <summary>Reads and decodes a file.</summary>
    /// <exception cref="InputException">Missing, unreadable, not a JPEG, PNG or WebP, or
    /// damaged.</exception>
    public static Picture Decode(string path)
    {
        using var file = Open(path, out long length);
        byte[] bytes = ArrayPool<byte>.Shared.Rent((int)length);
        try
        {
            int got = Guard(path, () =>
            {
                int read = 0;
                for (int n; (n =
                    RandomAccess.Read(file, bytes.AsSpan(read, (int)length - read), read)) > 0;)
                    read += n;
                return read;
            });
            return Decode(bytes, got, path);
        }
        finally
        {
            ArrayPool<byte>.Shared.Return(bytes);
        }
    }

    /// <summary>Decodes the first length bytes of file; name stands in errors.</summary>
    /// <exception cref="InputException">Not a JPEG, PNG or WebP, or damaged.</exception>
    public static Picture Decode(byte[] file, int length, string name) =>
        Decode(file, length, name, streamed: false);

    /// <summary>
    /// Decodes; streamed leaves libdeflate out, which changes nothing but the time.
    /// </summary>
    internal static Picture Decode(byte[] file, int length, string name, bool streamed)
    {
        var source = new ByteSource(file, length, name);
        var (info, header) = Parse(source, orientation: false);
        return header switch
        {
            PngHeader png => PngDecoder.Decode(source, file, png, streamed),
            JpegHeader jpeg => JpegDecoder.Decode(source, file, jpeg),
            WebPHeader webp => WebPDecoder.Decode(source, file, webp),
            _ => throw new InvalidOperationException($"{info.Format} has no decoder"),
        };
    }

    private static (PictureInfo Info, object Header) Parse(ByteSource source, bool orientation)
    {
        var format = PictureFormats.Identify(source);
        object header;
        long width, height;
        int turn;
        switch (format)
        {
            case PictureFormat.Png:
                var png = new PngHeader(source);
                (header, width, height) = (png, png.Width, png.Height);
                turn = orientation ? png.FindOrientation() : 1;
                break;
            case PictureFormat.Jpeg:
                var jpeg = new JpegHeader(source);
                (header, width, height, turn) = (jpeg, jpeg.Width, jpeg.Height, jpeg.Orientation);
                break;
            default:
                var webp = new WebPHeader(source);
                (header, width, height, turn) = (webp, webp.Width, webp.Height, webp.Orientation);
                break;
        }

        // Both sides are below 2^32, so that the product fits into 64 bits without a sign.
        if ((ulong)width * (ulong)height > MaxPixels)
            throw source.Error(
                $"has {width}x{height} pixels, the limit is {MaxPixels}; scale it down");
        return (new(format, new((int)width, (int)height), turn), header);
    }

    private static Microsoft.Win32.SafeHandles.SafeFileHandle Open(string path, out long length)
    {
        (var handle, length) = Guard(path, () =>
        {
            // Pipes and devices have no length: they are empty here, and never opened.
            var info = new FileInfo(path);
            if (Directory.Exists(path))
                throw new InputException($"{path}: is a folder, expected a picture");
            if (!info.Exists) throw new InputException($"{path}: no such file");
            if (info.Length == 0)
                throw new InputException(
                    $"{path}: file is empty, expected a JPEG, PNG or WebP picture");
            if (info.Length > Array.MaxLength)
                throw new InputException(
                    $"{path}: has {info.Length} bytes, at most {Array.MaxLength} are read");
            return (File.OpenHandle(path), info.Length);
        });
        return handle;
    }

    private static T Guard<T>(string path, Func<T> read)
    {
        try
        {
            return read();
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException
            or ArgumentException
            or NotSupportedException)
        {
            throw new InputException(
                $"{path}: cannot be read: {e.Message.ReplaceLineEndings(" ")}", e);
        }
    }
}
