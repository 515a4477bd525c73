using System.Buffers.Binary;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// Whether what a Parquet file says of itself, in its footer and before each page, can be so:
/// structures (Thrift's compact protocol) that end, fields of the types that the format gives them,
/// pages that lie in the file and have the values of their column, sizes that such a file can hold.
/// The library that reads it makes room for whatever is claimed, reads each field as what its
/// number stands for, and follows pages to wherever they are said to be.
/// </summary>
internal ref struct ParquetStructure
{
    private const int MostDepth = 32;

    // A group's values and bytes beyond those that its stored bytes let expect: values in runs,
    // texts that repeat themselves.
    private const long FreeValues = 1 << 22, FreeBytes = 1 << 26;
    private const int ValuesOfAByte = 8, BytesOfAStored = 100;

    // Structures by the numbers of the fields that lead to them, a byte each; those of pages begin
    // with one of their own. See parquet.thrift.
    private const ulong File = 0, Schema = 0x02, Pair = 0x05, Group = 0x04, Sorting = 0x0404,
        Chunk = 0x0401, Column = 0x040103, ColumnPair = 0x04010308, Encodings = 0x0401030D,
        Statistics = 0x0401030C, Page = 0xF0, Data = 0xF005, DataStatistics = 0xF00505,
        Dictionary = 0xF007, Data2 = 0xF008, Data2Statistics = 0xF00808, Unknown = ulong.MaxValue;

    private ReadOnlySpan<byte> _pages, _left;
    private Stack<long>? _open;

    // Of the schema's element, the column, the group and the page that are being read.
    private long _children, _values, _data, _index, _dictionary;
    private long _rows, _columns, _fewest, _groupValues, _stored, _whole;
    private long _type, _count, _entries, _count2;

    /// <param name="file">A whole file, whose first and last four bytes are the format's.</param>
    public static bool IsSound(ReadOnlySpan<byte> file)
    {
        if (file.Length < 12) return false;
        uint length = BinaryPrimitives.ReadUInt32LittleEndian(file[^8..]);
        if (length > file.Length - 12) return false;
        int end = file.Length - 8 - (int)length;
        var footer = new ParquetStructure
        {
            _pages = file[..end],
            _left = file.Slice(end, (int)length),
            _open = [],
        };
        return footer.Pass(12, 0, File);
    }

    // The types of a structure's fields, from number 1 on, as the protocol numbers them; C is a
    // structure.
    private static string Types(ulong path) => path switch
    {
        File => "5969989C8",
        Schema => "555855555C",
        Pair or ColumnPair => "88",
        Group => "9669664",
        Sorting => "511",
        Chunk => "86C6565C8",
        Column => "59956669666C965CC",
        Encodings => "555",
        Statistics or DataStatistics or Data2Statistics => "88668811",
        Page => "5555CCCC",
        Data => "5555C",
        Dictionary => "551",
        Data2 => "5555551C",
        _ => "",
    };

    // Lists and maps of flags take a byte each.
    private bool Pass(int type, int depth, ulong path) => depth < MostDepth && type switch
    {
        1 or 2 => true,
        3 => Skip(1),
        4 or 5 or 6 => Number(out ulong number)
            && Take(path, (long)(number >> 1) ^ -(long)(number & 1)),
        7 => Skip(8),
        8 => Number(out ulong bytes) && Skip(bytes),
        9 or 10 => List(depth, path),
        12 => Members(depth, path),
        _ => false,
    };

    private bool List(int depth, ulong path)
    {
        if (!Byte(out int head)) return false;
        ulong count = (ulong)(head >> 4);
        if (count == 15 && !Number(out count)) return false;
        int type = head & 15, expected = path switch
        {
            Schema or Group or Pair or Chunk or Sorting or ColumnPair or Encodings => 12,
            (Column << 8) | 2 => 5,
            (Column << 8) | 3 => 8,
            _ => type,
        };
        if (count > 0 && type != expected) return false;
        for (ulong i = 0; i < count; i++)
            if (!Pass(type is 1 or 2 ? 3 : type, depth + 1, path)) return false;
        return true;
    }

    private bool Members(int depth, ulong path)
    {
        string types = Types(path);
        for (long id = 0; Byte(out int head);)
        {
            if (head == 0) return End(path);
            ulong number = 0;
            if (head >> 4 == 0 && !Number(out number)) return false;
            id = head >> 4 == 0 ? (long)(number >> 1) ^ -(long)(number & 1) : id + (head >> 4);
            int type = head & 15;
            if (id > 0 && id <= types.Length
                && types[(int)id - 1] != "0113456789ABCDEF"[type]) return false;
            ulong inner = id is > 0 and < 0xF0 && path >> 56 == 0 ? (path << 8) | (ulong)id
                : Unknown;
            if (!Pass(type, depth + 1, inner)) return false;
        }

        return false;
    }

    private bool Take(ulong path, long value)
    {
        switch (path)
        {
            case (Schema << 8) | 5: _children = value; break;
            case (Group << 8) | 3: _rows = value; break;
            case (Column << 8) | 5: _values = value; break;
            case (Column << 8) | 9: _data = value; break;
            case (Column << 8) | 10: _index = value; break;
            case (Column << 8) | 11: _dictionary = value; break;
            case (Page << 8) | 1: _type = value; break;
            case (Page << 8) | 2: _whole = value; break;
            case (Page << 8) | 3: _stored = value; break;
            case (Data << 8) | 1: _count = value; break;
            case (Dictionary << 8) | 1: _entries = value; break;
            case (Data2 << 8) | 1: _count2 = value; break;
        }

        return true;
    }

    private bool End(ulong path) => path switch
    {
        Schema => Nests(),
        Column => HasPages(),
        Group => HasRows(),
        _ => true,
    };

    // Schemas are trees: each element is followed by as many as it has under it.
    private bool Nests()
    {
        while (_open!.TryPeek(out long left) && left == 0) _open.Pop();
        if (_open.Count > 0) _open.Push(_open.Pop() - 1);
        if (_children > 0) _open.Push(_children);
        _children = 0;
        return _open.Count < MostDepth;
    }

    private bool HasPages()
    {
        if (_values is < 0 or > int.MaxValue) return false;
        long at = long.MaxValue;
        foreach (long offset in (ReadOnlySpan<long>)[_data, _index, _dictionary])
            if (offset != 0) at = Math.Min(at, offset);
        for (long left = _values; left > 0;)
        {
            if (at < 4 || at >= _pages.Length) return false;
            var page = new ParquetStructure { _left = _pages[(int)at..] };
            if (!page.Pass(12, 0, Page) || page._whole < 0
                || page._stored < 0 || page._stored > page._left.Length) return false;
            at = _pages.Length - page._left.Length + page._stored;
            _stored += page._stored;
            _whole += page._whole;
            long count = page._type == 0 ? page._count : page._type == 3 ? page._count2 : 0;
            if (count < 0 || count > left || page._entries < 0 || page._entries > page._whole)
                return false;
            left -= count;
        }

        _fewest = _columns++ == 0 ? _values : Math.Min(_fewest, _values);
        _groupValues += _values;
        _values = _data = _index = _dictionary = 0;
        return true;
    }

    private bool HasRows()
    {
        bool fits = _rows >= 0 && _rows <= _fewest
            && _whole <= FreeBytes + (BytesOfAStored * _stored)
            && _groupValues <= FreeValues + (ValuesOfAByte * _whole);
        _rows = _columns = _fewest = _groupValues = _stored = _whole = 0;
        return fits;
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
