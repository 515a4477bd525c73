namespace MiniCpmNative.Kernels.Quantised;

/// <summary>Sizes of a matrix of 4-bit codes.</summary>
/// <param name="Outputs">Rows.</param>
/// <param name="Inputs">Columns.</param>
/// <param name="BlockSize">Elements of a scale, a power of two.</param>
/// <param name="ScaleBlock">Scales of a scale of theirs, a power of two; 0 where they are
/// floats.</param>
/// <param name="FirstBlock">Where it is a part of a matrix, the block that it begins with.</param>
public readonly record struct FourBitForm(
    int Outputs, int Inputs, int BlockSize = 64, int ScaleBlock = 0, long FirstBlock = 0)
{
    /// <summary>The largest block there is.</summary>
    public const int MostInBlock = 4096;

    public long Count => (long)Outputs * Inputs;

    public int CodeBytes => checked((int)((Count + 1) / 2));

    public int Blocks => checked((int)((Count + BlockSize - 1) / BlockSize));

    /// <summary>Floats that scale: blocks, or blocks of blocks of the whole matrix.</summary>
    public int Scales => ScaleBlock == 0 ? Blocks
        : checked((int)((FirstBlock + Blocks + ScaleBlock - 1) / ScaleBlock));

    /// <summary>Of codes, table and scales.</summary>
    public long Bytes => CodeBytes + (sizeof(float) * (16L + Scales))
        + (ScaleBlock == 0 ? 0 : Blocks + (sizeof(float) * 256L));

    /// <summary>Whether rows from there on begin with a block.</summary>
    public bool Splits(int begin) => (long)begin * Inputs % BlockSize == 0;

    public FourBitForm Part(int begin, int rows) => this with
    {
        Outputs = rows,
        FirstBlock = FirstBlock + ((long)begin * Inputs / BlockSize),
    };
}

/// <summary>The same codes wherever they lie in host memory.</summary>
public readonly unsafe struct FourBitElements(
    byte* codes, float* table, float* scales, byte* scaleCodes, float* scaleTable, float offset,
    FourBitForm form) : IPackedElements
{
    public void Unpack(long from, float* to, int count)
    {
        float* scaled = stackalloc float[16];
        for (long at = from, end = from + count; at < end;)
        {
            long block = at / form.BlockSize, stop = Math.Min(end, (block + 1) * form.BlockSize);
            float scale = Scale(block);
            for (int i = 0; i < 16; i++) scaled[i] = table[i] * scale;
            if (at % 2 != 0) *to++ = scaled[codes[at++ / 2] & 15];
            byte* code = codes + (at / 2);
            for (; at + 2 <= stop; at += 2, to += 2, code++)
                (to[0], to[1]) = (scaled[*code >> 4], scaled[*code & 15]);
            if (at < stop) (*to++, at) = (scaled[*code >> 4], at + 1);
        }
    }

    // Multiplied, rounded, added: not at once.
    private float Scale(long block)
    {
        if (scaleCodes is null) return scales[block];
        float product =
            scaleTable[scaleCodes[block]] * scales[(form.FirstBlock + block) / form.ScaleBlock];
        return product + offset;
    }
}
