using System.Numerics;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Quantised;

/// <summary>
/// A frozen matrix of 4-bit codes, <see cref="FourBitCodes"/>: about 4.5 bits an element with
/// scales in F32, 4.13 with scales that are codes themselves.
/// </summary>
public sealed unsafe class FourBitWeight : QuantisedWeight<FourBitElements>
{
    private const int TableSize = 16, ScaleTableSize = 256;

    private readonly FourBitForm _form;
    private readonly Tensor _codes, _table, _scales, _scaleCodes, _scaleTable;
    private readonly float _offset;

    /// <summary>On a device.</summary>
    public FourBitWeight(Device device, FourBitCodes codes)
        : this(device, codes.Form)
    {
        _offset = codes.Offset;
        device.Write<byte>(_codes, codes.Codes);
        device.Write<float>(_table, codes.Table);
        device.Write<float>(_scales, codes.Scales);
        if (!_scaleCodes.Exists) return;
        device.Write<byte>(_scaleCodes, codes.ScaleCodes!);
        device.Write<float>(_scaleTable, codes.ScaleTable!);
    }

    /// <summary>Without content, for a plan.</summary>
    public FourBitWeight(Device device, FourBitForm form)
        : base(form.Outputs, form.Inputs)
    {
        _form = form;
        _codes = New(DType.U8, form.CodeBytes);
        _table = New(DType.F32, TableSize);
        _scales = New(DType.F32, form.Scales);
        if (form.ScaleBlock == 0) return;
        _scaleCodes = New(DType.U8, form.Blocks);
        _scaleTable = New(DType.F32, ScaleTableSize);

        Tensor New(DType type, int count) =>
            device.Allocate(new Spec(type, new Shape(count)), "4-bit weight");
    }

    public override long Bytes => _codes.Spec.Bytes + _table.Spec.Bytes + _scales.Spec.Bytes
        + _scaleCodes.Spec.Bytes + _scaleTable.Spec.Bytes;

    protected override FourBitElements Packed => new(
        (byte*)_codes.Data, (float*)_table.Data, (float*)_scales.Data, (byte*)_scaleCodes.Data,
        (float*)_scaleTable.Data, _offset, _form);

    protected override void Unpack(in CudaCall call, in Tensor to) => call.Launch(
        "unpack_4bit", Grid.Eights(_form.Count), to, _table, _codes, _scales, _scaleCodes,
        _scaleTable, (double)_offset, BlockShift, ScaleShift, _form.FirstBlock, _form.Count);

    protected override void MultiplyFew(
        in CudaCall call, CudaMatrix x, CudaMatrix y, double alpha, double beta) => call.Launch(
        "multiply_4bit", Warps, y.Data, x.Data, x.Rows, Outputs, Inputs, x.Data.Shape.Cols,
        y.Data.Shape.Cols, (int)y.Data.Type, alpha, beta, _table, _codes, _scales, _scaleCodes,
        _scaleTable, (double)_offset, BlockShift, ScaleShift, _form.FirstBlock, _form.Count);

    private int BlockShift => BitOperations.Log2((uint)_form.BlockSize);

    private int ScaleShift => BitOperations.Log2((uint)Math.Max(1, _form.ScaleBlock));
}
