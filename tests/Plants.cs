using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Updates;

namespace MiniCpmNative.Tests;

/// <summary>The mistakes of <see cref="PlantedFaultTests"/>.</summary>
internal static partial class Plants
{
    // A list per section, made before this one is.
    public static Plant[] All =>
    [
        .. Basics, .. Blocks, .. Operations, .. Magnitudes, .. MixtureOfExperts,
        .. AttentionForward, .. AttentionBackward, .. LinearAttention,
    ];

    private static Plant[] Basics { get; } =
    [
        // 1: storage types
        new("the lower half of a word for the upper", "load_vector", "words[i] & 0xffff0000u",
            "words[i] << 16", "add") { Size = 64, With = [6] },

        Plant.Fault(Check.OutOfBounds, "one element too many of an odd row", "copy_lora_tile",
            "col + j < cols", "col + j <= cols", "lora_linear_dropout") with { Kernel = "lora_down", With = [8] },
        Other("cut off, not rounded", "narrow_bf16x2", "return y;",
            "return __float_as_uint(low) >> 16 | (__float_as_uint(high) & 0xffff0000u);",
            nameof(CudaRoundingTests.ErrorsHaveNoSide),
            cuda => new CudaRoundingTests(cuda)
                .ErrorsHaveNoSide(OpCases.All.Single(c => c.Name == "add")))
        with
        {
            With = [6],
        },

        // 4: sums
        new("the last row of a part is left out", "sum_rows", "first + rows_per_part)",
            "first + rows_per_part - 1)", "linear"),
        new("the first part is left out", "sum_parts", "int p = 0", "int p = 1", "linear"),
        new("half of the bias", "fill_rows", "b[c + i]", "b[(c + i) / 2]", "patch_embed")
        {
            Size = 16,
        },
        Plant.Fault(Check.OutOfBounds, "one column too many", "sum_rows", "c + i < cols",
            "c + i <= cols", "linear"),
        Plant.Fault(Check.GlobalRace, "every part writes the first", "sum_rows",
            "part[(u64)blockIdx.y * cols + own]", "part[own]", "patch_embed") with { Size = 1023 },

        // 5: normalisation
        new("what is beyond a row's end counts as zeros", "norm_forward_row",
            "own.has(first, i)", "true", "layer_norm"),
        new("a long row is not read again", "norm_forward_row",
            "if (cols > stretch) own.load(v, row, first);", "", "rms_norm") { Size = 8200 },
        new("the mean of the gradient is left out", "norm_backward_row", "g[i] - average", "g[i]",
            "layer_norm"),
        new("the centre is left out", "sum_norm_rows", "(v[i] - centre)", "v[i]", "layer_norm"),
        new("the last row of a part is left out", "sum_norm_rows", "r < end", "r < end - 1",
            "rms_norm"),
        Plant.Fault(Check.Uninitialised, "no barrier before the sums of warps are added",
            "norm_weight_parts", "= sums[which][i];\n        __syncthreads();", "= sums[which][i];",
            "layer_norm"),

        // 6: element-wise
        Plant.Fault(Check.OutOfBounds, "the tail is read as a whole vector", "is_whole",
            "i + VECTOR <= count", "i < count", "add") with { Kernel = "add_forward" },
        new("the tail repeats its first element", "store_run", "narrow(v[j])",
            "narrow(v[0])", "add"),
        new("the scale is left out", "scale_rows", "v[j] *= scale", "v[j] *= 1",
            "add") { Size = 64 },
        new("the upper half of the distribution is the lower", "normal_cdf",
            "x < 0 ? tail : 1 - tail", "tail", "gelu_erf"),
        new("the slope of the cubic is that of a line", "gelu_backward", "3 * GELU_CUBIC",
            "GELU_CUBIC", "gelu_tanh"),
        new("what is below zero passes", "relu", "a[j] <= 0 ? 0 :", "", "relu"),
        new("one target's flag for the other's", "swiglu_backward", "whole, accumulate_up",
            "whole, !accumulate_up", "swiglu"),
        new("the wrong half of the head", "rope", "load_run(b, x, at + half,", "load_run(b, x, at,",
            "rope"),
        new("forwards in the backward", "rope", "s[j] * direction", "s[j]", "rope"),

        // 8: low-rank adapters
        new("an element of a block takes its neighbour's word", "dropout_mask", "draw.z,",
            "draw.y,", "lora_linear_dropout"),
        new("both elements of a word take its high bits", "dropout_mask",
            "words_of[j] << 16 >= limit", "words_of[j] >= limit", "lora_linear_dropout"),
        new("the last columns are left out", "lora_down", "(end - begin + COLS - 1) / COLS",
            "(end - begin) / COLS", "lora_linear_dropout") { Size = 1023 },
        new("the first part of the columns is left out", "sum_four",
            "unroll 4\n    for (int p = 0", "unroll 4\n    for (int p = 1",
            "lora_linear_dropout") { Size = 2047 },
        new("nothing is dropped on the way back", "lora_gradient_x", ">> bit & 1 ?",
            ">> bit & 1 | 1 ?", "lora_linear_dropout"),
        Plant.Fault(Check.OutOfBounds, "one row too many", "lora_gradient_a",
            "first_col, cols, end - r,", "first_col, cols, end - r + 1,", "lora_linear_dropout"),

        // 7: lookups
        new("the scale is left out", "lookup_rows", "scale * load_any(", "1 * load_any(",
            "embedding"),
        Plant.Fault(Check.GlobalRace, "the second token begins its id again", "sum_by_id",
            "first > 0 &&", "first > 1 &&", "embedding") with { Size = 1023 },
        Plant.Fault(Check.SharedRaceWithinWarp, "the next tile comes too early", "order_by_id",
            "id + (first + i < token);\n        __syncthreads();", "id + (first + i < token);",
            "embedding") with { Size = 1023 },
        Plant.Fault(Check.OutOfBounds, "rows beyond the used ones are read", "gather_rows",
            "i < used ? rows[i] : -1", "rows[i]", "splice"),
        new("the feature before", "splice_forward", "(i - 1)", "(i > 1 ? i - 2 : 0)", "splice"),

        // 9: cross-entropy
        new("the tail is not read", "cross_entropy_rows", "c + i < vocabulary ? row[c + i] : 0",
            "0", "cross_entropy") { Size = 65, With = [7] },
        new("the target's logit is not subtracted", "cross_entropy_rows", "(own - top)", "top",
            "cross_entropy") { With = [7] },
        new("the last label is not found", "cross_entropy_scatter", "low < labels",
            "low + 1 < labels", "cross_entropy") { Size = 65, With = [7] },

        // 10: attention, forward
        Attention("left and right half exchanged", "narrow_left",
            "a[1] = narrow2(left[2], left[3])", "a[1] = narrow2(right[2], right[3])", 64),
        Attention("earlier output is not shrunk", "attention_forward_any", "out[r][i] *= keep",
            "out[r][i] *= 1", 8),
        Attention("rows behind the sequence", "copy_tile", "row + step < rows", "true", 64) with
        {
            By = Finder.Emulator, Check = Check.OutOfBounds, Kernel = "attention_forward_64",
        },
        Attention("no barrier behind the keys' wait", "attention_forward_tile",
            "__syncthreads(); // keys", "// keys", 72) with
        {
            By = Finder.Emulator, Check = Check.SharedRaceWithinWarp,
            Kernel = "attention_forward_72",
        },
        Attention("the tile is read before others have written it", "attention_forward_any",
            "__syncthreads();\n\n", "\n\n", 8) with
        {
            By = Finder.Emulator, Check = Check.Uninitialised,
        },

        // 12: optimizer
        Plant.Fault(Check.SharedRaceWithinWarp, "no barrier between two sums",
            "gradient_norm_parts",
            "double sum = block_sum_double(only_count ? 0 : squares, sums);\n    __syncthreads();",
            "double sum = block_sum_double(only_count ? 0 : squares, sums);",
            nameof(UpdateTests.TenStepsEqualPyTorch)) with { Other = TenSteps,
            Storage = DType.F32 },
        Plant.Fault(Check.SharedRaceWithinWarp, "no barrier in the halves of a sum",
            "block_sum_double",
            "shared[threadIdx.x + half];\n        __syncthreads();", "shared[threadIdx.x + half];",
            nameof(UpdateTests.TenStepsEqualPyTorch)) with
        {
            Other = TenSteps, Storage = DType.F32, Kernel = "gradient_norm_parts",
        },
        Other("clipped to the norm, not by it", "gradient_norm_finish",
            "max_norm / (length + 1e-6)",
            "max_norm", nameof(UpdateTests.TenStepsEqualPyTorch), TenSteps),
        Other("the fourth of a wide access updated with the third's gradient", "adamw",
            "gradient.w * factor", "gradient.z * factor",
            nameof(UpdateTests.ManyElementsEqualTheFormulaOneByOne),
            cuda => new UpdateTests(cuda).ManyElementsEqualTheFormulaOneByOne(100003, cuda: true)),
        Other("moments cut off, not rounded", "round_randomly", "(bits + random) >> 16",
            "bits >> 16", nameof(UpdateTests.MomentsInBf16AreRoundedWithoutBias),
            Moments) with { Storage = DType.BF16 },
        Other("the same random numbers in every step", "adamw_bf16_moments",
            "philox(seed, step,", "philox(seed, 0,",
            nameof(UpdateTests.MomentsInBf16AreRoundedWithoutBias),
            Moments) with { Storage = DType.BF16 },
        Other("random numbers by place in the call", "adamw_bf16_moments",
            "(u32)((first_element + i) / 4)", "(u32)(i / 4)",
            nameof(UpdateTests.PiecesOfARangeRoundAsTheWhole),
            cuda => new UpdateTests(cuda).PiecesOfARangeRoundAsTheWhole(cuda: true)),

        Other("elements counted in 32 bits", "adamw_bf16_moments",
            "(u32)((first_element + i) / 4)", "((u32)first_element + (u32)i) / 4",
            nameof(OptimizerUpdateTests.AnySizeAndPlace),
            cuda => new OptimizerUpdateTests(cuda).AnySizeAndPlace(
                new OptimizerForm(UpdateRule.AdamW, DType.BF16), DType.F32, cuda: true)),

        // 18: other optimizers
        Other("a small negative moment becomes 0", "nearest_entry", "x > 0 ? 1 : -1", "0",
            nameof(OptimizerUpdateTests.ASmallMomentOf8BitsKeepsItsSign),
            cuda => new OptimizerUpdateTests(cuda).ASmallMomentOf8BitsKeepsItsSign(cuda: true))
            with { With = [12] },
        Other("the scale of half a block", "write_codes", "j < 8", "j < 4",
            nameof(OptimizerUpdateTests.EachStepIn8BitsEqualsBitsandbytes), EightBits)
            with { With = [12] },
        Other("a change of any size", "adafactor_rate", "fmaxf(1.0f, ", "(1.0f + 0 * ",
            nameof(OptimizerUpdateTests.AdafactorOfAnyMatrix), Factored)
            with { With = [12], Storage = DType.F32 },
        Other("the last part of columns is left out", "adafactor_columns", "y < parts",
            "y < parts - 1", nameof(OptimizerUpdateTests.AdafactorOfAnyMatrix), Factored)
            with { With = [12], Storage = DType.F32 },
    ];

