using System.Buffers.Binary;
using StbImageSharp;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// A GIF up to its first frame (GIF89a specification), and that frame's pixels as Pillow shows
/// them: on a canvas of the transparent colour, or colour 0, with the colours of transparent pixels
/// as stored. StbImageSharp unpacks the frame alone, in a file written for it whose colour i is
/// (i, i, i), so that what comes back are the palette's indices; where its alpha is 0 the data had
/// no pixel.
/// </summary>
internal sealed class GifHeader
{
    private const int ScreenHead = 13, FrameHead = 9, MaxCodeBits = 12;

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

    /// <param name="file">Its bytes.</param>
    /// <param name="overWhite">Lays what is transparent over white.</param>
    /// <exception cref="InputException">The frame's data is damaged or cut off.</exception>
    public Picture Decode(byte[] file, bool overWhite = false)
    {
        byte[] white = [255, 255, 255];
        var frame = new PictureSize(_frameWidth, _frameHeight);
        StbDecoder.RequireSize(_source, "GIF", new(Width, Height));

        // The zero that ends the frame's data may be missing, as for Pillow.
        var stream = new PictureStream(
            FrameFile(), file, (int)_dataAt, (int)_source.Length, zeros: 1);
        byte[] pixels = StbDecoder.Decode(
            _source, "GIF", stream, frame, ColorComponents.RedGreenBlueAlpha);
        var picture = new Picture(Width, Height);
        if (frame != picture.Size)
        {
            var rgb = picture.Rgb;
            for (int i = 0; i < rgb.Length; i += 3) Colour(_background).CopyTo(rgb[i..]);
        }

        for (int y = 0, p = 0; y < frame.Height; y++)
        {
            var row = picture.Row(_top + y)[(_left * 3)..];
            for (int x = 0; x < frame.Width; x++, p += 4)
            {
                if (pixels[p + 3] == 0)
                {
                    picture.Dispose();
                    throw Broken("its pixels are cut off");
                }

                Colour(pixels[p]).CopyTo(row[(x * 3)..]);
            }
        }

        return picture;

        ReadOnlySpan<byte> Colour(int index) =>
            overWhite && index == _clear ? white : _colours[index];
    }

    // The frame as a GIF of its own, up to its data.
    private byte[] FrameFile()
    {
        byte[] head = new byte[ScreenHead + (256 * 3) + 1 + FrameHead];
        "GIF89a"u8.CopyTo(head);
        var size = head.AsSpan(6);
        BinaryPrimitives.WriteUInt16LittleEndian(size, (ushort)_frameWidth);
        BinaryPrimitives.WriteUInt16LittleEndian(size[2..], (ushort)_frameHeight);
        head[10] = 0x87; // 256 colours follow
        for (int i = 0; i < 256; i++) head.AsSpan(ScreenHead + (i * 3), 3).Fill((byte)i);
        var frame = head.AsSpan(ScreenHead + (256 * 3));
        frame[0] = (byte)',';
        size[..4].CopyTo(frame[5..]);
        frame[9] = (byte)(_interlaced ? 0x40 : 0);
        return head;
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
