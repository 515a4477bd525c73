namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// A frozen weight W[rows, cols] in the order in which products read it: panels of P rows, [rows /
/// P][cols][P], in the weight's own type, the last panel filled up with zeros. One copy serves y
/// = x W^T, which streams a panel as it lies (F32 without any packing, 16-bit types widened into a
/// block that stays in the cache), and dx = dy W, which transposes 16 x 16 elements in registers on
/// the way: one shuffle per four weights, against as many multiply-adds per weight as x has rows.
/// Keeping panels of columns instead would favour the backward pass, which runs once where the
/// forward runs twice under checkpointing.
/// </summary>
public readonly unsafe struct PackedMatrix
{
    /// <summary>
    /// Rows of a panel: two vectors of the widest instructions there are, so that a tile's part of
    /// it has no gaps, which would leave half of the first-level cache's lines unused.
    /// </summary>
    public static int PanelRows => Avx512Simd.IsSupported ? 32 : 16;

    /// <summary>
    /// A matrix packed before, at memory of <see cref="Bytes"/> bytes, 64-byte aligned.
    /// </summary>
    /// <exception cref="ShapeException">
    /// A negative size or a type other than F32, BF16, F16, F64.
    /// </exception>
    public PackedMatrix(void* memory, DType type, int rows, int cols)
    {
        _ = Bytes(rows, cols, type);
        View = MatrixView.Packed(memory, type, rows, cols);
    }

    /// <summary>
    /// The matrix as an operand: y = x W^T is <c>gemm.Multiply(x, w.View.T, y)</c>.
    /// </summary>
    public MatrixView View { get; }

    /// <summary>
    /// Bytes that a packed matrix takes: that of its rows rounded up to whole panels.
    /// </summary>
    /// <exception cref="ShapeException">
    /// A negative size or a type other than F32, BF16, F16, F64.
    /// </exception>
    public static long Bytes(int rows, int cols, DType type)
    {
        if (rows < 0 || cols < 0) throw new ShapeException($"packed matrix: size [{rows}, {cols}]");
        if (!type.IsFloat()) throw new ShapeException($"packed matrix: {type} is not a float type");
        return ((long)rows + PanelRows - 1) / PanelRows * PanelRows * cols * type.Size();
    }

    /// <summary>
    /// Packs row-major W into memory of <see cref="Bytes"/> bytes, 64-byte aligned, on all workers.
    /// </summary>
    /// <exception cref="ShapeException">w is transposed or packed already.</exception>
    public static PackedMatrix Pack(Workers workers, MatrixView w, void* memory)
    {
        var packed = new PackedMatrix(memory, w.Type, w.Rows, w.Cols);
        packed.Copy(workers, RowMajor(w, "w"), 0, w.Rows, unpack: false);
        return packed;
    }

    /// <summary>
    /// Writes rows firstRow .. firstRow + w.Rows - 1 into row-major w of the same type.
    /// </summary>
    /// <exception cref="ShapeException">
    /// Other columns or type, rows outside, w not row-major.
    /// </exception>
    public void Unpack(Workers workers, MatrixView w, int firstRow = 0)
    {
        bool inside = firstRow >= 0 && firstRow <= View.Rows - w.Rows;
        if (w.Type != View.Type || w.Cols != View.Cols || !inside)
            throw new ShapeException($"unpack: rows from {firstRow} of {View} do not fill {w}");
        Copy(workers, RowMajor(w, "w"), firstRow, w.Rows, unpack: true);
    }

    private static MatrixView RowMajor(MatrixView w, string name) => w.IsTransposed || w.IsPacked
        ? throw new ShapeException($"packed matrix: {name} must be row-major, got {w}")
        : w;

    private void Copy(Workers workers, MatrixView w, int firstRow, int rows, bool unpack)
    {
        if (rows == 0 || w.Cols == 0) return;
        int firstPanel = firstRow / PanelRows;
        int panels = ((firstRow + rows - 1) / PanelRows) - firstPanel + 1;
        var body = new CopyPanels
        {
            Packed = (byte*)View.Data,
            Rows = (byte*)w.Data,
            Stride = w.Stride,
            Cols = w.Cols,
            FirstRow = firstRow,
            EndRow = firstRow + rows,
            FirstPanel = firstPanel,
            Size = w.Type.Size(),
            Unpack = unpack,
        };
        workers.For(panels, body);
    }

    private struct CopyPanels : IRangeBody
    {
        public byte* Packed, Rows;
        public long Stride;
        public int Cols, FirstRow, EndRow, FirstPanel, Size;
        public bool Unpack;

        public readonly void Run(int begin, int end, int worker)
        {
            for (int panel = FirstPanel + begin; panel < FirstPanel + end; panel++)
            {
                switch (Size)
                {
                    case 2: Panel<ushort>(panel); break;
                    case 4: Panel<uint>(panel); break;
                    default: Panel<ulong>(panel); break;
                }
            }
        }

        // Blocks of 16 columns, so that the cache lines of 32 rows are used up before they are
        // evicted.
        private readonly void Panel<E>(int panel)
            where E : unmanaged
        {
            var packed = (E*)Packed + ((long)panel * Cols * PanelRows);
            int row0 = panel * PanelRows;
            int begin = Math.Max(FirstRow, row0), end = Math.Min(EndRow, row0 + PanelRows);
            for (int c0 = 0; c0 < Cols; c0 += 16)
            {
                int c1 = Math.Min(c0 + 16, Cols);
                for (int row = begin; row < end; row++)
                {
                    E* line = (E*)Rows + ((row - FirstRow) * Stride);
                    E* lane = packed + (row - row0);
                    if (Unpack)
                        for (int c = c0; c < c1; c++) line[c] = lane[(long)c * PanelRows];
                    else
                        for (int c = c0; c < c1; c++) lane[(long)c * PanelRows] = line[c];
                }

                for (int lane = end - row0; lane < PanelRows && !Unpack; lane++)
                    for (int c = c0; c < c1; c++) packed[((long)c * PanelRows) + lane] = default;
            }
        }
    }
}
