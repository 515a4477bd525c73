using System.Buffers.Binary;
using System.Text;

namespace MiniCpmNative.Engine.Export;

/// <summary>A tensor of a GGUF file.</summary>
/// <param name="Name">Its name there.</param>
/// <param name="Type">How its values are stored.</param>
/// <param name="Sizes">Sizes of its axes, the last one contiguous; the file has them
/// reversed.</param>
/// <param name="Write">Writes its bytes when its turn comes.</param>
internal sealed record GgufTensor(
    string Name, GgufType Type, IReadOnlyList<long> Sizes, Action<Stream> Write)
{
    public long Bytes => Type.Bytes(Sizes.Aggregate(1L, (count, size) => checked(count * size)));
}

/// <summary>
/// GGUF, version 3, as llama.cpp reads it: little endian; keys, tensor descriptions, then each
/// tensor's bytes, all of them padded to the alignment. Keys keep the order in which they are
/// added; general.architecture comes first.
/// </summary>
internal sealed class GgufFile
{
    private const uint Version = 3;
    private const int Alignment = 32;

    private readonly MemoryStream _keys = new();
    private long _count;

    // Of the format's value types.
    private enum Kind : uint
    {
        UInt32 = 4,
        Int32 = 5,
        Float32 = 6,
        Bool = 7,
        Text = 8,
        Array = 9,
    }

    /// <param name="architecture">general.architecture.</param>
    public GgufFile(string architecture) => Add("general.architecture", architecture);

    public void Add(string key, string value)
    {
        Begin(key, Kind.Text);
        Text(_keys, value);
    }

    public void Add(string key, uint value)
    {
        Begin(key, Kind.UInt32);
        UInt32(_keys, value);
    }

    public void Add(string key, int value)
    {
        Begin(key, Kind.Int32);
        UInt32(_keys, unchecked((uint)value));
    }

    public void Add(string key, float value)
    {
        Begin(key, Kind.Float32);
        UInt32(_keys, BitConverter.SingleToUInt32Bits(value));
    }

    public void Add(string key, bool value)
    {
        Begin(key, Kind.Bool);
        _keys.WriteByte(value ? (byte)1 : (byte)0);
    }

    public void Add(string key, IReadOnlyCollection<string> values)
    {
        BeginArray(key, Kind.Text, values.Count);
        foreach (string value in values) Text(_keys, value);
    }

    public void Add(string key, IReadOnlyCollection<int> values)
    {
        BeginArray(key, Kind.Int32, values.Count);
        foreach (int value in values) UInt32(_keys, unchecked((uint)value));
    }

    public void Add(string key, IReadOnlyCollection<float> values)
    {
        BeginArray(key, Kind.Float32, values.Count);
        foreach (float value in values) UInt32(_keys, BitConverter.SingleToUInt32Bits(value));
    }

    /// <summary>Writes the file.</summary>
    /// <exception cref="RunException">It cannot be written.</exception>
    public void Write(string path, IReadOnlyCollection<GgufTensor> tensors)
    {
        var head = new MemoryStream();
        head.Write("GGUF"u8);
        UInt32(head, Version);
        UInt64(head, tensors.Count);
        UInt64(head, _count);
        _keys.WriteTo(head);
        long offset = 0;
        foreach (GgufTensor tensor in tensors)
        {
            Text(head, tensor.Name);
            UInt32(head, (uint)tensor.Sizes.Count);
            foreach (long size in tensor.Sizes.Reverse()) UInt64(head, size);
            UInt32(head, tensor.Type.Id);
            UInt64(head, offset);
            offset = Aligned(offset + tensor.Bytes);
        }

        AtomicFile.Write(path, stream =>
        {
            head.WriteTo(stream);
            Pad(stream);
            foreach (GgufTensor tensor in tensors)
            {
                long end = stream.Position + tensor.Bytes;
                tensor.Write(stream);
                if (stream.Position != end)
                    throw new InvalidOperationException($"{tensor.Name}: wrote "
                        + $"{tensor.Bytes + stream.Position - end:N0} bytes of {tensor.Bytes:N0}");
                Pad(stream);
            }
        });
    }

    private void Begin(string key, Kind kind)
    {
        _count++;
        Text(_keys, key);
        UInt32(_keys, (uint)kind);
    }

    private void BeginArray(string key, Kind kind, int count)
    {
        Begin(key, Kind.Array);
        UInt32(_keys, (uint)kind);
        UInt64(_keys, count);
    }

    private static long Aligned(long offset) =>
        (offset + Alignment - 1) / Alignment * Alignment;

    private static void Pad(Stream stream) =>
        stream.Write(new byte[Aligned(stream.Position) - stream.Position]);

    private static void Text(Stream stream, string value)
    {
        byte[] bytes = Encoding.UTF8.GetBytes(value);
        UInt64(stream, bytes.Length);
        stream.Write(bytes);
    }

    private static void UInt32(Stream stream, uint value)
    {
        Span<byte> bytes = stackalloc byte[4];
        BinaryPrimitives.WriteUInt32LittleEndian(bytes, value);
        stream.Write(bytes);
    }

    private static void UInt64(Stream stream, long value)
    {
        Span<byte> bytes = stackalloc byte[8];
        BinaryPrimitives.WriteInt64LittleEndian(bytes, value);
        stream.Write(bytes);
    }
}