    // Size is the head's columns; with tiles that are whole, cut, and masked in part.
    private static Plant Attention(
        string name, string function, string from, string to, int headDim) =>
        new(name, function, from, to, nameof(CudaAttentionTests.Agrees))
        {
            Size = headDim,
            Other = cuda => CudaAttentionTests.Compare(
                AttentionProblem.Random(
                    4, 2, headDim, [130, 70], [150, 70], causal: true, [150, 60]),
                DType.BF16, cuda.Device(DType.BF16)),
        };

    private static Plant Other(string name, string function, string from, string to, string test,
        Action<CudaUnderTest> run) =>
        new(name, function, from, to, test) { By = Finder.Test, Other = run };

    private static void TenSteps(CudaUnderTest cuda)
    {
        foreach (ReferenceCase c in ReferenceFile.Open("ops/adamw").Cases)
            new UpdateTests(cuda).TenStepsEqualPyTorch(c);
    }

    private static void EightBits(CudaUnderTest cuda) =>
        new OptimizerUpdateTests(cuda).EachStepIn8BitsEqualsBitsandbytes(
            ReferenceFile.Open("optim/adamw8bit").Cases[1], cuda: true);

    private static void Factored(CudaUnderTest cuda) =>
        new OptimizerUpdateTests(cuda).AdafactorOfAnyMatrix(1, 517, 300, cuda: true);

    private static void Moments(CudaUnderTest cuda) =>
        new UpdateTests(cuda).MomentsInBf16AreRoundedWithoutBias(cuda: true);
}
