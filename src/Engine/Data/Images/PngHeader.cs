using System.Buffers.Binary;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// What stands in front of a PNG's pixels: PNG specification, third edition; which damage is
/// refused and which is passed over follows Pillow, whose pixels the official script trains on.
/// Checksums are verified up to the pixels, not behind. Ancillary chunks matter only where Pillow
/// refuses them.
/// </summary>
internal sealed class PngHeader
{
    private const uint Ihdr = 0x49484452, Plte = 0x504c5445, Idat = 0x49444154, Iend = 0x49454e44;
    private const uint Trns = 0x74524e53, Exif = 0x65584966, Actl = 0x6163544c, Fctl = 0x6663544c;
    private const uint Fdat = 0x66644154, Phys = 0x70485973, Srgb = 0x73524742, Gama = 0x67414d41;
    private const uint Chrm = 0x6348524d, Iccp = 0x69434350;

    private static readonly uint[] s_crc = CrcTable();

    private readonly ByteSource _source;
    private uint _frameSequence;
    private bool _animated;

    /// <summary>Reads up to the first IDAT chunk.</summary>
    /// <exception cref="InputException">No PNG, or one that Pillow refuses.</exception>
    public PngHeader(ByteSource source)
    {
        _source = source;
        long at = Signature.Length;
        while (true)
        {
            var (type, length) = Chunk(at) ?? throw Broken("ends before its pixels");
            if (type is Idat or Iend) break;
            Demand(at + 8, length);
            Read(type, at + 8, length);
            CheckSum(at, length);
            at += 12 + length;
        }

        if (Width == 0 || Height == 0 || Channels == 0)
            throw Broken("header has no valid size, bit depth and colour type");
        if (Chunk(at)?.Type != Idat) throw Broken("has no pixels");
        DataAt = at;
    }

    public static ReadOnlySpan<byte> Signature => [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];

    public long Width { get; private set; }

    public long Height { get; private set; }

    /// <summary>Bits of one sample: 1, 2, 4, 8 or 16.</summary>
    public int Depth { get; private set; }

    /// <summary>0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGB and alpha.</summary>
    public int Colour { get; private set; }

    /// <summary>Samples of one pixel, 0 when depth and colour do not go together.</summary>
    public int Channels { get; private set; }

    public bool Interlaced { get; private set; }

    /// <summary>Where the palette's bytes are; none leaves every colour black.</summary>
    public long PaletteAt { get; private set; }

    public int PaletteLength { get; private set; }

    /// <summary>
    /// What is transparent: alphas of the palette's first colours, or the colour that is.
    /// </summary>
    public long TransparencyAt { get; private set; }

    public int TransparencyLength { get; private set; }

    /// <summary>Offset of the first IDAT chunk (its length field).</summary>
    public long DataAt { get; }

    public int Orientation { get; private set; } = 1;

    public int BitsPerPixel => Depth * Channels;

    /// <summary>Type and data length of the chunk at an offset; null at the end and where none
    /// is.</summary>
    public (uint Type, long Length)? Chunk(long at)
    {
        var head = _source.At(at, 8);
        if (head.Length < 8) return null;
        foreach (byte letter in head[4..])
            if (!char.IsAsciiLetterOrDigit((char)letter) && letter != '_') return null;
        return (BinaryPrimitives.ReadUInt32BigEndian(head[4..]),
            BinaryPrimitives.ReadUInt32BigEndian(head));
    }

    public static bool IsData(uint type) => type == Idat;

    /// <summary>
    /// Reads the chunks behind the pixels, from the end of a data chunk on. A file that stops
    /// between chunks is whole enough; one that stops inside a chunk is refused.
    /// </summary>
    /// <exception cref="InputException">A chunk is cut or too short.</exception>
    public void ReadTail(long at)
    {
        while (Chunk(at) is { } chunk && chunk.Type != Iend && !(chunk.Type == Fctl && _animated))
        {
            Demand(at + 8, chunk.Length);
            if (chunk.Type is not (Idat or Ihdr or Plte or Fctl or Fdat))
                Read(chunk.Type, at + 8, chunk.Length);
            at += 12 + chunk.Length;
        }
    }

    /// <summary>Orientation, also from an eXIf chunk behind the pixels; damage there is passed
    /// over.</summary>
    public int FindOrientation()
    {
        for (long at = DataAt; Chunk(at) is { } chunk && chunk.Type != Iend;
            at += 12 + chunk.Length)
            if (chunk.Type == Exif) Read(Exif, at + 8, chunk.Length);
        return Orientation;
    }

