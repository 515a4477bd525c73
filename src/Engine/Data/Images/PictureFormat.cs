using System.Text;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>The kinds of picture files that are read.</summary>
public enum PictureFormat
{
    Jpeg,
    Png,
    WebP,
}

/// <summary>Tells a file's kind by its first bytes; the name's ending is never looked at.</summary>
internal static class PictureFormats
{
    // First bytes -> name; a name with an article is what the refusal says the file is.
    private static readonly (byte[] Prefix, string Kind)[] s_refused =
    [
        ("GIF87a"u8.ToArray(), "a GIF picture"), ("GIF89a"u8.ToArray(), "a GIF picture"),
        ("BM"u8.ToArray(), "a BMP picture"),
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

    /// <summary>The format of a file.</summary>
    /// <exception cref="InputException">Empty, or no JPEG, PNG or WebP: named when
    /// known.</exception>
    public static PictureFormat Identify(ByteSource source)
    {
        var head = source.At(0, 512);
        if (head.IsEmpty) throw source.Error("file is empty, expected a JPEG, PNG or WebP picture");
        if (head.StartsWith((ReadOnlySpan<byte>)[0xff, 0xd8, 0xff])) return PictureFormat.Jpeg;
        if (head.StartsWith(PngHeader.Signature)) return PictureFormat.Png;
        if (WebPHeader.Accepts(head)) return PictureFormat.WebP;
        throw source.Error(Refused(source, head) is { } kind
            ? $"is {kind}, expected JPEG, PNG or WebP; convert it to PNG"
            : "is no picture that can be read, expected JPEG, PNG or WebP");
    }

    private static string? Refused(ByteSource source, ReadOnlySpan<byte> head)
    {
        foreach (var (prefix, kind) in s_refused)
            if (head.StartsWith(prefix)) return kind;
        if (head.Length > 2 && head[0] == 'P' && head[1] is >= (byte)'1' and <= (byte)'7'
            && head[2] is (byte)' ' or (byte)'\n' or (byte)'\r' or (byte)'\t')
            return "a PBM, PGM, PPM or PAM picture";
        if (head.Length >= 12 && head[4..8].SequenceEqual("ftyp"u8))
        {
            bool avif = head[8..12].SequenceEqual("avif"u8) || head[8..12].SequenceEqual("avis"u8);
            return avif ? "an AVIF picture" : "a HEIC picture or a video";
        }

        if (source.At(source.Length - 18, 18).StartsWith("TRUEVISION-XFILE."u8))
            return "a TGA picture";
        string text = Encoding.Latin1.GetString(head);
        if (text.Contains("<svg", StringComparison.OrdinalIgnoreCase)) return "an SVG drawing";
        if (text.Contains("<html", StringComparison.OrdinalIgnoreCase)
            || text.Contains("<!doctype html", StringComparison.OrdinalIgnoreCase))
            return "an HTML page";
        return source.Name.EndsWith(".tga", StringComparison.OrdinalIgnoreCase)
            ? "a TGA picture" : null;
    }
}
