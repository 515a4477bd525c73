using System.Numerics;
using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using MiniCpmNative.GpuEmulator.Machine;

namespace MiniCpmNative.GpuEmulator.Memory;

/// <summary>
/// Moves values between register rows and a lane-major run of bytes (lane n's Count elements of
/// Size bytes at n * Size * Count). Narrow values are widened by the instruction's sign.
/// </summary>
internal static unsafe class Lanes
{
    /// <summary>Bytes to registers.</summary>
    public static void ToRegisters(Warp w, Instruction i, byte* from, uint exec)
    {
        int bytes = i.Size * i.Count;
        if (exec == uint.MaxValue && i.Count == 1 && i.Size == i.DWidth)
        {
            Unsafe.CopyBlock(w.R + i.Rows[0], from, (uint)(bytes * 32));
            return;
        }
        if (exec == uint.MaxValue && i.Count == 1 && i.Size == 2 && i.DWidth == 4 && !i.Signed)
        {
            uint* to = (uint*)(w.R + i.Rows[0]);
            for (int lane = 0; lane < 32; lane += 16)
            {
                var (low, high) = Vector256.Widen(Vector256.Load((ushort*)from + lane));
                low.Store(to + lane);
                high.Store(to + lane + 8);
            }
            return;
        }
        for (int e = 0; e < i.Count; e++)
        {
            byte* row = w.R + i.Rows[e], at = from + e * i.Size;
            if (i.Rows[e] < 0) continue;
            if (i.Size == 4 && i.DWidth == 4)
            {
                for (uint rest = exec; rest != 0; rest &= rest - 1)
                {
                    int lane = BitOperations.TrailingZeroCount(rest);
                    ((uint*)row)[lane] = *(uint*)(at + lane * bytes);
                }
                continue;
            }
            for (uint rest = exec; rest != 0; rest &= rest - 1)
            {
                int lane = BitOperations.TrailingZeroCount(rest);
                ulong value = Widen(at + lane * bytes, i.Size, i.Signed);
                if (i.DWidth == 8) ((ulong*)row)[lane] = value;
                else ((uint*)row)[lane] = (uint)value;
            }
        }
    }

    /// <summary>Registers to bytes.</summary>
    public static void FromRegisters(Warp w, Instruction i, byte* to, uint exec)
    {
        int bytes = i.Size * i.Count;
        if (exec == uint.MaxValue && i.Count == 1 && i.Size == i.DWidth)
        {
            Unsafe.CopyBlock(to, w.R + i.Rows[0], (uint)(bytes * 32));
            return;
        }
        if (exec == uint.MaxValue && i.Count == 1 && i.Size == 2 && i.DWidth == 4)
        {
            uint* values = (uint*)(w.R + i.Rows[0]);
            for (int lane = 0; lane < 32; lane += 16)
                Vector256.Narrow(Vector256.Load(values + lane), Vector256.Load(values + lane + 8))
                    .Store((ushort*)to + lane);
            return;
        }
        for (int e = 0; e < i.Count; e++)
        {
            byte* row = w.R + i.Rows[e], at = to + e * i.Size;
            for (uint rest = exec; rest != 0; rest &= rest - 1)
            {
                int lane = BitOperations.TrailingZeroCount(rest);
                byte* value = row + lane * i.DWidth;
                switch (i.Size)
                {
                    case 1: at[lane * bytes] = *value; break;
                    case 2: *(ushort*)(at + lane * bytes) = *(ushort*)value; break;
                    case 4: *(uint*)(at + lane * bytes) = *(uint*)value; break;
                    default: *(ulong*)(at + lane * bytes) = *(ulong*)value; break;
                }
            }
        }
    }

    private static ulong Widen(byte* at, int size, bool signed) => size switch
    {
        1 => signed ? (ulong)*(sbyte*)at : *at,
        2 => signed ? (ulong)*(short*)at : *(ushort*)at,
        4 => signed ? (ulong)*(int*)at : *(uint*)at,
        _ => *(ulong*)at,
    };
}
