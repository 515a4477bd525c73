using System.Buffers.Binary;
using Microsoft.Win32.SafeHandles;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// Reading at any place of a picture file, in memory or on disk, so that one parser serves decoding
/// and probing. From disk a window of a few KiB is read at a time. Nothing is read beyond the end:
/// fewer bytes come back.
/// </summary>
internal sealed class ByteSource
{
    /// <summary>Bytes that are read at a time.</summary>
    public const int Most = 4096;

    private readonly SafeFileHandle? _file;
    private readonly byte[] _bytes;
    private long _windowAt;
    private int _windowLength;

    /// <summary>The first length bytes of data; name stands in errors.</summary>
    public ByteSource(byte[] data, int length, string name) =>
        (_bytes, _windowLength, Length, Name) = (data, length, length, name);

    public ByteSource(SafeFileHandle file, long length, string name) =>
        (_file, _bytes, Length, Name) = (file, new byte[Most], length, name);

    public long Length { get; }

    public string Name { get; }

    /// <summary>Up to count (at most <see cref="Most"/>) bytes at an offset; valid until the next
    /// call.</summary>
    public ReadOnlySpan<byte> At(long at, int count)
    {
        if (at < 0 || at >= Length) return default;
        count = (int)Math.Min(count, Length - at);
        if (at < _windowAt || at + count > _windowAt + _windowLength)
        {
            _windowAt = at;
            _windowLength = RandomAccess.Read(_file!, _bytes, at);
            count = Math.Min(count, _windowLength);
        }

        return _bytes.AsSpan((int)(at - _windowAt), count);
    }

    /// <summary>The big-endian 16-bit number at an offset, -1 beyond the end.</summary>
    public int Word(long at) =>
        At(at, 2) is { Length: 2 } two ? BinaryPrimitives.ReadUInt16BigEndian(two) : -1;

    /// <summary>An error about this file.</summary>
    public InputException Error(string what, Exception? inner = null) =>
        new($"{Name}: {what}", inner);
}
