namespace MiniCpmNative.Kernels.Cpu;

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
        Limits = (int*)(Deltas + width);
    }

    /// <summary>Transposed q, or k in the key pass: [headDim, width].</summary>
    public T* Left { get; }

    /// <summary>Transposed dO, or v in the key pass: [headDim, width].</summary>
    public T* Right { get; }

    /// <summary>Transposed o, dq or dk before the last factor: [headDim, width].</summary>
    public T* LeftSum { get; }

    /// <summary>Transposed dv: [headDim, width].</summary>
    public T* RightSum { get; }

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

    /// <summary>Keys that each lane's query sees.</summary>
    public int* Limits { get; }

    /// <summary>
    /// Bytes of one worker, a multiple of 128 so that workers share no cache line pair.
    /// </summary>
    public static long Bytes(int headDim, int width)
    {
        long elements = ((4L * headDim) + (2 * Depth) + LaneRows) * width;
        return ((elements * sizeof(T)) + (width * sizeof(int)) + 127) / 128 * 128;
    }
}
