using System.Buffers.Binary;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// Protocol Buffers' wire format, field by field; every length is checked against what is there.
/// </summary>
internal ref struct ProtobufReader(ReadOnlySpan<byte> bytes, string path)
{
    private readonly ReadOnlySpan<byte> _bytes = bytes;
    private int _at;
    private int _wire;

    /// <summary>Number of the field that Next has found.</summary>
    public int Field { get; private set; }

    /// <summary>Moves to the next field, whose value must be read or skipped; false at the
    /// end.</summary>
    public bool Next()
    {
        if (_at == _bytes.Length) return false;
        ulong tag = Varint();
        (Field, _wire) = ((int)(tag >> 3), (int)(tag & 7));
        return tag >> 3 is > 0 and <= 0x1FFFFFFF ? true : throw Bad();
    }

    public ReadOnlySpan<byte> Bytes()
    {
        Expect(2);
        ulong length = Varint();
        return Take(length > int.MaxValue ? int.MaxValue : (int)length);
    }

    public string Text()
    {
        var text = Bytes();
        return System.Text.Unicode.Utf8.IsValid(text)
            ? System.Text.Encoding.UTF8.GetString(text)
            : throw new InputException($"{path}: a text is not UTF-8; {What}");
    }

    public long Integer()
    {
        Expect(0);
        return (long)Varint();
    }

    public bool Flag() => Integer() != 0;

    public float Single()
    {
        Expect(5);
        return BinaryPrimitives.ReadSingleLittleEndian(Take(4));
    }

    public void Skip()
    {
        switch (_wire)
        {
            case 0: Varint(); break;
            case 1: Take(8); break;
            case 2: Bytes(); break;
            case 5: Take(4); break;
            default: throw Bad();
        }
    }

    private const string What =
        "expected a SentencePiece model (tokenizer.model), whole and unchanged";

    private readonly InputException Bad() => new($"{path}: is damaged or of another kind; {What}");

    private readonly void Expect(int wire)
    {
        if (_wire != wire) throw Bad();
    }

    private ReadOnlySpan<byte> Take(int count)
    {
        if (count > _bytes.Length - _at) throw Bad();
        var taken = _bytes.Slice(_at, count);
        _at += count;
        return taken;
    }

    private ulong Varint()
    {
        ulong value = 0;
        for (int shift = 0; shift < 64; shift += 7)
        {
            byte next = Take(1)[0];
            value |= (ulong)(next & 0x7F) << shift;
            if (next < 0x80) return value;
        }
        throw Bad();
    }
}
