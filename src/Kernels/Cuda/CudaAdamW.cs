using MiniCpmNative.Kernels.Updates;

namespace MiniCpmNative.Kernels.Cuda;

/// <summary>The GPU's AdamW: kernels `adamw` and `adamw_bf16_moments`.</summary>
internal static class CudaAdamW
{
    public static void Run(CudaDevice device, in AdamW step, in AdamWRange range, in Tensor norm)
    {
        long count = range.Weights.Shape.Count;
        var (keep, newFirst, newSecond, rate, root) = step.Factors();
        Tensor p = range.Weights, rounded = Tensor.None;
        if (range.Master.Exists) (p, rounded) = (range.Master, range.Weights);
        Grid grid = Grid.Elements((count + 3) / 4);
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
                step.Seed, (ulong)step.Step, AdamW.RandomLayer]);
    }
}
