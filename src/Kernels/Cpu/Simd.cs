using System.Numerics;
using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>What the matrix kernels are compiled for; each needs the ones before it.</summary>
public enum InstructionSet
{
    /// <summary>Vector&lt;T&gt;: whatever the runtime offers, on any processor.</summary>
    Portable,

    /// <summary>AVX2 and FMA, 256 bits, 16 registers.</summary>
    Avx2,

    /// <summary>AVX-512 F, BW, VL, DQ: 512 bits, 32 registers.</summary>
    Avx512,
}

/// <summary>
/// The seam between the matrix kernels and the processor: vectors of T in registers of type V.
/// Kernels are written once over this interface and compiled per instruction set, with every call
/// inlined.
/// </summary>
internal unsafe interface ISimd<T, V>
    where T : unmanaged
    where V : unmanaged
{
    /// <summary>Elements of a vector; a power of two, at most 16.</summary>
    static abstract int Width { get; }

    /// <summary>Rows of a full register tile, which is two vectors wide.</summary>
    static abstract int TileRows { get; }

    static abstract V Zero { get; }

    static abstract V Broadcast(T value);

    static abstract V Load(T* p);

    /// <summary>Width elements of bfloat16, widened.</summary>
    static abstract V LoadBF16(ushort* p);

    /// <summary>Width elements of IEEE half precision, widened.</summary>
    static abstract V LoadF16(ushort* p);

    static abstract void Store(T* p, V value);

    /// <summary>a * b + c.</summary>
    static abstract V Fma(V a, V b, V c);

    /// <summary>Sum of the lanes, in a fixed order.</summary>
    static abstract T Sum(V value);

    /// <summary>Asks for the cache line at p, to be written soon.</summary>
    static abstract void Prefetch(void* p);

    /// <summary>
    /// to[j * toStride + i] = from[min(i, rows - 1) * stride + j] for i, j below Width, in
    /// increasing j: toStride may be below Width, then later rows overwrite the surplus of earlier
    /// ones. from and stride count elements of the storage.
    /// </summary>
    static abstract void Transpose<S>(byte* from, nint stride, int rows, T* to, nint toStride)
        where S : IStorage;
}

/// <summary>How a matrix is stored in memory; loads widen to the type of computation.</summary>
internal unsafe interface IStorage
{
    static abstract int Size { get; }

    static abstract V Load<T, V, I>(byte* p)
        where T : unmanaged
        where V : unmanaged
        where I : ISimd<T, V>;

    static abstract T Scalar<T>(byte* p)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>;
}

/// <summary>Stored in the type of computation.</summary>
internal readonly unsafe struct Native<TStored> : IStorage
    where TStored : unmanaged
{
    public static int Size => sizeof(TStored);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Load<T, V, I>(byte* p)
        where T : unmanaged
        where V : unmanaged
        where I : ISimd<T, V> => I.Load((T*)p);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static T Scalar<T>(byte* p)
        where T : unmanaged, IBinaryFloatingPointIeee754<T> => *(T*)p;
}

internal readonly unsafe struct BFloat16 : IStorage
{
    public static int Size => 2;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Load<T, V, I>(byte* p)
        where T : unmanaged
        where V : unmanaged
        where I : ISimd<T, V> => I.LoadBF16((ushort*)p);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static T Scalar<T>(byte* p)
        where T : unmanaged, IBinaryFloatingPointIeee754<T> =>
        T.CreateTruncating(BitConverter.UInt32BitsToSingle((uint)*(ushort*)p << 16));
}

internal readonly unsafe struct Half16 : IStorage
{
    public static int Size => 2;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Load<T, V, I>(byte* p)
        where T : unmanaged
        where V : unmanaged
        where I : ISimd<T, V> => I.LoadF16((ushort*)p);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static T Scalar<T>(byte* p)
        where T : unmanaged, IBinaryFloatingPointIeee754<T> => T.CreateTruncating(*(Half*)p);
}
