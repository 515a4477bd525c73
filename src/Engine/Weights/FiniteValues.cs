using System.Numerics;
using System.Runtime.InteropServices;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Weights;

/// <summary>
/// Whether a stored tensor's values are numbers, in the type that a run keeps them in: one NaN or
/// infinity among the weights makes every loss NaN, and a value beyond the type's largest becomes
/// an infinity. As integers without their sign floats are ordered by magnitude, infinities and NaNs
/// last, so that one bound finds all of them. A pass over the bytes, at memory speed.
/// </summary>
public static unsafe class FiniteValues
{
    // A piece stays in a core's cache, and is worth a thread.
    private const long PieceBytes = 1 << 20;

    /// <summary>Requires finite values.</summary>
    /// <param name="tensor">Of a float type; other types pass.</param>
    /// <param name="kept">The type its values are rounded to.</param>
    /// <exception cref="InputException">Names file, tensor, index and value.</exception>
    public static void Require(StoredTensor tensor, DType kept)
    {
        if (tensor.StoredType.Kernel is not { } type || !type.IsFloat()) return;
        switch (type)
        {
            case DType.BF16:
                // F32's upper half: no BF16 value lies between a bound and its own upper half.
                Require<ushort>(tensor, kept, (ushort)((Bound(kept) + 0xFFFF) >> 16), 0x7FFF);
                break;
            case DType.F16:
                Require<ushort>(tensor, kept, 0x7C00, 0x7FFF);
                break;
            case DType.F32:
                Require<uint>(tensor, kept, Bound(kept), 0x7FFF_FFFF);
                break;
            case DType.F64:
                Require<ulong>(tensor, kept, DoubleBound(kept), long.MaxValue);
                break;
        }
    }

    // The least magnitude, as F32, that rounds to infinity: F16's largest is 65504 and BF16's
    // 0x7F7F; half a step above it ties to even, which is the infinity.
    private static uint Bound(DType kept) => kept switch
    {
        DType.F16 => BitConverter.SingleToUInt32Bits(65520),
        DType.BF16 => 0x7F7F_8000,
        _ => 0x7F80_0000,
    };

    private static ulong DoubleBound(DType kept) => BitConverter.DoubleToUInt64Bits(kept switch
    {
        DType.F32 => float.MaxValue + Math.ScaleB(1, 103), // half of the last step
        _ => BitConverter.UInt32BitsToSingle(Bound(kept)),
    });

    private static void Require<T>(StoredTensor tensor, DType kept, T bound, T magnitude)
        where T : unmanaged, IBinaryInteger<T>
    {
        T* data = (T*)tensor.Data;
        long count = tensor.Count, piece = PieceBytes / sizeof(T);
        long pieces = (count + piece - 1) / piece, bad = long.MaxValue;
        void Look(long i)
        {
            long begin = i * piece;
            var values = new ReadOnlySpan<T>(data + begin, (int)Math.Min(piece, count - begin));
            if (IsBelow(values, bound, magnitude)) return;
            int at = 0;
            while ((values[at] & magnitude) < bound) at++;
            long seen = Volatile.Read(ref bad);
            while (begin + at < seen)
                seen = Math.Min(
                    seen, Interlocked.CompareExchange(ref bad, begin + at, seen));
        }

        if (pieces <= 1) for (long i = 0; i < pieces; i++) Look(i);
        else Parallel.For(0, pieces, Look);
        if (bad == long.MaxValue) return;
        double value = Value(data[bad]);
        throw new InputException($"{tensor.Place}, element {Messages.Number(bad)} is "
            + (double.IsFinite(value)
                ? FormattableString.Invariant($"{value}, too large for {kept}, the run's type: ")
                    + (kept == DType.F16 ? "set bf16 in place of fp16" : "train without bf16")
                : FormattableString.Invariant($"{value}: the file is damaged, or a run that had ")
                    + "failed saved it"));

        double Value(T bits) => tensor.Type switch
        {
            DType.BF16 => BitConverter.UInt32BitsToSingle(uint.CreateTruncating(bits) << 16),
            DType.F16 => (double)BitConverter.UInt16BitsToHalf(ushort.CreateTruncating(bits)),
            DType.F32 => BitConverter.UInt32BitsToSingle(uint.CreateTruncating(bits)),
            _ => BitConverter.UInt64BitsToDouble(ulong.CreateTruncating(bits)),
        };
    }

    // Whether every magnitude is below the bound; the file's bytes need not be aligned.
    private static bool IsBelow<T>(ReadOnlySpan<T> values, T bound, T magnitude)
        where T : unmanaged, IBinaryInteger<T>
    {
        int i = 0;
        ref T first = ref MemoryMarshal.GetReference(values);
        var most = Vector<T>.Zero;
        var mask = new Vector<T>(magnitude);
        for (; i <= values.Length - Vector<T>.Count; i += Vector<T>.Count)
            most = Vector.Max(most, Vector.LoadUnsafe(ref first, (nuint)i) & mask);
        if (Vector.GreaterThanOrEqualAny(most, new Vector<T>(bound))) return false;
        for (; i < values.Length; i++)
            if ((values[i] & magnitude) >= bound) return false;
        return true;
    }
}
