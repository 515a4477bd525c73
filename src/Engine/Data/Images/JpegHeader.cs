namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// The segments in front of a JPEG's first scan (ITU T.81 annex B): size, components and how the
/// camera was held. What is refused here is what Pillow refuses before it decodes.
/// </summary>
internal sealed class JpegHeader
{
    private const int SoiMarker = 0xd8, EoiMarker = 0xd9, SosMarker = 0xda, App1 = 0xe1, Dhp = 0xde;

    private readonly ByteSource _source;

    /// <exception cref="InputException">No scan, no valid frame header, or cut before the first
    /// scan.</exception>
    public JpegHeader(ByteSource source)
    {
        _source = source;
        long at = 2;
        while (true)
        {
            var two = source.At(at, 2);
            if (two.Length < 2) throw Broken("ends before its pixels");
            if (two[0] != 0xff || two[1] is 0)
            {
                at++;
                continue;
            }

            int marker = two[1];
            if (marker == 0xff)
            {
                at++;
                continue;
            }

            if (marker < 0xc0) throw Broken($"has no marker at byte {at}");
            at += 2;
            if (!HasSegment(marker)) continue;
            int length = source.Word(at);
            if (length < 0) throw Broken("ends before its pixels");
            length = Math.Max(length, 2); // lengths below their own two bytes are passed over
            if (at + length > source.Length) throw Broken("ends before its pixels");
            ReadSegment(marker, at + 2, length - 2);
            if (marker == SosMarker)
            {
                ScanAt = at;
                break;
            }

            at += length;
        }

        if (Width == 0 || Height == 0) throw Broken("has no frame header, or one of size 0");
    }

    public int Width { get; private set; }

    public int Height { get; private set; }

    /// <summary>1 grey, 3 YCbCr or RGB, 4 CMYK or YCCK.</summary>
    public int Components { get; private set; }

    public int Orientation { get; private set; } = 1;

    /// <summary>Arithmetic coding has no least size per pixel.</summary>
    public bool Arithmetic { get; private set; }

    /// <summary>Where the first scan's header (its length field) is.</summary>
    public long ScanAt { get; }

    /// <summary>
    /// True when the end marker stands where the decoder looks for it. libjpeg-turbo fills up a cut
    /// file in silence; Pillow refuses it.
    /// </summary>
    public bool Ends(ReadOnlySpan<byte> file)
    {
        long at = ScanAt + _source.Word(ScanAt);
        while (at < file.Length)
        {
            int found = file[(int)at..].IndexOf((byte)0xff);
            if (found < 0 || at + found + 1 >= file.Length) return false;
            at += found + 1;
            int marker = file[(int)at];
            if (marker == 0xff) continue;
            at++;
            if (marker == EoiMarker) return true;
            if (marker < 0xc0 || !HasSegment(marker)) continue;
            int length = _source.Word(at);
            if (length < 0) return false;
            at += length;
        }

        return false;
    }

    // Restart markers, start and end of image, and the reserved JPG markers stand alone in Pillow.
    private static bool HasSegment(int marker) =>
        marker is not ((>= 0xd0 and <= EoiMarker) or 0xc8 or (>= 0xf0 and <= 0xfd));

    private void ReadSegment(int marker, long at, int length)
    {
        bool frame = marker is (>= 0xc0 and <= 0xcf and not (0xc4 or 0xc8 or 0xcc)) or Dhp;
        if (frame) ReadFrame(marker, at, length);
        else if (marker == App1 && Orientation == 1
            && _source.At(at, 6).SequenceEqual("Exif\0\0"u8))
            Orientation = Exif.Orientation(_source, at, length);
    }

    private void ReadFrame(int marker, long at, int length)
    {
        var s = _source.At(at, 6);
        if (length < 6 || s.Length < 6) throw Broken("frame header is cut");
        var (precision, components) = (s[0], s[5]);
        if (precision != 8) throw Broken($"has {precision} bits per sample, expected 8");
        if (components is not (1 or 3 or 4))
            throw Broken($"has {components} colour components, expected 1, 3 or 4");
        (Width, Height, Components) = (_source.Word(at + 3), _source.Word(at + 1), components);
        Arithmetic = marker >= 0xc9;
    }

    private InputException Broken(string what) => _source.Error($"damaged JPEG: {what}");
}
