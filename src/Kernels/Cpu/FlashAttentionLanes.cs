using System.Numerics;
using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// The vector operations that attention needs, so that its loops are written once for every
/// register width and for float and double. All members are inlined into the loops.
/// </summary>
internal unsafe interface ILanes<TVector, T>
    where T : unmanaged
{
    /// <summary>Elements in one register.</summary>
    static abstract int Count { get; }

    /// <summary>
    /// Rows of a register tile three vectors wide: 8 of 32 registers' worth, 4 of 16.
    /// </summary>
    static abstract int TileRows { get; }

    static abstract TVector Load(T* source);

    static abstract void Store(T* target, TVector value);

    static abstract TVector Broadcast(T value);

    static abstract TVector Add(TVector left, TVector right);

    static abstract TVector Multiply(TVector left, TVector right);

    /// <summary>left * right + addend, rounded once.</summary>
    static abstract TVector Fma(TVector left, TVector right, TVector addend);

    /// <summary>The larger element; right's where either is not a number.</summary>
    static abstract TVector Max(TVector left, TVector right);

    /// <summary>value, but 0 where test is below limit (not where test is not a number).</summary>
    static abstract TVector ZeroBelow(TVector test, TVector limit, TVector value);

    static abstract T Sum(TVector value);

    /// <summary>
    /// 2^n, n the integer in the low bits of a number between 1.5 * 2^p and 2^(p+1).
    /// </summary>
    static abstract TVector PowerOfTwo(TVector shifted);
}

/// <summary>512 bit registers (AVX-512).</summary>
internal readonly unsafe struct Lanes512<T> : ILanes<Vector512<T>, T>
    where T : unmanaged
{
    public static int Count => Vector512<T>.Count;

    public static int TileRows => 8;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector512<T> Load(T* source) => Vector512.Load(source);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store(T* target, Vector512<T> value) => value.Store(target);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector512<T> Broadcast(T value) => Vector512.Create(value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector512<T> Add(Vector512<T> left, Vector512<T> right) => left + right;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector512<T> Multiply(Vector512<T> left, Vector512<T> right) => left * right;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector512<T> Fma(Vector512<T> left, Vector512<T> right, Vector512<T> addend) =>
        typeof(T) == typeof(float)
            ? Vector512.FusedMultiplyAdd(left.AsSingle(), right.AsSingle(), addend.AsSingle())
                .As<float, T>()
            : Vector512.FusedMultiplyAdd(left.AsDouble(), right.AsDouble(), addend.AsDouble())
                .As<double, T>();

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector512<T> Max(Vector512<T> left, Vector512<T> right) =>
        Vector512.MaxNative(left, right);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector512<T> ZeroBelow(
        Vector512<T> test, Vector512<T> limit, Vector512<T> value) =>
        Vector512.AndNot(value, Vector512.LessThan(test, limit));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static T Sum(Vector512<T> value) => Vector512.Sum(value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector512<T> PowerOfTwo(Vector512<T> shifted) =>
        typeof(T) == typeof(float)
            ? ((shifted.AsInt32() + Vector512.Create(127)) << 23).As<int, T>()
            : ((shifted.AsInt64() + Vector512.Create(1023L)) << 52).As<long, T>();
}

/// <summary>256 bit registers (AVX2; pairs of 128 bit registers on Arm).</summary>
internal readonly unsafe struct Lanes256<T> : ILanes<Vector256<T>, T>
    where T : unmanaged
{
    public static int Count => Vector256<T>.Count;

    public static int TileRows => 4;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<T> Load(T* source) => Vector256.Load(source);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store(T* target, Vector256<T> value) => value.Store(target);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<T> Broadcast(T value) => Vector256.Create(value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<T> Add(Vector256<T> left, Vector256<T> right) => left + right;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<T> Multiply(Vector256<T> left, Vector256<T> right) => left * right;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<T> Fma(Vector256<T> left, Vector256<T> right, Vector256<T> addend) =>
        typeof(T) == typeof(float)
            ? Vector256.FusedMultiplyAdd(left.AsSingle(), right.AsSingle(), addend.AsSingle())
                .As<float, T>()
            : Vector256.FusedMultiplyAdd(left.AsDouble(), right.AsDouble(), addend.AsDouble())
                .As<double, T>();

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<T> Max(Vector256<T> left, Vector256<T> right) =>
        Vector256.MaxNative(left, right);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<T> ZeroBelow(
        Vector256<T> test, Vector256<T> limit, Vector256<T> value) =>
        Vector256.AndNot(value, Vector256.LessThan(test, limit));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static T Sum(Vector256<T> value) => Vector256.Sum(value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<T> PowerOfTwo(Vector256<T> shifted) =>
        typeof(T) == typeof(float)
            ? ((shifted.AsInt32() + Vector256.Create(127)) << 23).As<int, T>()
            : ((shifted.AsInt64() + Vector256.Create(1023L)) << 52).As<long, T>();
}
