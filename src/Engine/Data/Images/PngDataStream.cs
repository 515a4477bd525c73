namespace MiniCpmNative.Engine.Data.Images;

/// <summary>The data of a run of IDAT chunks, read in place from the file's bytes.</summary>
internal sealed class PngDataStream(PngHeader header, byte[] file, int length) : Stream
{
    private long _at = header.DataAt, _left = -4;

    /// <summary>More was asked for than the run of chunks, or the file, holds.</summary>
    public bool Exhausted { get; private set; }

    /// <summary>Where the chunk being read ends, its checksum included.</summary>
    public long ChunkEnd => _at + _left + 4;

    public override bool CanRead => true;

    public override bool CanSeek => false;

    public override bool CanWrite => false;

    public override long Length => throw new NotSupportedException();

    public override long Position
    {
        get => throw new NotSupportedException();
        set => throw new NotSupportedException();
    }

    /// <summary>Compressed bytes that the run of IDAT chunks holds, without reading them.</summary>
    public static long Available(PngHeader header, long fileLength)
    {
        long sum = 0;
        for (long at = header.DataAt; header.Chunk(at) is { } chunk && PngHeader.IsData(chunk.Type);
            at += 12 + chunk.Length)
            sum += Math.Clamp(chunk.Length, 0, Math.Max(0, fileLength - at - 8));
        return sum;
    }

    /// <summary>The next bytes, at most that many, of one chunk; none at the end.</summary>
    public ReadOnlySpan<byte> Next(int most)
    {
        // -4 marks the start: no checksum of a chunk before to step over.
        while (_left <= 0)
        {
            long next = ChunkEnd;
            if (header.Chunk(next) is not { } chunk || !PngHeader.IsData(chunk.Type))
            {
                Exhausted = true;
                return default;
            }

            (_at, _left) = (next + 8, chunk.Length);
        }

        int count = (int)Math.Min(Math.Min(most, _left), Math.Max(0, length - _at));
        Exhausted |= count == 0 && most > 0;
        var part = file.AsSpan((int)Math.Min(_at, length), count);
        _at += count;
        _left -= count;
        return part;
    }

    public override int Read(Span<byte> into)
    {
        var part = Next(into.Length);
        part.CopyTo(into);
        return part.Length;
    }

    public override int Read(byte[] buffer, int offset, int count) =>
        Read(buffer.AsSpan(offset, count));

    public override void Flush()
    {
    }

    public override long Seek(long offset, SeekOrigin origin) => throw new NotSupportedException();

    public override void SetLength(long value) => throw new NotSupportedException();

    public override void Write(byte[] buffer, int offset, int count) =>
        throw new NotSupportedException();
}
