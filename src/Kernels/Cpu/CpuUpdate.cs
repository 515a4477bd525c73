using System.Numerics;
using MiniCpmNative.Kernels.Updates;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// The CPU's optimizers: element-wise, memory-bound (AdamW reads p m v g, writes p m v), on all
/// threads.
/// </summary>
internal static unsafe class CpuUpdate
{
    private const int Block = 4096;

    public static void Run<T>(Workers workers, in UpdateStep step, in UpdateRange range,
        double factor)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        long count = range.Weights.Shape.Count;
        workers.For(checked((int)((count + Block - 1) / Block)),
            new Blocks<T>(range, count, new Formula<T>(step, factor, range.M.Type), step));
    }

    private readonly struct Blocks<T>(
        UpdateRange range, long count, Formula<T> formula, UpdateStep step) : IRangeBody
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
                else if (range.M.Type == DType.U8)
                    Quantised((float*)p, (float*)g, first, length);
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
                var counter = ((uint)((range.First + first + i) / 4), UpdateStep.RandomLayer,
                    (uint)step.Step, (uint)((ulong)step.Step >> 32));
                (random[0], random[1], random[2], random[3]) = Philox.Draw(counter, key);
                for (int j = 0; j < some; j++)
                {
                    means[j] = FloatBits.RoundToBF16(m[j], random[j] & 0xFFFF);
                    squares[j] = FloatBits.RoundToBF16(v[j], random[j] >> 16);
                }
            }
        }

        // Moments in 8 bits: the values take them before they are rounded.
        private void Quantised(float* p, float* g, long first, int length)
        {
            float* m = stackalloc float[DynamicMap.Block];
            float* v = stackalloc float[DynamicMap.Block];
            for (int i = 0; i < length; i += DynamicMap.Block)
            {
                int some = Math.Min(DynamicMap.Block, length - i);
                Read(range.M, range.MScales, DynamicMap.Signed, first + i, m, some);
                Read(range.V, range.VScales, DynamicMap.Unsigned, first + i, v, some);
                formula.Apply((T*)(p + i), (T*)(g + i), (T*)m, (T*)v, some);
                Write(range.M, range.MScales, DynamicMap.Signed, first + i, m, some);
                Write(range.V, range.VScales, DynamicMap.Unsigned, first + i, v, some);
            }
        }

        private static void Read(
            in Tensor codes, in Tensor scales, float[] table, long first, float* x, int count)
        {
            if (!codes.Exists) return;
            float scale = ((float*)scales.Data)[first / DynamicMap.Block];
            byte* code = (byte*)codes.Data + first;
            for (int i = 0; i < count; i++) x[i] = table[code[i]] * scale;
        }

        private static void Write(
            in Tensor codes, in Tensor scales, float[] table, long first, float* x, int count)
        {
            if (!codes.Exists) return;
            float scale = 0;
            for (int i = 0; i < count; i++) scale = Math.Max(scale, Math.Abs(x[i]));
            ((float*)scales.Data)[first / DynamicMap.Block] = scale;
            byte* code = (byte*)codes.Data + first;
            for (int i = 0; i < count; i++)
                code[i] = DynamicMap.Code(table, scale > 0 ? x[i] / scale : 0);
        }
    }

    private readonly struct Formula<T>
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        private readonly T _factor, _keep, _first, _newFirst, _second, _newSecond, _rate, _root,
            _epsilon;

        private readonly UpdateRule _rule;

        public Formula(in UpdateStep step, double factor, DType moments)
        {
            _rule = step.Rule;
            var (keep, newFirst, newSecond, rate, root) = step.Factors(moments);
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
            if (_rule == UpdateRule.Lion) Lion(p, g, m, count);
            else if (_rule == UpdateRule.Sgd) Sgd(p, g, count);
            else AdamW(p, g, m, v, count);
        }

        private void Lion(T* p, T* g, T* m, int count)
        {
            for (int i = 0; i < count; i++)
            {
                T gradient = g[i] * _factor, step = (m[i] * _first) + (gradient * _newFirst);
                m[i] = (m[i] * _second) + (gradient * _newSecond);
                // 0 has no sign.
                p[i] = (p[i] * _keep) - (step > T.Zero ? _rate : step < T.Zero ? -_rate : T.Zero);
            }
        }

        private void Sgd(T* p, T* g, int count)
        {
            for (int i = 0; i < count; i++) p[i] = (p[i] * _keep) - (g[i] * _factor * _rate);
        }

        private void AdamW(T* p, T* g, T* m, T* v, int count)
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
