using System.Numerics;
using System.Runtime.CompilerServices;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>Packs panels of A, then columns of B where the whole of B is shared.</summary>
internal unsafe struct GemmPackBody<T, V, I> : IRangeBody
    where T : unmanaged, IBinaryFloatingPointIeee754<T>
    where V : unmanaged
    where I : ISimd<T, V>
{
    public GemmPlan<T>* Plan;

    /// <summary>Panels of A; the items after them are panels of B.</summary>
    public int LeftPanels;

    public readonly void Run(int begin, int end, int worker)
    {
        for (int item = begin; item < end; item++)
        {
            if (item < LeftPanels) Left(item);
            else Right(item - LeftPanels);
        }
    }

    private readonly void Left(int panel)
    {
        int row = panel * I.TileRows;
        T* to = Plan->PackedA + (panel * Plan->PanelStride);
        int rows = Math.Min(I.TileRows, Plan->MCount - row);
        GemmPack<T, V, I>.Left(*Plan, Plan->M0 + row, rows, Plan->K0, Plan->KCount, to);
    }

    private readonly void Right(int panel)
    {
        int n = panel * PackedMatrix.PanelRows;
        int cols = Math.Min(PackedMatrix.PanelRows, Plan->N - n);
        GemmPack<T, V, I>.Right(*Plan, n, cols, 0, Plan->K, Plan->SharedB + ((nint)n * Plan->K));
    }
}

