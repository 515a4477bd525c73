using System.Numerics;
using MiniCpmNative.Kernels.Cpu;

namespace MiniCpmNative.Kernels.Updates;

/// <summary>
/// One step of AdamW over one flat range, Loshchilov and Hutter 2019, in torch.optim.AdamW's form:
/// p *= 1 - lr * decay;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
/// p -= lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + epsilon),  with g the gradient times the clipping
/// factor and t = Step from 1.
/// </summary>
public readonly record struct AdamW(
    double LearningRate, double Beta1, double Beta2, double Epsilon, double WeightDecay, long Step);

/// <summary>
/// The tensors of one range, all of one shape. Weights are F32, or BF16 or F16 with a Master in F32 of
/// which they are the rounded copy; Gradient, M and V are F32. (All F64 on an F64 device.)
/// </summary>
public readonly record struct AdamWRange(
    Tensor Weights, Tensor Master, Tensor Gradient, Tensor M, Tensor V)
{
    /// <exception cref="ShapeException">Types or shapes do not fit.</exception>
    public void Check(DType activations)
    {
        var state = new Spec(activations, Weights.Shape);
        Must("gradient", Gradient.Spec, state);
        Must("m", M.Spec, state);
        Must("v", V.Spec, state);
        Must("master", Master.Spec, Weights.Type == activations ? default : state);
    }

    private static void Must(string name, Spec got, Spec expected)
    {
        if (got != expected)
            throw new ShapeException($"adamw: {name} must be {expected}, got {got}");
    }
}

/// <summary>The CPU's AdamW: element-wise, memory-bound (reads p m v g, writes p m v), on all threads.</summary>
internal static unsafe class CpuAdamW
{
    private const int Block = 4096;

    public static void Run<T>(Workers workers, in AdamW step, in AdamWRange range, double factor)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        long count = range.Weights.Shape.Count;
        workers.For(checked((int)((count + Block - 1) / Block)),
            new Blocks<T>(range, count, new Formula<T>(step, factor)));
    }

    private readonly struct Blocks<T>(AdamWRange range, long count, Formula<T> formula) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int block = begin; block < end; block++)
            {
                long first = (long)block * Block;
                int length = (int)Math.Min(Block, count - first);
                T* p = (T*)(range.Master.Exists ? range.Master : range.Weights).Data + first;
                formula.Apply(p, (T*)range.Gradient.Data + first,
                    (T*)range.M.Data + first, (T*)range.V.Data + first, length);
                if (range.Master.Exists)
                    FloatBits.Narrow((float*)p, (ushort*)range.Weights.Data + first,
                        range.Weights.Type, length);
            }
        }
    }

    private readonly struct Formula<T>
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        private readonly T _factor, _keep, _first, _newFirst, _second, _newSecond, _rate, _root, _epsilon;

        public Formula(in AdamW step, double factor)
        {
            _factor = Real.Of<T>(factor);
            _keep = Real.Of<T>(1 - (step.LearningRate * step.WeightDecay));
            _first = Real.Of<T>(step.Beta1);
            _newFirst = Real.Of<T>(1 - step.Beta1);
            _second = Real.Of<T>(step.Beta2);
            _newSecond = Real.Of<T>(1 - step.Beta2);
            _rate = Real.Of<T>(step.LearningRate / (1 - Math.Pow(step.Beta1, step.Step)));
            _root = Real.Of<T>(Math.Sqrt(1 - Math.Pow(step.Beta2, step.Step)));
            _epsilon = Real.Of<T>(step.Epsilon);
        }

        public void Apply(T* p, T* g, T* m, T* v, int count)
        {
            int i = 0;
            for (; i <= count - Vector<T>.Count; i += Vector<T>.Count)
            {
                Vector<T> gradient = Vector.Load(g + i) * _factor;
                Vector<T> first = (Vector.Load(m + i) * _first) + (gradient * _newFirst);
                Vector<T> second = (Vector.Load(v + i) * _second) + (gradient * gradient * _newSecond);
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
