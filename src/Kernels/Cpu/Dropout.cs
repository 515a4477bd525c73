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
    private readonly int _threshold;
    private readonly T _scale;

    public Dropout(Randomness random, int layer, double p)
    {
        (_random, _layer, _threshold) = (random, layer, Philox.Threshold(p));
        _scale = Real.Of<T>(Philox.Scale(p));
        Active = random.Dropout && _threshold > 0;
    }

    public bool Active { get; }

    /// <summary>
    /// y = factor * x, or y += factor * x, over rows firstRow .. of the masked matrix, which x and
    /// y hold from their start.
    /// </summary>
    public void Apply(Workers workers, Matrix<T> x, long firstRow, Matrix<T> y, bool accumulate)
    {
        Philox.MustBeDrawable(firstRow + x.Rows, x.Cols);
        int pieces = (x.Cols + Piece - 1) / Piece;
        workers.For(checked(x.Rows * pieces),
            new Pieces(this, x.Data, y.Data, firstRow, x.Cols, pieces, accumulate),
            minChunk: Math.Max(1, 4 * Piece / Math.Max(1, Math.Min(x.Cols, Piece))));
    }

    private readonly struct Pieces(Dropout<T> dropout, T* x, T* y, long firstRow, int cols,
        int pieces, bool accumulate) : IRangeBody
    {
        public void Run(int begin, int end, int worker)
        {
            byte* keep = stackalloc byte[Piece];
            for (int i = begin; i < end; i++)
            {
                int row = i / pieces, col = i % pieces * Piece, count = Math.Min(Piece, cols - col);
                Philox.Mask(dropout._random, dropout._layer, dropout._threshold,
                    ((firstRow + row) * Philox.DrawnCols(cols)) + col, count, keep);
                long at = ((long)row * cols) + col;
                Multiply(x + at, keep, dropout._scale, y + at, count, accumulate);
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