    private void Read(uint type, long at, long length)
    {
        switch (type)
        {
            case Ihdr: ReadHeader(at, length); break;
            case Plte when Colour == 3:
                if (length > 770) throw Broken($"palette has {length} bytes, expected at most 768");
                (PaletteAt, PaletteLength) = (at, (int)length);
                break;
            case Exif: Orientation = Images.Exif.Orientation(_source, at, length); break;
            case Trns:
                AtLeast(length, Colour switch { 0 => 2, 2 => 6, _ => 0 }, "tRNS");
                (TransparencyAt, TransparencyLength) = (at, (int)Math.Min(length, 256));
                break;
            case Phys: AtLeast(length, 9, "pHYs"); break;
            case Srgb: AtLeast(length, 1, "sRGB"); break;
            case Gama: AtLeast(length, 4, "gAMA"); break;
            case Chrm when length % 4 != 0: throw Broken("cHRM chunk has a wrong length");
            case Iccp: ReadProfileHead(at, length); break;
            case Actl: AtLeast(length, 8, "acTL"); ReadAnimation(at); break;
            case Fctl: AtLeast(length, 26, "fcTL"); ReadFrame(at); break;
            case Fdat: throw Broken("an animation frame comes before the picture");
        }
    }

    private void ReadHeader(long at, long length)
    {
        AtLeast(length, 13, "IHDR");
        var s = _source.At(at, 13);
        Width = BinaryPrimitives.ReadUInt32BigEndian(s);
        Height = BinaryPrimitives.ReadUInt32BigEndian(s[4..]);
        (Depth, Colour, Interlaced) = (s[8], s[9], s[12] != 0);
        Channels = (Colour, Depth) switch
        {
            (0, 1 or 2 or 4 or 8 or 16) or (3, 1 or 2 or 4 or 8) => 1,
            (4, 8 or 16) => 2,
            (2, 8 or 16) => 3,
            (6, 8 or 16) => 4,
            _ => 0,
        };
        if (Channels == 0)
            throw Broken($"has bit depth {Depth} with colour type {Colour}, which is not defined");
        if (s[11] != 0) throw Broken($"has filter method {s[11]}, expected 0");
    }

    private void ReadProfileHead(long at, long length)
    {
        var s = _source.At(at, (int)Math.Min(length, 256));
        int end = s.IndexOf((byte)0);
        if (end + 1 >= s.Length || s[end + 1] != 0) throw Broken("iCCP chunk is damaged");
    }

    private void ReadAnimation(long at)
    {
        uint frames = BinaryPrimitives.ReadUInt32BigEndian(_source.At(at, 4));
        _animated = !_animated && frames is > 1 and <= 0x80000000;
    }

    // A frame in front of the pixels is the first one: it has to cover the picture.
    private void ReadFrame(long at)
    {
        var s = _source.At(at, 26);
        uint sequence = BinaryPrimitives.ReadUInt32BigEndian(s);
        uint width = BinaryPrimitives.ReadUInt32BigEndian(s[4..]);
        uint height = BinaryPrimitives.ReadUInt32BigEndian(s[8..]);
        ulong offset = BinaryPrimitives.ReadUInt64BigEndian(s[12..]);
        if (sequence != _frameSequence++) throw Broken("animation frames are out of order");
        if (width != Width || height != Height || offset != 0)
            throw Broken(
                $"first animation frame is {width}x{height}, the picture {Width}x{Height}");
    }

    private void AtLeast(long length, int least, string chunk)
    {
        if (length < least)
            throw Broken($"{chunk} chunk has {length} bytes, expected at least {least}");
    }

    private void Demand(long at, long length)
    {
        if (at + length > _source.Length)
            throw Broken(
                $"a chunk claims {length} bytes, {Math.Max(0, _source.Length - at)} are left");
    }

    private void CheckSum(long at, long length)
    {
        uint crc = uint.MaxValue;
        long end = at + 8 + length;
        for (long p = at + 4; p < end; p += 4096)
            foreach (byte b in _source.At(p, (int)Math.Min(4096, end - p)))
                crc = (crc >> 8) ^ s_crc[(crc ^ b) & 0xff];
        var stored = _source.At(end, 4);
        if (stored.Length < 4 || BinaryPrimitives.ReadUInt32BigEndian(stored) != ~crc)
            throw Broken($"checksum of the chunk at byte {at} is wrong");
    }

    private InputException Broken(string what) => _source.Error($"damaged PNG: {what}");

    private static uint[] CrcTable()
    {
        var table = new uint[256];
        for (uint i = 0; i < 256; i++)
        {
            uint c = i;
            for (int bit = 0; bit < 8; bit++) c = (c >> 1) ^ (0xedb88320u & (0 - (c & 1)));
            table[i] = c;
        }

        return table;
    }
}
