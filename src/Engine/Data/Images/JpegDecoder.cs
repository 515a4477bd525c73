using System.Runtime.InteropServices;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// JPEG through libturbojpeg's TurboJPEG 2 interface (also in version 3), called with its defaults:
/// accurate integer IDCT and fancy upsampling, the bytes Pillow gets. CMYK is taken as inverted,
/// with or without Adobe's marker, as Pillow takes it. Warnings about damaged data are passed over
/// as there; a file without its end marker is refused. Where the library is missing StbImageSharp
/// decodes what it can: three components or one, Huffman coded, of slightly other pixels.
/// </summary>
internal static unsafe class JpegDecoder
{
    private const int Rgb = 0, Cmyk = 11;

    // Refuses progressive files of more than 500 scans, which only attacks have.
    private const int LimitScans = 32768;

    // Huffman coding spends a bit or more on every block of 8x8 samples.
    private const long PixelsPerByte = 8 * 64;

    // Beginnings of libjpeg's warnings (jerror.h, JWRN), without that of a file's premature end.
    private static readonly string[] s_warnings =
    [
        "Corrupt JPEG data", "Unknown Adobe color transform", "Inconsistent progression sequence",
        "Warning: unknown JFIF", "Invalid SOS parameters for sequential", "Application transferred",
    ];

    private static readonly NativePictureLibrary s_library = new(
        "JPEG",
        "libturbojpeg (libjpeg-turbo 2.0 or newer)",
        "Debian or Ubuntu: apt install libturbojpeg0; Fedora: dnf install turbojpeg; "
            + "macOS: brew install jpeg-turbo",
        [
            "libturbojpeg.so.0", "libturbojpeg.so", "libturbojpeg.dylib", "turbojpeg.dll",
            "/opt/homebrew/opt/jpeg-turbo/lib/libturbojpeg.dylib",
            "/usr/local/opt/jpeg-turbo/lib/libturbojpeg.dylib", "libturbojpeg.dll",
        ]);

    /// <summary>What is to be known where the library is missing; null where it is there.</summary>
    public static string? Fallback => s_library.Found
        ? null
        : $"read by StbImageSharp, {s_library.Name} was not found: slower, and pixels differ from "
            + "Pillow's by up to 3 of 255 levels, at 4:2:2 by up to 131 in the last columns; for "
            + $"equal ones {s_library.Install}";

    /// <summary>Whether the library is there.</summary>
    public static string Describe() =>
        Fallback is { } fallback ? $"JPEG: {fallback}" : s_library.Describe();

    /// <summary>
    /// Bytes in memory at once for one pixel: RGB, the inks of four components, and all
    /// coefficients of a picture that comes in several scans.
    /// </summary>
    public static int BytesPerPixel(JpegHeader header) => !s_library.Found
        ? StbDecoder.BytesPerPixel
        : 3 + (header.Components == 4 ? 4 : 0)
            + (header.KeepsCoefficients ? 2 * header.Components : 0);

    /// <exception cref="InputException">The library is missing, or the file is damaged.</exception>
    public static Picture Decode(ByteSource source, byte[] file, JpegHeader header)
    {
        var data = file.AsSpan(0, (int)source.Length);
        var scans = new JpegScans(header, source, data);
        if (scans.End == 0) throw source.Error("damaged JPEG: its pixels are cut off");
        long pixels = (long)header.Width * header.Height;
        if (!header.Arithmetic && pixels > (source.Length * PixelsPerByte) + 65536)
            throw source.Error(
                $"damaged JPEG: {header.Width}x{header.Height} pixels do not fit into "
                + $"{source.Length} bytes");
        if (scans.Samples > JpegScans.MaxSamples)
            throw source.Error(
                $"is a JPEG picture of {header.Width}x{header.Height} pixels whose scans visit "
                + $"{scans.Samples} samples, the limit is {JpegScans.MaxSamples}; save it anew");
        if (!s_library.Found) return DecodeBuiltIn(source, file, header, scans);
        if (header.Components != 4)
        {
            var picture = new Picture(header.Width, header.Height);
            fixed (byte* into = picture.Bytes)
                return Run(source, data, header, picture, into, 3, Rgb);
        }

        var converted = new Picture(header.Width, header.Height);
        byte[] inks = new byte[pixels * 4];
        fixed (byte* into = inks) Run(source, data, header, converted, into, 4, Cmyk);
        FromInverseCmyk(inks, converted.Rgb);
        return converted;
    }

