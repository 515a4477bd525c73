using MiniCpmNative.GpuEmulator;

namespace MiniCpmNative.Tests;

/// <summary>
/// Mistakes in the kernels of the mixture of experts.
/// </summary>
internal static partial class Plants
{
    private static Plant[] MixtureOfExperts { get; } =
    [
        Experts("the best expert is chosen twice", "route_experts", "k > 0 &&", "k > 1 &&"),
        Experts("a logit that is no number is smaller than others", "is_before",
            "if ((a != a) != (b != b)) return a != a;", "", nameof(CudaExpertsTests)) with
        {
            By = Finder.Test, Other = cuda => new CudaExpertsTests(cuda).ABadLogitIsSeen(16),
        },
        Experts("the logits' exponentials are not divided", "route_experts", "/= sum", "/= 1"),
        Experts("the first warp's terms are not counted", "sort_by_expert", "if (w < warp) at +=",
            "if (w < warp - 1) at +=") with
        {
            Kernel = "expert_product", Size = 70, By = Finder.Emulator,
            Check = Check.ForeignPointer,
        },
        Plant.Fault(Check.SharedRaceWithinWarp, "counts are overwritten before they are read",
            "sort_by_expert", "__syncthreads(); // the counts before are read", "",
            "experts_whole") with { With = [5, 6, 8, 14], Size = 200 },
        Plant.Fault(Check.Uninitialised, "an expert's second tile is its first", "expert_tiles",
            " + i * EXPERT_TILE_ROWS", "", "experts_whole") with
        {
            Kernel = "combine_experts", With = [5, 6, 8, 14], Size = 70,
        },
        Experts("the gradient of up does not reach x", "expert_tile", "parts * chunks", "chunks"),
        Experts("gate and up have one matrix", "expert_tile", "(BACK ? 0 : blockIdx.z)", "0"),
        Experts("experts without rows keep what was there", "expert_gradient",
            "begin == end && accumulate", "begin == end"),
        Experts("all experts have the first one's weight", "combine_experts", "g[term] : 1",
            "g[first] : 1"),
        Experts("another slope of silu", "experts_backward", "silu * (1 - s)", "s * (1 - s)"),
        Experts("chosen weights are free to grow", "route_experts_backward", "(dg[i] - mean)",
            "dg[i]"),
        Experts("a closed gate adds all", "gated_add", "open * u[i]", "u[i]", "gated_add"),
        Experts("a gate's slope is the gate", "gated_add_backward", "s * (1 - s) *", "s *",
            "gated_add"),
    ];

    private static Plant Experts(
        string name, string function, string from, string to, string @case = "experts_whole") =>
        new(name, function, from, to, @case) { With = [5, 6, 8, 14] };
}
