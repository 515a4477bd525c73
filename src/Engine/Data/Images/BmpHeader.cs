using System.Buffers.Binary;
using System.Numerics;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// The header of a Windows or OS/2 bitmap, and its pixels. Samples of 5 and 6 bits are widened as
/// in Pillow. A palette of 2 colours, or a grey one, is a palette at every depth here; Pillow loses
/// the pixels of some.
/// </summary>
internal sealed class BmpHeader
{
    private const int FileHead = 14, Os2 = 12, Windows = 40, BitFields = 3;

    // Masks of red, green and blue; the second are the defaults of 16 and of 32 bits.
    private static readonly uint[] s_565 = [0xf800, 0x7e0, 0x1f], s_555 = [0x7c00, 0x3e0, 0x1f];

    private static readonly uint[][] s_masks32 =
    [
        [0xff0000, 0xff00, 0xff], [0xff000000, 0xff0000, 0xff00], [0xff, 0xff00, 0xff0000],
    ];

    private readonly ByteSource _source;
    private readonly int _bits, _headLength;
    private readonly bool _topDown;
    private readonly long _rowsAt;
    private readonly uint[] _masks = [];
    private readonly ColourTable _colours = ColourTable.Grey;

    /// <exception cref="InputException">Cut, damaged, or of a kind that is not read.</exception>
    public BmpHeader(ByteSource source)
    {
        _source = source;
        var file = source.At(0, FileHead + 4);
        if (file.Length < FileHead + 4) throw Broken("header is cut");
        long offset = Long(file[10..]);
        _headLength = (int)Long(file[FileHead..]);
        if (_headLength is not (Os2 or Windows or 52 or 56 or 64 or 108 or 124))
            throw Broken($"has a header of {_headLength} bytes, which is not defined");
        var head = source.At(FileHead, _headLength);
        if (head.Length < _headLength) throw Broken("header is cut");
        long compression = 0, colours = 0;
        if (_headLength == Os2)
        {
            (Width, Height, _bits) = (Word(head[4..]), Word(head[6..]), Word(head[10..]));
        }
        else
        {
            _topDown = head[11] == 0xff;
            Width = Long(head[4..]);
            Height = _topDown ? (1L << 32) - Long(head[8..]) : Long(head[8..]);
            _bits = Word(head[14..]);
            (compression, colours) = (Long(head[16..]), Long(head[32..]));
        }

        if (Width == 0 || Height == 0) throw Broken("has no valid size");
        if (_bits is not (1 or 4 or 8 or 16 or 24 or 32))
            throw Broken($"has {_bits} bits per pixel, expected 1, 4, 8, 16, 24 or 32");
        long at = FileHead + _headLength;
        if (compression == BitFields) at = ReadMasks(at, out _masks);
        else if (compression != 0) throw source.Error(
            $"is a BMP picture with {Compression(compression)}, which is not read; convert it to "
            + "PNG");
        else if (_bits == 16) _masks = s_555;
        if (_bits <= 8)
        {
            int step = _headLength == Os2 ? 3 : 4;
            colours = colours == 0 ? 1L << _bits : colours;
            if (colours > 256) throw Broken($"has {colours} colours, expected at most 256");
            var palette = source.At(at, (int)colours * step);
            if (palette.Length < colours * step) throw Broken("palette is cut");
            _colours = ColourTable.Read(palette, step, blueFirst: true);
            if (offset == at) offset = 0;
            at += palette.Length;
        }

        _rowsAt = offset == 0 ? at : offset;
    }

    public long Width { get; }

    public long Height { get; }

    public static bool Accepts(ReadOnlySpan<byte> head) => head.StartsWith("BM"u8);

