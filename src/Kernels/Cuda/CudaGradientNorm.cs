using MiniCpmNative.Kernels.Updates;

namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// The GPU's reduction: a block adds a part of fixed size (kernel `gradient_norm_parts`), one block
/// adds the parts of all ranges (`gradient_norm_finish`); nothing depends on the size of the GPU.
/// </summary>
internal static class CudaGradientNorm
{
    // 16 accesses of 16 bytes per thread.
    private const long PerPart = 1 << 14;

    public static void Run(
        CudaDevice device, ReadOnlySpan<Tensor> gradients, double maxNorm, in Tensor into,
        in Tensor losses)
    {
        int parts = PartsOf(losses);
        foreach (ref readonly Tensor gradient in gradients) parts += PartsOf(gradient);
        ArenaMark mark = device.Step.Mark();
        Tensor part = device.Step.Push(new Spec(DType.F64, new Shape(parts, 2)), "gradient_norm");
        int first = 0;
        foreach (ref readonly Tensor gradient in gradients) Add(gradient, onlyCount: false);
        Add(losses, onlyCount: true);
        device.Launch("gradient_norm_finish", new Grid(1, 256),
            [into, part, parts, KernelArgument.Double(maxNorm)]);
        device.Step.Pop(mark);

        void Add(in Tensor values, bool onlyCount)
        {
            int count = PartsOf(values);
            if (count == 0) return;
            device.Launch("gradient_norm_parts", new Grid(count, 256),
                [part.Slice(first, count), values, values.Shape.Count, PerPart, onlyCount]);
            first += count;
        }
    }

    private static int PartsOf(in Tensor values) =>
        values.Exists ? checked((int)((values.Shape.Count + PerPart - 1) / PerPart)) : 0;
}