    private static Picture DecodeBuiltIn(
        ByteSource source, byte[] file, JpegHeader header, JpegScans scans)
    {
        string? beyond = header switch
        {
            { Components: 4 } => "four colour components (CMYK or YCCK)",
            { Arithmetic: true } => "arithmetic coding",
            { FrameMarker: not (>= 0xc0 and <= 0xc2) } => "lossless or hierarchical coding",
            _ => null,
        };
        if (beyond != null)
            throw source.Error($"is a JPEG picture with {beyond}, which {s_library.Needed}");
        string? irregular = header.Frames != 1 ? "has several frame headers" : scans.Irregular;
        if (irregular != null) throw source.Error($"damaged JPEG: {irregular}");
        var stream = new PictureStream(file, (int)source.Length);
        var picture = StbDecoder.Decode(source, "JPEG", stream, new(header.Width, header.Height));
        if (stream.Position == scans.End) return picture;

        // The decoder has left off in silence, and did not write all pixels.
        picture.Dispose();
        throw source.Error("damaged JPEG: its pixels cannot be decoded to the end");
    }

    private static Picture Run(
        ByteSource source, ReadOnlySpan<byte> data, JpegHeader header, Picture picture, byte* into,
        int channels, int pixelFormat)
    {
        void* decoder = null;
        try
        {
            decoder = ((delegate* unmanaged[Cdecl]<void*>)s_library.Entry("tjInitDecompress",
                source))();
            if (decoder == null) throw source.Error("libturbojpeg cannot start a decoder");
            var decompress =
                (delegate* unmanaged[Cdecl]<void*, byte*, CULong, byte*, int, int, int, int,
                int, int>)s_library.Entry("tjDecompress2", source);
            fixed (byte* bytes = data)
            {
                int status = decompress(
                    decoder, bytes, new CULong((nuint)data.Length), into, header.Width,
                    header.Width * channels, header.Height, pixelFormat, LimitScans);
                if (status != 0) Check(decoder, source);
            }

            return picture;
        }
        catch
        {
            picture.Dispose();
            throw;
        }
        finally
        {
            if (decoder != null)
                ((delegate* unmanaged[Cdecl]<void*, int>)s_library.Entry("tjDestroy", source))(
                    decoder);
        }
    }

    // A decoder that stops after it has warned reports the code of a warning, so the text has to
    // tell warnings, which Pillow passes over, from errors. A cut file is an error to Pillow.
    private static void Check(void* decoder, ByteSource source)
    {
        byte* text =
            ((delegate* unmanaged[Cdecl]<void*, byte*>)s_library.Entry("tjGetErrorStr2", source))(
            decoder);
        string message = Marshal.PtrToStringUTF8((nint)text) ?? "";
        foreach (string warning in s_warnings)
            if (message.StartsWith(warning, StringComparison.Ordinal)) return;
        throw source.Error($"damaged JPEG: {message}");
    }

    // v = clip(n - c * n / 255), n = 255 - k, rounded as Pillow rounds it.
    private static void FromInverseCmyk(ReadOnlySpan<byte> inks, Span<byte> rgb)
    {
        for (int p = 0, i = 0; i < rgb.Length; p += 4, i += 3)
        {
            int n = inks[p + 3];
            for (int c = 0; c < 3; c++)
            {
                int t = ((255 - inks[p + c]) * n) + 128;
                rgb[i + c] = (byte)Math.Clamp(n - (((t >> 8) + t) >> 8), 0, 255);
            }
        }
    }
}