    /// <exception cref="InputException">Rows are missing.</exception>
    public Picture Decode()
    {
        // The last row's filling up to 4 bytes may be missing.
        long used = ((Width * _bits) + 7) / 8, stride = (used + 3) & ~3L;
        long needed = ((Height - 1) * stride) + used;
        if (_rowsAt + needed > _source.Length)
            throw Broken(
                $"its pixels are cut off: rows of {needed} bytes from byte {_rowsAt} on, "
                + $"the file has {_source.Length}");
        var picture = new Picture((int)Width, (int)Height);
        // Whole bytes of whole pixels.
        int piece = ByteSource.Most / _bits * 8;
        for (int y = 0; y < picture.Height; y++)
        {
            var row = picture.Row(_topDown ? y : picture.Height - 1 - y);
            for (int x = 0; x < picture.Width; x += piece)
            {
                int pixels = Math.Min(piece, picture.Width - x), bytes = ((pixels * _bits) + 7) / 8;
                var from = _source.At(_rowsAt + (y * stride) + ((long)x * _bits / 8), bytes);
                Unpack(from, row.Slice(3 * x, 3 * pixels));
            }
        }

        return picture;
    }

    private void Unpack(ReadOnlySpan<byte> from, Span<byte> row)
    {
        int pixels = row.Length / 3, step = _bits / 8, green = _masks == s_565 ? 6 : 5;
        // Places of red, green and blue among a pixel's bytes.
        var (r, g, b) = (2, 1, 0);
        if (_bits == 32 && _masks.Length > 0) (r, g, b) = (At(0), At(1), At(2));
        for (int i = 0; i < pixels; i++)
        {
            var pixel = row.Slice(3 * i, 3);
            if (_bits <= 8)
            {
                int bit = i * _bits, value = from[bit / 8] >> (8 - _bits - (bit % 8));
                _colours[value & ((1 << _bits) - 1)].CopyTo(pixel);
            }
            else if (_bits == 16)
            {
                int value = Word(from[(2 * i)..]);
                pixel[0] = Wide(value >> (5 + green), 5);
                pixel[1] = Wide(value >> 5, green);
                pixel[2] = Wide(value, 5);
            }
            else
            {
                var bytes = from.Slice(i * step, step);
                (pixel[0], pixel[1], pixel[2]) = (bytes[r], bytes[g], bytes[b]);
            }
        }

        int At(int channel) => BitOperations.TrailingZeroCount(_masks[channel]) / 8;

        // The low bits of a sample as 0 to 255, cut off.
        static byte Wide(int value, int bits)
        {
            int most = (1 << bits) - 1;
            return (byte)((value & most) * 255 / most);
        }
    }

    private long ReadMasks(long at, out uint[] masks)
    {
        int from = FileHead + Windows;
        var s = _source.At(from, 12);
        if (s.Length < 12) throw Broken("header is cut");
        uint[] found = [(uint)Long(s), (uint)Long(s[4..]), (uint)Long(s[8..])];
        uint[][] known = _bits switch
        {
            16 => [s_565, s_555],
            24 => [s_masks32[0]],
            32 => [.. s_masks32, [0, 0, 0]],
            _ => [],
        };
        masks = known.FirstOrDefault(m => m.SequenceEqual(found)) ?? throw _source.Error(
            $"is a BMP picture of {_bits} bits with the colour masks {found[0]:x}, {found[1]:x} "
            + $"and {found[2]:x}, which are not read; convert it to PNG");
        if (_bits == 24 || masks[0] == 0) masks = [];
        return _headLength == Windows ? at + 12 : at;
    }

    private static string Compression(long kind) => kind switch
    {
        1 or 2 => "run lengths",
        4 => "a JPEG picture in it",
        5 => "a PNG picture in it",
        _ => $"compression {kind}",
    };

    private static long Long(ReadOnlySpan<byte> s) => BinaryPrimitives.ReadUInt32LittleEndian(s);

    private static int Word(ReadOnlySpan<byte> s) => BinaryPrimitives.ReadUInt16LittleEndian(s);

    private InputException Broken(string what) => _source.Error($"damaged BMP: {what}");
}
