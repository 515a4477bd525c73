using System.Buffers.Binary;
using System.Collections.Immutable;
using System.Text.Encodings.Web;
using System.Text.Json;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;

namespace MiniCpmNative.Engine.Weights;

/// <summary>
/// A tensor to be saved: its description, and what writes its <see cref="Bytes"/> row-major,
/// little-endian bytes when its turn comes, so that a model larger than memory can stream.
/// </summary>
public sealed unsafe record TensorToSave(
    string Name, StoredType Type, ImmutableArray<long> Sizes, Action<Stream> Write)
{
    private const int ChunkElements = 1 << 16;

    /// <summary>A tensor of a type that kernels take.</summary>
    public TensorToSave(string name, DType type, Shape shape, Action<Stream> write)
        : this(name, StoredType.Of(type), SizesOf(shape), write)
    {
    }

    public long Bytes =>
        Sizes.Aggregate((long)Type.Size, (bytes, size) => checked(bytes * size));

    /// <summary>The sizes of a shape's axes.</summary>
    public static ImmutableArray<long> SizesOf(Shape shape) =>
        [.. Enumerable.Range(0, shape.Rank).Select(axis => (long)shape[axis])];

    /// <summary>Saves floats rounded to a float type, chunk by chunk.</summary>
    public static TensorToSave Floats(string name, DType type, Shape shape, nint floats)
    {
        if (!type.IsFloat())
            throw new ArgumentOutOfRangeException(nameof(type), type, "not a float type");
        return new TensorToSave(name, type, shape, stream =>
        {
            var chunk = new byte[ChunkElements * type.Size()];
            fixed (byte* target = chunk)
            {
                for (long i = 0; i < shape.Count; i += ChunkElements)
                {
                    int count = (int)Math.Min(ChunkElements, shape.Count - i);
                    FloatBits.Narrow((float*)floats + i, target, type, count);
                    stream.Write(chunk, 0, count * type.Size());
                }
            }
        });
    }
}

/// <summary>
/// Writes safetensors files as the original library does, to the byte: metadata first, tensors by
/// element type (wider first) and then by name, the header padded with spaces to 8 bytes.
/// </summary>
public static class SafetensorsWriter
{
    // The original escapes only what JSON demands.
    private static readonly JsonWriterOptions s_json =
        new() { Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping };

    /// <summary>
    /// Writes all tensors under metadata {"format": "pt"}, which PyTorch's readers ask for.
    /// </summary>
    /// <exception cref="RunException">The file cannot be written.</exception>
    /// <exception cref="ArgumentException">A name occurs twice.</exception>
    public static void Write(string path, IEnumerable<TensorToSave> tensors)
    {
        TensorToSave[] ordered = [.. tensors
            .OrderByDescending(tensor => tensor.Type.Order)
            .ThenBy(tensor => tensor.Name, StringComparer.Ordinal)];
        byte[] header = Header(ordered);
        AtomicFile.Write(path, stream =>
        {
            stream.Write(header);
            foreach (var tensor in ordered)
            {
                long end = stream.Position + tensor.Bytes;
                tensor.Write(stream);
                if (stream.Position != end)
                    throw new InvalidOperationException($"{tensor.Name}: wrote"
                        + $" {tensor.Bytes + stream.Position - end:N0} bytes, expected "
                        + $"{tensor.Bytes:N0}");
            }
        });
    }

    private static byte[] Header(TensorToSave[] tensors)
    {
        var names = new HashSet<string>(StringComparer.Ordinal) { "__metadata__" };
        using var buffer = new MemoryStream();
        buffer.Write(stackalloc byte[8]);
        using (var json = new Utf8JsonWriter(buffer, s_json))
        {
            json.WriteStartObject();
            json.WriteStartObject("__metadata__");
            json.WriteString("format", "pt");
            json.WriteEndObject();
            long offset = 0;
            foreach (var tensor in tensors)
            {
                if (!names.Add(tensor.Name))
                    throw new ArgumentException(
                        $"tensor {Messages.Quote(tensor.Name)} is there twice");
                WriteTensor(json, tensor, offset);
                offset = checked(offset + tensor.Bytes);
            }

            json.WriteEndObject();
        }

        while (buffer.Length % 8 != 0) buffer.WriteByte((byte)' ');
        byte[] bytes = buffer.ToArray();
        BinaryPrimitives.WriteInt64LittleEndian(bytes, bytes.Length - 8);
        return bytes;
    }

    private static void WriteTensor(Utf8JsonWriter json, TensorToSave tensor, long offset)
    {
        json.WriteStartObject(tensor.Name);
        json.WriteString("dtype", tensor.Type.Name);
        json.WriteStartArray("shape");
        foreach (long size in tensor.Sizes) json.WriteNumberValue(size);
        json.WriteEndArray();
        json.WriteStartArray("data_offsets");
        json.WriteNumberValue(offset);
        json.WriteNumberValue(offset + tensor.Bytes);
        json.WriteEndArray();
        json.WriteEndObject();
    }
}
