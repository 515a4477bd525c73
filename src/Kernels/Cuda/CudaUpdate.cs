using MiniCpmNative.Kernels.Updates;

namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// The GPU's optimizers: kernels `adamw`, `adamw_bf16_moments`, `update_8bit` (AdamW and Lion with
/// moments in 8 bits) and `lion` (also plain gradients).
/// </summary>
internal static class CudaUpdate
{
    public static void Run(
        CudaDevice device, in UpdateStep step, in UpdateRange range, in Tensor norm)
    {
        long count = range.Weights.Shape.Count;
        var (keep, newFirst, newSecond, rate, root) = step.Factors(range.M.Type);
        Tensor p = range.Weights, rounded = Tensor.None;
        if (range.Master.Exists) (p, rounded) = (range.Master, range.Weights);
        Grid grid = Grid.Elements((count + 3) / 4);
        if (range.M.Type == DType.U8)
        {
            // A warp for what shares a scale.
            device.Launch("update_8bit", Grid.Elements(DynamicMap.Blocks(count) * 32L),
                [p, rounded, (int)rounded.Type, range.Gradient, range.M, range.V, range.MScales,
                    range.VScales, norm, count, keep, step.Beta1, newFirst, step.Beta2, newSecond,
                    rate, root, step.Epsilon]);
            return;
        }

        if (step.Rule is UpdateRule.Lion or UpdateRule.Sgd)
        {
            device.Launch("lion", grid,
                [p, rounded, (int)rounded.Type, range.Gradient, range.M, norm, count, keep,
                    step.Beta1, newFirst, step.Beta2, newSecond, rate]);
            return;
        }

        if (range.M.Type == DType.F32)
        {
            device.Launch("adamw", grid,
                [p, rounded, (int)rounded.Type, range.Gradient, range.M, range.V, norm, count, keep,
                    step.Beta1, newFirst, step.Beta2, newSecond, rate, root, step.Epsilon]);
            return;
        }

        device.Launch("adamw_bf16_moments", grid,
            [p, rounded, (int)rounded.Type, range.Gradient, range.M, range.V, norm, count, keep,
                step.Beta1, newFirst, step.Beta2, newSecond, rate, root, step.Epsilon, range.First,
                step.Seed, (ulong)step.Step, UpdateStep.RandomLayer]);
    }
}
