using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Tests;

/// <summary>
/// Mistakes in the kernels of lookups, adapters and cross-entropy, and in what all use.
/// </summary>
internal static partial class Plants
{
    private static Plant[] Blocks { get; } =
    [
        // 2: warps and blocks
        Plant.Fault(Check.SharedRaceWithinWarp, "no barrier before the next sum", "block_sum",
            "sum += shared[warp];\n    __syncthreads();", "sum += shared[warp];", "layer_norm") with
        {
            Kernel = "norm_forward", With = [5],
        },
        Plant.Fault(Check.SharedRaceWithinWarp, "no barrier before the warps' sums are read",
            "block_sum", "= x;\n    __syncthreads();", "= x;", "layer_norm") with
        {
            Kernel = "norm_forward", With = [5],
        },
        new("a lane's neighbours are left out", "warp_sum", "lane > 0", "lane > 1", "layer_norm")
        {
            With = [5],
        },

        // 3: random numbers
        new("a round too few", "philox", "round < 10", "round < 9",
            "lora_linear_dropout") { With = [8] },
    ];

    private static Plant[] Operations { get; } =
    [
        // 7: lookups
        Plant.Fault(Check.Uninitialised, "equal ids in no order", "order_by_id",
            "tile[i] < id + (first + i < token)", "tile[i] < id", "embedding") with
        {
            Kernel = "sum_by_id", Size = 64,
        },
        Plant.Fault(Check.Endless, "the search for the last token does not move on", "sum_by_id",
            "last = middle + 1", "last = middle", "embedding") with { Size = 64 },
        new("a row ends after the first turn of its block", "put_row", "c += blockDim.x * VECTOR",
            "c += cols", "splice") { Size = 2056 },
        new("a row without vectors ends after the first turn", "lookup_rows", "c += blockDim.x)",
            "c += cols)", "embedding") { Size = 2057 },
        new("gradients of replaced tokens", "splice_text_backward", "from[token] > 0",
            "from[token] > 1", "splice"),

        // 8: adapters
        new("the mask of another row in the backward", "lora_gradient_x",
            "i / 2 * 8 + g) * 4", "i / 2 * 8 + g / 2) * 4", "lora_linear_dropout"),
        new("the mask of another row for A", "lora_gradient_a",
            "row[0], row[4]", "row[0], row[0]", "lora_linear_dropout"),
        new("a block of random numbers is used twice", "dropout_mask", "4 * i + k);",
            "4 * i);", "lora_linear_dropout") { Size = 64 },
        new("the mask of another adapter in the backward", "lora_gradient_x",
            "mask + row * words", "mask + (u64)first_row * words", "linears_dropout"),
        Plant.Fault(Check.GlobalRace, "another adapter's gradient", "lora_gradient_a",
            "(adapter, da0, da1, da2)", "(0, da0, da1, da2)", "linears_dropout"),
        new("the heads turned forwards in the backward", "heads", "s[j] * direction", "s[j]",
            "linears"),
        new("the bias of half a head is taken away", "heads", "b[j] += s[j];", "b[j] -= s[j];",
            "linears"),
        Plant.Fault(Check.SharedRaceWithinWarp, "sums are read before their warp has written them",
            "lora_gradient_x", "make_float2(from[0], from[1]);\n        }\n        __syncwarp();",
            "make_float2(from[0], from[1]);\n        }", "lora_linear_dropout"),
        Plant.Fault(Check.AsyncCopyNotWaitedFor, "a step's copies are not waited for", "in_stages",
            "wait_copies<LORA_STAGES - 2>", "wait_copies<LORA_STAGES - 1>",
            "lora_linear_dropout") with { Kernel = "lora_down" },

        // 7: resampled positions, columns; 10: a cache
        new("terms are not weighted", "weighted_gather", "v[i] += weights[k] * w[i]",
            "v[i] += w[i]", "weighted_gather_whole") { Size = 16, With = [6] },
        new("a row's first term goes to the row before", "row_of_term", "starts[middle] <= k",
            "starts[middle] < k", "weighted_gather") { With = [6] },
        new("columns behind the part keep what was there", "columns_backward",
            "put_row(behind, 0, 1, accumulate,", "put_row(behind, 0, 1, 1,", "columns"),
        Plant.Fault(Check.OutOfBounds, "the frame behind the last is read", "unfold_forward",
            "(u32)frame < (u32)frames", "(u32)frame <= (u32)frames", "unfold_stride") with
        {
            Size = 16,
        },
        new("every frame is the middle of a window", "unfold_backward",
            "at >= 0 && at % stride == 0", "at >= 0", "unfold_stride"),
        new("rows of a cache begin at its start", "cache_append", "(u64)slot * cols",
            "(u64)i * cols", "cache_append"),
        new("counted from the end of the cache's room", "find_tile", "mask.causal == 2",
            "mask.causal == 3", "attention_cached") { With = [11] },

        // 9: cross-entropy
        Other("the sum is not rescaled when the largest rises", "add_exponentials",
            "sum *= expf(max - raised);", "",
            nameof(CudaLookupTests.CrossEntropyOfALargeVocabulary),
            cuda => new CudaLookupTests(cuda)
                .CrossEntropyOfALargeVocabulary(DType.BF16, 151_700)) with
        {
            By = Finder.Rule, With = [7],
        },
        new("one at the target's neighbour", "cross_entropy_rows", "c + i == target ? scale",
            "c + i == target + 1 ? scale", "cross_entropy") { Size = 64, With = [7] },
        Plant.Fault(Check.Uninitialised, "no barrier in the sum of losses", "cross_entropy_sum",
            "{\n        __syncthreads();", "{", "cross_entropy") with { With = [7] },
        Plant.Fault(Check.Endless, "the search for a token's row does not move on",
            "cross_entropy_scatter", "low = middle + 1", "low = middle", "cross_entropy") with
        {
            With = [7],
        },

        // 13: quantised weights
        Quantised("the low half of a byte first", "four_bit", "+ 4 - 4 * (j % 2)",
            "+ 4 * (j % 2)", "nf4"),
        Quantised("a part's blocks of blocks begin at 0", "four_bit", "(first_block + block)",
            "block", "fp4_nested_part"),
        Quantised("the offset is left out", "four_bit", ", offset);", ", 0);", "nf4_nested"),
        Quantised("the last byte is left out", "four_bit", "i + 2 * j < count",
            "i + 2 * j + 1 < count", "nf4"),
        Quantised("a group goes on into the next row", "grouped",
            "min(size - column % size, cols - column)", "size - column % size", "groups4"),
        Quantised("the zero point of the first group", "grouped", "zeros[row * groups + group]",
            "zeros[row * groups]", "groups8"),
        Few("the sums of the last row are another's", "multiply_few", "(u64)r * y_stride + n", "n"),
        Few("a stretch is left out", "multiply_few", "k += WARP * CAST", "k += 2 * WARP * CAST"),
        Few("weights are not rounded", "multiply_few", "widen(narrow(v[j]))", "v[j]"),
        Quantised("the next row has the scale of this one", "int8_rows", "scales[++row]",
            "scales[row++]", "int8"),
        Quantised("the table is read before it is there", "in_banks", "__syncthreads();", "",
            "nf4") with
        {
            By = Finder.Emulator, Check = Check.SharedRaceWithinWarp, Kernel = "unpack_4bit",
        },
    ];

