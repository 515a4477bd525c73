using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Runtime.Intrinsics;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// The five row filters of PNG, undone in place (PNG specification 9.2). a is the byte one pixel to
/// the left, b the one above, c the one above a. Pixels of 3 and 4 bytes are one vector each,
/// because every pixel depends on the one before it; other widths go byte by byte.
/// </summary>
internal static class PngFilters
{
    /// <summary>
    /// Undoes a row's filter. row and above begin with their filter byte and have 16 readable bytes
    /// behind them; false when the filter is unknown.
    /// </summary>
    public static bool Undo(Span<byte> row, ReadOnlySpan<byte> above, int bytesPerPixel)
    {
        var x = row[1..];
        var b = above.Slice(1, x.Length);
        switch (row[0])
        {
            case 0: break;
            case 1: Sub(x, bytesPerPixel); break;
            case 2: Up(x, b); break;
            case 3: Average(x, b, bytesPerPixel); break;
            case 4: Paeth(x, b, bytesPerPixel); break;
            default: return false;
        }

        return true;
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Up(Span<byte> x, ReadOnlySpan<byte> b)
    {
        int i = 0;
        ref byte row = ref MemoryMarshal.GetReference(x);
        ref byte up = ref MemoryMarshal.GetReference(b);
        for (; i <= x.Length - Vector256<byte>.Count; i += Vector256<byte>.Count)
            (Vector256.LoadUnsafe(ref row, (nuint)i) + Vector256.LoadUnsafe(ref up, (nuint)i))
                .StoreUnsafe(ref row, (nuint)i);
        for (; i < x.Length; i++) x[i] += b[i];
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Sub(Span<byte> x, int bytesPerPixel)
    {
        if (bytesPerPixel is not (3 or 4))
        {
            for (int i = bytesPerPixel; i < x.Length; i++) x[i] += x[i - bytesPerPixel];
            return;
        }

        ref byte row = ref MemoryMarshal.GetReference(x);
        var a = Vector128<byte>.Zero;
        for (int i = 0; i < x.Length; i += bytesPerPixel)
        {
            a += Load(ref row, i);
            Store(a, ref row, i, bytesPerPixel);
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Average(Span<byte> x, ReadOnlySpan<byte> b, int bytesPerPixel)
    {
        if (bytesPerPixel is not (3 or 4))
        {
            for (int i = 0; i < x.Length; i++)
                x[i] += (byte)(((i < bytesPerPixel ? 0 : x[i - bytesPerPixel]) + b[i]) >> 1);
            return;
        }

        ref byte row = ref MemoryMarshal.GetReference(x);
        ref byte up = ref MemoryMarshal.GetReference(b);
        var a = Vector128<byte>.Zero;
        var low = Vector128.Create((byte)0x7f);
        for (int i = 0; i < x.Length; i += bytesPerPixel)
        {
            // floor((a + b) / 2) without leaving the byte.
            var above = Load(ref up, i);
            var half = (a & above) + (Vector128.ShiftRightLogical((a ^ above).AsUInt16(), 1).AsByte() & low);
            a = half + Load(ref row, i);
            Store(a, ref row, i, bytesPerPixel);
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Paeth(Span<byte> x, ReadOnlySpan<byte> b, int bytesPerPixel)
    {
        if (bytesPerPixel is not (3 or 4))
        {
            for (int i = 0; i < x.Length; i++)
            {
                bool first = i < bytesPerPixel;
                x[i] += Predict(first ? 0 : x[i - bytesPerPixel], b[i], first ? 0 : b[i - bytesPerPixel]);
            }

            return;
        }

        ref byte row = ref MemoryMarshal.GetReference(x);
        ref byte up = ref MemoryMarshal.GetReference(b);
        Vector128<short> a = default, c = default;
        var bytes = Vector128.Create((short)255);
        for (int i = 0; i < x.Length; i += bytesPerPixel)
        {
            // p = a + b - c; |p - a| = |b - c|, |p - b| = |a - c|, |p - c| = |(b - c) + (a - c)|.
            var above = Vector128.WidenLower(Load(ref up, i)).AsInt16();
            var toA = above - c;
            var toB = a - c;
            var toC = Vector128.Abs(toA + toB);
            toA = Vector128.Abs(toA);
            toB = Vector128.Abs(toB);
            var least = Vector128.Min(toC, Vector128.Min(toA, toB));
            var nearest = Vector128.ConditionalSelect(
                Vector128.Equals(least, toA),
                a,
                Vector128.ConditionalSelect(Vector128.Equals(least, toB), above, c));
            c = above;
            a = (nearest + Vector128.WidenLower(Load(ref row, i)).AsInt16()) & bytes;
            Store(Vector128.Narrow(a.AsUInt16(), a.AsUInt16()), ref row, i, bytesPerPixel);
        }
    }

    private static byte Predict(int a, int b, int c)
    {
        int toA = Math.Abs(b - c), toB = Math.Abs(a - c), toC = Math.Abs(a + b - c - c);
        return (byte)(toA <= toB && toA <= toC ? a : toB <= toC ? b : c);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector128<byte> Load(ref byte at, int i) =>
        Vector128.CreateScalar(Unsafe.ReadUnaligned<uint>(ref Unsafe.Add(ref at, i))).AsByte();

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Store(Vector128<byte> pixel, ref byte at, int i, int bytesPerPixel)
    {
        uint value = pixel.AsUInt32().ToScalar();
        ref byte to = ref Unsafe.Add(ref at, i);
        if (bytesPerPixel == 4)
        {
            Unsafe.WriteUnaligned(ref to, value);
            return;
        }

        Unsafe.WriteUnaligned(ref to, (ushort)value);
        Unsafe.Add(ref to, 2) = (byte)(value >> 16);
    }
}
