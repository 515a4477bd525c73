using System.Numerics;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;
using MiniCpmNative.GpuEmulator.Machine;

namespace MiniCpmNative.GpuEmulator.Alu;

/// <summary>mov between vectors and scalars, widening moves, bfi and table operations.</summary>
internal static unsafe class Moves
{
    /// <summary>mov.bN d, {parts}: Size bytes each, first part lowest.</summary>
    public static void Pack(Warp w, Instruction i)
    {
        int count = i.Rows.Length, partWidth = i.Size == 8 ? 8 : 4;
        ulong mask = i.Size == 8 ? ulong.MaxValue : (1ul << (i.Size * 8)) - 1;
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            ulong value = 0;
            for (int p = 0; p < count; p++)
            {
                byte* part = w.R + i.Rows[p] + lane * partWidth;
                value |= ((i.Size == 8 ? *(ulong*)part : *(uint*)part) & mask) << (p * i.Size * 8);
            }
            if (i.DWidth == 8) ((ulong*)(w.R + i.D))[lane] = value;
            else ((uint*)(w.R + i.D))[lane] = (uint)value;
        }
    }

    /// <summary>mov.bN {parts}, a.</summary>
    public static void Unpack(Warp w, Instruction i)
    {
        ulong mask = (1ul << (i.Size * 8)) - 1;
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            ulong value = i.AWidth == 8 ? ((ulong*)(w.R + i.A))[lane] : ((uint*)(w.R + i.A))[lane];
            for (int p = 0; p < i.Rows.Length; p++)
                if (i.Rows[p] >= 0)
                    ((uint*)(w.R + i.Rows[p]))[lane] = (uint)(value >> (p * i.Size * 8) & mask);
        }
    }

    /// <summary>cvt.{u,s}64.{u,s}32: the commonest conversions, as vectors.</summary>
    public static void WidenUnsigned(Warp w, Instruction i)
    {
        for (int v = 0; v < 4; v++)
        {
            var (low, high) = Vector256.Widen(Vector256.Load((uint*)(w.R + i.A) + v * 8));
            PutWide(w, i, v, low, high);
        }
    }

    public static void WidenSigned(Warp w, Instruction i)
    {
        for (int v = 0; v < 4; v++)
        {
            var (low, high) = Vector256.Widen(Vector256.Load((int*)(w.R + i.A) + v * 8));
            PutWide(w, i, v, low.AsUInt64(), high.AsUInt64());
        }
    }

    public static void Narrow64(Warp w, Instruction i)
    {
        ulong* a = (ulong*)(w.R + i.A);
        uint* d = (uint*)(w.R + i.D);
        for (int v = 0; v < 4; v++)
        {
            var low = Vector256.Narrow(Vector256.Load(a + v * 8), Vector256.Load(a + v * 8 + 4));
            Vector256.ConditionalSelect(Maps.Lanes<uint>(w.Exec, v), low, Vector256.Load(d + v * 8))
                .Store(d + v * 8);
        }
    }

    /// <summary>mul.wide.u32 and .s32.</summary>
    public static void MulWideUnsigned(Warp w, Instruction i)
    {
        for (int v = 0; v < 4; v++)
        {
            var (al, ah) = Vector256.Widen(Vector256.Load((uint*)(w.R + i.A) + v * 8));
            var (bl, bh) = Vector256.Widen(Vector256.Load((uint*)(w.R + i.B) + v * 8));
            PutWide(w, i, v, al * bl, ah * bh);
        }
    }

    public static void MulWideSigned(Warp w, Instruction i)
    {
        for (int v = 0; v < 4; v++)
        {
            var (al, ah) = Vector256.Widen(Vector256.Load((int*)(w.R + i.A) + v * 8));
            var (bl, bh) = Vector256.Widen(Vector256.Load((int*)(w.R + i.B) + v * 8));
            PutWide(w, i, v, (al * bl).AsUInt64(), (ah * bh).AsUInt64());
        }
    }

    private static void PutWide(Warp w, Instruction i, int v, Vector256<ulong> low,
        Vector256<ulong> high)
    {
        ulong* d = (ulong*)(w.R + i.D) + v * 8;
        if (w.Exec == uint.MaxValue)
        {
            low.Store(d);
            high.Store(d + 4);
            return;
        }
        Vector256.ConditionalSelect(Maps.Lanes<ulong>(w.Exec, v * 2), low, Vector256.Load(d))
            .Store(d);
        Vector256.ConditionalSelect(Maps.Lanes<ulong>(w.Exec, v * 2 + 1), high,
            Vector256.Load(d + 4))
            .Store(d + 4);
    }

    /// <summary>shl.b64 and shr.u64 (Mode 1): counts above 63 give zero.</summary>
    public static void Shift64(Warp w, Instruction i)
    {
        ulong* a = (ulong*)(w.R + i.A);
        uint* counts = (uint*)(w.R + i.B);
        for (int v = 0; v < 4; v++)
        {
            var (low, high) = Vector256.Widen(Vector256.Load(counts + v * 8));
            Vector256<ulong> x = Vector256.Load(a + v * 8), y = Vector256.Load(a + v * 8 + 4);
            if (i.Mode == 0)
                PutWide(w, i, v, Avx2.ShiftLeftLogicalVariable(x, low),
                    Avx2.ShiftLeftLogicalVariable(y, high));
            else
                PutWide(w, i, v, Avx2.ShiftRightLogicalVariable(x, low),
                    Avx2.ShiftRightLogicalVariable(y, high));
        }
    }

    /// <summary>bfi f, a, b, c, d: d bits of a put into b at place c; rows A, B, C, E.</summary>
    public static void Insert(Warp w, Instruction i)
    {
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            int place = (int)(((uint*)(w.R + i.C))[lane] & 255),
                count = (int)(((uint*)(w.R + i.E))[lane] & 255);
            if (i.DWidth == 8)
            {
                ulong a = ((ulong*)(w.R + i.A))[lane], b = ((ulong*)(w.R + i.B))[lane];
                ulong mask = place > 63 ? 0
                    : (count > 63 ? ulong.MaxValue : (1ul << count) - 1) << place;
                ((ulong*)(w.R + i.D))[lane] = (b & ~mask) | (a << (place & 63) & mask);
            }
            else
            {
                uint a = ((uint*)(w.R + i.A))[lane], b = ((uint*)(w.R + i.B))[lane];
                uint mask = place > 31 ? 0
                    : (count > 31 ? uint.MaxValue : (1u << count) - 1) << place;
                ((uint*)(w.R + i.D))[lane] = (b & ~mask) | (a << (place & 31) & mask);
            }
        }
    }

    public static void Table<TOp>(Warp w, Instruction i) where TOp : ITernaryTable
    {
        uint* a = (uint*)(w.R + i.A), b = (uint*)(w.R + i.B), c = (uint*)(w.R + i.C),
            d = (uint*)(w.R + i.D);
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            d[lane] = TOp.Run(a[lane], b[lane], c[lane], i.Mode);
        }
    }

    /// <summary>activemask: the lanes that are here.</summary>
    public static void ActiveMask(Warp w, Instruction i)
    {
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
            ((uint*)(w.R + i.D))[BitOperations.TrailingZeroCount(rest)] = w.Exec;
    }

    /// <summary>Fences: blocks here see one another at once, so there is nothing to
    /// order.</summary>
    public static void Fence(Warp w, Instruction i) => w.Block.Fenced = true;

    public static void Nothing(Warp w, Instruction i)
    {
    }

    public static void Trap(Warp w, Instruction i) =>
        throw w.Fault(Check.Trap, BitOperations.TrailingZeroCount(w.Exec), "trap");
}
