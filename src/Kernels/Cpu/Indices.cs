using System.Numerics;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// Rows looked up by index. A wrong index would read or write foreign memory, so each is checked
/// before the threads start.
/// </summary>
internal static unsafe class Indices
{
    /// <exception cref="ShapeException">An index is negative or not below the limit.</exception>
    public static void MustBeBelow(Op op, string name, Matrix<int> indices, int limit)
    {
        for (int i = 0; i < indices.Count; i++)
            if ((uint)indices[i] >= (uint)limit)
                throw new ShapeException(
                    $"{op.Name}: {name}[{i}] is {indices[i]}, expected 0 to {limit - 1}");
    }

    /// <summary>
    /// from[row] = the i with positions[i] = row, or -1:
    /// which row replaces each of the given number.
    /// </summary>
    /// <exception cref="ShapeException">A position is outside, or stands twice.</exception>
    public static void Invert(Op op, string name, Matrix<int> positions, Matrix<int> from)
    {
        int rows = (int)from.Count;
        MustBeBelow(op, name, positions, rows);
        new Span<int>(from.Data, rows).Fill(-1);
        for (int i = 0; i < positions.Count; i++)
        {
            ref int first = ref from[positions[i]];
            if (first >= 0)
                throw new ShapeException(
                    $"{op.Name}: {name}[{i}] is {positions[i]}, as is {name}[{first}]");
            first = i;
        }
    }

    /// <summary>to = a row of a matrix in any float storage, widened.</summary>
    public static void Read<T>(in Tensor table, int row, T* to)
        where T : unmanaged
    {
        int cols = table.Shape.Cols;
        var from = (byte*)table.Data + ((long)row * cols * table.Type.Size());
        if (typeof(T) == typeof(float)) FloatBits.Widen(from, table.Type, (float*)to, cols);
        else if (table.Type == DType.F64) new Span<T>(from, cols).CopyTo(new Span<T>(to, cols));
        else throw new ShapeException($"{table.Spec} in an F64 computation");
    }

    /// <summary>
    /// into[row] = scale * sum of dy over the tokens whose id is row, or adds it; rows without a
    /// token become zero unless the gradient accumulates. Tokens are sorted by id first, and each
    /// row sums its own in token order, so any number of threads gives the same bits. With rowOf
    /// and weights term k is weights[k] times row rowOf[k] of dy.
    /// </summary>
    public static void SumById<T>(
        in CpuCall<T> call, Matrix<int> ids, Matrix<T> dy, T scale, Gradient<T> into,
        Matrix<int> rowOf = default, Matrix<T> weights = default)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        int rows = into.Into.Rows, tokens = (int)ids.Count;
        Matrix<int> ends = call.ScratchInts(rows + 1), order = call.ScratchInts(tokens);
        new Span<int>(ends.Data, rows + 1).Clear();
        for (int i = 0; i < tokens; i++) ends[ids[i] + 1]++;
        for (int row = 0; row < rows; row++) ends[row + 1] += ends[row];
        for (int i = 0; i < tokens; i++) order[ends[ids[i]]++] = i;
        call.Workers.For(rows,
            new Segments<T>(ends, order, dy, scale, into, rowOf, weights), minChunk: 64);
    }

    // After sorting, ends[row] is where the tokens of row end;
    // they start where those of row - 1 end.
    private readonly struct Segments<T>(
        Matrix<int> ends, Matrix<int> order, Matrix<T> dy, T scale, Gradient<T> into,
        Matrix<int> rowOf, Matrix<T> weights) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int row = begin; row < end; row++)
            {
                int first = row == 0 ? 0 : ends[row - 1], last = ends[row];
                if (first == last && !into.Accumulate) into.Into.RowSpan(row).Clear();
                for (int i = first; i < last; i++)
                {
                    int term = order[i];
                    T* from = dy.Row(rowOf.Exists ? rowOf[term] : term);
                    T factor = weights.Exists ? scale * weights[term] : scale;
                    Elementwise.Map(from, null, null, into.Into.Row(row), dy.Cols,
                        into.Accumulate || i > first, new Elementwise.Scaled<T>(factor));
                }
            }
        }
    }
}
