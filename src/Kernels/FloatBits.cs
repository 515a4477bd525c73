using System.Numerics.Tensors;
using System.Runtime.Intrinsics;

namespace MiniCpmNative.Kernels;

/// <summary>
/// Conversions between F32 and the storage types BF16 and F16. Widening is exact; narrowing rounds
/// to nearest, ties to even, keeps subnormals, overflows to infinity, and a NaN stays a NaN of its
/// sign. Pointers need no alignment. Memory-bound; source and target must not overlap unless they
/// are equal in address and type.
/// </summary>
public static unsafe class FloatBits
{
    private const int SpanLimit = 1 << 28;

    public static float FromBF16(ushort bits) => BitConverter.UInt32BitsToSingle((uint)bits << 16);

    public static ushort ToBF16(float value)
    {
        uint bits = BitConverter.SingleToUInt32Bits(value);
        return float.IsNaN(value)
            ? (ushort)((bits >> 16) | 0x40)
            : (ushort)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    }

    /// <summary>
    /// One of the two BF16 neighbours: the upper one in magnitude with the probability of the part
    /// that is cut off, if random is uniform below 2^16. Infinities and NaNs stay what they are.
    /// </summary>
    public static ushort RoundToBF16(float value, uint random)
    {
        uint bits = BitConverter.SingleToUInt32Bits(value);
        return float.IsFinite(value) ? (ushort)((bits + random) >> 16) : ToBF16(value);
    }

    public static float FromF16(ushort bits) => (float)BitConverter.UInt16BitsToHalf(bits);

    public static ushort ToF16(float value) => BitConverter.HalfToUInt16Bits((Half)value);

    /// <summary>
    /// target[i] = (float)source[i]; source holds BF16, F16, F32 or F64 (rounded).
    /// </summary>
    /// <exception cref="ArgumentOutOfRangeException">type is not a float type.</exception>
    public static void Widen(void* source, DType type, float* target, nint count)
    {
        switch (type)
        {
            case DType.F32:
                Buffer.MemoryCopy(source, target, count * sizeof(float), count * sizeof(float));
                break;
            case DType.BF16:
                WidenBF16((ushort*)source, target, count);
                break;
            case DType.F16:
                WidenF16((ushort*)source, target, count);
                break;
            case DType.F64:
                for (nint i = 0; i < count; i++) target[i] = (float)((double*)source)[i];
                break;
            default:
                throw new ArgumentOutOfRangeException(nameof(type), type, "not a float type");
        }
    }

    /// <summary>
    /// target[i] = source[i] rounded to type; target holds BF16, F16, F32 or F64.
    /// </summary>
    /// <exception cref="ArgumentOutOfRangeException">type is not a float type.</exception>
    public static void Narrow(float* source, void* target, DType type, nint count)
    {
        switch (type)
        {
            case DType.F32:
                Buffer.MemoryCopy(source, target, count * sizeof(float), count * sizeof(float));
                break;
            case DType.BF16:
                NarrowBF16(source, (ushort*)target, count);
                break;
            case DType.F16:
                NarrowF16(source, (ushort*)target, count);
                break;
            case DType.F64:
                for (nint i = 0; i < count; i++) ((double*)target)[i] = source[i];
                break;
            default:
                throw new ArgumentOutOfRangeException(nameof(type), type, "not a float type");
        }
    }

    public static void WidenBF16(ReadOnlySpan<ushort> source, Span<float> target)
    {
        CheckLengths(source.Length, target.Length);
        fixed (ushort* from = source)
        fixed (float* to = target)
            WidenBF16(from, to, source.Length);
    }

    public static void WidenBF16(ushort* source, float* target, nint count)
    {
        nint i = 0;
        if (Vector512.IsHardwareAccelerated)
        {
            for (; i <= count - 32; i += 32)
            {
                var (low, high) = Vector512.Widen(Vector512.Load(source + i));
                (low << 16).AsSingle().Store(target + i);
                (high << 16).AsSingle().Store(target + i + 16);
            }
        }

        for (; i <= count - 16; i += 16)
        {
            var (low, high) = Vector256.Widen(Vector256.Load(source + i));
            (low << 16).AsSingle().Store(target + i);
            (high << 16).AsSingle().Store(target + i + 8);
        }

        for (; i < count; i++) target[i] = FromBF16(source[i]);
    }

    public static void NarrowBF16(ReadOnlySpan<float> source, Span<ushort> target)
    {
        CheckLengths(source.Length, target.Length);
        fixed (float* from = source)
        fixed (ushort* to = target)
            NarrowBF16(from, to, source.Length);
    }

    public static void NarrowBF16(float* source, ushort* target, nint count)
    {
        nint i = 0;
        if (Vector512.IsHardwareAccelerated)
        {
            for (; i <= count - 32; i += 32)
            {
                var low = RoundToHigh16(Vector512.Load(source + i));
                var high = RoundToHigh16(Vector512.Load(source + i + 16));
                Vector512.Narrow(low, high).Store(target + i);
            }
        }

        for (; i <= count - 16; i += 16)
        {
            var low = RoundToHigh16(Vector256.Load(source + i));
            var high = RoundToHigh16(Vector256.Load(source + i + 8));
            Vector256.Narrow(low, high).Store(target + i);
        }

        for (; i < count; i++) target[i] = ToBF16(source[i]);
    }

    public static void WidenF16(ushort* source, float* target, nint count)
    {
        for (nint i = 0; i < count; i += SpanLimit)
        {
            int part = (int)Math.Min(SpanLimit, count - i);
            TensorPrimitives.ConvertToSingle(
                new ReadOnlySpan<Half>(source + i, part), new Span<float>(target + i, part));
        }
    }

    public static void NarrowF16(float* source, ushort* target, nint count)
    {
        for (nint i = 0; i < count; i += SpanLimit)
        {
            int part = (int)Math.Min(SpanLimit, count - i);
            TensorPrimitives.ConvertToHalf(
                new ReadOnlySpan<float>(source + i, part), new Span<Half>(target + i, part));
        }
    }

    // A NaN is not rounded: adding could carry its payload away and leave an infinity.
    private static Vector512<uint> RoundToHigh16(Vector512<float> value)
    {
        var bits = value.AsUInt32();
        var odd = (bits >>> 16) & Vector512<uint>.One;
        var rounded = (bits + Vector512.Create(0x7FFFu) + odd) >>> 16;
        var quiet = (bits >>> 16) | Vector512.Create(0x40u);
        return Vector512.ConditionalSelect(Vector512.IsNaN(value).AsUInt32(), quiet, rounded);
    }

    private static Vector256<uint> RoundToHigh16(Vector256<float> value)
    {
        var bits = value.AsUInt32();
        var odd = (bits >>> 16) & Vector256<uint>.One;
        var rounded = (bits + Vector256.Create(0x7FFFu) + odd) >>> 16;
        var quiet = (bits >>> 16) | Vector256.Create(0x40u);
        return Vector256.ConditionalSelect(Vector256.IsNaN(value).AsUInt32(), quiet, rounded);
    }

    private static void CheckLengths(int source, int target)
    {
        if (source != target)
            throw new ArgumentException($"source has {source} elements, target {target}");
    }
}
