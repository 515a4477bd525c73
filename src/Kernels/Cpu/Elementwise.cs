using System.Numerics;
using System.Runtime.CompilerServices;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>A formula on vectors of elements; operands that were not given are zero.</summary>
public interface IMap<T>
{
    Vector<T> At(Vector<T> a, Vector<T> b, Vector<T> c);
}

/// <summary>
/// Element-wise loops, each formula written once: whole vectors, then one padded vector for the
/// rest. Operands may be null (zero is read) and may be the result's memory. Memory-bound.
/// </summary>
public static unsafe class Elementwise
{
    private const int Block = 4096;

    /// <summary>y[i] = map(a[i], b[i], c[i]), or adds it, on the calling thread.</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void Map<T, TMap>(T* a, T* b, T* c, T* y, long count, bool accumulate, TMap map)
        where T : unmanaged
        where TMap : struct, IMap<T>
    {
        long i = 0;
        for (; i <= count - Vector<T>.Count; i += Vector<T>.Count)
        {
            Vector<T> value = map.At(
                a is null ? default : Vector.Load(a + i),
                b is null ? default : Vector.Load(b + i),
                c is null ? default : Vector.Load(c + i));
            if (accumulate) value += Vector.Load(y + i);
            Vector.Store(value, y + i);
        }

        int rest = (int)(count - i);
        if (rest == 0) return;
        Vector<T> last = map.At(
            a is null ? default : LoadFirst(a + i, rest),
            b is null ? default : LoadFirst(b + i, rest),
            c is null ? default : LoadFirst(c + i, rest));
        if (accumulate) last += LoadFirst(y + i, rest);
        StoreFirst(last, y + i, rest);
    }

    /// <summary>The same for a whole tensor on all threads; absent operands have no data.</summary>
    public static void Map<T, TMap>(
        Workers workers, Matrix<T> a, Matrix<T> b, Matrix<T> c, Matrix<T> y, bool accumulate,
        TMap map)
        where T : unmanaged
        where TMap : unmanaged, IMap<T>
    {
        int blocks = checked((int)((y.Count + Block - 1) / Block));
        workers.For(blocks,
            new Blocks<T, TMap>(a.Data, b.Data, c.Data, y.Data, y.Count, accumulate, map));
    }

    /// <summary>into = x * scale, or adds it: the gradient of everything linear.</summary>
    public static void Scale<T>(Workers workers, Matrix<T> x, T scale, Gradient<T> into)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        if (into.Wanted)
            Map(workers, x, default, default, into.Into, into.Accumulate, new Scaled<T>(scale));
    }

    /// <summary>The first count elements; zero in the other lanes.</summary>
    public static Vector<T> LoadFirst<T>(T* source, int count)
        where T : unmanaged
    {
        Vector<T> value = default;
        Unsafe.CopyBlockUnaligned(&value, source, (uint)(count * sizeof(T)));
        return value;
    }

    public static void StoreFirst<T>(Vector<T> value, T* target, int count)
        where T : unmanaged => Unsafe.CopyBlockUnaligned(target, &value, (uint)(count * sizeof(T)));

    /// <summary>a * scale.</summary>
    public readonly struct Scaled<T>(T scale) : IMap<T>
        where T : unmanaged
    {
        public Vector<T> At(Vector<T> a, Vector<T> b, Vector<T> c) => a * scale;
    }

    private readonly struct Blocks<T, TMap>(
        T* a, T* b, T* c, T* y, long count, bool accumulate, TMap map) : IRangeBody
        where T : unmanaged
        where TMap : unmanaged, IMap<T>
    {
        public void Run(int begin, int end, int worker)
        {
            long first = (long)begin * Block;
            Map(From(a, first), From(b, first), From(c, first), y + first,
                Math.Min(count, (long)end * Block) - first, accumulate, map);
        }

        private static T* From(T* data, long offset) => data is null ? null : data + offset;
    }
}
