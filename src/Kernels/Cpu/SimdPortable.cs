using System.Numerics;
using System.Runtime.CompilerServices;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// Vector&lt;T&gt;: the path of other processors and of double. Storage narrower than T is widened
/// element by element, which only packing and the smallest products see.
/// </summary>
internal readonly unsafe struct PortableSimd<T> : ISimd<T, Vector<T>>
    where T : unmanaged, IBinaryFloatingPointIeee754<T>
{
    public static int Width => Vector<T>.Count;

    public static int TileRows => 6;

    public static Vector<T> Zero => Vector<T>.Zero;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector<T> Broadcast(T value) => new(value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector<T> Load(T* p) => Vector.Load(p);

    public static Vector<T> LoadBF16(ushort* p) => Widen<BFloat16>((byte*)p);

    public static Vector<T> LoadF16(ushort* p) => Widen<Half16>((byte*)p);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store(T* p, Vector<T> value) => Vector.Store(value, p);

    // Fused where the processor can, two roundings where it cannot.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector<T> Fma(Vector<T> a, Vector<T> b, Vector<T> c)
    {
        if (typeof(T) == typeof(float))
        {
            return Vector.MultiplyAddEstimate(a.As<T, float>(), b.As<T, float>(), c.As<T, float>())
                .As<float, T>();
        }

        return Vector.MultiplyAddEstimate(a.As<T, double>(), b.As<T, double>(), c.As<T, double>())
            .As<double, T>();
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static T Sum(Vector<T> value) => Vector.Sum(value);

    public static void Prefetch(void* p)
    {
        // No portable way to ask.
    }

    public static void Transpose<S>(byte* from, nint stride, int rows, T* to, nint toStride)
        where S : IStorage
    {
        for (int j = 0; j < Width; j++)
        {
            for (int i = 0; i < Width; i++)
            {
                nint at = (Math.Min(i, rows - 1) * stride) + j;
                to[(j * toStride) + i] = S.Scalar<T>(from + (at * S.Size));
            }
        }
    }

    private static Vector<T> Widen<S>(byte* p)
        where S : IStorage
    {
        T* values = stackalloc T[Vector<T>.Count];
        for (int i = 0; i < Width; i++) values[i] = S.Scalar<T>(p + (i * S.Size));
        return Vector.Load(values);
    }
}
