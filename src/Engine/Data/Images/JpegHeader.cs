namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// The segments in front of a JPEG's first scan (ITU T.81 annex B): size, components and how the
/// camera was held. What is refused here is what Pillow refuses before it decodes.
/// </summary>
internal sealed class JpegHeader
{
    internal const int EoiMarker = 0xd9, SosMarker = 0xda, Dri = 0xdd;

    private const int App1 = 0xe1, Dhp = 0xde;

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

    public bool Progressive { get; private set; }

    /// <summary>Comes in several scans, so that all coefficients are kept until the end.</summary>
    public bool KeepsCoefficients =>
        Progressive || (_source.At(ScanAt + 2, 1) is { Length: 1 } parts && parts[0] < Components);

    /// <summary>The last frame header's marker; the built-in decoder knows three.</summary>
    public int FrameMarker { get; private set; }

    /// <summary>Frame headers; one, unless the file is damaged.</summary>
    public int Frames { get; private set; }

    /// <summary>Number and sampling factors of each component, as far as the header has
    /// them.</summary>
    public IReadOnlyList<(int Id, int Across, int Down)> Parts { get; private set; } = [];

    /// <summary>Components and how the colours are sampled, for instance "JPEG 4:2:0".</summary>
    public string Kind => Components switch
    {
        1 => "JPEG grey",
        4 => "JPEG CMYK",
        _ => Parts switch
        {
            [(_, 1, 1), (_, 1, 1), (_, 1, 1)] => "JPEG 4:4:4",
            [(_, 2, 1), (_, 1, 1), (_, 1, 1)] => "JPEG 4:2:2",
            [(_, 2, 2), (_, 1, 1), (_, 1, 1)] => "JPEG 4:2:0",
            _ => "JPEG of other sampling",
        },
    };

    /// <summary>Blocks between restart markers in the first scan; 0 for none.</summary>
    public int RestartInterval { get; private set; }

    /// <summary>Where the first scan's header (its length field) is.</summary>
    public long ScanAt { get; }

    // Restart markers, start and end of image, and the reserved JPG markers stand alone in Pillow.
    internal static bool HasSegment(int marker) =>
        marker is not ((>= 0xd0 and <= EoiMarker) or 0xc8 or (>= 0xf0 and <= 0xfd));

    private void ReadSegment(int marker, long at, int length)
    {
        bool frame = marker is (>= 0xc0 and <= 0xcf and not (0xc4 or 0xc8 or 0xcc)) or Dhp;
        if (frame) ReadFrame(marker, at, length);
        else if (marker == Dri && length >= 2) RestartInterval = _source.Word(at);
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
        Arithmetic = marker is >= 0xc9 and not Dhp;
        Progressive = (marker & 3) == 2 && marker != Dhp;
        (FrameMarker, Frames) = (marker, Frames + 1);
        var parts = _source.At(at + 6, Math.Min(length - 6, 3 * components));
        var list = new List<(int, int, int)>(components);
        for (int i = 0; i + 3 <= parts.Length; i += 3)
            list.Add((parts[i], parts[i + 1] >> 4, parts[i + 1] & 15));
        Parts = list;
    }

    private InputException Broken(string what) => _source.Error($"damaged JPEG: {what}");
}
