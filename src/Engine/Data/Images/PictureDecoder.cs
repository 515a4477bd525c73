using System.Buffers;
using Microsoft.Win32.SafeHandles;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// What a picture file's header says. Orientation is EXIF's, 1 (upright) to 8; Kind names the
/// format, and of a JPEG how its colours are sampled.
/// </summary>
public readonly record struct PictureInfo(
    PictureFormat Format, PictureSize Size, int Orientation, string Kind);

/// <summary>
/// Picture files to RGB, byte for byte what Pillow's Image.open(path).convert("RGB") gives: the
/// official script's input. The format is told by the content. PNG is managed code, faster with
/// the system's libdeflate; JPEG and WebP go to its libturbojpeg and libwebp, which are looked for
/// when the first such picture comes; where libturbojpeg is missing, JPEG goes to StbImageSharp,
/// with other pixels then. GIF (the first frame), BMP and TGA are managed code. Not applied, as in
/// Pillow: EXIF orientation (see Picture.Oriented), gamma, colour profiles.
/// </summary>
public static class PictureDecoder
{
    /// <summary>Pillow's limit; more pixels than this are taken for an attack.</summary>
    public const long MaxPixels = 178_956_970;

    /// <summary>Reads size and orientation from a file's header without decoding it.</summary>
    /// <exception cref="InputException">Missing, unreadable, of a format that is not read, or
    /// damaged.</exception>
    public static PictureInfo Probe(string path)
    {
        using var file = Open(path, out long length);
        return Guard(path, () => Parse(new ByteSource(file, length, path), orientation: true).Info);
    }

    /// <summary>The same of a file in memory; name stands in errors.</summary>
    /// <exception cref="InputException">Of a format that is not read, or damaged.</exception>
    public static PictureInfo Probe(byte[] file, string name) => Guard(
        name, () => Parse(new ByteSource(file, file.Length, name), orientation: true).Info);

    /// <summary>
    /// Reads and decodes a file; overWhite lays what is transparent over white, as transformers'
    /// processors do, where Pillow drops it (PNG, WebP). Waits while the pictures of other threads,
    /// which count until they are disposed of, leave too little memory
    /// (<see cref="PictureMemory"/>).
    /// </summary>
    /// <exception cref="InputException">Missing, unreadable, of a format that is not read, or
    /// damaged.</exception>
    public static Picture Decode(string path, bool overWhite = false)
    {
        using var file = Open(path, out long length);
        var source = new ByteSource(file, length, path);
        var (needed, streamed) = Guard(path, () => Needed(source));
        return Within(needed, () =>
        {
            if (streamed) return Decode(source, [], overWhite: overWhite);
            byte[] bytes = ArrayPool<byte>.Shared.Rent((int)length);
            try
            {
                int got = Guard(path, () => Fill(file, bytes.AsSpan(0, (int)length)));
                return Decode(bytes, got, path, overWhite: overWhite);
            }
            finally
            {
                ArrayPool<byte>.Shared.Return(bytes);
            }
        });
    }

    /// <summary>The same of a file in memory; name stands in errors.</summary>
    /// <exception cref="InputException">Of a format that is not read, or damaged.</exception>
    public static Picture Decode(byte[] file, string name, bool overWhite = false)
    {
        var source = new ByteSource(file, file.Length, name);
        var (needed, _) = Guard(name, () => Needed(source));
        return Within(needed, () => Decode(source, file, overWhite: overWhite));
    }

    private static Picture Within(long needed, Func<Picture> decode)
    {
        var memory = PictureMemory.Enter(needed);
        try
        {
            var picture = decode();
            memory.Shrink(picture.Bytes.Length);
            picture.Holds(memory);
            return picture;
        }
        catch
        {
            memory.Dispose();
            throw;
        }
    }

    /// <summary>Decodes the first length bytes of file; name stands in errors.</summary>
    /// <exception cref="InputException">Of a format that is not read, or damaged.</exception>
    public static Picture Decode(byte[] file, int length, string name) =>
        Decode(file, length, name, overWhite: false);

    /// <summary>
    /// Decodes; streamed leaves libdeflate out, which changes nothing but the time.
    /// </summary>
    internal static Picture Decode(byte[] file, int length, string name, bool streamed = false,
        bool overWhite = false) =>
        Decode(new ByteSource(file, length, name), file, streamed, overWhite);

