using System.Buffers.Binary;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// The header of a Targa picture, and its pixels through StbImageSharp, which gets a plain header
/// and a whole palette, and then the file's pixels. Pictures stored from right to left are turned
/// round here. A Targa has no mark at its front: it is known by its footer or by the file's name.
/// </summary>
internal sealed class TgaHeader
{
    private const int Head = 18, RunLengths = 8, LongestRun = 128;

    private readonly ByteSource _source;
    private readonly int _kind, _bits, _flags;
    private readonly long _pixelsAt;
    private readonly ColourTable _colours = ColourTable.Grey;

    /// <exception cref="InputException">Cut, damaged, or of a kind that is not read.</exception>
    public TgaHeader(ByteSource source)
    {
        _source = source;
        var s = source.At(0, Head);
        if (s.Length < Head) throw Broken("header is cut");
        (int idLength, int mapped, _kind) = (s[0], s[1], s[2]);
        var (first, count, mapBits) = (Word(s[3..]), Word(s[5..]), s[7]);
        (Width, Height, _bits, _flags) = (Word(s[12..]), Word(s[14..]), s[16], s[17]);
        if (mapped > 1 || Width == 0 || Height == 0
            || (_kind & ~RunLengths, _bits) is not ((1, 8) or (2, 16 or 24 or 32) or (3, 8 or 16)))
            throw Broken(
                $"is of kind {_kind} with {_bits} bits per pixel, which is not read; convert it to "
                + "PNG if it is a Targa picture");
        _pixelsAt = Head + idLength;
        if (mapped == 0) return;
        if (mapBits is not (16 or 24 or 32))
            throw Broken($"has palette entries of {mapBits} bits, expected 16, 24 or 32");
        int step = mapBits / 8;
        if (Indexed) _colours = ReadColours(first, Math.Min(count, 256), step);
        _pixelsAt += (long)count * step;
    }

    public int Width { get; }

    public int Height { get; }

    private bool Indexed => (_kind & ~RunLengths) == 1;

    public static bool Accepts(ByteSource source) =>
        source.At(source.Length - 18, 18).StartsWith("TRUEVISION-XFILE."u8)
        || source.Name.EndsWith(".tga", StringComparison.OrdinalIgnoreCase);

    /// <param name="file">Its bytes.</param>
    /// <param name="overWhite">Lays what is transparent over white.</param>
    /// <exception cref="InputException">Pixels are missing.</exception>
    public Picture Decode(byte[] file, bool overWhite = false)
    {
        long pixels = (long)Width * Height, left = _source.Length - _pixelsAt;
        int step = _bits / 8;
        long most = (_kind & RunLengths) != 0 ? left / (1 + step) * LongestRun : left / step;
        if (pixels > most)
            throw Broken($"{Width}x{Height} pixels do not fit into {Math.Max(0, left)} bytes");
        var stream = new PictureStream(PlainHead(), file, (int)_pixelsAt, (int)_source.Length);
        // Colours with eight bits of alpha, or grey with as many.
        bool isClear = _bits == 32 || (_bits == 16 && (_kind & ~RunLengths) == 3);
        var picture = StbDecoder.Decode(
            _source, "TGA", stream, new(Width, Height), overWhite && isClear);
        const int fromTheRight = 0x10;
        if ((_flags & fromTheRight) == 0) return picture;
        using (picture) return picture.Oriented(2);
    }

    private ColourTable ReadColours(int first, int count, int step)
    {
        var stored = _source.At(_pixelsAt, count * step);
        if (stored.Length < count * step) throw Broken("palette is cut");
        byte[] palette = new byte[(first + count) * 3];
        for (int i = 0; i < count; i++)
        {
            var colour = palette.AsSpan((first + i) * 3, 3);
            var entry = stored.Slice(i * step, step);
            if (step > 2)
            {
                entry[..3].CopyTo(colour);
                continue;
            }

            int five = Word(entry);
            for (int c = 0; c < 3; c++, five >>= 5) colour[c] = (byte)((five & 31) * 255 / 31);
        }

        return ColourTable.Read(palette, 3, blueFirst: true);
    }

    // Header and palette as StbImageSharp understands them.
    private byte[] PlainHead()
    {
        byte[] head = new byte[Head];
        (head[1], head[2]) = ((byte)(Indexed ? 1 : 0), (byte)_kind);
        BinaryPrimitives.WriteUInt16LittleEndian(head.AsSpan(12), (ushort)Width);
        BinaryPrimitives.WriteUInt16LittleEndian(head.AsSpan(14), (ushort)Height);
        (head[16], head[17]) = ((byte)_bits, (byte)(_flags & 0x20));
        if (!Indexed) return head;
        (head[6], head[7]) = (1, 24); // 256 entries
        return [.. head, .. _colours.BlueFirst(256, 3)];
    }

    private static int Word(ReadOnlySpan<byte> s) => BinaryPrimitives.ReadUInt16LittleEndian(s);

    private InputException Broken(string what) => _source.Error($"damaged TGA: {what}");
}
