using System.Numerics;
using System.Runtime.Intrinsics;
using MiniCpmNative.GpuEmulator.Machine;

namespace MiniCpmNative.GpuEmulator.Alu;

// Comparisons as vectors of ones and zeros; the unordered ones are true where an operand is NaN.

internal readonly struct Eq<T> : IBinary<T>
{
    public static Vector256<T> Run(Vector256<T> a, Vector256<T> b) => Vector256.Equals(a, b);
}

internal readonly struct Ne<T> : IBinary<T>
{
    // For floats the ordered one: different, and neither is NaN.
    public static Vector256<T> Run(Vector256<T> a, Vector256<T> b) =>
        ~Vector256.Equals(a, b) & Vector256.Equals(a, a) & Vector256.Equals(b, b);
}

internal readonly struct Lt<T> : IBinary<T>
{
    public static Vector256<T> Run(Vector256<T> a, Vector256<T> b) => Vector256.LessThan(a, b);
}

internal readonly struct Le<T> : IBinary<T>
{
    public static Vector256<T> Run(Vector256<T> a, Vector256<T> b) =>
        Vector256.LessThanOrEqual(a, b);
}

internal readonly struct Gt<T> : IBinary<T>
{
    public static Vector256<T> Run(Vector256<T> a, Vector256<T> b) => Vector256.GreaterThan(a, b);
}

internal readonly struct Ge<T> : IBinary<T>
{
    public static Vector256<T> Run(Vector256<T> a, Vector256<T> b) =>
        Vector256.GreaterThanOrEqual(a, b);
}

internal readonly struct Unordered<TOp, T> : IBinary<T> where TOp : IBinary<T>
{
    public static Vector256<T> Run(Vector256<T> a, Vector256<T> b) => TOp.Run(a, b)
        | IsNaN<T>.Run(a, b);
}

internal readonly struct IsNaN<T> : IBinary<T>
{
    public static Vector256<T> Run(Vector256<T> a, Vector256<T> b) =>
        ~(Vector256.Equals(a, a) & Vector256.Equals(b, b));
}

internal readonly struct IsNumber<T> : IBinary<T>
{
    public static Vector256<T> Run(Vector256<T> a, Vector256<T> b) =>
        Vector256.Equals(a, a) & Vector256.Equals(b, b);
}

/// <summary>setp, selp and everything on predicates, which are words with a bit per lane.</summary>
internal static unsafe class Predicates
{
    public const int None = 0, And = 1, Or = 2, Xor = 3;

    /// <summary>setp.cmp[.bool] d[|d2], a, b[, c]: d = (a cmp b) op c, d2 = !(a cmp b) op
    /// c.</summary>
    public static void Set<TOp, T>(Warp w, Instruction i) where TOp : IBinary<T> where T
        : unmanaged =>
        Combine(w, i, Maps.Compare<TOp, T>(w.R + i.A, w.R + i.B));

    public static void Set16<TOp, T>(Warp w, Instruction i)
        where TOp : IBinary<T> where T : unmanaged, INumber<T>
    {
        uint result = 0;
        for (int lane = 0; lane < 32; lane++)
        {
            var a = Vector256.Create(*(T*)(w.R + i.A + lane * 4));
            var b = Vector256.Create(*(T*)(w.R + i.B + lane * 4));
            result |= (TOp.Run(a, b).ExtractMostSignificantBits() & 1) << lane;
        }
        Combine(w, i, result);
    }

    private static void Combine(Warp w, Instruction i, uint compared)
    {
        uint c = i.C >= 0 ? *(uint*)(w.R + i.C) ^ i.FlipC : 0;
        if (i.D >= 0) Put(w, i.D, Join(i.Mode, compared, c));
        if (i.D2 >= 0) Put(w, i.D2, Join(i.Mode, ~compared, c));
    }

    private static uint Join(int mode, uint a, uint c) => mode switch
    {
        And => a & c,
        Or => a | c,
        Xor => a ^ c,
        _ => a,
    };

