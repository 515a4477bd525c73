using System.Buffers.Binary;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// The header of a Targa picture, and its pixels. A Targa has no mark at its front: it is known by
/// its footer or by the file's name.
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

    /// <param name="overWhite">Lays what is transparent over white.</param>
    /// <exception cref="InputException">Pixels are missing.</exception>
    public Picture Decode(bool overWhite = false)
    {
        long pixels = (long)Width * Height, left = _source.Length - _pixelsAt;
        int step = _bits / 8;
        long most = (_kind & RunLengths) != 0 ? left / (1 + step) * LongestRun : left / step;
        if (pixels > most)
            throw Broken($"{Width}x{Height} pixels do not fit into {Math.Max(0, left)} bytes");
        // Colours with eight bits of alpha, or grey with as many.
        overWhite &= _bits == 32 || (_bits == 16 && (_kind & ~RunLengths) == 3);
        const int fromTheRight = 0x10, fromTheTop = 0x20;
        var picture = new Picture(Width, Height);
        long at = _pixelsAt;
        bool isPacked = (_kind & RunLengths) != 0, repeats = false;
        Span<byte> pixel = stackalloc byte[3];
        for (int y = 0, run = 0; y < Height; y++)
        {
            var row = picture.Row((_flags & fromTheTop) != 0 ? y : Height - 1 - y);
            for (int x = 0; x < Width; x++)
            {
                bool isNew = !isPacked || !repeats;
                if (isPacked && run == 0)
                {
                    int head = _source.At(at++, 1) is { Length: 1 } one ? one[0] : 0;
                    (run, repeats, isNew) = (head % LongestRun + 1, head >= LongestRun, true);
                }

                run--;
                if (isNew)
                {
                    var from = _source.At(at, step);
                    if (from.Length < step)
                    {
                        picture.Dispose();
                        throw Broken("its pixels are cut off");
                    }

                    Unpack(from, pixel, overWhite);
                    at += step;
                }

                pixel.CopyTo(row[(3 * ((_flags & fromTheRight) == 0 ? x : Width - 1 - x))..]);
            }
        }

        return picture;
    }

    private void Unpack(ReadOnlySpan<byte> from, Span<byte> pixel, bool overWhite)
    {
        if (Indexed) _colours[from[0]].CopyTo(pixel);
        else if ((_kind & ~RunLengths) == 3) pixel.Fill(from[0]);
        else if (_bits == 16) Widen(Word(from), pixel);
        else (pixel[0], pixel[1], pixel[2]) = (from[2], from[1], from[0]);
        if (!overWhite) return;
        foreach (ref byte channel in pixel) channel = White.Under(channel, from[^1]);
    }

    // 5 bits each, of blue the lowest.
    private static void Widen(int value, Span<byte> rgb)
    {
        for (int c = 2; c >= 0; c--, value >>= 5) rgb[c] = (byte)((value & 31) * 255 / 31);
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

            Widen(Word(entry), colour);
            colour.Reverse();
        }

        return ColourTable.Read(palette, 3, blueFirst: true);
    }

    private static int Word(ReadOnlySpan<byte> s) => BinaryPrimitives.ReadUInt16LittleEndian(s);

    private InputException Broken(string what) => _source.Error($"damaged TGA: {what}");
}
