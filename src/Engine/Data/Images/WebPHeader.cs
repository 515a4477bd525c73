using System.Buffers.Binary;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// The RIFF structure of a WebP file (RFC 9649): canvas, the picture's or the first frame's data,
/// and how the camera was held. All chunks have to be there whole, as for libwebp's demultiplexer
/// that Pillow asks.
/// </summary>
internal sealed class WebPHeader
{
    private const int RiffHead = 12, ChunkHead = 8, AnimationFlag = 2, ExifFlag = 8, FrameHead = 16;

    private readonly ByteSource _source;

    /// <exception cref="InputException">Cut, or not a WebP structure.</exception>
    public WebPHeader(ByteSource source)
    {
        _source = source;
        long size = Long(4);
        Length = size + 8;
        if (size < RiffHead - 8 + ChunkHead || Length > source.Length)
            throw Broken($"claims {Length} bytes, the file has {source.Length}");
        var first = source.At(RiffHead, 4);
        if (first.SequenceEqual("VP8X"u8)) ReadExtended();
        else ReadStill(RiffHead);
        if (Width == 0 || Height == 0) throw Broken("has no valid size");
        if (DataAt == 0) throw Broken("has no picture");
    }

    public int Width { get; private set; }

    public int Height { get; private set; }

    public int Orientation { get; private set; } = 1;

    /// <summary>Bytes of the file that belong to the picture.</summary>
    public long Length { get; }

    /// <summary>What libwebp decodes: the whole file, or the first frame of an animation.</summary>
    public long DataAt { get; private set; }

    public long DataLength { get; private set; }

    /// <summary>Place of the first frame on the canvas.</summary>
    public PictureSize FrameOffset { get; private set; }

    /// <summary>Size of the first frame; the canvas where the file is no animation.</summary>
    public PictureSize Frame { get; private set; }

    public bool Animated { get; private set; }

    /// <summary>Without loss a picture of one colour takes no bits per pixel.</summary>
    public bool Lossless { get; private set; }

    public static bool Accepts(ReadOnlySpan<byte> head) =>
        head.Length >= 16 && head.StartsWith("RIFF"u8) && head[8..12].SequenceEqual("WEBP"u8)
        && head[12..15].SequenceEqual("VP8"u8) && head[15] is (byte)' ' or (byte)'L' or (byte)'X';

    private void ReadExtended()
    {
        var s = _source.At(RiffHead + ChunkHead, 10);
        if (s.Length < 10) throw Broken("header is cut");
        int flags = s[0];
        (Width, Height) = (1 + Three(s[4..]), 1 + Three(s[7..]));
        Animated = (flags & AnimationFlag) != 0;
        Frame = new(Width, Height);
        for (long at = RiffHead; at + ChunkHead <= Length;)
        {
            uint size = Long(at + 4);
            var name = _source.At(at, 4);
            if (at + ChunkHead + size > Length)
                throw Broken($"a chunk claims {size} bytes beyond the end");
            if (name.SequenceEqual("ANMF"u8)) ReadFrame(at + ChunkHead, size);
            else if (name.SequenceEqual("EXIF"u8) && (flags & ExifFlag) != 0)
                Orientation = Exif.Orientation(_source, at + ChunkHead, size);
            else if (!Animated && (name.SequenceEqual("VP8 "u8) || name.SequenceEqual("VP8L"u8)))
            {
                Lossless = name[3] == 'L';
                (DataAt, DataLength) = (-1, Length);
            }

            at += ChunkHead + size + (size & 1);
        }

        if (DataAt == -1) DataAt = RiffHead;
    }

    private void ReadFrame(long at, uint size)
    {
        if (!Animated || DataAt != 0) return;
        var s = _source.At(at, FrameHead);
        if (size < FrameHead + ChunkHead || s.Length < FrameHead)
            throw Broken("first frame is cut");
        FrameOffset = new(2 * Three(s), 2 * Three(s[3..]));
        Frame = new(1 + Three(s[6..]), 1 + Three(s[9..]));
        if ((long)FrameOffset.Width + Frame.Width > Width
            || (long)FrameOffset.Height + Frame.Height > Height)
            throw Broken("first frame is larger than the canvas");
        (DataAt, DataLength) = (at + FrameHead, size - FrameHead);
        Lossless = !_source.At(DataAt, 4).SequenceEqual("VP8 "u8)
            && !_source.At(DataAt, 4).SequenceEqual("ALPH"u8);
    }

    private void ReadStill(long at)
    {
        uint size = Long(at + 4);
        if (at + ChunkHead + size > Length)
            throw Broken($"picture claims {size} bytes beyond the end");
        Lossless = _source.At(at, 4)[3] == 'L';
        var s = _source.At(at + ChunkHead, 10);
        if (s.Length < 10) throw Broken("picture header is cut");
        if (Lossless)
        {
            uint bits = BinaryPrimitives.ReadUInt32LittleEndian(s[1..]);
            (Width, Height) = (1 + (int)(bits & 0x3fff), 1 + (int)((bits >> 14) & 0x3fff));
        }
        else
        {
            Width = BinaryPrimitives.ReadUInt16LittleEndian(s[6..]) & 0x3fff;
            Height = BinaryPrimitives.ReadUInt16LittleEndian(s[8..]) & 0x3fff;
        }

        Frame = new(Width, Height);
        (DataAt, DataLength) = (RiffHead, Length);
    }

    private uint Long(long at) =>
        _source.At(at, 4) is { Length: 4 } four ? BinaryPrimitives.ReadUInt32LittleEndian(four) : 0;

    private static int Three(ReadOnlySpan<byte> s) => s[0] | (s[1] << 8) | (s[2] << 16);

    private InputException Broken(string what) => _source.Error($"damaged WebP: {what}");
}
