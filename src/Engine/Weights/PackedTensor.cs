using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Quantised;

namespace MiniCpmNative.Engine.Weights;

/// <summary>
/// A matrix that its files hold quantised, in several tensors: to readers a tensor of F32 under the
/// name and shape that the model has it by. What it is made of can be taken as it is (<see
/// cref="On"/>).
/// </summary>
public abstract unsafe class PackedTensor : StoredTensor
{
    private protected PackedTensor(
        StoredTensor main, string name, int outputs, int inputs, params StoredTensor?[] others)
        : base(main.File, name, StoredType.Of(DType.F32), [outputs, inputs], 0,
            (long)outputs * inputs * sizeof(float))
    {
        (Outputs, Inputs) = (outputs, inputs);
        Main = main;
        PackedBytes = main.Bytes + others.Sum(t => t?.Bytes ?? 0);
    }

    public int Outputs { get; }

    public int Inputs { get; }

    /// <summary>Bytes in the files.</summary>
    public long PackedBytes { get; }

    private protected StoredTensor Main { get; }

    /// <summary>
    /// Rows begin..begin + rows as a frozen weight on a device; without content for a plan. Null
    /// where the form has no weight, or does not split there.
    /// </summary>
    /// <exception cref="InputException">The files cannot be read, or hold no such
    /// matrix.</exception>
    public abstract Weight? On(Device device, int begin, int rows, bool isPlan = false);

    public override void Read(long from, Span<byte> target) =>
        new ReadOnlySpan<byte>((byte*)Data + from, target.Length).CopyTo(target);

    /// <summary>A part of the files as floats; all must be finite.</summary>
    private protected static float[] Floats(StoredTensor tensor)
    {
        float[] values = tensor.ToFloats();
        int bad = Array.FindIndex(values, v => !float.IsFinite(v));
        return bad < 0 ? values : throw new InputException(
            $"{tensor.Place}, element {bad} is {values[bad]}: the file is damaged");
    }

    private protected static byte[] All(StoredTensor tensor)
    {
        var bytes = new byte[tensor.Bytes];
        tensor.Read(0, bytes);
        return bytes;
    }
}

/// <summary>
/// A matrix of bitsandbytes' Linear4bit: codes, the table, scales or codes of scales, and a state
/// in JSON. The tables are the file's: those written by a CPU differ in an entry.
/// </summary>
internal sealed unsafe class FourBitTensor(
    FourBitForm form, string name, StoredTensor codes, StoredTensor table, StoredTensor scales,
    StoredTensor? nestedScales, StoredTensor? nestedTable, float offset)
    : PackedTensor(codes, name, form.Outputs, form.Inputs, table, scales, nestedScales, nestedTable)
{
    public FourBitCodes Codes()
    {
        byte[] codes = All(Main);
        // The last byte of an odd number of elements may have others behind it.
        if (codes.Length > form.CodeBytes) codes = codes[..form.CodeBytes];
        return nestedScales is null ? new(form, codes, Floats(table), Floats(scales))
            : new(form, codes, Floats(table), Floats(nestedScales), All(scales),
                Floats(nestedTable!), offset);
    }

    public override Weight? On(Device device, int begin, int rows, bool isPlan) =>
        !form.Splits(begin) ? null
        : isPlan ? new FourBitWeight(device, form.Part(begin, rows))
        : new FourBitWeight(device, Codes().Rows(begin, rows));

    internal override void Fill(void* target)
    {
        const int piece = 1 << 16;
        FourBitCodes all = Codes();
        Parallel.For(0, (Count + piece - 1) / piece, i => all.Unpack(i * piece, new Span<float>(
            (float*)target + (i * piece), (int)Math.Min(piece, Count - (i * piece)))));
    }
}

/// <summary>A matrix of bitsandbytes' Linear8bitLt: signed bytes, and a scale for each
/// row.</summary>
internal sealed unsafe class Int8Tensor(string name, StoredTensor elements, StoredTensor scales)
    : PackedTensor(elements, name, elements.Shape[0], elements.Shape[1], scales)
{
    public override Weight On(Device device, int begin, int rows, bool isPlan)
    {
        if (isPlan) return new Int8RowsWeight(device, rows, Inputs);
        var bytes = new byte[checked(rows * Inputs)];
        Main.Read((long)begin * Inputs, bytes);
        return new Int8RowsWeight(device, Inputs, bytes, Floats(scales).AsSpan(begin, rows));
    }

    internal override void Fill(void* target)
    {
        byte[] bytes = All(Main);
        float[] factors = Floats(scales);
        fixed (byte* from = bytes)
        fixed (float* scale = factors)
            new Int8RowsElements((sbyte*)from, scale, Inputs)
                .Unpack(0, (float*)target, checked((int)Count));
    }
}