/// <summary>
/// Computes blocks of C: MBlock rows by NBlock columns, all of K0 .. K0 + KCount.
/// </summary>
internal unsafe struct GemmBody<T, V, I> : IRangeBody
    where T : unmanaged, IBinaryFloatingPointIeee754<T>
    where V : unmanaged
    where I : ISimd<T, V>
{
    private static int Panel => PackedMatrix.PanelRows;

    private const int FirstLevelBytes = 32 << 10, LeastDepth = 128;

    public GemmPlan<T>* Plan;

    public readonly void Run(int begin, int end, int worker)
    {
        T* scratch = Plan->Scratch + (worker * Plan->ScratchStride);
        for (int item = begin; item < end; item++)
        {
            int m = Plan->M0 + (item / Plan->ItemsN * Plan->MBlock);
            int rows = Math.Min(Plan->MBlock, Plan->M0 + Plan->MCount - m);
            // Even shares of the panels: a short last item would leave a thread without work.
            int block = item % Plan->ItemsN;
            int n = Share(block), cols = Math.Min(Share(block + 1), Plan->N) - n;
            for (int k = Plan->K0; k < Plan->K0 + Plan->KCount; k += Plan->KBlock)
            {
                int tiles = Tiles(rows, I.TileRows) * Tiles(cols, 2 * I.Width);
                GemmAhead ahead = k + Plan->KBlock < Plan->K0 + Plan->KCount
                    ? Ahead(block, k + Plan->KBlock, tiles)
                    : item + 1 < end ? Ahead((item + 1) % Plan->ItemsN, Plan->K0, tiles) : default;
                Block(m, rows, n, cols, k, Depth(k), scratch, ref ahead);
            }
        }
    }

    private static int Tiles(int count, int size) => (count + size - 1) / size;

    private readonly int Share(int block) =>
        (int)((long)block * Plan->Panels / Plan->ItemsN) * Panel;

    private readonly int Depth(int k) => Math.Min(Plan->KBlock, Plan->K0 + Plan->KCount - k);

    /// <summary>What is packed next, if anything.</summary>
    private readonly GemmAhead Ahead(int block, int k, int tiles)
    {
        if (Plan->SharedB is not null || Plan->DirectB) return default;
        int n = Share(block), cols = Math.Min(Share(block + 1), Plan->N) - n;
        return GemmAhead.Of(*Plan, n, cols, k, Depth(k), tiles);
    }

    private readonly void Block(
        int m, int rows, int n, int cols, int k, int depth, T* scratch, ref GemmAhead ahead)
    {
        T* b;
        nint bStep = Panel, bPanel;
        int whole = cols;
        if (Plan->SharedB is not null)
        {
            bPanel = (nint)Plan->K * Panel;
            b = Plan->SharedB + (n / Panel * bPanel) + ((nint)k * Panel);
        }
        else if (Plan->DirectB)
        {
            bool rowMajor = Plan->BLayout == RightLayout.Rows;
            bPanel = rowMajor ? Panel : Plan->BStride;
            bStep = rowMajor ? Plan->BStride : Panel;
            b = (T*)Plan->B + (n / Panel * bPanel) + (k * bStep);
            int surplus = cols % Panel;
            if (bStep != Panel && surplus != 0)
            {
                // A tile reads whole vectors, which would leave the rows of B here: these few
                // columns are packed after all.
                whole = cols - surplus;
                GemmPack<T, V, I>.Right(*Plan, n + whole, surplus, k, depth, scratch);
            }
        }
        else
        {
            bPanel = (nint)depth * Panel;
            b = scratch;
            GemmPack<T, V, I>.Right(*Plan, n, cols, k, depth, b);
        }

        bool first = k == 0;
        var to = new GemmOut<T>
        {
            Stride = Plan->CRow,
            Alpha = Plan->Alpha,
            Beta = first ? Plan->Beta : T.One,
        };
        T* left = Left(m, rows, k, depth, scratch, out nint leftStep);
        int tile = I.TileRows, width = 2 * I.Width;
        var (down, across) = Reach(depth, cols);
        for (int top = 0; top < rows; top += down)
            for (int start = 0; start < cols; start += across)
                for (int i = top; i < Math.Min(rows, top + down); i += tile)
                {
                    T* a = left + (i / tile * leftStep);
                    T* c = Plan->C + ((m + i) * Plan->CRow) + (n * Plan->CCol);
                    int tileRows = Math.Min(tile, rows - i), stop = Math.Min(cols, start + across);
                    for (int j = start; j < stop; j += width)
                    {
                        ahead.Fetch<T, V, I>();
                        T* right = (j < whole ? b + (j / Panel * bPanel) : scratch) + (j % Panel);
                        nint rightStep = j < whole ? bStep : Panel;
                        to.C = c + (j * Plan->CCol);
                        to.Bias = first && Plan->Bias is not null ? Plan->Bias + n + j : null;
                        if (Plan->IsLeftPacked)
                            Tile<PackedLeft>(tileRows, cols - j, depth, a, 1, tile, right,
                                rightStep, to);
                        else
                            Tile<StridedLeft>(
                                tileRows, cols - j, depth, a, Plan->ARow, 1, right, rightStep, to);
                    }
                }
    }

    /// <summary>
    /// Rows and columns of a round of tiles. Of the two panels that a tile multiplies, that of B
    /// stays in the first-level cache while A's pass by, or A's, which is smaller, where B's is too
    /// large for it; what passes by stays in the second-level cache. Where a sum is so shallow that
    /// C's memory is the bound, C is written along its rows.
    /// </summary>
    private static (int Down, int Across) Reach(int depth, int cols)
    {
        int width = 2 * I.Width;
        if (depth < LeastDepth) return (I.TileRows, cols);
        bool fits = (long)width * depth * sizeof(T) <= FirstLevelBytes;
        return (GemmPlan<T>.CachedRows, fits ? width : GemmPlan<T>.CachedCols);
    }

    /// <summary>Up to two vectors of columns: a whole tile, or what there is of one.</summary>
    private readonly void Tile<L>(
        int rows, int cols, nint k, T* a, nint aRow, nint aStep, T* b, nint bStep, in GemmOut<T> to)
        where L : ILeft
    {
        int width = 2 * I.Width;
        if (rows < I.TileRows || cols < width || Plan->CCol != 1)
            Columns<L>(rows, Math.Min(width, cols), k, a, aRow, aStep, b, bStep, to);
        else if (I.TileRows == 12)
            GemmTile<T, V, I, Rows12, L>.Two(k, a, aRow, aStep, b, bStep, to);
        else
            GemmTile<T, V, I, Rows6, L>.Two(k, a, aRow, aStep, b, bStep, to);
    }

    /// <summary>Rows m.. of A from k on, in panels or where they lie, and how far it is to the next
    /// tile's.</summary>
    private readonly T* Left(int m, int rows, int k, int depth, T* scratch, out nint step)
    {
        int tile = I.TileRows;
        if (!Plan->IsLeftPacked)
        {
            step = tile * Plan->ARow;
            return Plan->A + (m * Plan->ARow) + k;
        }

        if (!Plan->OwnLeft)
        {
            step = Plan->PanelStride;
            return Plan->PackedA + ((m - Plan->M0) / tile * step) + ((nint)(k - Plan->K0) * tile);
        }

        step = ((nint)depth * tile) + GemmPlan<T>.LeftPad;
        T* to = scratch;
        for (int i = 0; i < rows; i += tile, to += step)
            GemmPack<T, V, I>.Left(*Plan, m + i, Math.Min(tile, rows - i), k, depth, to);
        return scratch;
    }

    /// <summary>Columns of one panel of B, in tiles of two vectors or one.</summary>
    private readonly void Columns<L>(
        int rows, int cols, nint k, T* a, nint aRow, nint aStep, T* b, nint bStep, GemmOut<T> to)
        where L : ILeft
    {
        int two = 2 * I.Width;
        while (cols > 0)
        {
            int width = cols > I.Width ? two : I.Width;
            if (cols >= width && Plan->CCol == 1)
                Rows<L>(rows, width == two, k, a, aRow, aStep, b, bStep, to);
            else
                Edge<L>(rows, Math.Min(cols, width), k, a, aRow, aStep, b, bStep, to);
            cols -= width;
            b += width;
            to.C += width * Plan->CCol;
            if (to.Bias is not null) to.Bias += width;
        }
    }

    /// <summary>
    /// Fewer columns than a tile has, or C transposed: through a tile on the stack.
    /// </summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    private readonly void Edge<L>(
        int rows, int cols, nint k, T* a, nint aRow, nint aStep, T* b, nint bStep, GemmOut<T> to)
        where L : ILeft
    {
        T* tile = stackalloc T[12 * 32];
        int width = cols > I.Width ? 2 * I.Width : I.Width;
        var part = new GemmOut<T> { C = tile, Stride = width, Alpha = T.One, Beta = T.Zero };
        Rows<L>(rows, cols > I.Width, k, a, aRow, aStep, b, bStep, part);
        for (int i = 0; i < rows; i++)
        {
            T* c = to.C + (i * to.Stride);
            for (int j = 0; j < cols; j++, c += Plan->CCol)
            {
                T value = to.Bias is null ? T.Zero : to.Bias[j];
                value = T.FusedMultiplyAdd(to.Alpha, tile[(i * width) + j], value);
                if (to.Beta != T.Zero) value = T.FusedMultiplyAdd(to.Beta, *c, value);
                *c = value;
            }
        }
    }

    private static void Rows<L>(
        int rows, bool two, nint k, T* a, nint aRow, nint aStep, T* b, nint bStep, GemmOut<T> to)
        where L : ILeft
    {
        while (rows > 0)
        {
            int done;
            if (rows >= 12 && I.TileRows >= 12)
            {
                done = 12;
                if (two) GemmTile<T, V, I, Rows12, L>.Two(k, a, aRow, aStep, b, bStep, to);
                else GemmTile<T, V, I, Rows12, L>.One(k, a, aRow, aStep, b, bStep, to);
            }
            else if (rows >= 8 && I.TileRows >= 8)
            {
                done = 8;
                if (two) GemmTile<T, V, I, Rows8, L>.Two(k, a, aRow, aStep, b, bStep, to);
                else GemmTile<T, V, I, Rows8, L>.One(k, a, aRow, aStep, b, bStep, to);
            }
            else if (rows >= 6)
            {
                done = 6;
                if (two) GemmTile<T, V, I, Rows6, L>.Two(k, a, aRow, aStep, b, bStep, to);
                else GemmTile<T, V, I, Rows6, L>.One(k, a, aRow, aStep, b, bStep, to);
            }
            else if (rows >= 4)
            {
                done = 4;
                if (two) GemmTile<T, V, I, Rows4, L>.Two(k, a, aRow, aStep, b, bStep, to);
                else GemmTile<T, V, I, Rows4, L>.One(k, a, aRow, aStep, b, bStep, to);
            }
            else if (rows >= 2)
            {
                done = 2;
                if (two) GemmTile<T, V, I, Rows2, L>.Two(k, a, aRow, aStep, b, bStep, to);
                else GemmTile<T, V, I, Rows2, L>.One(k, a, aRow, aStep, b, bStep, to);
            }
            else
            {
                done = 1;
                if (two) GemmTile<T, V, I, Rows1, L>.Two(k, a, aRow, aStep, b, bStep, to);
                else GemmTile<T, V, I, Rows1, L>.One(k, a, aRow, aStep, b, bStep, to);
            }

            rows -= done;
            a += done * aRow;
            to.C += done * to.Stride;
        }
    }
}
