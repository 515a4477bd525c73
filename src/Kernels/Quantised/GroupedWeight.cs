using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Quantised;

/// <summary>Sizes of a matrix of unsigned codes in groups of columns.</summary>
/// <param name="Outputs">Rows.</param>
/// <param name="Inputs">Columns.</param>
/// <param name="Bits">Of a code, 4 or 8.</param>
/// <param name="GroupSize">Columns of a group.</param>
/// <param name="IsOrdered">Whether each column says which group is its own; else they are
/// neighbours.</param>
public readonly record struct GroupedForm(
    int Outputs, int Inputs, int Bits, int GroupSize, bool IsOrdered)
{
    public int Groups => (Inputs + GroupSize - 1) / GroupSize;

    public long Count => (long)Outputs * Inputs;

    public int CodeBytes => checked((int)(((Count * Bits) + 7) / 8));

    /// <summary>Scales, and zero points.</summary>
    public int Scales => checked(Outputs * Groups);
}

/// <summary>Such a matrix in managed memory.</summary>
/// <param name="Codes">Row-major; of 4 bits the first of a byte in its low half.</param>
/// <param name="Scales">[Outputs, Groups].</param>
/// <param name="Zeros">[Outputs, Groups].</param>
/// <param name="GroupOf">The group of each column; null where they are not ordered.</param>
public sealed record GroupedCodes(
    GroupedForm Form, byte[] Codes, float[] Scales, byte[] Zeros, int[]? GroupOf);

/// <summary>
/// A frozen matrix as AWQ and GPTQ have it: element [n, k] is (code - zero[n, g]) * scale[n, g]
/// with g the group of column k. With groups of 128 it takes about 4.3 bits an element.
/// </summary>
public sealed unsafe class GroupedWeight : QuantisedWeight<GroupedElements>
{
    private readonly GroupedForm _form;
    private readonly Tensor _codes, _scales, _zeros, _groupOf;

    /// <summary>On a device.</summary>
    public GroupedWeight(Device device, GroupedCodes codes)
        : this(device, codes.Form)
    {
        device.Write<byte>(_codes, codes.Codes);
        device.Write<float>(_scales, codes.Scales);
        device.Write<byte>(_zeros, codes.Zeros);
        if (_groupOf.Exists) device.Write<int>(_groupOf, codes.GroupOf!);
    }

    /// <summary>Without content, for a plan.</summary>
    public GroupedWeight(Device device, GroupedForm form)
        : base(form.Outputs, form.Inputs)
    {
        _form = form;
        _codes = New(DType.U8, form.CodeBytes);
        _scales = New(DType.F32, form.Scales);
        _zeros = New(DType.U8, form.Scales);
        if (form.IsOrdered) _groupOf = New(DType.I32, form.Inputs);

        Tensor New(DType type, int count) =>
            device.Allocate(new Spec(type, new Shape(count)), "weight in groups");
    }

    public override long Bytes =>
        _codes.Spec.Bytes + _scales.Spec.Bytes + _zeros.Spec.Bytes + _groupOf.Spec.Bytes;

    protected override GroupedElements Packed => new((byte*)_codes.Data, (float*)_scales.Data,
        (byte*)_zeros.Data, (int*)_groupOf.Data, _form);

    protected override void Unpack(in CudaCall call, in Tensor to) => call.Launch(
        "unpack_grouped", Grid.Eights(_form.Count), to, _codes, _scales, _zeros, _groupOf,
        _form.Bits, _form.GroupSize, _form.Groups, Inputs, _form.Count);

    protected override void MultiplyFew(
        in CudaCall call, CudaMatrix x, CudaMatrix y, double alpha, double beta) => call.Launch(
        "multiply_grouped", Warps, y.Data, x.Data, x.Rows, Outputs, Inputs, x.Data.Shape.Cols,
        y.Data.Shape.Cols, (int)y.Data.Type, alpha, beta, _codes, _scales, _zeros, _groupOf,
        _form.Bits, _form.GroupSize, _form.Groups);
}

/// <summary>The same codes wherever they lie in host memory.</summary>
public readonly unsafe struct GroupedElements(
    byte* codes, float* scales, byte* zeros, int* groupOf, GroupedForm form) : IPackedElements
{
    public void Unpack(long from, float* to, int count)
    {
        int column = (int)(from % form.Inputs);
        long first = from / form.Inputs * form.Groups;
        for (long i = from; i < from + count; i++)
        {
            int code = form.Bits == 8 ? codes[i] : codes[i / 2] >> (int)(i % 2 * 4) & 15;
            long group = first + (groupOf is null ? column / form.GroupSize : groupOf[column]);
            *to++ = (code - zeros[group]) * scales[group];
            if (++column == form.Inputs) (column, first) = (0, first + form.Groups);
        }
    }
}
