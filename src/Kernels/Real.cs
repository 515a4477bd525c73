using System.Numerics;
using System.Runtime.CompilerServices;

namespace MiniCpmNative.Kernels;

/// <summary>
/// Conversions between double and the type of computation, float or double. The generic ones of
/// INumberBase box their argument in code that is not optimised yet, which a warm step must not.
/// </summary>
internal static class Real
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static T Of<T>(double value)
        where T : unmanaged => typeof(T) == typeof(float)
        ? Unsafe.BitCast<float, T>((float)value)
        : Unsafe.BitCast<double, T>(value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static double ToDouble<T>(T value)
        where T : unmanaged => typeof(T) == typeof(float)
        ? Unsafe.BitCast<T, float>(value)
        : Unsafe.BitCast<T, double>(value);
}
