using System.Numerics;
using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using MiniCpmNative.GpuEmulator.Machine;

namespace MiniCpmNative.GpuEmulator.Alu;

internal interface IUnary<T>
{
    static abstract Vector256<T> Run(Vector256<T> a);
}

internal interface IBinary<T>
{
    static abstract Vector256<T> Run(Vector256<T> a, Vector256<T> b);
}

internal interface ITernary<T>
{
    static abstract Vector256<T> Run(Vector256<T> a, Vector256<T> b, Vector256<T> c);
}

/// <summary>Lane-wise functions for the rest; narrow types live in the low bytes of 4-byte
/// lanes.</summary>
internal interface IScalar<TD, TA>
{
    static abstract TD Run(TA a);
}

internal interface IScalar<TD, TA, TB>
{
    static abstract TD Run(TA a, TB b);
}

internal interface IScalar<TD, TA, TB, TC>
{
    static abstract TD Run(TA a, TB b, TC c);
}

/// <summary>
/// Handlers that apply one operation to all lanes of an instruction: vectors of 32 bytes, blended
/// into the result row where only some lanes execute.
/// </summary>
internal static unsafe class Maps
{
    // For each byte of an execution mask, eight (or for each nibble four) lanes of ones or zeros.
    private static readonly uint* s_masks32 = MakeMasks32();
    private static readonly ulong* s_masks64 = MakeMasks64();

    private static uint* MakeMasks32()
    {
        uint* masks = (uint*)System.Runtime.InteropServices.NativeMemory.AlignedAlloc(256 * 32, 64);
        for (int m = 0; m < 256; m++)
            for (int lane = 0; lane < 8; lane++)
                masks[m * 8 + lane] = (m >> lane & 1) != 0 ? ~0u : 0;
        return masks;
    }

    private static ulong* MakeMasks64()
    {
        ulong* masks =
            (ulong*)System.Runtime.InteropServices.NativeMemory.AlignedAlloc(16 * 32, 64);
        for (int m = 0; m < 16; m++)
            for (int lane = 0; lane < 4; lane++)
                masks[m * 4 + lane] = (m >> lane & 1) != 0 ? ~0ul : 0;
        return masks;
    }

    /// <summary>All ones in the lanes of mask that vector v of a row holds.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<T> Lanes<T>(uint mask, int v) where T : unmanaged => sizeof(T) == 8
        ? Vector256.LoadAligned(s_masks64 + (mask >> (v * 4) & 15) * 4).As<ulong, T>()
        : Vector256.LoadAligned(s_masks32 + (mask >> (v * 8) & 255) * 8).As<uint, T>();

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Blend<T>(T* d, int v, Vector256<T> value, uint exec) where T : unmanaged
    {
        T* at = d + v * Vector256<T>.Count;
        Vector256.ConditionalSelect(Lanes<T>(exec, v), value, Vector256.Load(at)).Store(at);
    }

    public static void Unary<TOp, T>(Warp w, Instruction i) where TOp : IUnary<T> where T
        : unmanaged
    {
        T* d = (T*)(w.R + i.D), a = (T*)(w.R + i.A);
        int n = Vector256<T>.Count;
        uint exec = w.Exec;
        if (exec == uint.MaxValue)
            for (int at = 0; at < 32; at += n) TOp.Run(Vector256.Load(a + at)).Store(d + at);
        else
            for (int v = 0; v * n < 32; v++) Blend(d, v, TOp.Run(Vector256.Load(a + v * n)), exec);
    }

    public static void Binary<TOp, T>(Warp w, Instruction i) where TOp : IBinary<T> where T
        : unmanaged
    {
        T* d = (T*)(w.R + i.D), a = (T*)(w.R + i.A), b = (T*)(w.R + i.B);
        int n = Vector256<T>.Count;
        uint exec = w.Exec;
        if (exec == uint.MaxValue)
            for (int at = 0; at < 32; at += n)
                TOp.Run(Vector256.Load(a + at), Vector256.Load(b + at)).Store(d + at);
        else
            for (int v = 0; v * n < 32; v++)
                Blend(d, v, TOp.Run(Vector256.Load(a + v * n), Vector256.Load(b + v * n)), exec);
    }

