using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Tests;

/// <summary>Mistakes in the kernels of attention, found by its own tests on heads of 64 columns.</summary>
internal static partial class Plants
{
    private static Plant[] AttentionForward { get; } =
    [
        Forward("queries see one key too few", "keys_seen", "query + 1 + at.keys", "query + at.keys"),
        Forward("a lane's own tiles are not counted", "find_tile", "lane >= step", "lane > step"),
        ForwardFault(Check.AsyncCopyNotWaitedFor, "one group of copies too few is waited for",
            "attention_forward_tile", "wait_copies<0>();\n        __syncthreads(); // values",
            "wait_copies<1>();\n        __syncthreads(); // values"),
        ForwardFault(Check.SharedRaceWithinWarp, "no barrier behind the values' copy",
            "attention_forward_tile", "__syncthreads(); // values are here", "// values are here"),
        ForwardFault(Check.SharedRaceWithinWarp, "no barrier before values are overwritten",
            "attention_forward_tile", "__syncthreads(); // keys are here", "// keys are here"),
        ForwardFault(Check.SharedRaceWithinWarp, "lanes store before others have written",
            "attention_forward_tile", "    __syncwarp();\n", ""),
        ForwardFault(Check.OutOfBounds, "rows behind the last are copied", "copy_tile",
            "line + c * 8, row + step < rows", "line + c * 8, true"),
        Forward("the mask is left out where a tile is ragged", "attention_forward_tile",
            "first + KEYS > seen[0]", "first + KEYS > seen[0] + 8"),
        Forward("the output keeps its scale when the largest rises", "attention_forward_tile",
            "out[n][2 * i] *= keep;", ""),
        Forward("two lanes' shares of the sum are left out", "attention_forward_tile",
            "sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 2);", ""),
        Forward("lse in powers of two", "log_sum_exp", "fmaf(max, scale,", "fmaf(max, factor,"),
        Forward("values are not transposed", "attention_forward_tile",
            "load_matrix_x4_transposed(value,", "load_matrix_x4(value,"),
        Forward("the next head's keys", "attention_forward_tile", "head / (heads / kv_heads)",
            "head % kv_heads"),
        Forward("probabilities are cut off, not rounded", "attention_forward_tile", "narrow_left(p,",
            """
            for (int n = 2 * step; n < 2 * step + 2; n++)
                for (int i = 0; i < 4; i++)
                    s[n][i] = __uint_as_float(__float_as_uint(s[n][i]) & 0xffff0000u);
            narrow_left(p,
            """) with { By = Finder.Test },
    ];

    private static Plant Forward(string name, string function, string from, string to) =>
        new(name, function, from, to, nameof(CudaAttentionTests))
        {
            Other = cuda => CudaAttentionTests.Compare(
                AttentionOfTests, DType.BF16, cuda.Device(DType.BF16)),
        };

    private static Plant ForwardFault(Check check, string name, string function, string from, string to) =>
        Forward(name, function, from, to) with
        {
            By = Finder.Emulator, Check = check, Kernel = "attention_forward_64",
        };

    // Two sequences, the first of more than two tiles; grouped heads; some keys masked.
    private static AttentionProblem AttentionOfTests =>
        AttentionProblem.Random(4, 2, 64, [130, 7], [130, 7], causal: true, [130, 5]);
}
