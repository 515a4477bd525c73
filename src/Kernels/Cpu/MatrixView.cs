namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// A matrix in somebody else's memory: row-major with a stride, or packed (<see
/// cref="PackedMatrix"/>). <see cref="T"/> is the same memory read the other way round, so a
/// product says its transposes in its operands: y = x W^T is <c>gemm.Multiply(x, w.T, y)</c>, and
/// it does not matter to the caller whether w is packed.
/// </summary>
public readonly unsafe struct MatrixView
{
    /// <summary>
    /// Row-major elements; stride counts elements from row to row, cols when left out.
    /// </summary>
    /// <exception cref="ShapeException">A negative size, or a stride below the columns.</exception>
    public MatrixView(void* data, DType type, int rows, int cols, long? stride = null)
        : this(data, type, rows, cols, stride ?? cols, transposed: false, packed: false)
    {
        if (rows < 0 || cols < 0)
            throw new ShapeException($"matrix: negative size [{rows}, {cols}]");
        if (Stride < cols)
            throw new ShapeException($"matrix: stride {Stride} is below the {cols} columns");
    }

    private MatrixView(
        void* data, DType type, int rows, int cols, long stride, bool transposed, bool packed)
    {
        Data = data;
        Type = type;
        Rows = rows;
        Cols = cols;
        Stride = stride;
        IsTransposed = transposed;
        IsPacked = packed;
    }

    public void* Data { get; }

    public DType Type { get; }

    /// <summary>Rows as seen through this view.</summary>
    public int Rows { get; }

    /// <summary>Columns as seen through this view.</summary>
    public int Cols { get; }

    /// <summary>Elements between stored rows; in a packed matrix between panels.</summary>
    public long Stride { get; }

    /// <summary>Whether the memory holds the transpose of what the view shows.</summary>
    public bool IsTransposed { get; }

    public bool IsPacked { get; }

    /// <summary>The transpose; no element moves.</summary>
    public MatrixView T => new(Data, Type, Cols, Rows, Stride, !IsTransposed, IsPacked);

    /// <summary>Rows begin .. begin + count - 1 of a view that is not transposed.</summary>
    /// <exception cref="ShapeException">
    /// Outside the matrix, a transposed view, or a packed one cut elsewhere than at whole panels.
    /// </exception>
    public MatrixView RowRange(int begin, int count)
    {
        if (IsTransposed || begin < 0 || count < 0 || begin > Rows - count)
            throw new ShapeException($"matrix: rows {begin} + {count} of {this}");
        if (IsPacked && begin % PackedMatrix.PanelRows != 0)
        {
            throw new ShapeException(
                $"matrix: packed rows start at multiples of {PackedMatrix.PanelRows}, got {begin}");
        }

        long step = IsPacked ? begin / PackedMatrix.PanelRows : begin;
        byte* data = (byte*)Data + (step * Stride * Type.Size());
        return new(data, Type, count, Cols, Stride, transposed: false, IsPacked);
    }

    public override string ToString() =>
        $"{Type} [{Rows}, "
            + $"{Cols}]{(IsTransposed ? " transposed" : "")}{(IsPacked ? " packed" : "")}";

    internal static MatrixView Packed(void* data, DType type, int rows, int cols) =>
        new(data, type, rows, cols, (long)cols * PackedMatrix.PanelRows, false, packed: true);
}
