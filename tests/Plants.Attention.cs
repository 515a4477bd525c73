using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Tests;

/// <summary>
/// Mistakes in the kernels of attention, found by its own tests on heads of 64 columns.
/// </summary>
internal static partial class Plants
{
    private static Plant[] AttentionForward { get; } =
    [
        Decode("a key behind the share", "int end = min(seen, first + share);",
            "int end = min(seen, first + share + 1);"),
        Decode("earlier output is not shrunk", "out[h][i] *= keeps[h]", "out[h][i] *= 1"),
        Decode("scores are read before others have written them",
            "__syncthreads(); // scores are here", "// scores are here") with
        {
            By = Finder.Emulator, Check = Check.SharedRaceWithinWarp,
        },
        Decode("what is reduced is read too early", "__syncthreads(); // and read",
            "// and read") with
        {
            By = Finder.Emulator, Check = Check.SharedRaceWithinWarp,
        },
        Decode("shares are not brought to one maximum",
            "value += part[c] * softmax_keep(part[dim], offset, factor);", "value += part[c];",
            "attention_decode_merge"),
        Decode("the last share is left out", "(seen + share - 1) / share", "seen / share",
            "attention_decode_merge"),
        Forward("a lane's own tiles are not counted", "find_tile", "lane >= step", "lane > step"),
        Forward("no barrier behind the values' copy", "attention_forward_tile",
            "__syncthreads(); // values are here", "// values are here") with
        {
            By = Finder.Emulator, Check = Check.SharedRaceWithinWarp,
            Kernel = "attention_forward_64",
        },
        Forward("lanes store before others have written", "attention_forward_tile",
            "    __syncwarp();\n    for (int i = lane;", "    for (int i = lane;") with
        {
            By = Finder.Emulator, Check = Check.SharedRaceWithinWarp,
            Kernel = "attention_forward_64",
        },
        Forward("the mask is left out where a tile is ragged", "attention_forward_tile",
            "> min(seen_first, at.visible)",
            "> min(seen_first, at.visible) + 32"),
        Forward("a diagonal too many", "attention_forward_tile", "8 * n + i >= seen",
            "8 * n + i > seen"),
        Forward("another key head", "attention_forward_tile", "head / (a.heads / a.kv_heads)",
            "head % a.kv_heads"),
        Forward("counted from the start, not the end", "keys_seen", "+ at.before", "") with
        {
            Other = cuda => CudaAttentionTests.Compare(
                AttentionProblem.Random(2, 1, 64, [30], [90], causal: true),
                DType.BF16, cuda.Device(DType.BF16)),
        },
        Forward("values are not waited for", "attention_forward_tile", "wait_copies<1>();", "") with
        {
            By = Finder.Emulator, Check = Check.AsyncCopyNotWaitedFor,
            Kernel = "attention_forward_64",
        },
        Forward("two lanes' shares of the sum are left out", "attention_forward_tile",
            "total += __shfl_xor_sync(ALL_LANES, total, 2);", ""),
        Forward("lse in powers of two", "log_sum_exp", "fmaf(max, scale,", "fmaf(max, factor,"),
        Forward("values are not transposed", "attention_forward_tile",
            "load_matrix_x4_transposed(value,", "load_matrix_x4(value,"),
        Forward("probabilities are cut off, not rounded", "attention_forward_tile",
            "narrow_left(p[m],",
            """
            for (int n = 2 * step; n < 2 * step + 2; n++)
                for (int i = 0; i < 4; i++)
                    s[m][n][i] = __uint_as_float(__float_as_uint(s[m][n][i]) & 0xffff0000u);
            narrow_left(p[m],
            """) with { By = Finder.Test },
        Forward("values that do not count are read", "attention_forward_tile",
            "kv_stride, end - first);\n        commit_copies();\n        key_at",
            "kv_stride, at.keys - first);\n        commit_copies();\n        key_at"),
        Forward("sums are not rescaled", "attention_forward_tile", "sum[m][i] *= keep;", "") with
        {
            Other = cuda => CudaAttentionTests.Compare(
                AttentionProblem.Random(2, 1, 64, [90], [90], causal: true, spread: 12),
                DType.BF16, cuda.Device(DType.BF16)),
        },
    ];

    private static Plant[] AttentionBackward { get; } =
    [
        Backward("lse of another head", "attention_statistics", "lse[(u64)token * heads + head]",
            "lse[(u64)token * heads]"),
        Backward("delta is left out", "attention_backward_tile", "(dp[m][n][i] - delta[i % 2])",
            "dp[m][n][i]"),
        Backward("probabilities of what is masked", "attention_backward_tile",
            "if (!sees) s[m / 4][n][m % 4] = dp[m / 4][n][m % 4] = 0;", ""),
        BackwardFault(Check.AsyncCopyNotWaitedFor, "one stage for two steps",
            "attention_backward_tile", "stage ^= 1;", ""),
        BackwardFault(Check.AsyncCopyNotWaitedFor, "the step's copies are not waited for",
            "attention_backward_tile", "wait_copies<0>();", "wait_copies<1>();"),
        BackwardFault(Check.OutOfBounds, "rows behind the last are written", "store_gradient",
            "bool inside = g + half * 8 < rows;",
            "bool inside = true;"),
        Backward("keys see the queries before them", "attention_backward_tile", "g - at.before",
            "g - at.before - 1"),
        Backward("dq without its scale", "attention_backward_tile", "dq[m], a.scale,",
            "dq[m], 1,"),
    ];

    // Of one query over a cache, of which there are two shares.
    private static Plant Decode(string name, string from, string to,
        string function = "attention_decode") =>
        Forward(name, function, from, to) with
        {
            Other = cuda => CudaAttentionTests.Compare(
                AttentionProblem.Random(
                    3, 1, 64, [1, 1], [600, 600], causal: true, [590, 70]) with
                {
                    Cached = true,
                },
                DType.BF16, cuda.Device(DType.BF16)),
        };

    private static Plant Forward(string name, string function, string from, string to) =>
        new(name, function, from, to, nameof(CudaAttentionTests))
        {
            Other = cuda => CudaAttentionTests.Compare(
                AttentionOfTests, DType.BF16, cuda.Device(DType.BF16)),
        };

    private static Plant Backward(string name, string function, string from, string to) =>
        new(name, function, from, to, nameof(CudaAttentionBackwardTests))
        {
            Other = cuda => CudaAttentionBackwardTests.Compare(cuda, AttentionOfTests, DType.BF16),
            With = [10],
        };

    private static Plant BackwardFault(Check check, string name, string function, string from,
        string to) =>
        Backward(name, function, from, to) with
        {
            By = Finder.Emulator,
            Check = check,
            Kernel = "attention_backward_64",
        };

    // Two sequences, the first of more than two tiles; grouped heads; some keys masked.
    private static AttentionProblem AttentionOfTests =>
        AttentionProblem.Random(4, 2, 64, [130, 7], [130, 7], causal: true, [130, 5]);
}
