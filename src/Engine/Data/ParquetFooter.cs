using System.Buffers.Binary;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// Whether the structure of a Parquet file's footer, Thrift's compact protocol, ends where the file
/// says that it does. The library that reads it waits for ever for the end of a number that is cut
/// off, and makes room for lists of any length that is claimed.
/// </summary>
internal ref struct ParquetFooter
{
    private const int MostDepth = 32;

    private ReadOnlySpan<byte> _left;

    /// <param name="file">A whole file, whose first and last four bytes are the format's.</param>
    public static bool IsWhole(ReadOnlySpan<byte> file)
    {
        if (file.Length < 12) return false;
        uint length = BinaryPrimitives.ReadUInt32LittleEndian(file[^8..]);
        if (length > file.Length - 12) return false;
        var footer = new ParquetFooter { _left = file.Slice(file.Length - 8 - (int)length, (int)length) };
        return footer.Pass(12, 0);
    }

    // The types of the protocol by their numbers; lists and maps of flags take a byte each.
    private bool Pass(int type, int depth) => depth < MostDepth && type switch
    {
        1 or 2 => true,
        3 => Skip(1),
        4 or 5 or 6 => Number(out _),
        7 => Skip(8),
        8 => Number(out ulong bytes) && Skip(bytes),
        9 or 10 => List(depth),
        12 => Members(depth),
        _ => false,
    };

    private bool List(int depth)
    {
        if (!Byte(out int head)) return false;
        ulong count = (ulong)(head >> 4);
        if (count == 15 && !Number(out count)) return false;
        int type = head & 15;
        for (ulong i = 0; i < count; i++)
            if (!Pass(type is 1 or 2 ? 3 : type, depth + 1)) return false;
        return true;
    }

    private bool Members(int depth)
    {
        while (Byte(out int head))
        {
            if (head == 0) return true;
            if ((head >> 4 == 0 && !Number(out _)) || !Pass(head & 15, depth + 1)) return false;
        }

        return false;
    }

    private bool Number(out ulong value)
    {
        value = 0;
        for (int shift = 0; shift < 64; shift += 7)
        {
            if (!Byte(out int next)) return false;
            value |= (ulong)(next & 127) << shift;
            if (next < 128) return true;
        }

        return false;
    }

    private bool Byte(out int value)
    {
        value = _left.IsEmpty ? 0 : _left[0];
        return Skip(1);
    }

    private bool Skip(ulong count)
    {
        if (count > (ulong)_left.Length) return false;
        _left = _left[(int)count..];
        return true;
    }
}
