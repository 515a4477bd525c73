using System.Buffers.Binary;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Export;

/// <summary>
/// How GGUF stores values: plain, or in blocks of 32 neighbours of a row with a scale d in F16 (of
/// ggml). Q8_0: d = max|x| / 127, q = round(x / d) as signed bytes. Q4_0: d = x / -8 of the x of
/// largest magnitude, q = trunc(x / d + 8.5) up to 15, value j in the low and j + 16 in the high
/// half of byte j. The quotients are products with 1 / d in F32, before d is rounded.
/// </summary>
internal abstract class GgufType(string name, uint id, uint fileType, int block, int blockBytes)
{
    public static GgufType F32 { get; } = new Plain("f32", 0, 0, DType.F32);

    public static GgufType F16 { get; } = new Plain("f16", 1, 1, DType.F16);

    public static GgufType BF16 { get; } = new Plain("bf16", 30, 32, DType.BF16);

    public static GgufType Q8 { get; } = new EightBits();

    public static GgufType Q4 { get; } = new FourBits();

    /// <summary>Those that the matrices of a language model can have.</summary>
    public static IReadOnlyList<GgufType> Choices { get; } = [F16, BF16, Q8, Q4];

    public string Name { get; } = name;

    public uint Id { get; } = id;

    /// <summary>general.file_type of a model whose matrices mostly have it.</summary>
    public uint FileType { get; } = fileType;

    /// <summary>Values that are stored together; rows are whole numbers of them.</summary>
    public int Block { get; } = block;

    public bool IsQuantised => Block > 1;

    public long Bytes(long count) => count / Block * blockBytes;

    /// <summary>Writes whole blocks of values.</summary>
    public abstract void Encode(ReadOnlySpan<float> values, Span<byte> target);

    public override string ToString() => Name;

    private static float Inverse(float scale) => scale == 0 ? 0 : 1 / scale;

    private static void Scale(float scale, Span<byte> target) =>
        BinaryPrimitives.WriteUInt16LittleEndian(target, FloatBits.ToF16(scale));

    private sealed class Plain(string name, uint id, uint fileType, DType type)
        : GgufType(name, id, fileType, 1, type.Size())
    {
        public override unsafe void Encode(ReadOnlySpan<float> values, Span<byte> target)
        {
            fixed (float* from = values)
            fixed (byte* to = target) FloatBits.Narrow(from, to, type, values.Length);
        }
    }

    private sealed class EightBits() : GgufType("q8_0", 8, 7, 32, 34)
    {
        public override void Encode(ReadOnlySpan<float> values, Span<byte> target)
        {
            for (; values.Length > 0; values = values[32..], target = target[34..])
            {
                float largest = 0;
                foreach (float value in values[..32])
                    largest = Math.Max(largest, Math.Abs(value));
                float scale = largest / 127, inverse = Inverse(scale);
                Scale(scale, target);
                for (int i = 0; i < 32; i++)
                    target[2 + i] = (byte)(sbyte)MathF.Round(
                        values[i] * inverse, MidpointRounding.AwayFromZero);
            }
        }
    }

    private sealed class FourBits() : GgufType("q4_0", 2, 2, 32, 18)
    {
        public override void Encode(ReadOnlySpan<float> values, Span<byte> target)
        {
            for (; values.Length > 0; values = values[32..], target = target[18..])
            {
                float largest = 0;
                foreach (float value in values[..32])
                    if (Math.Abs(value) > Math.Abs(largest)) largest = value;
                float scale = largest / -8, inverse = Inverse(scale);
                Scale(scale, target);
                for (int i = 0; i < 16; i++)
                    target[2 + i] = (byte)(Quant(values[i]) | (Quant(values[i + 16]) << 4));

                int Quant(float value) => Math.Min(15, (int)((value * inverse) + 8.5f));
            }
        }
    }
}
