using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// Attention's gradients by the kernels of sm_90a: one that computes all three in floats, tile by
/// tile, and one that sums tiles and rounds. See section 4 of kernels_sm90a.cu.
/// </summary>
internal static class HopperAttentionBackward
{
    private const int Threads = 384, FinishThreads = 128, FinishCols = 32;
    private const int Keys = AttentionTiles.Rows, Queries = 64;

    /// <summary>Queues the kernels; tiles are the lists of queries and of keys.</summary>
    public static void Run(in CudaCall call, Attention op, string kernel, int causal,
        in Tensor statistics, in Tensor queryTiles, in Tensor keyTiles)
    {
        Tensor q = call.In(0), k = call.In(1), v = call.In(2);
        int tokens = (int)q.Shape.Rows, keyTokens = (int)k.Shape.Rows;
        int sequences = (int)call.Input(3).Shape.Count - 1;
        int cols = (op.HeadDim + 15) / 16 * 16, rows = keyTiles.Shape[0];
        GradientTarget dq = call.Gradient(0), dk = call.Gradient(1), dv = call.Gradient(2);
        int queryPlaces = checked(op.Heads * ((tokens / Queries) + sequences));
        int keyPlaces = checked(op.Heads * ((keyTokens / Keys) + sequences));
        Tensor dqTiles = call.Scratch(DType.F32, queryPlaces, Queries * cols);
        Tensor turns = call.Scratch(DType.I32, queryPlaces);
        call.Clear(turns);
        // Query heads that share a key head leave a part each.
        int parts = op.Heads / op.KvHeads;
        Tensor dkParts = Parts(call, dk), dvParts = Parts(call, dv);
        call.Launch(kernel, new Grid(checked(rows * op.Heads), Threads, SharedBytes(cols)),
            parts > 1 ? Tensor.None : dk.Buffer, parts > 1 ? Tensor.None : dv.Buffer, dqTiles,
            dkParts, dvParts, turns, q, k, v, call.OutputGradient, statistics, keyTiles,
            call.Input(5), rows, sequences, tokens, keyTokens, causal, op.Heads, op.KvHeads,
            op.Scale, dk.Accumulate, dv.Accumulate, Neighbours(op, tokens));
        call.Launch("attention_backward_hopper_finish",
            new Grid(new Dim3(2 * Math.Max(rows, queryTiles.Shape[0]),
                op.Heads + (parts > 1 ? 2 * op.KvHeads : 0),
                (op.HeadDim + FinishCols - 1) / FinishCols), FinishThreads),
            dq.Buffer, dk.Buffer, dv.Buffer, dqTiles, dkParts, dvParts, turns, queryTiles,
            keyTiles, queryTiles.Shape[0], rows, sequences, tokens, keyTokens, op.Heads,
            op.KvHeads, op.HeadDim, op.Scale, dq.Accumulate, dk.Accumulate, dv.Accumulate);

        Tensor Parts(in CudaCall call, GradientTarget gradient) => parts > 1 && gradient.Wanted
            ? call.Scratch(DType.F32, keyPlaces, Keys * cols) : Tensor.None;
    }

    // Heads whose blocks run side by side: few enough that what they share stays in the L2 cache.
    private static int Neighbours(Attention op, int tokens)
    {
        const long CacheBytes = 24 << 20, BytesOfElement = 2 + 2 + 4; // of q, dO and dq
        long ofHead = Math.Max(1, tokens * (long)op.HeadDim * BytesOfElement);
        return (int)Math.Clamp(CacheBytes / ofHead, 1, op.Heads);
    }

    // As laid out in kernels_sm90a.cu: keys and values, two stages of q and dO and of ds, dq,
    // statistics, barriers and the block's description.
    private static int SharedBytes(int cols) => (2 * Keys * cols * 2) + (4 * Queries * cols * 2)
        + (2 * Keys * Queries * 2) + (Queries * cols * 4) + (2 * Queries * 8) + 256;
}
