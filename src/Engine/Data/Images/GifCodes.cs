namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// The palette indices of a GIF's frame from its LZW codes (GIF89a specification, appendix F): the
/// lowest bit first, in blocks of up to 255 bytes behind their length; one of 0 ends them, and may
/// be missing, as for Pillow.
/// </summary>
internal sealed class GifCodes
{
    private const int Most = 1 << 12;

    private readonly ByteSource _source;
    private readonly int _indexBits, _clear;

    // A code stands for those of the one before and one more; the first of all is kept.
    private readonly short[] _before = new short[Most];
    private readonly byte[] _last = new byte[Most], _first = new byte[Most], _run = new byte[Most];
    private long _at;
    private int _block, _bits, _bitCount, _width, _count, _old = -1;
    private bool _isCleared;

    /// <param name="source">The file.</param>
    /// <param name="at">Where the number of bits of an index is, up to 12.</param>
    public GifCodes(ByteSource source, long at)
    {
        (_source, _at) = (source, at);
        _indexBits = Byte();
        _clear = 1 << _indexBits;
        for (int i = 0; i < _clear; i++) _last[i] = _first[i] = (byte)i;
        Clear();
    }

    /// <summary>What the next code stands for.</summary>
    /// <exception cref="InputException">Damaged, or there is none.</exception>
    public ReadOnlySpan<byte> Next()
    {
        int code = Read();
        while (code == _clear)
        {
            Clear();
            _isCleared = true;
            code = Read();
        }

        if (code == _clear + 1) throw Cut();
        if (!_isCleared) throw Damaged("no clear code");
        bool isAdded = _old >= 0 && _count < Most;
        if (code >= (isAdded ? _count + 1 : _count)) throw Damaged("illegal code in raster");
        if (isAdded)
        {
            (_before[_count], _first[_count]) = ((short)_old, _first[_old]);
            _last[_count] = _first[code == _count ? _old : code];
            _count++;
        }

        if (_count == 1 << _width && _count < Most) _width++;
        _old = code;
        int at = Most;
        for (; code > _clear; code = _before[code]) _run[--at] = _last[code];
        _run[--at] = _last[code];
        return _run.AsSpan(at);
    }

    private void Clear() => (_width, _count, _old) = (_indexBits + 1, _clear + 2, -1);

    private int Read()
    {
        for (; _bitCount < _width; _bitCount += 8)
        {
            if (_block == 0 && (_block = Byte()) == 0) throw Cut();
            _bits |= Byte() << _bitCount;
            _block--;
        }

        int code = _bits & ((1 << _width) - 1);
        _bits >>= _width;
        _bitCount -= _width;
        return code;
    }

    private int Byte() => _source.At(_at++, 1) is { Length: 1 } one ? one[0] : throw Cut();

    private InputException Cut() =>
        _source.Error("damaged GIF: its pixels are cut off");

    private InputException Damaged(string what) =>
        _source.Error($"damaged GIF: its pixels cannot be decoded ({what})");
}
