using System.Buffers.Binary;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// A GIF up to its first frame (GIF89a specification), and that frame's pixels as Pillow shows
/// them: on a canvas of the transparent colour, or colour 0, with the colours of transparent pixels
/// as stored.
/// </summary>
internal sealed class GifHeader
{
    private const int ScreenHead = 13, FrameHead = 9, MaxCodeBits = 12;

    // The rows of an interlaced frame in their order; of another one the last alone.
    private static readonly (int First, int Step)[] s_passes =
        [(0, 8), (4, 8), (2, 4), (1, 2), (0, 1)];

    private readonly ByteSource _source;
    private ColourTable _colours = ColourTable.Grey;
    private int _left, _top, _frameWidth, _frameHeight, _background, _clear = -1;
    private bool _interlaced;
    private long _dataAt;

    /// <exception cref="InputException">Cut, or without a frame.</exception>
    public GifHeader(ByteSource source)
    {
        _source = source;
        var screen = source.At(0, ScreenHead);
        if (screen.Length < ScreenHead) throw Broken("header is cut");
        Width = Word(screen[6..]);
        Height = Word(screen[8..]);
        long at = ReadColours(ScreenHead, screen[10]);
        while (true)
        {
            var block = source.At(at++, 1);
            if (block.IsEmpty || block[0] == ';') throw Broken("has no picture");
            if (block[0] == ',') break;
            if (block[0] == '!') at = SkipExtension(at);
        }

        ReadFrame(at);
    }

    public int Width { get; private set; }

    public int Height { get; private set; }

    public static bool Accepts(ReadOnlySpan<byte> head) =>
        head.StartsWith("GIF87a"u8) || head.StartsWith("GIF89a"u8);

    /// <param name="overWhite">Lays what is transparent over white.</param>
    /// <exception cref="InputException">The frame's data is damaged or cut off.</exception>
    public Picture Decode(bool overWhite = false)
    {
        byte[] white = [255, 255, 255];
        var picture = new Picture(Width, Height);
        var rgb = picture.Rgb;
        if (new PictureSize(_frameWidth, _frameHeight) != picture.Size)
            for (int i = 0; i < rgb.Length; i += 3) Colour(_background).CopyTo(rgb[i..]);
        var codes = new GifCodes(_source, _dataAt);
        try
        {
            int pass = _interlaced ? 0 : s_passes.Length - 1;
            for (int x = 0, y = 0, rows = 0; rows < _frameHeight;)
            {
                foreach (byte index in codes.Next())
                {
                    Colour(index).CopyTo(picture.Row(_top + y)[((_left + x) * 3)..]);
                    if (++x < _frameWidth) continue;
                    (x, y) = (0, y + s_passes[pass].Step);
                    if (++rows == _frameHeight) break;
                    while (y >= _frameHeight) y = s_passes[++pass].First;
                }
            }
        }
        catch
        {
            picture.Dispose();
            throw;
        }

        return picture;

        ReadOnlySpan<byte> Colour(int index) =>
            overWhite && index == _clear ? white : _colours[index];
    }

    // Behind flags that say whether there is a palette; a grey one does not displace the other.
    private long ReadColours(long at, int flags)
    {
        if ((flags & 0x80) == 0) return at;
        int length = 6 << (flags & 7);
        var palette = _source.At(at, length);
        if (palette.Length < length) throw Broken("palette is cut");
        var colours = ColourTable.Read(palette, 3, blueFirst: false);
        if (colours != ColourTable.Grey) _colours = colours;
        return at + length;
    }

    private long SkipExtension(long at)
    {
        const int graphicControl = 0xf9;
        var head = _source.At(at, 6);
        if (head.Length < 2) throw Broken("has no picture");
        if (head[0] == graphicControl && head.Length == 6 && head[1] >= 4 && (head[2] & 1) != 0)
            _background = _clear = head[5];
        at++;
        while (_source.At(at, 1) is { Length: 1 } length && length[0] != 0) at += 1 + length[0];
        return at + 1;
    }

    private void ReadFrame(long at)
    {
        var s = _source.At(at, FrameHead);
        if (s.Length < FrameHead) throw Broken("frame is cut");
        (_left, _top) = (Word(s), Word(s[2..]));
        (_frameWidth, _frameHeight) = (Word(s[4..]), Word(s[6..]));
        int flags = s[8];
        _interlaced = (flags & 0x40) != 0;
        if (_frameWidth == 0 || _frameHeight == 0) throw Broken("frame is empty");
        Width = Math.Max(Width, _left + _frameWidth);
        Height = Math.Max(Height, _top + _frameHeight);
        _dataAt = ReadColours(at + FrameHead, flags);
        if (_source.At(_dataAt, 1) is not { Length: 1 } bits || bits[0] is < 2 or > MaxCodeBits)
            throw Broken("frame's data is cut or damaged");

        // Codes stand for at most one pixel more than the longest one before, and for 2^12.
        long codes = (_source.Length - _dataAt) * 8 / (bits[0] + 1);
        long most = codes * Math.Min(codes + 1, 1 << MaxCodeBits);
        if ((long)_frameWidth * _frameHeight > most)
            throw Broken(
                $"{_frameWidth}x{_frameHeight} pixels do not fit into {_source.Length} bytes");
    }

    private static int Word(ReadOnlySpan<byte> s) => BinaryPrimitives.ReadUInt16LittleEndian(s);

    private InputException Broken(string what) => _source.Error($"damaged GIF: {what}");
}
