namespace MiniCpmNative.Kernels.Cpu;

/// <summary>What the probabilities and their gradients need of a query.</summary>
internal struct AttentionQuery<T>
{
    /// <summary>-lse / scale is OffsetHigh + OffsetLow.</summary>
    public T OffsetHigh, OffsetLow;

    /// <summary>sum_d dO * o.</summary>
    public T Delta;
}

/// <summary>One worker's tiles, cut from its part of the scratch memory.</summary>
internal readonly unsafe struct AttentionScratch<T>
    where T : unmanaged
{
    /// <summary>
    /// Keys, or queries in the key pass, that a tile of scores holds besides its lanes.
    /// </summary>
    public const int Depth = 64;

    private const int LaneRows = 6;

    public AttentionScratch(byte* memory, int worker, int headDim, int width)
    {
        var next = (T*)(memory + (worker * Bytes(headDim, width)));
        int tile = headDim * width;
        Left = next;
        Right = Left + tile;
        LeftSum = Right + tile;
        RightSum = LeftSum + tile;
        Scores = RightSum + tile;
        ScoreGradients = Scores + (Depth * width);
        Max = ScoreGradients + (Depth * width);
        Sum = Max + width;
        Keep = Sum + width;
        OffsetsHigh = Keep + width;
        OffsetsLow = OffsetsHigh + width;
        Deltas = OffsetsLow + width;
        Queries = (AttentionQuery<T>*)(Deltas + width);
        Limits = (int*)(Queries + Depth);
    }

    /// <summary>Transposed q, or k in the key pass: [headDim, width].</summary>
    public T* Left { get; }

    /// <summary>Transposed dO, or v in the key pass: [headDim, width].</summary>
    public T* Right { get; }

    /// <summary>Transposed o, dq or dk before the last factor: [headDim, width].</summary>
    public T* LeftSum { get; init; }

    /// <summary>Transposed dv: [headDim, width].</summary>
    public T* RightSum { get; init; }

    /// <summary>Logits, then probabilities: [Depth, width].</summary>
    public T* Scores { get; }

    /// <summary>Gradients of probabilities, then of scaled logits: [Depth, width].</summary>
    public T* ScoreGradients { get; }

    /// <summary>Largest raw q . k so far.</summary>
    public T* Max { get; }

    /// <summary>Sum of exp(scale * (q . k - Max)) so far.</summary>
    public T* Sum { get; }

    /// <summary>What earlier sums are multiplied with.</summary>
    public T* Keep { get; }

    /// <summary>-lse / scale of each lane's query is OffsetsHigh + OffsetsLow.</summary>
    public T* OffsetsHigh { get; }

    public T* OffsetsLow { get; }

    /// <summary>sum_d dO * o of each lane's query.</summary>
    public T* Deltas { get; }

    /// <summary>Queries of a tile of the key pass: [Depth].</summary>
    public AttentionQuery<T>* Queries { get; }

    /// <summary>Keys that each lane's query sees.</summary>
    public int* Limits { get; }

    /// <summary>
    /// Bytes of one worker, a multiple of 128 so that workers share no cache line pair.
    /// </summary>
    public static long Bytes(int headDim, int width)
    {
        long elements = (((4L * headDim) + (2 * Depth) + LaneRows) * width) + (3 * Depth);
        return ((elements * sizeof(T)) + (width * sizeof(int)) + 127) / 128 * 128;
    }
}

/// <summary>
/// What a worker that computes all gradients of a head keeps of it, behind its tiles. Sums of dk
/// and dv of all keys are kept only where several query heads add to them.
/// </summary>
internal readonly unsafe struct AttentionHeadScratch<T>
    where T : unmanaged
{
    private readonly T* _sums;
    private readonly nint _tile;

    public AttentionHeadScratch(byte* memory, int headDim, int width, int mostQueries, int keptKeys)
    {
        nint columns = RoundedUp(headDim, width);
        _tile = (nint)headDim * width;
        Keys = (T*)(memory + AttentionScratch<T>.Bytes(headDim, width));
        DQ = Keys + (columns * width);
        Queries = (AttentionQuery<T>*)(DQ + (columns * mostQueries));
        _sums = keptKeys > 0 ? (T*)(Queries + mostQueries) : null;
    }

    /// <summary>A block of keys: [headDim / width, rounded up][width][width].</summary>
    public T* Keys { get; }

    /// <summary>dq before its last factor: [headDim / width, rounded up][queries][width].</summary>
    public T* DQ { get; }

    /// <summary>The queries of a head.</summary>
    public AttentionQuery<T>* Queries { get; }

    /// <summary>As <see cref="AttentionScratch{T}.Bytes"/>, its tiles included.</summary>
    public static long Bytes(int headDim, int width, int mostQueries, int keptKeys)
    {
        long columns = RoundedUp(headDim, width);
        long elements = (columns * width) + (mostQueries * (columns + 3))
            + (2L * headDim * RoundedUp(keptKeys, width));
        return AttentionScratch<T>.Bytes(headDim, width)
            + (((elements * sizeof(T)) + 127) / 128 * 128);
    }

    /// <summary>The tiles, with the sums of dk and dv that belong to a block of keys.</summary>
    public AttentionScratch<T> WithSums(in AttentionScratch<T> scratch, int block)
    {
        if (_sums is null) return scratch;
        T* sums = _sums + (2 * block * _tile);
        return scratch with { LeftSum = sums, RightSum = sums + _tile };
    }

    private static int RoundedUp(int count, int unit) => (count + unit - 1) / unit * unit;
}
