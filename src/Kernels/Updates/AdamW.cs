using System.Numerics;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Updates;

/// <summary>
/// One step of AdamW over one flat range, Loshchilov and Hutter 2019, in torch.optim.AdamW's form:
/// p *= 1 - lr * decay;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
/// p -= lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + epsilon),  with g the gradient times the
/// clipping factor and t = Step from 1. Seed keys the rounding of 16-bit moments; see
/// <see cref="AdamWRange"/>.
/// </summary>
public readonly record struct AdamW(
    double LearningRate, double Beta1, double Beta2, double Epsilon, double WeightDecay, long Step,
    ulong Seed = 0)
{
    /// <summary>The layer number of the random numbers; those of dropout and of adapters' start are
    /// small, or small below 2^32.</summary>
    internal const uint RandomLayer = 0x80000000;

    /// <summary>
    /// The formula's factors, in double: p keep - m / (sqrt(v) / root + epsilon) rate.
    /// </summary>
    internal (double Keep, double NewFirst, double NewSecond, double Rate,
        double Root) Factors() => (
        1 - (LearningRate * WeightDecay), 1 - Beta1, 1 - Beta2,
        LearningRate / (1 - Math.Pow(Beta1, Step)), Math.Sqrt(1 - Math.Pow(Beta2, Step)));
}

/// <summary>
/// The tensors of one range, all of one shape. Weights are F32, or BF16 or F16 with a Master in F32
/// of which they are the rounded copy; Gradient is F32. M and V are F32, or BF16, which halves
/// them: then they are rounded up or down at random, so that the many small changes of a moving
/// average are kept on average (the nearest value would be the old one for ever). The random
/// numbers are those of <see cref="Philox"/> for (Seed, Step) of the step and element First + i, so
/// that the same run rounds the same way; m takes the low half of the element's word, v the high
/// half. First is a multiple of 4. (All F64 on an F64 device.)
/// </summary>
public readonly record struct AdamWRange(
    Tensor Weights, Tensor Master, Tensor Gradient, Tensor M, Tensor V, long First = 0)
{
    /// <exception cref="ShapeException">Types or shapes do not fit.</exception>
    /// <param name="full">F32, or F64 on an F64 device.</param>
    public void Check(DType full)
    {
        var state = new Spec(full, Weights.Shape);
        Spec moments = full == DType.F32 && M.Type == DType.BF16 ? state.As(DType.BF16) : state;
        Must("gradient", Gradient.Spec, state);
        Must("m", M.Spec, moments);
        Must("v", V.Spec, moments);
        Must("master", Master.Spec, Weights.Type == full ? default : state);
        if (First % 4 != 0) throw new ShapeException($"adamw: first element is {First}, not 4 n");
    }

    private static void Must(string name, Spec got, Spec expected)
    {
        if (got != expected)
            throw new ShapeException($"adamw: {name} must be {expected}, got {got}");
    }
}

/// <summary>
/// The CPU's AdamW: element-wise, memory-bound (reads p m v g, writes p m v), on all threads.
/// </summary>
internal static unsafe class CpuAdamW
{
    private const int Block = 4096;

    public static void Run<T>(Workers workers, in AdamW step, in AdamWRange range, double factor)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        long count = range.Weights.Shape.Count;
        workers.For(checked((int)((count + Block - 1) / Block)),
            new Blocks<T>(range, count, new Formula<T>(step, factor), step));
    }

    private readonly struct Blocks<T>(
        AdamWRange range, long count, Formula<T> formula, AdamW step) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int block = begin; block < end; block++)
            {
                long first = (long)block * Block;
                int length = (int)Math.Min(Block, count - first);
                T* p = (T*)(range.Master.Exists ? range.Master : range.Weights).Data + first;
                T* g = (T*)range.Gradient.Data + first;
                if (range.M.Type == DType.BF16)
                    Rounding((float*)p, (float*)g, first, length);
                else
                    formula.Apply(p, g, (T*)range.M.Data + first, (T*)range.V.Data + first, length);
                if (range.Master.Exists)
                    FloatBits.Narrow((float*)p, (ushort*)range.Weights.Data + first,
                        range.Weights.Type, length);
            }
        }

        // Moments in BF16: widened and rounded again four elements at a time,
        // as many as a counter gives.
        private void Rounding(float* p, float* g, long first, int length)
        {
            float* m = stackalloc float[4];
            float* v = stackalloc float[4];
            uint* random = stackalloc uint[4];
            var key = ((uint)step.Seed, (uint)(step.Seed >> 32));
            for (int i = 0; i < length; i += 4)
            {
                int some = Math.Min(4, length - i);
                ushort* means = (ushort*)range.M.Data + first + i;
                ushort* squares = (ushort*)range.V.Data + first + i;
                FloatBits.Widen(means, DType.BF16, m, some);
                FloatBits.Widen(squares, DType.BF16, v, some);
                formula.Apply((T*)(p + i), (T*)(g + i), (T*)m, (T*)v, some);
                var counter = ((uint)((range.First + first + i) / 4), AdamW.RandomLayer,
                    (uint)step.Step, (uint)((ulong)step.Step >> 32));
                (random[0], random[1], random[2], random[3]) = Philox.Draw(counter, key);
                for (int j = 0; j < some; j++)
                {
                    means[j] = FloatBits.RoundToBF16(m[j], random[j] & 0xFFFF);
                    squares[j] = FloatBits.RoundToBF16(v[j], random[j] >> 16);
                }
            }
        }
    }

    private readonly struct Formula<T>
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        private readonly T _factor, _keep, _first, _newFirst, _second, _newSecond, _rate, _root,
            _epsilon;

        public Formula(in AdamW step, double factor)
        {
            var (keep, newFirst, newSecond, rate, root) = step.Factors();
            _factor = Real.Of<T>(factor);
            _keep = Real.Of<T>(keep);
            _first = Real.Of<T>(step.Beta1);
            _newFirst = Real.Of<T>(newFirst);
            _second = Real.Of<T>(step.Beta2);
            _newSecond = Real.Of<T>(newSecond);
            _rate = Real.Of<T>(rate);
            _root = Real.Of<T>(root);
            _epsilon = Real.Of<T>(step.Epsilon);
        }

        public void Apply(T* p, T* g, T* m, T* v, int count)
        {
            int i = 0;
            for (; i <= count - Vector<T>.Count; i += Vector<T>.Count)
            {
                Vector<T> gradient = Vector.Load(g + i) * _factor;
                Vector<T> first = (Vector.Load(m + i) * _first) + (gradient * _newFirst);
                Vector<T> second = (Vector.Load(v + i) * _second)
                    + (gradient * gradient * _newSecond);
                Vector<T> root = (Vector.SquareRoot(second) / Vector.Create(_root))
                    + Vector.Create(_epsilon);
                Vector.Store(first, m + i);
                Vector.Store(second, v + i);
                Vector.Store((Vector.Load(p + i) * _keep) - (first / root * _rate), p + i);
            }

            for (; i < count; i++)
            {
                T gradient = g[i] * _factor;
                m[i] = (m[i] * _first) + (gradient * _newFirst);
                v[i] = (v[i] * _second) + (gradient * gradient * _newSecond);
                p[i] = (p[i] * _keep) - (m[i] / ((T.Sqrt(v[i]) / _root) + _epsilon) * _rate);
            }
        }
    }
}

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
