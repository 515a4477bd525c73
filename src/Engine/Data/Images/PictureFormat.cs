using System.Buffers.Binary;
using System.Text;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>The kinds of picture files that are read.</summary>
public enum PictureFormat
{
    Jpeg,
    Png,
    WebP,
    Gif,
    Bmp,
    Tga,
}

/// <summary>Tells a file's kind by its first bytes; the name's ending is never looked at.</summary>
internal static class PictureFormats
{
    // First bytes -> name; a name with an article is what the refusal says the file is.
    private static readonly (byte[] Prefix, string Kind)[] s_refused =
    [
        ("II*\0"u8.ToArray(), "a TIFF picture"), ("MM\0*"u8.ToArray(), "a TIFF picture"),
        ("II+\0"u8.ToArray(), "a TIFF picture"), ("MM\0+"u8.ToArray(), "a TIFF picture"),
        ("8BPS"u8.ToArray(), "a Photoshop picture"), ("qoif"u8.ToArray(), "a QOI picture"),
        ("DDS "u8.ToArray(), "a DDS picture"),
        ("\x76\x2f\x31\x01"u8.ToArray(), "an OpenEXR picture"),
        ([0, 0, 1, 0], "a Windows icon"), ("%PDF"u8.ToArray(), "a PDF document"),
        ([0, 0, 0, 12, .. "jP  "u8], "a JPEG 2000 picture"),
        ([0xff, 0x4f, 0xff, 0x51], "a JPEG 2000 picture"),
        ([0, 0, 0, 12, .. "JXL "u8], "a JPEG XL picture"), ([0xff, 0x0a], "a JPEG XL picture"),
        ("%!PS"u8.ToArray(), "a PostScript document"), ([0x1f, 0x8b], "a gzip archive"),
        ("PK\x03\x04"u8.ToArray(), "a zip archive"),
    ];

    // How to make a PNG of it, where that is not what every viewer can do.
    private static readonly (string Kind, string Way)[] s_ways =
    [
        ("a TIFF picture", "magick IN.tif OUT.png, or tiff2png"),
        ("a HEIC picture", "heif-convert IN.heic OUT.png, or magick IN.heic OUT.png"),
        ("an AVIF picture", "avifdec IN.avif OUT.png, or magick IN.avif OUT.png"),
        ("a video", "one picture of it: ffmpeg -i IN.mp4 -frames:v 1 OUT.png"),
    ];

    private const string Page = "an HTML page";

    /// <summary>What is read, for messages.</summary>
    public const string Read = "JPEG, PNG, WebP, GIF, BMP or TGA";

    /// <summary>The format of a file.</summary>
    /// <exception cref="InputException">Empty, or of no format that is read: named when
    /// known.</exception>
    public static PictureFormat Identify(ByteSource source)
    {
        var head = source.At(0, 512);
        if (head.IsEmpty) throw source.Error($"file is empty, expected a {Read} picture");
        if (head.StartsWith((ReadOnlySpan<byte>)[0xff, 0xd8, 0xff])) return PictureFormat.Jpeg;
        if (head.StartsWith(PngHeader.Signature)) return PictureFormat.Png;
        if (WebPHeader.Accepts(head)) return PictureFormat.WebP;
        if (GifHeader.Accepts(head)) return PictureFormat.Gif;
        if (BmpHeader.Accepts(head)) return PictureFormat.Bmp;
        if (head.StartsWith("version https://git-lfs"u8))
            throw source.Error("is a pointer of Git LFS, not the picture itself: run git lfs pull");
        string? kind = Refused(head);
        if (kind == null && TgaHeader.Accepts(source)) return PictureFormat.Tga;
        if (kind == null)
            throw source.Error($"is no picture that can be read, expected {Read}");
        string way = s_ways.FirstOrDefault(w => w.Kind == kind).Way is { } known
            ? $" ({known})" : "";
        throw source.Error($"is {kind}, expected {Read}; "
            + (kind == Page ? "download the picture again" : $"convert it to PNG{way}"));
    }

    private static string? Refused(ReadOnlySpan<byte> head)
    {
        foreach (var (prefix, kind) in s_refused)
            if (head.StartsWith(prefix)) return kind;
        if (head.Length > 2 && head[0] == 'P' && head[1] is >= (byte)'1' and <= (byte)'7'
            && head[2] is (byte)' ' or (byte)'\n' or (byte)'\r' or (byte)'\t')
            return "a PBM, PGM, PPM or PAM picture";
        if (head.Length >= 12 && head[4..8].SequenceEqual("ftyp"u8)) return Brand(head);
        if (head.StartsWith((ReadOnlySpan<byte>)[0x1a, 0x45, 0xdf, 0xa3])
            || (head.Length >= 12 && head.StartsWith("RIFF"u8)
                && head[8..12].SequenceEqual("AVI "u8)))
            return "a video";
        string text = Encoding.Latin1.GetString(head);
        if (text.Contains("<svg", StringComparison.OrdinalIgnoreCase)) return "an SVG drawing";
        return text.Contains("<html", StringComparison.OrdinalIgnoreCase)
            || text.Contains("<!doctype html", StringComparison.OrdinalIgnoreCase)
            ? Page : null;
    }

    // ISO base media files say what they are by a list of brands: the main one, a version, others.
    private static string Brand(ReadOnlySpan<byte> head)
    {
        int length = (int)Math.Min(
            (uint)head.Length, BinaryPrimitives.ReadUInt32BigEndian(head));
        string brands = Encoding.Latin1.GetString(head[8..Math.Max(12, length)]);
        if (brands.Contains("avif") || brands.Contains("avis")) return "an AVIF picture";
        string[] heic = ["heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "msf1"];
        return heic.Any(brands.Contains) ? "a HEIC picture" : "a video";
    }
}