    // file holds the bytes of what does not come from its source alone.
    private static Picture Decode(
        ByteSource source, byte[] file, bool streamed = false, bool overWhite = false) =>
        Guard(source.Name, () =>
        {
            var (info, header) = Parse(source, orientation: false);
            return header switch
            {
                PngHeader png => PngDecoder.Decode(source, file, png, streamed, overWhite),
                JpegHeader jpeg => JpegDecoder.Decode(source, file, jpeg),
                WebPHeader webp => WebPDecoder.Decode(source, file, webp, overWhite),
                GifHeader gif => gif.Decode(overWhite),
                BmpHeader bmp => bmp.Decode(),
                TgaHeader tga => tga.Decode(overWhite),
                _ => throw new InvalidOperationException($"{info.Format} has no decoder"),
            };
        });

    // Bytes that reading and decoding take at most at one time: the file where it is not read as
    // its pixels are wanted, for PNG its data in one piece too, and what the decoders keep for each
    // pixel.
    private static (long Bytes, bool Streamed) Needed(ByteSource source)
    {
        var (info, header) = Parse(source, orientation: false);
        long perPixel = header switch
        {
            PngHeader => 3,
            JpegHeader jpeg => JpegDecoder.BytesPerPixel(jpeg),
            WebPHeader => 3 + 4,
            _ => 3,
        };
        bool streamed = header is GifHeader or BmpHeader or TgaHeader;
        return ((perPixel * info.Size.Width * info.Size.Height)
            + (source.Length * (streamed ? 0 : header is PngHeader ? 2 : 1)), streamed);
    }

    private static (PictureInfo Info, object Header) Parse(ByteSource source, bool orientation)
    {
        var format = PictureFormats.Identify(source);
        (object header, long width, long height, int turn, string kind) = Header();

        // Both sides are below 2^32, so that the product fits into 64 bits without a sign.
        if ((ulong)width * (ulong)height > MaxPixels)
            throw source.Error(
                $"has {width}x{height} pixels, the limit is {MaxPixels}; scale it down");
        return (new(format, new((int)width, (int)height), turn, kind), header);

        (object, long, long, int, string) Header()
        {
            switch (format)
            {
                case PictureFormat.Png:
                    var png = new PngHeader(source);
                    return (png, png.Width, png.Height, orientation ? png.FindOrientation() : 1,
                        "PNG");
                case PictureFormat.Jpeg:
                    var jpeg = new JpegHeader(source);
                    return (jpeg, jpeg.Width, jpeg.Height, jpeg.Orientation, jpeg.Kind);
                case PictureFormat.Gif:
                    var gif = new GifHeader(source);
                    return (gif, gif.Width, gif.Height, 1, "GIF");
                case PictureFormat.Bmp:
                    var bmp = new BmpHeader(source);
                    return (bmp, bmp.Width, bmp.Height, 1, "BMP");
                case PictureFormat.Tga:
                    var tga = new TgaHeader(source);
                    return (tga, tga.Width, tga.Height, 1, "TGA");
                default:
                    var webp = new WebPHeader(source);
                    return (webp, webp.Width, webp.Height, webp.Orientation, "WebP");
            }
        }
    }

    private static int Fill(SafeFileHandle file, Span<byte> bytes)
    {
        int read = 0;
        for (int n; (n = RandomAccess.Read(file, bytes[read..], read)) > 0;) read += n;
        return read;
    }

    private static SafeFileHandle Open(string path, out long length)
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
                    $"{path}: file is empty, expected a {PictureFormats.Read} picture");
            if (info.Length > Array.MaxLength)
                throw new InputException(
                    $"{path}: has {info.Length} bytes, at most {Array.MaxLength} are read");
            return (File.OpenHandle(path), info.Length);
        });
        return handle;
    }

    // Whatever goes wrong is about this file: one row among many, which may be left out.
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
            throw new InputException($"{path}: cannot be read: {Messages.OneLine(e.Message)}", e);
        }
        catch (Exception e) when (e is not InputException)
        {
            throw new InputException(
                $"{path}: cannot be decoded: it is damaged, or of a kind that is not read", e);
        }
    }
}
