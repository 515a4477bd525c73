using System.Numerics;

namespace MiniCpmNative.GpuEmulator.Memory;

/// <summary>
/// Extra passes of a shared-memory request. 32 banks of 4 bytes; lanes with the same word share a
/// pass; 8-byte accesses go by half warps and 16-byte ones by quarters (CUDA programming guide).
/// </summary>
internal static unsafe class BankConflicts
{
    public static int Count(ulong* address, uint exec, int bytes)
    {
        int words = Math.Max(1, bytes / 4), lanes = 32 / words, extra = 0;
        Span<ulong> seen = stackalloc ulong[32];
        Span<byte> perBank = stackalloc byte[32];
        for (int start = 0; start < 32; start += lanes)
        {
            perBank.Clear();
            int count = 0, most = 0;
            uint part = lanes == 32 ? exec : exec & (((1u << lanes) - 1) << start);
            for (; part != 0; part &= part - 1)
            {
                ulong first = address[BitOperations.TrailingZeroCount(part)] >> 2;
                if (seen[..count].Contains(first)) continue;
                seen[count++] = first;
                for (int word = 0; word < words; word++)
                    most = Math.Max(most, ++perBank[(int)((first + (ulong)word) & 31)]);
            }
            if (most > 1) extra += most - 1;
        }
        return extra;
    }
}
