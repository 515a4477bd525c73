using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Quantised;

namespace MiniCpmNative.Engine.Model;

/// <summary>How a run quantises the decoder's linear layers on load.</summary>
/// <param name="Nested">Whether scales are codes themselves (double quantisation).</param>
public sealed record Quantisation(FourBitKind Kind, bool Nested)
{
    public FourBitForm Form(int outputs, int inputs) =>
        new(outputs, inputs, ScaleBlock: Nested ? 256 : 0);
}

/// <summary>
/// Frozen weights in 4 or 8 bits: those that the checkpoint holds so, as they are, and, where a run
/// asks for it, the linear layers of the decoder, each quantised when it is read. Joiner, head and
/// vision tower stay as they are stored.
/// </summary>
/// <param name="table">The model's parameters.</param>
/// <param name="storage">The type that values are rounded to before they are quantised.</param>
/// <param name="quantisation">Null quantises nothing.</param>
/// <param name="checkpoint">The files; null plans without them.</param>
public sealed class QuantisedKind(
    ParameterTable table, DType storage, Quantisation? quantisation, Checkpoint? checkpoint)
    : IWeightKind
{
    private readonly HashSet<string> _linears = quantisation is null ? [] :
    [
        .. table.Linears.Where(l => l.Name != table.Head).Select(l => l.Name + ".weight")
            .Where(name => table.Find(name)?.Part == ModelPart.Decoder),
    ];

    public bool Takes(string weight) =>
        checkpoint?.Find(weight) is PackedTensor { IsKept: true } || _linears.Contains(weight);

    public unsafe Weight? Load(Device device, StoredTensor matrix, int begin, int rows)
    {
        if (matrix is PackedTensor { IsKept: true } packed) return packed.On(device, begin, rows);
        if (!_linears.Contains(matrix.Name)) return null;
        FourBitForm form = quantisation!.Form(matrix.Shape[0], matrix.Shape.Cols);
        if (!form.Splits(begin)) return null;
        using var values = new StorageValues(matrix, 0, matrix.Count, storage);
        return new FourBitWeight(device, FourBitCodes.Of(
            form, quantisation.Kind, values.Type, values.Data).Rows(begin, rows));
    }

    public Weight? Plan(Device device, string weight, int begin, int rows)
    {
        if (checkpoint?.Find(weight) is PackedTensor { IsKept: true } packed)
            return packed.On(device, begin, rows, isPlan: true);
        if (!_linears.Contains(weight)) return null;
        Shape shape = table.Find(weight)!.Shape;
        FourBitForm form = quantisation!.Form(shape[0], shape.Cols);
        return form.Splits(begin) ? new FourBitWeight(device, form.Part(begin, rows)) : null;
    }

    /// <summary>Bytes that a frozen tensor takes, about.</summary>
    public long Bytes(StoredTensor tensor) =>
        tensor is PackedTensor { IsKept: true } packed ? packed.PackedBytes
        : _linears.Contains(tensor.Name) ? (tensor.Count / 2) + (tensor.Count / 60)
        : tensor.Count * Math.Min(tensor.StoredType.Size, storage.Size());
}
