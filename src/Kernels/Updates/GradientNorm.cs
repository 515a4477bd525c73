using System.Numerics;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Updates;

/// <summary>
/// The global norm of gradients, and what follows from it, as a device tensor of
/// <see cref="Spec"/>: norm = sqrt(sum of g^2) over all ranges, accumulated in double in a fixed
/// order; factor = min(1, maxNorm / (norm + 1e-6)) as torch.nn.utils.clip_grad_norm_ has it; and
/// the number of elements that are NaN or infinite, those of the step's losses included. On the
/// device, so that a step need not wait for the host.
/// </summary>
public readonly record struct GradientNorm(double Norm, double Factor, double NonFinite)
{
    /// <summary>F64[3]: norm, factor, number of non-finite elements.</summary>
    public static Spec Spec { get; } = new(DType.F64, new Shape(3));

    internal static GradientNorm Of(double squares, double nonFinite, double maxNorm)
    {
        double norm = Math.Sqrt(squares);
        double factor = maxNorm > 0 ? Math.Min(1, maxNorm / (norm + 1e-6)) : 1;
        return new(norm, factor, nonFinite);
    }
}

/// <summary>The CPU's reduction: partial sums per block of fixed size, added in order.</summary>
internal static unsafe class CpuGradientNorm
{
    private const int Block = 1 << 14;

    /// <summary>
    /// Adds one range's sum of squares and number of non-finite elements to the totals.
    /// </summary>
    public static void Add<T>(
        Workers workers, Arena scratch, in Tensor gradient, ref double squares,
        ref double nonFinite)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        long count = gradient.Shape.Count;
        int blocks = checked((int)((count + Block - 1) / Block));
        ArenaMark mark = scratch.Mark();
        var partial = (double*)scratch.Push(
            new Spec(DType.F64, new Shape(blocks, 2)), "gradient_norm").Data;
        workers.For(blocks, new Blocks<T>((T*)gradient.Data, count, partial));
        for (int block = 0; block < blocks; block++)
        {
            squares += partial[2 * block];
            nonFinite += partial[(2 * block) + 1];
        }

        scratch.Pop(mark);
    }

    private readonly struct Blocks<T>(T* g, long count, double* partial) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int block = begin; block < end; block++)
            {
                long first = (long)block * Block;
                int length = (int)Math.Min(Block, count - first);
                double squares = Squares(g + first, length);
                partial[2 * block] = squares;
                // No square of a finite float overflows a double, so only a bad sum needs a count.
                partial[(2 * block) + 1] = double.IsFinite(squares)
                    ? 0 : NonFinite(g + first, length);
            }
        }

        private static double Squares(T* x, int length)
        {
            int i = 0;
            double sum = 0;
            if (typeof(T) == typeof(float))
            {
                Vector<double> low = default, high = default;
                for (; i <= length - Vector<float>.Count; i += Vector<float>.Count)
                {
                    Vector.Widen(Vector.Load((float*)x + i), out var a, out var b);
                    low += a * a;
                    high += b * b;
                }

                sum = Vector.Sum(low + high);
            }

            for (; i < length; i++)
            {
                double value = Real.ToDouble(x[i]);
                sum += value * value;
            }

            return sum;
        }

        private static int NonFinite(T* x, int length)
        {
            int bad = 0;
            for (int i = 0; i < length; i++) bad += T.IsFinite(x[i]) ? 0 : 1;
            return bad;
        }
    }
}

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
