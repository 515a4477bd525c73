using System.Numerics;
using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// One layer's dropout of one step over a matrix of some columns, as <see cref="Philox"/> defines
/// it. The mask is drawn where it is used, in forward and again in backward, and never stored.
/// </summary>
internal readonly unsafe struct Dropout<T>
    where T : unmanaged, IBinaryFloatingPointIeee754<T>
{
    // Elements whose mask lies on the stack at a time.
    private const int Piece = 2048;

    private readonly Randomness _random;
    private readonly int _layer;
    private readonly uint _threshold;
    private readonly T _scale;

    public Dropout(Randomness random, int layer, double p)
    {
        (_random, _layer, _threshold) = (random, layer, Philox.Threshold(p));
        _scale = Real.Of<T>(1 / (1 - p));
        Active = random.Dropout && p > 0;
    }

    public bool Active { get; }

    /// <summary>
    /// y = factor * x, or y += factor * x, over rows firstRow .. of the masked matrix, which x and
    /// y hold from their start.
    /// </summary>
    public void Apply(Workers workers, Matrix<T> x, long firstRow, Matrix<T> y, bool accumulate)
    {
        long first = firstRow * x.Cols;
        if (first + x.Count > 1L << 34)
            throw new ShapeException($"dropout over more than 2^34 elements: [{x.Rows}, {x.Cols}]");
        long lead = first % 32;
        int pieces = checked((int)((lead + x.Count + Piece - 1) / Piece));
        workers.For(pieces, new Pieces(this, x.Data, y.Data, first, x.Count, accumulate),
            minChunk: 4);
    }

    private readonly struct Pieces(
        Dropout<T> dropout, T* x, T* y, long first, long count, bool accumulate) : IRangeBody
    {
        public void Run(int begin, int end, int worker)
        {
            byte* keep = stackalloc byte[Piece];
            long origin = first - (first % 32), last = first + count;
            for (int piece = begin; piece < end; piece++)
            {
                long start = origin + ((long)piece * Piece);
                int length = (int)Math.Min(Piece, last - start);
                Philox.Mask(dropout._random, dropout._layer, dropout._threshold, start,
                    length, keep);
                int skip = (int)Math.Max(0, first - start);
                long at = start + skip - first;
                Multiply(x + at, keep + skip, dropout._scale, y + at, length - skip, accumulate);
            }
        }
    }

    private static void Multiply(T* x, byte* keep, T scale, T* y, int count, bool accumulate)
    {
        int i = 0;
        if (typeof(T) == typeof(float))
        {
            Vector256<float> factor = Vector256.Create((float)Real.ToDouble(scale));
            for (; i <= count - 8; i += 8)
            {
                Vector256<uint> bits = Widen(keep + i);
                Vector256<float> value = Vector256.Load((float*)x + i)
                    * (Vector256.ConvertToSingle(bits.AsInt32()) * factor);
                if (accumulate) value += Vector256.Load((float*)y + i);
                value.Store((float*)y + i);
            }
        }

        for (; i < count; i++)
        {
            T value = x[i] * (keep[i] != 0 ? scale : T.Zero);
            y[i] = accumulate ? y[i] + value : value;
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector256<uint> Widen(byte* source) =>
        Vector256.WidenLower(Vector256.WidenLower(
            Vector256.CreateScalarUnsafe(*(ulong*)source).AsByte()));
}
