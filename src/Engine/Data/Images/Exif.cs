using System.Buffers.Binary;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>The one thing wanted of EXIF metadata: how the camera was held.</summary>
internal static class Exif
{
    private const int OrientationTag = 0x0112;

    /// <summary>
    /// Orientation, 1 to 8, from the TIFF structure in the length bytes at an offset (with or
    /// without "Exif\0\0" in front); 1 when there is none or the structure is damaged, as Pillow
    /// has it.
    /// </summary>
    public static int Orientation(ByteSource source, long at, long length)
    {
        long end = Math.Min(at + length, source.Length);
        if (source.At(at, 6).SequenceEqual("Exif\0\0"u8)) at += 6;
        var head = source.At(at, 8);
        if (end - at < 8 || head.Length < 8) return 1;
        bool little = head.StartsWith("II*\0"u8);
        if (!little && !head.StartsWith("MM\0*"u8)) return 1;

        long directory = at + Number(head[4..], 4, little);
        if (directory + 2 > end) return 1;
        long count = Number(source.At(directory, 2), 2, little);
        for (long i = 0; i < count; i++)
        {
            long entryAt = directory + 2 + (12 * i);
            if (entryAt + 12 > end) return 1;
            var entry = source.At(entryAt, 12);
            if (entry.Length < 12) return 1;
            if (Number(entry, 2, little) != OrientationTag) continue;
            int size = Number(entry[2..], 2, little) switch { 1 => 1, 3 => 2, 4 => 4, _ => 0 };
            long value = Number(entry[8..], size, little);
            return size > 0 && value is >= 1 and <= 8 ? (int)value : 1;
        }

        return 1;
    }

    private static long Number(ReadOnlySpan<byte> bytes, int size, bool little) =>
        (size, little) switch
        {
            _ when bytes.Length < size => 0,
            (1, _) => bytes[0],
            (2, true) => BinaryPrimitives.ReadUInt16LittleEndian(bytes),
            (2, false) => BinaryPrimitives.ReadUInt16BigEndian(bytes),
            (4, true) => BinaryPrimitives.ReadUInt32LittleEndian(bytes),
            (4, false) => BinaryPrimitives.ReadUInt32BigEndian(bytes),
            _ => 0,
        };
}
