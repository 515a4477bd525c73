namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// The memory that the next block of B will be packed from. Packing alone would wait for it, as
/// nothing else happens then; so the tiles of the block before fetch it, a few cache lines each.
/// </summary>
internal unsafe struct GemmAhead
{
    private const int Line = 64;

    private byte* _row;
    private nint _length, _stride, _at;
    private int _rows, _linesPerTile;

    /// <summary>Columns n.. and k.. of B, to be fetched while some tiles are computed.</summary>
    public static GemmAhead Of<T>(in GemmPlan<T> plan, int n, int cols, int k, int depth, int tiles)
        where T : unmanaged
    {
        int size = plan.BType.Size(), panel = PackedMatrix.PanelRows;
        nint stride = plan.BStride;
        // Rows of memory, elements of each, and the first.
        var (rows, length, first) = plan.BLayout switch
        {
            RightLayout.Rows => (depth, cols, (k * stride) + n),
            RightLayout.Transposed => (cols, depth, (n * stride) + k),
            RightLayout.Panels =>
                (Panels(cols), depth * panel, (n / panel * stride) + ((nint)k * panel)),
            _ => (Panels(depth), cols * panel, (k / panel * stride) + ((nint)n * panel)),
        };
        long lines = (((long)length * size) + Line - 1) / Line * rows;
        return new GemmAhead
        {
            _row = plan.B + (first * size),
            _length = (nint)length * size,
            _stride = stride * size,
            _rows = rows,
            _linesPerTile = (int)((lines + tiles - 1) / Math.Max(1, tiles)),
        };

        int Panels(int count) => (count + panel - 1) / panel;
    }

    /// <summary>Fetches one tile's share.</summary>
    public void Fetch<T, V, I>()
        where T : unmanaged, System.Numerics.IBinaryFloatingPointIeee754<T>
        where V : unmanaged
        where I : ISimd<T, V>
    {
        for (int i = 0; i < _linesPerTile && _rows > 0; i++)
        {
            I.Prefetch(_row + _at);
            _at += Line;
            if (_at < _length) continue;
            _row += _stride;
            (_at, _rows) = (0, _rows - 1);
        }
    }
}