    private static Plant Few(string name, string function, string from, string to) =>
        Other(name, function, from, to, nameof(QuantisedWeightTests.FewRows),
            cuda => QuantisedWeightTests.FewRows(cuda, "nf4_nested", DType.BF16, 5, 1024, 3));

    private static Plant Quantised(
        string name, string function, string from, string to, string kind) =>
        Other(name, function, from, to, nameof(QuantisedWeightTests.OnCuda),
            cuda => QuantisedWeightTests.OnCuda(cuda, kind, DType.BF16));

    // 16: magnitudes of weight-decomposed adapters
    private static Plant[] Magnitudes { get; } =
    [
        new("the scale once where it is squared", "adapted_norm", "+ scale * scale * z[at]",
            "+ scale * z[at]", "adapted_norm") { With = [6] },
        new("p by rows", "adapted_norm", "(u64)k * outputs + j", "(u64)j * rank + k",
            "adapted_norm") { With = [6] },
        new("the bias is left out", "dora_columns", "v[i] + offset[i]", "v[i]", "dora_linear")
        {
            With = [6],
        },
        new("what is there is not added to", "dora_columns", "whole, accumulate);", "whole, 0);",
            "dora_linear_dropout") { With = [6, 8] },
        new("the magnitude's neighbour", "dora_columns", "m[c + i] / n", "m[c] / n", "dora_linear")
        {
            With = [6],
        },
        new("the norm is left out of the magnitudes' gradient", "dora_backward", "total / n[own]",
            "total", "dora_linear") { With = [6] },
        new("the first warp's rows are left out", "dora_backward", "int w = 0; w < 8",
            "int w = 1; w < 8", "dora_linear") { With = [6] },
        Plant.Fault(Check.SharedRaceWithinWarp, "no barrier before the warps' sums are read",
            "dora_backward", "= sum[i];\n    __syncthreads();", "= sum[i];", "dora_linear") with
        {
            With = [6],
        },
        new("a row's draws are those of the one before", "dora_mask", "row * 4 * words",
            "(row - 1) * 4 * words", "dora_linear_dropout") { With = [6, 8] },
        new("neighbours have the same half", "dora_mask", "k % 2 ? 0 : 16", "16",
            "dora_linear_dropout") { With = [6, 8] },
        new("a kept element's factor", "dora_mask", ">= limit ? factor", ">= limit ? 1.0f",
            "dora_linear_dropout") { With = [6, 8] },
        Plant.Fault(Check.Uninitialised, "one column too many", "dora_columns",
            "c + i < cols ? m", "c + i <= cols ? m", "dora_linear") with { With = [6] },
    ];
}
