namespace MiniCpmNative.Kernels;

/// <summary>
/// Sizes of a contiguous row-major tensor, outermost first, at most four; no axes is a scalar.
/// Kernels see matrices: <see cref="Cols"/> is the last axis and <see cref="Rows"/> all others.
/// </summary>
public readonly record struct Shape
{
    public const int MaxRank = 4;

    private readonly int _d0, _d1, _d2, _d3;

    public Shape(params ReadOnlySpan<int> sizes)
    {
        if (sizes.Length > MaxRank)
            throw new ShapeException($"a shape has at most {MaxRank} axes, got {sizes.Length}");
        foreach (int size in sizes)
            if (size < 0) throw new ShapeException($"negative size {size} in a shape");
        Rank = sizes.Length;
        if (Rank > 0) _d0 = sizes[0];
        if (Rank > 1) _d1 = sizes[1];
        if (Rank > 2) _d2 = sizes[2];
        if (Rank > 3) _d3 = sizes[3];
        _ = checked((long)Size(0) * Size(1) * Size(2) * Size(3));
    }

    public int Rank { get; }

    public int this[int axis] => (uint)axis < (uint)Rank
        ? Size(axis)
        : throw new ShapeException($"axis {axis} of {this}, which has {Rank}");

    public long Count => Rank == 0 ? 1 : Rows * Cols;

    /// <summary>Last axis; 1 for a scalar.</summary>
    public int Cols => Rank == 0 ? 1 : Size(Rank - 1);

    /// <summary>Product of all axes but the last.</summary>
    public long Rows
    {
        get
        {
            long rows = 1;
            for (int axis = 0; axis < Rank - 1; axis++) rows *= Size(axis);
            return rows;
        }
    }

    public override string ToString()
    {
        Span<int> sizes = [_d0, _d1, _d2, _d3];
        return "[" + string.Join(", ", sizes[..Rank].ToArray()) + "]";
    }

    private int Size(int axis) =>
        axis >= Rank ? 1 : axis switch { 0 => _d0, 1 => _d1, 2 => _d2, _ => _d3 };
}