    public static void Ternary<TOp, T>(Warp w, Instruction i) where TOp : ITernary<T> where T
        : unmanaged
    {
        T* d = (T*)(w.R + i.D), a = (T*)(w.R + i.A), b = (T*)(w.R + i.B), c = (T*)(w.R + i.C);
        int n = Vector256<T>.Count;
        uint exec = w.Exec;
        if (exec == uint.MaxValue)
            for (int at = 0; at < 32; at += n)
                TOp.Run(Vector256.Load(a + at), Vector256.Load(b + at), Vector256.Load(c + at))
                    .Store(d + at);
        else
            for (int v = 0; v * n < 32; v++)
                Blend(d, v, TOp.Run(
                    Vector256.Load(a + v * n), Vector256.Load(b + v * n),
                    Vector256.Load(c + v * n)), exec);
    }

    public static void Scalar1<TOp, TD, TA>(Warp w, Instruction i)
        where TOp : IScalar<TD, TA> where TD : unmanaged where TA : unmanaged
    {
        byte* d = w.R + i.D, a = w.R + i.A;
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            Put(d, lane, i.DWidth, TOp.Run(*(TA*)(a + lane * i.AWidth)));
        }
    }

    public static void Scalar2<TOp, TD, TA, TB>(Warp w, Instruction i)
        where TOp : IScalar<TD, TA, TB> where TD : unmanaged where TA : unmanaged where TB
            : unmanaged
    {
        byte* d = w.R + i.D, a = w.R + i.A, b = w.R + i.B;
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            Put(d, lane, Width<TD>(), TOp.Run(
                *(TA*)(a + lane * Width<TA>()), *(TB*)(b + lane * Width<TB>())));
        }
    }

    public static void Scalar3<TOp, TD, TA, TB, TC>(Warp w, Instruction i)
        where TOp : IScalar<TD, TA, TB, TC>
        where TD : unmanaged where TA : unmanaged where TB : unmanaged where TC : unmanaged
    {
        byte* d = w.R + i.D, a = w.R + i.A, b = w.R + i.B, c = w.R + i.C;
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            Put(d, lane, Width<TD>(), TOp.Run(*(TA*)(a + lane * Width<TA>()),
                *(TB*)(b + lane * Width<TB>()), *(TC*)(c + lane * Width<TC>())));
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static int Width<T>() where T : unmanaged => sizeof(T) == 8 ? 8 : 4;

    // Values narrower than their register are extended by their own sign: cvt and ld write whole
    // rows.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Put<T>(byte* row, int lane, int width, T value) where T : unmanaged
    {
        if (sizeof(T) == 8) *(ulong*)(row + lane * 8) = *(ulong*)&value;
        else if (sizeof(T) == 4 && width == 4) *(uint*)(row + lane * 4) = *(uint*)&value;
        else
        {
            long wide = typeof(T) == typeof(sbyte) ? *(sbyte*)&value
                : typeof(T) == typeof(short) ? *(short*)&value
                : typeof(T) == typeof(int) ? *(int*)&value
                : sizeof(T) == 1 ? *(byte*)&value
                : sizeof(T) == 2 ? *(ushort*)&value : *(uint*)&value;
            if (width == 8) *(long*)(row + lane * 8) = wide;
            else *(uint*)(row + lane * 4) = (uint)wide;
        }
    }

    /// <summary>32 lanes of a vector comparison as a mask.</summary>
    public static uint Compare<TOp, T>(byte* rowA, byte* rowB) where TOp : IBinary<T> where T
        : unmanaged
    {
        T* a = (T*)rowA, b = (T*)rowB;
        int n = Vector256<T>.Count;
        uint result = 0;
        for (int at = 0; at < 32; at += n)
            result |= TOp.Run(Vector256.Load(a + at), Vector256.Load(b + at))
                .ExtractMostSignificantBits() << at;
        return result;
    }
}