    private static void Put(Warp w, int row, uint value)
    {
        uint* d = (uint*)(w.R + row);
        *d = (*d & ~w.Exec) | (value & w.Exec);
    }

    /// <summary>and/or/xor.pred (Mode), mov.pred and not.pred (Mode None, with FlipA).</summary>
    public static void Test<T, TOp>(Warp w, Instruction i) where T : unmanaged
        where TOp : IProperty<T>
    {
        T* a = (T*)(w.R + i.A);
        uint holds = 0;
        for (int lane = 0; lane < 32; lane++)
            if (TOp.Holds(a[lane])) holds |= 1u << lane;
        Combine(w, i, holds);
    }

    public static void Logic(Warp w, Instruction i)
    {
        uint a = *(uint*)(w.R + i.A) ^ i.FlipA;
        uint b = i.B >= 0 ? *(uint*)(w.R + i.B) ^ i.FlipB : 0;
        Put(w, i.D, Join(i.Mode, a, b));
    }

    /// <summary>selp d, a, b, c: a where the predicate c holds.</summary>
    public static void Select<T>(Warp w, Instruction i) where T : unmanaged
    {
        T* d = (T*)(w.R + i.D), a = (T*)(w.R + i.A), b = (T*)(w.R + i.B);
        uint c = *(uint*)(w.R + i.C) ^ i.FlipC;
        int n = Vector256<T>.Count;
        for (int v = 0; v * n < 32; v++)
        {
            var value = Vector256.ConditionalSelect(
                Maps.Lanes<T>(c, v), Vector256.Load(a + v * n), Vector256.Load(b + v * n));
            Vector256.ConditionalSelect(Maps.Lanes<T>(w.Exec, v), value, Vector256.Load(d + v * n))
                .Store(d + v * n);
        }
    }

    /// <summary>set.cmp.u32: all ones (or 1.0f with Mode2) where true.</summary>
    public static void SetWord<TOp, T>(Warp w, Instruction i) where TOp : IBinary<T> where T
        : unmanaged
    {
        uint result = Maps.Compare<TOp, T>(w.R + i.A, w.R + i.B);
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            ((uint*)(w.R + i.D))[lane] = (result >> lane & 1) == 0 ? 0 : i.Mode2 != 0 ? 0x3F800000u
                : ~0u;
        }
    }
}

/// <summary>What testp asks of a value.</summary>
internal interface IProperty<T>
{
    static abstract bool Holds(T a);
}

internal readonly struct IsFinite<T> : IProperty<T> where T : INumberBase<T>
{
    public static bool Holds(T a) => T.IsFinite(a);
}

internal readonly struct IsInfinite<T> : IProperty<T> where T : INumberBase<T>
{
    public static bool Holds(T a) => T.IsInfinity(a);
}

internal readonly struct IsNormal<T> : IProperty<T> where T : INumberBase<T>
{
    public static bool Holds(T a) => T.IsNormal(a);
}

internal readonly struct IsSubnormal<T> : IProperty<T> where T : INumberBase<T>
{
    public static bool Holds(T a) => T.IsSubnormal(a);
}

/// <summary>slct: the first where the last is not negative; NaN takes the second.</summary>
internal readonly struct SelectBySign : IScalar<uint, uint, uint, int>,
    IScalar<ulong, ulong, ulong, int>, IScalar<uint, uint, uint, float>,
    IScalar<ulong, ulong, ulong, float>
{
    public static uint Run(uint a, uint b, int c) => c >= 0 ? a : b;
    public static ulong Run(ulong a, ulong b, int c) => c >= 0 ? a : b;
    public static uint Run(uint a, uint b, float c) => c >= 0 ? a : b;
    public static ulong Run(ulong a, ulong b, float c) => c >= 0 ? a : b;
}

internal readonly struct SelectBySignFlushed : IScalar<uint, uint, uint, float>,
    IScalar<ulong, ulong, ulong, float>
{
    public static uint Run(uint a, uint b, float c) => c > -1.17549435e-38f ? a : b;
    public static ulong Run(ulong a, ulong b, float c) => c > -1.17549435e-38f ? a : b;
}
