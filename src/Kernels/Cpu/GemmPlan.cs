using System.Numerics;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>Where a tile goes: C = alpha * sum + beta * C + bias, rows Stride apart.</summary>
internal unsafe struct GemmOut<T>
    where T : unmanaged
{
    public T* C, Bias;
    public nint Stride;
    public T Alpha, Beta;
}

/// <summary>How the right operand lies in memory, seen as B[k, n].</summary>
internal enum RightLayout
{
    /// <summary>Rows of k: n is contiguous.</summary>
    Rows,

    /// <summary>Rows of n: k is contiguous; packing transposes.</summary>
    Transposed,

    /// <summary>Panels of P n: [n / P][k][P], see <see cref="PackedMatrix"/>.</summary>
    Panels,

    /// <summary>Panels of P k: [k / P][n][P]; packing transposes.</summary>
    TransposedPanels,
}

/// <summary>
/// One product C[m, n] = alpha * A[m, k] B[k, n] + beta * C + bias, as its threads see it.
/// </summary>
internal unsafe struct GemmPlan<T>
    where T : unmanaged
{
    /// <summary>Elements behind each panel of A, at least a vector.</summary>
    public const int LeftPad = 16;

    /// <summary>
    /// Rows of A and columns of B that stay in the second-level cache: with 512 of k 240 KiB and,
    /// where B's panels do not stay in the first, 384 KiB of F32.
    /// Whole tiles and panels of every size.
    /// </summary>
    public const int CachedRows = 120, CachedCols = 192;

    public int M, N, K;

    /// <summary>A[i, k] at A + i * ARow + k * ACol; one of the two is 1.</summary>
    public T* A;
    public nint ARow, ACol;

    public byte* B;
    public DType BType;
    public RightLayout BLayout;

    /// <summary>Elements between rows of B, or between its panels.</summary>
    public nint BStride;

    public T* C, Bias;
    public nint CRow, CCol;
    public T Alpha, Beta;

    /// <summary>
    /// Panels of the whole of B in T, or null when each item packs what it needs.
    /// </summary>
    public T* SharedB;

    /// <summary>
    /// Panels of TileRows rows of A for M0.., K0..,
    /// or null when A is read where it lies, or OwnLeft.
    /// </summary>
    public T* PackedA;

    /// <summary>Each item packs its own rows of A into its worker's room.</summary>
    public bool OwnLeft;
    public int M0, MCount, K0, KCount, KBlock;

    /// <summary>
    /// Elements between panels of A: what they hold and LeftPad, which packing spills into.
    /// </summary>
    public nint PanelStride;

    /// <summary>B is read where it lies.</summary>
    public bool DirectB;

    /// <summary>
    /// Most columns and rows of one item of work, items along n, and panels that these share.
    /// </summary>
    public int NBlock, MBlock, ItemsN, Panels;

    /// <summary>
    /// Room of each worker for one block of B, or of A where items pack their own.
    /// </summary>
    public T* Scratch;
    public nint ScratchStride;

    /// <summary>A is read from panels, not where it lies.</summary>
    public readonly bool IsLeftPacked => OwnLeft || PackedA is not null;
}
