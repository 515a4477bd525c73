using System.Numerics;
using MiniCpmNative.Kernels.Updates;

namespace MiniCpmNative.Kernels.Cpu;

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
