using System.Numerics;

namespace MiniCpmNative.Kernels.Quantised;

/// <summary>The two tables of 4-bit values that bitsandbytes has.</summary>
public enum FourBitKind
{
    /// <summary>Quantiles of a normal distribution (Dettmers et al. 2023, QLoRA).</summary>
    Nf4,

    /// <summary>A sign, two bits of exponent, one of mantissa.</summary>
    Fp4,
}

/// <summary>
/// Codes of four bits in host memory: element i is Table[code of i] * scale of its block, blocks
/// being BlockSize elements of the row-major matrix one after the other, whatever its rows; the
/// code of an even element is the high half of its byte. Scales are floats, or codes themselves:
/// scale of block b = ScaleTable[ScaleCodes[b]] * Scales[b / ScaleBlock] + Offset. Codes and
/// scales are those of bitsandbytes' CUDA kernels, to the bit.
/// </summary>
public sealed unsafe record FourBitCodes(
    FourBitForm Form, byte[] Codes, float[] Table, float[] Scales, byte[]? ScaleCodes = null,
    float[]? ScaleTable = null, float Offset = 0)
{
    // Whole blocks of any size that there is; worth a thread.
    private const int Piece = 1 << 16;

    private static readonly float[] s_nf4 =
    [
        -1, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
        -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0,
        0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
        0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1,
    ];

    // The bounds between neighbours, as the CUDA kernel has them.
    private static readonly float[] s_nf4Bounds =
    [
        -0.8480964004993439f, -0.6106329262256622f, -0.4599952697753906f, -0.33967943489551544f,
        -0.23460740596055984f, -0.13791173323988914f, -0.045525018125772476f,
        0.03979014977812767f, 0.1202552504837513f, 0.2035212516784668f, 0.2920137718319893f,
        0.3893125355243683f, 0.5016634166240692f, 0.6427869200706482f, 0.8614784178118011f,
    ];

    private static readonly float[] s_fp4 =
    [
        0, 1f / 192, 2f / 3, 1, 1f / 3, 0.5f, 1f / 6, 0.25f,
        -0f, -1f / 192, -2f / 3, -1, -1f / 3, -0.5f, -1f / 6, -0.25f,
    ];

    // Of magnitudes, and the codes between them in their order.
    private static readonly float[] s_fp4Bounds =
    [
        0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f, 0.4166667f, 0.583333f, 0.8333333f,
    ];

    private static readonly byte[] s_fp4Order = [0, 1, 6, 7, 4, 5, 2, 3];

    private static readonly float[] s_scales = Dynamic();

    /// <summary>The table of a kind.</summary>
    public static float[] TableOf(FourBitKind kind) => kind == FourBitKind.Nf4 ? s_nf4 : s_fp4;

    /// <summary>Quantises a row-major matrix in host memory.</summary>
    /// <param name="form">What is made of it.</param>
    /// <param name="kind">The table.</param>
    /// <param name="type">Of the values: F32, BF16 or F16.</param>
    /// <param name="source">The values.</param>
    public static FourBitCodes Of(FourBitForm form, FourBitKind kind, DType type, void* source)
    {
        var codes = new byte[form.CodeBytes];
        var scales = new float[form.Blocks];
        Parallel.For(0, (form.Count + Piece - 1) / Piece, piece =>
        {
            long begin = piece * Piece;
            int count = (int)Math.Min(Piece, form.Count - begin);
            var values = new float[count];
            fixed (float* to = values)
                FloatBits.Widen((byte*)source + (begin * type.Size()), type, to, count);
            for (int at = 0; at < count; at += form.BlockSize)
                scales[(begin + at) / form.BlockSize] = Block(
                    values.AsSpan(at, Math.Min(form.BlockSize, count - at)), kind,
                    codes.AsSpan((int)((begin + at) / 2)));
        });
        float[] table = TableOf(kind);
        if (form.ScaleBlock == 0) return new(form, codes, table, scales);
        double sum = 0;
        foreach (float scale in scales) sum += scale;
        float offset = (float)(sum / scales.Length);
        var (scaleCodes, largest) = Nested(scales, offset, form.ScaleBlock);
        return new(form, codes, table, largest, scaleCodes, s_scales, offset);
    }

    /// <summary>Elements from..from + to.Length.</summary>
    public void Unpack(long from, Span<float> to)
    {
        fixed (byte* codes = Codes, scaleCodes = ScaleCodes)
        fixed (float* table = Table, scales = Scales, scaleTable = ScaleTable, target = to)
            new FourBitElements(codes, table, scales, scaleCodes, scaleTable, Offset, Form)
                .Unpack(from, target, to.Length);
    }

    /// <summary>Rows begin..begin + rows, which begin with a block.</summary>
    public FourBitCodes Rows(int begin, int rows)
    {
        if (rows == Form.Outputs) return this;
        FourBitForm form = Form.Part(begin, rows);
        int block = (int)(form.FirstBlock - Form.FirstBlock);
        int code = (int)((long)begin * Form.Inputs / 2);
        return this with
        {
            Form = form,
            Codes = Codes.AsSpan(code, form.CodeBytes).ToArray(),
            ScaleCodes = ScaleCodes?.AsSpan(block, form.Blocks).ToArray(),
            Scales = ScaleCodes is null ? Scales.AsSpan(block, form.Blocks).ToArray()
                : Scales.AsSpan(0, form.Scales).ToArray(),
        };
    }

    // The scale, in whose place a block of zeros has 0 (and its elements the code of NaN, as they
    // are divided by it).
    private static float Block(ReadOnlySpan<float> x, FourBitKind kind, Span<byte> to)
    {
        float largest = 0;
        foreach (float value in x) largest = MathF.Max(largest, MathF.Abs(value));
        float inverse = 1 / largest;
        Span<int> ranks = stackalloc int[FourBitForm.MostInBlock + 1];
        ReadOnlySpan<float> bounds = kind == FourBitKind.Nf4 ? s_nf4Bounds : s_fp4Bounds;
        int i = 0;
        for (; i <= x.Length - Vector<float>.Count; i += Vector<float>.Count)
        {
            Vector<float> y = new Vector<float>(x[i..]) * inverse;
            if (kind == FourBitKind.Fp4) y = Vector.Abs(y);
            var rank = Vector<int>.Zero;
            foreach (float bound in bounds) rank -= Vector.GreaterThan(y, new Vector<float>(bound));
            rank.CopyTo(ranks[i..]);
        }

        // A last element without a neighbour has a zero beside it.
        int even = (x.Length + 1) / 2 * 2;
        for (; i < even; i++)
        {
            float y = (i < x.Length ? x[i] : 0) * inverse;
            if (kind == FourBitKind.Fp4) y = MathF.Abs(y);
            ranks[i] = 0;
            foreach (float bound in bounds) ranks[i] += y > bound ? 1 : 0;
        }

        if (kind == FourBitKind.Fp4)
            for (int k = 0; k < even; k++)
                ranks[k] = s_fp4Order[ranks[k]] | (k < x.Length && x[k] * inverse < 0 ? 8 : 0);
        for (int k = 0; k < even; k += 2) to[k / 2] = (byte)((ranks[k] << 4) | ranks[k + 1]);
        return largest;
    }

    private static (byte[] Codes, float[] Largest) Nested(float[] scales, float offset, int size)
    {
        var codes = new byte[scales.Length];
        var largest = new float[(scales.Length + size - 1) / size];
        for (int block = 0; block < largest.Length; block++)
        {
            int begin = block * size, end = Math.Min(scales.Length, begin + size);
            float most = 0;
            for (int i = begin; i < end; i++) most = MathF.Max(most, MathF.Abs(scales[i] - offset));
            float inverse = 1 / most;
            for (int i = begin; i < end; i++) codes[i] = Nearest((scales[i] - offset) * inverse);
            largest[block] = most;
        }

        return (codes, largest);
    }

    // The table's nearest entry: NaN, of a block of equal scales, has the first.
    private static byte Nearest(float x)
    {
        int low = 0, high = s_scales.Length - 1;
        while (high - low > 1)
        {
            int middle = (low + high) / 2;
            if (x > s_scales[middle]) low = middle;
            else high = middle;
        }

        return (byte)(x > (s_scales[low] + s_scales[high]) * 0.5f ? high : low);
    }

    // The signed dynamic map: for each power of ten, centres of equal parts of [0.1, 1], twice as
    // many as for the one below; both signs, 0 and 1.
    private static float[] Dynamic()
    {
        const int Powers = 7;
        var all = new List<float> { 0, 1 };
        for (int i = 0; i < Powers; i++)
        {
            int parts = 1 << i;
            float step = (1 - 0.1f) / parts, power = (float)Math.Pow(10, i - (Powers - 1));
            // torch.linspace: from the nearer end, rounded once.
            float Bound(int k) => k < (parts + 1) / 2
                ? MathF.FusedMultiplyAdd(step, k, 0.1f)
                : MathF.FusedMultiplyAdd(-step, parts - k, 1);
            for (int k = 0; k < parts; k++)
            {
                float centre = power * ((Bound(k) + Bound(k + 1)) / 2);
                all.AddRange([centre, -centre]);
            }
        }

        all.Sort();
        return [.. all];
    }
}
