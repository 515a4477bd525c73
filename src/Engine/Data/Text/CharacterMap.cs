using System.Buffers.Binary;
using System.Runtime.InteropServices;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// precompiled_charsmap of a SentencePiece model: which bytes of UTF-8 are replaced by which. A
/// size, a trie as a double array in units of 32 bits (darts-clone: bits 0 to 7 label, bit 8 "a
/// value follows", bit 9 "offset in units of 256", bits 10 to 30 offset; of a value bits 0 to 30),
/// and the replacements, each ended by a zero.
/// </summary>
internal sealed class CharacterMap
{
    private const uint Value = 0x7FFFFFFF, Label = 0x800000FF;

    private readonly uint[] _units;
    private readonly byte[] _texts;
    private readonly string _path;

    /// <exception cref="InputException">The sizes do not fit.</exception>
    public CharacterMap(ReadOnlySpan<byte> blob, string path)
    {
        _path = path;
        uint bytes = blob.Length < 4 ? 0 : BinaryPrimitives.ReadUInt32LittleEndian(blob);
        if (bytes == 0 || bytes % 4 != 0 || bytes > blob.Length - 4) throw Bad();
        _units = MemoryMarshal.Cast<byte, uint>(blob.Slice(4, (int)bytes)).ToArray();
        _texts = blob[(4 + (int)bytes)..].ToArray();
        if (_texts.Length == 0 || _texts[^1] != 0) throw Bad();
    }

    private InputException Bad() => new($"{_path}: normalizer_spec.precompiled_charsmap is "
        + "damaged; download tokenizer.model again");

    /// <summary>
    /// The replacement of the longest sequence that text begins with; false when the map has none.
    /// </summary>
    public bool Replaces(
        ReadOnlySpan<byte> text, out int length, out ReadOnlySpan<byte> replacement)
    {
        length = 0;
        replacement = default;
        uint node = Offset(_units[0]);
        for (int i = 0; i < text.Length; i++)
        {
            node ^= text[i];
            if (node >= _units.Length) throw Bad();
            uint unit = _units[node];
            if ((unit & Label) != text[i]) break;
            node ^= Offset(unit);
            if ((unit & 0x100) == 0) continue;
            uint start = node < _units.Length ? _units[node] & Value : uint.MaxValue;
            if (start >= _texts.Length) throw Bad();
            var rest = _texts.AsSpan((int)start);
            length = i + 1;
            replacement = rest[..rest.IndexOf((byte)0)];
        }
        return length > 0;
    }

    private static uint Offset(uint unit) => (unit >> 10) << (int)((unit & 0x200) >> 6);
}
