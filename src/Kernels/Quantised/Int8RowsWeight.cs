using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Quantised;

/// <summary>
/// A frozen matrix of signed bytes with a scale for each row, as bitsandbytes' LLM.int8 stores it:
/// element [r, c] is its byte times scale[r] / 127.
/// </summary>
public sealed unsafe class Int8RowsWeight : QuantisedWeight<Int8RowsElements>
{
    private readonly Tensor _elements, _scales;

    /// <param name="device">Where it lies.</param>
    /// <param name="inputs">Columns.</param>
    /// <param name="elements">Signed, row-major.</param>
    /// <param name="scales">One for each row.</param>
    public Int8RowsWeight(Device device, int inputs, ReadOnlySpan<byte> elements,
        ReadOnlySpan<float> scales)
        : this(device, scales.Length, inputs)
    {
        device.Write(_elements, elements);
        device.Write(_scales, scales);
    }

    /// <summary>Without content, for a plan.</summary>
    public Int8RowsWeight(Device device, int outputs, int inputs)
        : base(outputs, inputs)
    {
        _elements = device.Allocate(new Spec(DType.U8, new Shape(outputs, inputs)), "8-bit weight");
        _scales = device.Allocate(new Spec(DType.F32, new Shape(outputs)), "8-bit scales");
    }

    public override long Bytes => _elements.Spec.Bytes + _scales.Spec.Bytes;

    protected override Int8RowsElements Packed =>
        new((sbyte*)_elements.Data, (float*)_scales.Data, Inputs);

    protected override void Unpack(in CudaCall call, in Tensor to) => call.Launch(
        "unpack_int8", Grid.Eights(to.Shape.Count), to, _elements, _scales, Inputs, to.Shape.Count);

    protected override void MultiplyFew(
        in CudaCall call, CudaMatrix x, CudaMatrix y, double alpha, double beta) => call.Launch(
        "multiply_int8", Warps, y.Data, x.Data, x.Rows, Outputs, Inputs, x.Data.Shape.Cols,
        y.Data.Shape.Cols, (int)y.Data.Type, alpha, beta, _elements, _scales);
}

/// <summary>Bytes and scales of rows in host memory.</summary>
public readonly unsafe struct Int8RowsElements(sbyte* elements, float* scales, int inputs)
    : IPackedElements
{
    public void Unpack(long from, float* to, int count)
    {
        for (long i = from; i < from + count; i++)
            *to++ = elements[i] * scales[i / inputs] / 127;
    }
}
