using System.Numerics;
using MiniCpmNative.GpuEmulator.Machine;

namespace MiniCpmNative.GpuEmulator.Memory;

internal enum AtomicOp : byte
{
    Add, Exchange, CompareSwap, Min, Max, Increment, Decrement, And, Or, Xor,
}

/// <summary>
/// atom and red on global and shared memory, lanes in ascending order. One lock serves all global
/// atomics: emulated contention is rare. Operand type T is uint, int, ulong, long, float or double.
/// </summary>
internal static unsafe class Atomics
{
    private static readonly Lock s_lock = new();

    public static void Run<T>(Warp w, Instruction i) where T : unmanaged, INumber<T>
    {
        Address.Fill(w, i.A, i.AddressIs64, i.Offset);
        uint global = w.Exec, shared = 0;
        if (i.Space == Ptx.Space.Shared) (global, shared) = (0, w.Exec);
        else if (i.Space == Ptx.Space.Generic)
        {
            OtherSpaces.Split(w, out global, out shared, out uint local);
            if (local != 0) throw w.Fault(Check.ForeignPointer, 0, "an atomic on local memory");
        }
        w.Counters.AtomicLanes += BitOperations.PopCount(w.Exec);
        bool changed = false;
        if (i.Releases || w.Block.Fenced) GlobalAccess.Release(w, global);
        lock (s_lock)
        {
            for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
            {
                int lane = BitOperations.TrailingZeroCount(rest);
                ulong address = w.Addresses[lane];
                if (address % (ulong)sizeof(T) != 0)
                    throw w.Fault(Check.Misaligned, lane, $"{sizeof(T)} bytes at 0x{address:x}");
                byte* at;
                if ((global >> lane & 1) != 0)
                {
                    at = GlobalAccess.Check(w, i, address, sizeof(T), lane);
                    GlobalAccess.MarkWritten(w, i, address, at, sizeof(T));
                }
                else
                {
                    at = w.Block.Shared.Resolve(w, address, sizeof(T), lane);
                    w.Block.Shared.ReadAtomic(w, at, sizeof(T), lane);
                    w.Block.Shared.Write(w, at, null, sizeof(T), lane, atomic: true);
                }
                changed |= Apply<T>(w, i, (T*)at, lane, (global >> lane & 1) != 0);
            }
        }
        if (changed) w.Block.Changed();
        if (i.Looks || i.Releases) GlobalAccess.Acquire(w, global);
        if (global != 0)
            w.Counters.GlobalWriteSectors += GlobalAccess.CountSectors(w, i, global, sizeof(T),
            true);
    }

    // On global memory add.f32 flushes subnormal operands and results (PTX ISA, atom); on shared
    // memory it does not.
    private static bool Apply<T>(Warp w, Instruction i, T* at, int lane, bool flush)
        where T : unmanaged, INumber<T>
    {
        T old = *at;
        T b = ((T*)(w.R + i.B))[lane];
        if (typeof(T) == typeof(float) && flush)
        {
            float sum = Flushed((float)(object)old) + Flushed((float)(object)b);
            *(float*)at = Flushed(sum);
            if (i.D >= 0) ((T*)(w.R + i.D))[lane] = old;
            return Bits(*at) != Bits(old);
        }
        ulong oldBits = Bits(old), bits = Bits(b);
        *at = (AtomicOp)i.Mode switch
        {
            AtomicOp.Add => old + b,
            AtomicOp.Exchange => b,
            AtomicOp.CompareSwap => oldBits == bits ? ((T*)(w.R + i.C))[lane] : old,
            AtomicOp.Min => old < b ? old : b,
            AtomicOp.Max => old > b ? old : b,
            AtomicOp.Increment => old >= b ? T.Zero : old + T.One,
            AtomicOp.Decrement => old == T.Zero || old > b ? b : old - T.One,
            AtomicOp.And => FromBits<T>(oldBits & bits),
            AtomicOp.Or => FromBits<T>(oldBits | bits),
            _ => FromBits<T>(oldBits ^ bits),
        };
        if (i.D >= 0) ((T*)(w.R + i.D))[lane] = old;
        return Bits(*at) != oldBits;
    }

    private static float Flushed(float a) => float.IsSubnormal(a) ? MathF.CopySign(0, a) : a;

    private static ulong Bits<T>(T value) where T : unmanaged =>
        sizeof(T) == 8 ? *(ulong*)&value : *(uint*)&value;

    private static T FromBits<T>(ulong bits) where T : unmanaged => *(T*)&bits;
}
