using System.Numerics;

namespace MiniCpmNative.GpuEmulator.Alu;

internal readonly struct Popc32 : IScalar<uint, uint>
{
    public static uint Run(uint a) => (uint)BitOperations.PopCount(a);
}

internal readonly struct Popc64 : IScalar<uint, ulong>
{
    public static uint Run(ulong a) => (uint)BitOperations.PopCount(a);
}

internal readonly struct Clz32 : IScalar<uint, uint>
{
    public static uint Run(uint a) => (uint)BitOperations.LeadingZeroCount(a);
}

internal readonly struct Clz64 : IScalar<uint, ulong>
{
    public static uint Run(ulong a) => (uint)BitOperations.LeadingZeroCount(a);
}

internal readonly struct Brev32 : IScalar<uint, uint>
{
    public static uint Run(uint a)
    {
        a = (a >> 1 & 0x55555555) | (a & 0x55555555) << 1;
        a = (a >> 2 & 0x33333333) | (a & 0x33333333) << 2;
        a = (a >> 4 & 0x0F0F0F0F) | (a & 0x0F0F0F0F) << 4;
        return System.Buffers.Binary.BinaryPrimitives.ReverseEndianness(a);
    }
}

internal readonly struct Brev64 : IScalar<ulong, ulong>
{
    public static ulong Run(ulong a) => (ulong)Brev32.Run((uint)a) << 32
        | Brev32.Run((uint)(a >> 32));
}

/// <summary>bfind: place of the highest one (of the highest bit that differs from the sign), or
/// ~0.</summary>
internal readonly struct Bfind32 : IScalar<uint, uint>
{
    public static uint Run(uint a) => a == 0 ? ~0u : (uint)BitOperations.Log2(a);
}

internal readonly struct BfindS32 : IScalar<uint, int>
{
    public static uint Run(int a) => Bfind32.Run((uint)(a < 0 ? ~a : a));
}

internal readonly struct Bfind64 : IScalar<uint, ulong>
{
    public static uint Run(ulong a) => a == 0 ? ~0u : (uint)BitOperations.Log2(a);
}

internal readonly struct BfindS64 : IScalar<uint, long>
{
    public static uint Run(long a) => Bfind64.Run((ulong)(a < 0 ? ~a : a));
}

/// <summary>.shiftamt: how far to shift left so that the found bit leads.</summary>
internal readonly struct BfindShift32<TOp> : IScalar<uint, uint> where TOp : IScalar<uint, uint>
{
    public static uint Run(uint a) => TOp.Run(a) is var place && place == ~0u ? place : 31 - place;
}

internal readonly struct BfindShift64<TOp> : IScalar<uint, ulong> where TOp : IScalar<uint, ulong>
{
    public static uint Run(ulong a) => TOp.Run(a) is var place && place == ~0u ? place : 63 - place;
}

/// <summary>bfe: c bits from place b; signed ones repeat the field's (or the word's) top
/// bit.</summary>
internal readonly struct BfeU32 : IScalar<uint, uint, uint, uint>
{
    public static uint Run(uint a, uint b, uint c)
    {
        int place = (int)(b & 255), count = (int)(c & 255);
        if (count == 0 || place > 31) return 0;
        uint field = a >> place;
        return count > 31 ? field : field & ((1u << count) - 1);
    }
}

internal readonly struct BfeS32 : IScalar<int, int, uint, uint>
{
    public static int Run(int a, uint b, uint c)
    {
        int place = (int)(b & 255), count = (int)(c & 255);
        if (count == 0) return 0;
        int top = Math.Min(place + count - 1, 31);
        long shifted = (long)a >> Math.Min(place, 31);
        int width = top - place + 1;
        if (width <= 0) return a >> 31;
        return (int)(shifted << (64 - width) >> (64 - width));
    }
}

internal readonly struct BfeU64 : IScalar<ulong, ulong, uint, uint>
{
    public static ulong Run(ulong a, uint b, uint c)
    {
        int place = (int)(b & 255), count = (int)(c & 255);
        if (count == 0 || place > 63) return 0;
        ulong field = a >> place;
        return count > 63 ? field : field & ((1ul << count) - 1);
    }
}

internal readonly struct BfeS64 : IScalar<long, long, uint, uint>
{
    public static long Run(long a, uint b, uint c)
    {
        int place = (int)(b & 255), count = (int)(c & 255);
        if (count == 0) return 0;
        int width = Math.Min(place + count - 1, 63) - place + 1;
        if (width <= 0) return a >> 63;
        return a >> Math.Min(place, 63) << (64 - width) >> (64 - width);
    }
}

internal readonly struct Lop3 : ITernaryTable
{
    public static uint Run(uint a, uint b, uint c, int table)
    {
        uint result = 0;
        for (int k = 0; k < 8; k++)
            if ((table >> k & 1) != 0)
                result |= ((k & 4) != 0 ? a : ~a) & ((k & 2) != 0 ? b : ~b) & ((k & 1) != 0 ? c
                    : ~c);
        return result;
    }
}

/// <summary>Lane-wise functions of three words and an immediate.</summary>
internal interface ITernaryTable
{
    static abstract uint Run(uint a, uint b, uint c, int mode);
}

/// <summary>prmt.b32: each selector nibble picks one of eight bytes; its top bit repeats the
/// sign.</summary>
internal readonly struct Prmt : ITernaryTable
{
    public static uint Run(uint a, uint b, uint c, int mode)
    {
        ulong bytes = (ulong)b << 32 | a;
        uint result = 0;
        for (int n = 0; n < 4; n++)
        {
            uint selector = c >> (n * 4) & 15;
            uint value = (uint)(bytes >> (int)(selector & 7) * 8) & 255;
            if ((selector & 8) != 0) value = (value & 128) != 0 ? 255u : 0;
            result |= value << (n * 8);
        }
        return result;
    }
}

/// <summary>shf.{l,r}.{clamp,wrap}: the funnel b:a. Mode bit 0 is right, bit 1 is wrap.</summary>
internal readonly struct Funnel : ITernaryTable
{
    public static uint Run(uint a, uint b, uint c, int mode)
    {
        int n = (mode & 2) != 0 ? (int)(c & 31) : (int)Math.Min(c, 32);
        ulong both = (ulong)b << 32 | a;
        return (mode & 1) != 0 ? (uint)(both >> n) : (uint)(both << n >> 32);
    }
}

internal readonly struct Sad<T, TWide> : IScalar<T, T, T, T>
    where T : IBinaryInteger<T> where TWide : IBinaryInteger<TWide>
{
    public static T Run(T a, T b, T c) => c + T.CreateTruncating(
        TWide.Abs(TWide.CreateTruncating(a) - TWide.CreateTruncating(b)));
}
