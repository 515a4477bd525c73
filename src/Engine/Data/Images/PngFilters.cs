using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Runtime.Intrinsics;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// The five row filters of PNG, undone (PNG specification 9.2). a is the byte one pixel to the
/// left, b the one above, c the one above a. Every pixel depends on the one before it, so that a
/// vector holds one pixel, of up to 8 bytes; what it holds and stores beyond that the next pixel
/// overwrites.
/// </summary>
internal static class PngFilters
{
    /// <summary>
    /// Undoes the filter of a row, which begins with its number; false when that is unknown. The
    /// three rows have Picture.Slack bytes behind them; those of into are overwritten. They do not
    /// overlap, except that into may stand right behind above.
    /// </summary>
    public static bool Undo(
        ReadOnlySpan<byte> filtered, ReadOnlySpan<byte> above, Span<byte> into, int bytesPerPixel)
    {
        int length = filtered.Length - 1;
        if (into.Length < length || above.Length < length)
            throw new ArgumentException(
                $"rows have {above.Length} and {into.Length} bytes, not {length}");
        ref byte x = ref Unsafe.Add(ref MemoryMarshal.GetReference(filtered), 1);
        ref byte b = ref MemoryMarshal.GetReference(above);
        ref byte to = ref MemoryMarshal.GetReference(into);
        switch (filtered[0])
        {
            case 0: filtered[1..].CopyTo(into); break;
            case 1: Sub(ref x, ref to, length, bytesPerPixel); break;
            case 2: Up(ref x, ref b, ref to, length); break;
            case 3: Average(ref x, ref b, ref to, length, bytesPerPixel); break;
            case 4: Paeth(ref x, ref b, ref to, length, bytesPerPixel); break;
            default: return false;
        }

        return true;
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Up(ref byte x, ref byte b, ref byte to, int length)
    {
        for (nuint i = 0; i < (nuint)length; i += (nuint)Vector256<byte>.Count)
            (Vector256.LoadUnsafe(ref x, i) + Vector256.LoadUnsafe(ref b, i))
                .StoreUnsafe(ref to, i);
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Sub(ref byte x, ref byte to, int length, int bytesPerPixel)
    {
        var a = Vector128<byte>.Zero;
        for (int i = 0; i < length; i += bytesPerPixel)
        {
            a += Load(ref x, i);
            Store(a, ref to, i);
        }
    }

    // The sums of the other two need 9 and 10 bits, so that a byte takes 16; the last sum, with x,
    // is one of bytes, which leaves the upper 8 at zero.
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Average(
        ref byte x, ref byte b, ref byte to, int length, int bytesPerPixel)
    {
        var a = Vector128<ushort>.Zero;
        for (int i = 0; i < length; i += bytesPerPixel)
        {
            var half = (a + Vector128.WidenLower(Load(ref b, i))) >>> 1;
            a = (half.AsByte() + Vector128.WidenLower(Load(ref x, i)).AsByte()).AsUInt16();
            Store(Vector128.Narrow(a, a), ref to, i);
        }
    }

    // Of a, b and c the nearest to a + b - c, the first of equals. With the smaller and the greater
    // of a and b and t = 3c - a - b: c, where smaller < t < greater, is nearest; else, as the
    // distances are |b - c|, |a - c| and |c + c - a - b|, the smaller where t >= greater and the
    // greater where t <= smaller. So only three dependent steps follow on a.
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Paeth(ref byte x, ref byte b, ref byte to, int length, int bytesPerPixel)
    {
        Vector128<short> a = default, c = default;
        for (int i = 0; i < length; i += bytesPerPixel)
        {
            var above = Vector128.WidenLower(Load(ref b, i)).AsInt16();
            var t = c + c + c - above - a;
            var smaller = Vector128.Min(a, above);
            var greater = Vector128.Max(a, above);
            var nearest = Vector128.ConditionalSelect(
                Vector128.GreaterThan(t, smaller),
                Vector128.ConditionalSelect(Vector128.GreaterThan(greater, t), c, smaller),
                greater);
            c = above;
            a = (nearest.AsByte() + Vector128.WidenLower(Load(ref x, i)).AsByte()).AsInt16();
            Store(Vector128.Narrow(a.AsUInt16(), a.AsUInt16()), ref to, i);
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector128<byte> Load(ref byte at, int i) =>
        Vector128.CreateScalar(Unsafe.ReadUnaligned<ulong>(ref Unsafe.Add(ref at, i))).AsByte();

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Store(Vector128<byte> pixel, ref byte at, int i) =>
        Unsafe.WriteUnaligned(ref Unsafe.Add(ref at, i), pixel.AsUInt64().ToScalar());
}
