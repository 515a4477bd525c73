namespace MiniCpmNative.Kernels.Cuda;

/// <summary>Blocks, threads of a block, and bytes of dynamic shared memory of a launch.</summary>
public readonly record struct Grid(Dim3 Blocks, Dim3 Threads, int SharedBytes = 0)
{
    private const int Threads256 = 256, Warp = 32, MaxRowBlocks = 65535;

    /// <summary>A thread per element.</summary>
    public static Grid Elements(long count) => new(Blocked(count, Threads256), Threads256);

    /// <summary>A thread per 16 bytes of a storage type.</summary>
    public static Grid Vectors(long count, DType type) =>
        Elements(((count * type.Size()) + 15) / 16);

    /// <summary>A thread per eight elements, as kernels that cast or fill take them.</summary>
    public static Grid Eights(long count) =>
        Elements((count + KernelConstants.Cast - 1) / KernelConstants.Cast);

    /// <summary>Blocks of 256 threads.</summary>
    public static Grid Blocks256(int x, int y = 1, int z = 1) => new(new Dim3(x, y, z), Threads256);

    /// <summary>A block of 256 threads per row.</summary>
    public static Grid Rows(int rows) => new(rows, Threads256);

    /// <summary>
    /// A block per row of a storage type: a thread per 16 bytes, or, in rows of more than 256 such
    /// vectors, as few warps as take an equal number of them each.
    /// </summary>
    public static Grid Rows(int rows, int cols, DType type)
    {
        int vectors = Math.Max(1, Blocked((long)cols * type.Size(), 16));
        int perThread = Blocked(vectors, Threads256);
        return new(rows, Blocked(Blocked(vectors, perThread), Warp) * Warp);
    }

    /// <summary>A block per 32 vectors of 16 bytes of columns, and per part of the rows.</summary>
    public static Grid Tiles(int cols, int parts, DType type) =>
        new(new Dim3(Blocked((long)cols * type.Size(), 16 * Warp), parts), Threads256);

    /// <summary>
    /// A larger block per row, for rows that are as long as a vocabulary.
    /// </summary>
    public static Grid LongRows(int rows) => new(rows, KernelConstants.LogitsThreads);

    /// <summary>A thread per 16 bytes of columns, which takes about every eighth row.</summary>
    public static Grid ColumnVectors(int cols, int rows, DType type)
    {
        int vectors = Blocked((long)cols * type.Size(), 16);
        return new(
            new Dim3(Blocked(vectors, Threads256), Math.Clamp(Blocked(rows, 8), 1, MaxRowBlocks)),
            Threads256);
    }

    /// <summary>
    /// A block per head and tile of rows of packed sequences, whose lengths only the device knows:
    /// as many tiles as there can be.
    /// </summary>
    public static Grid SequenceTiles(int rows, int sequences, int rowsPerTile, int heads,
        int threads) =>
        new(new Dim3(Blocked(rows, rowsPerTile) + sequences, heads), threads);

    private static int Blocked(long count, int size) => checked((int)((count + size - 1) / size));
}
