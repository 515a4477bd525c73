using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using MiniCpmNative.GpuEmulator.Machine;

namespace MiniCpmNative.GpuEmulator.Memory;

/// <summary>Addresses of a warp's lanes and the patterns that have a short way.</summary>
internal static unsafe class Address
{
    /// <summary>warp.Addresses[lane] = row + offset; row -1 is an absolute address.</summary>
    public static void Fill(Warp w, int row, bool is64, long offset)
    {
        ulong* to = w.Addresses;
        var add = Vector256.Create((ulong)offset);
        if (row < 0)
        {
            for (int v = 0; v < 32; v += 4) add.Store(to + v);
        }
        else if (is64)
        {
            ulong* from = (ulong*)(w.R + row);
            for (int v = 0; v < 32; v += 4) (Vector256.Load(from + v) + add).Store(to + v);
        }
        else
        {
            uint* from = (uint*)(w.R + row);
            for (int v = 0; v < 32; v += 8)
            {
                var (low, high) = Vector256.Widen(Vector256.Load(from + v));
                (low + add).Store(to + v);
                (high + add).Store(to + v + 4);
            }
        }
    }

    /// <summary>Lane n is at address[0] + n * bytes.</summary>
    public static bool IsRow(ulong* address, int bytes)
    {
        var expected = Vector256.Create(address[0]) + Vector256<ulong>.Indices * (ulong)bytes;
        var step = Vector256.Create((ulong)bytes * 4);
        for (int v = 0; v < 32; v += 4)
        {
            if (Vector256.Load(address + v) != expected) return false;
            expected += step;
        }
        return true;
    }

    /// <summary>A generic address of the shared window as a shared address; others as they
    /// are.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong ToShared(ulong address) =>
        address - DeviceMemory.SharedWindow < DeviceMemory.WindowBytes
            ? address - DeviceMemory.SharedWindow
            : address;
}
