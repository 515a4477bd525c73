namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// What StbImageSharp reads: the first bytes of a buffer. Seeking stops at both ends: the library
/// skips by lengths that the file claims, and then waits for Position to be equal to Length.
/// </summary>
internal sealed class PictureStream(byte[] file, int length) : Stream
{
    private long _at;

    /// <summary>More was asked for than there is; the library takes zeros then.</summary>
    public bool Exhausted { get; private set; }

    public override bool CanRead => true;

    public override bool CanSeek => true;

    public override bool CanWrite => false;

    public override long Length => length;

    public override long Position
    {
        get => _at;
        set => _at = Math.Clamp(value, 0, Length);
    }

    public override int ReadByte()
    {
        if (_at >= Length)
        {
            Exhausted = true;
            return -1;
        }

        return file[_at++];
    }

    public override int Read(byte[] buffer, int offset, int count)
    {
        for (int i = 0; i < count; i++)
        {
            int next = ReadByte();
            if (next < 0) return i;
            buffer[offset + i] = (byte)next;
        }

        return count;
    }

    public override long Seek(long offset, SeekOrigin origin) => Position = offset + origin switch
    {
        SeekOrigin.Begin => 0,
        SeekOrigin.Current => _at,
        _ => Length,
    };

    public override void Flush()
    {
    }

    public override void SetLength(long value) => throw new NotSupportedException();

    public override void Write(byte[] buffer, int offset, int count) =>
        throw new NotSupportedException();
}
