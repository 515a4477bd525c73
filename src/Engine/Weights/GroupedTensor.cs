using System.Runtime.InteropServices;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Quantised;

namespace MiniCpmNative.Engine.Weights;

/// <summary>
/// A matrix of AWQ (the layout of its matrix product) or GPTQ: unsigned codes in words of 32 bits,
/// W[n, k] = (code[k, n] - zero[g, n]) * scale[g, n] with g the group of input k. Kept, it lies by
/// outputs, as products read it.
/// </summary>
/// <param name="isAwq">Whether words hold neighbouring outputs, in AWQ's order, of an input; GPTQ's
/// hold neighbouring inputs of an output.</param>
/// <param name="addsOne">Whether zero points are stored less one, in each field of a word, with
/// borrows between them (GPTQ v1).</param>
internal sealed unsafe class GroupedTensor(
    GroupedForm form, bool isAwq, bool addsOne, string name, StoredTensor words, StoredTensor zeros,
    StoredTensor scales, StoredTensor? groups)
    : PackedTensor(words, name, form.Outputs, form.Inputs, zeros, scales, groups)
{
    // Column c of a word of AWQ's is in this field of it.
    private static readonly int[] s_awqField = [0, 4, 1, 5, 2, 6, 3, 7];

    private readonly int _fields = 32 / form.Bits;

    private uint Mask => (1u << form.Bits) - 1;

    public override Weight On(Device device, int begin, int rows, bool isPlan) => isPlan
        ? new GroupedWeight(device, form with { Outputs = rows })
        : new GroupedWeight(device, Codes(begin, rows));

    internal override void Fill(void* target)
    {
        GroupedCodes all = Codes(0, form.Outputs);
        fixed (byte* codes = all.Codes, zero = all.Zeros)
        fixed (float* scale = all.Scales)
        fixed (int* group = all.GroupOf)
        {
            var elements = new GroupedElements(codes, scale, zero, group, form);
            Parallel.For(0, form.Outputs, n => elements.Unpack(
                (long)n * form.Inputs, (float*)target + ((long)n * form.Inputs), form.Inputs));
        }
    }

    private GroupedCodes Codes(int begin, int rows)
    {
        GroupedForm part = form with { Outputs = rows };
        uint[] stored = Words(Main), zero = Words(zeros);
        float[] scale = Floats(scales);
        if (addsOne)
            for (int i = 0; i < zero.Length; i++) zero[i] += uint.MaxValue / Mask;
        var all = new GroupedCodes(part, new byte[part.CodeBytes], new float[part.Scales],
            new byte[part.Scales], groups is null ? null : GroupOf());
        // Rows of an odd number of 4-bit codes share bytes.
        int together = form.Bits == 4 && form.Inputs % 2 != 0 ? 2 : 1;
        Parallel.For(0, (rows + together - 1) / together, block =>
        {
            for (int n = block * together; n < Math.Min(rows, (block + 1) * together); n++)
            {
                for (int k = 0; k < form.Inputs; k++)
                {
                    uint code = isAwq ? Field(stored, k, begin + n)
                        : stored[((long)(k / _fields) * form.Outputs) + begin + n]
                            >> (k % _fields * form.Bits) & Mask;
                    long bit = (((long)n * form.Inputs) + k) * form.Bits;
                    all.Codes[bit / 8] |= (byte)(code << (int)(bit % 8));
                }

                for (int g = 0; g < form.Groups; g++)
                {
                    int at = (n * form.Groups) + g;
                    all.Scales[at] = scale[((long)g * form.Outputs) + begin + n];
                    all.Zeros[at] = (byte)Field(zero, g, begin + n);
                }
            }
        });
        return all;
    }

    // Of a row of words that hold neighbouring outputs.
    private uint Field(uint[] rows, int row, int n)
    {
        int place = n % _fields;
        if (isAwq) place = s_awqField[place];
        long word = ((long)row * (form.Outputs / _fields)) + (n / _fields);
        return rows[word] >> (place * form.Bits) & Mask;
    }

    private int[] GroupOf()
    {
        int[] found = [.. Words(groups!).Select(g => (int)g)];
        int bad = Array.FindIndex(found, g => g < 0 || g >= form.Groups);
        return bad < 0 ? found : throw new InputException(
            $"{groups!.Place}, element {bad} is {found[bad]}, expected a group from 0 to "
            + $"{form.Groups - 1}");
    }

    private static uint[] Words(StoredTensor tensor)
    {
        var found = new uint[tensor.Bytes / sizeof(uint)];
        tensor.Read(0, MemoryMarshal.AsBytes(found.AsSpan()));
        return found;
    }
}
