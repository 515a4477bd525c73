using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Quantised;

namespace MiniCpmNative.Engine.Model;

/// <summary>How a run quantises linear layers on load.</summary>
/// <param name="Nested">Whether scales are codes themselves (double quantisation).</param>
/// <param name="Skipped">Names of modules that are left out with all that is in them; null takes
/// the decoder alone.</param>
public sealed record Quantisation(
    FourBitKind Kind, bool Nested, IReadOnlyList<string>? Skipped = null)
{
    /// <summary>As q_lora and the keys beside it say; null without it.</summary>
    public static Quantisation? Of(TrainArguments arguments) => !arguments.Quantises ? null
        : new(arguments.Bnb4bitQuantType == QuantType.Fp4 ? FourBitKind.Fp4 : FourBitKind.Nf4,
            arguments.Bnb4bitUseDoubleQuant ?? true, arguments.LlmInt8SkipModules);

    /// <summary>Whether it takes a linear layer. The head's product is a part of the loss, which
    /// reads it as it is.</summary>
    public bool Takes(ParameterTable table, LinearModule linear) => linear.Name != table.Head
        && (Skipped is null
            ? table.Find(linear.Name + ".weight")?.Part == ModelPart.Decoder
            : !Skipped.Any(name => IsIn(linear.Name, name)));

    /// <summary>What is left out is there.</summary>
    /// <exception cref="InputException">A name is no module of the model.</exception>
    public void MustName(ParameterTable table)
    {
        foreach (string name in Skipped ?? [])
            if (!table.Modules.Any(module => IsIn(module, name)))
                throw new InputException($"llm_int8_skip_modules {Messages.Quote(name)} is no "
                    + "module of the model" + TrainKeys.Guess(
                        name, table.Modules.SelectMany(m => m.Split('.')).Distinct()));
    }

    private static bool IsIn(string module, string name) =>
        $".{module}.".Contains($".{name}.", StringComparison.Ordinal);

    public FourBitForm Form(int outputs, int inputs) =>
        new(outputs, inputs, ScaleBlock: Nested ? 256 : 0);

    public override string ToString() =>
        $"{Kind}, {(Nested ? "nested" : "plain")}, without {string.Join(' ', Skipped ?? [])}";
}

/// <summary>
/// Frozen weights in 4 or 8 bits: those that the checkpoint holds so, as they are, and, where a run
/// asks for it, linear layers, each quantised when it is read.
/// </summary>
/// <param name="table">The model's parameters.</param>
/// <param name="storage">The type that values are rounded to before they are quantised.</param>
/// <param name="quantisation">Null quantises nothing.</param>
/// <param name="checkpoint">The files; null plans without them.</param>
public sealed class QuantisedKind(
    ParameterTable table, DType storage, Quantisation? quantisation, Checkpoint? checkpoint)
    : IWeightKind
{
    private readonly HashSet<string> _linears = Linears(table, quantisation);

    private (string? Name, FourBitCodes Codes) _last;

    private static HashSet<string> Linears(ParameterTable table, Quantisation? quantisation)
    {
        quantisation?.MustName(table);
        return [.. table.Linears
            .Where(l => quantisation?.Takes(table, l) == true).Select(l => l.Name + ".weight")];
    }

    public bool Takes(string weight) =>
        checkpoint?.Find(weight) is PackedTensor || _linears.Contains(weight);

    public Weight? Load(Device device, StoredTensor matrix, int begin, int rows)
    {
        if (matrix is PackedTensor packed) return packed.On(device, begin, rows);
        if (!_linears.Contains(matrix.Name)) return null;
        FourBitCodes codes = CodesOf(matrix);
        return codes.Form.Splits(begin) ? new FourBitWeight(device, codes.Rows(begin, rows)) : null;
    }

    public RowReader? Reader(StoredTensor matrix)
    {
        if (!_linears.Contains(matrix.Name) || matrix is PackedTensor) return null;
        return CodesOf(matrix).Unpack;
    }

    // Of the last matrix, which is asked for again by its other parts and for its norms.
    private unsafe FourBitCodes CodesOf(StoredTensor matrix)
    {
        if (_last.Name == matrix.Name) return _last.Codes;
        FourBitForm form = quantisation!.Form(matrix.Shape[0], matrix.Shape.Cols);
        using var values = new StorageValues(matrix, 0, matrix.Count, storage);
        _last = (matrix.Name, FourBitCodes.Of(form, quantisation.Kind, values.Type, values.Data));
        return _last.Codes;
    }

    public Weight? Plan(Device device, string weight, int begin, int rows)
    {
        if (checkpoint?.Find(weight) is PackedTensor packed)
            return packed.On(device, begin, rows, isPlan: true);
        if (!_linears.Contains(weight)) return null;
        Shape shape = table.Find(weight)!.Shape;
        FourBitForm form = quantisation!.Form(shape[0], shape.Cols);
        return form.Splits(begin) ? new FourBitWeight(device, form.Part(begin, rows)) : null;
    }

    /// <summary>Bytes that a frozen tensor takes, about.</summary>
    public long Bytes(StoredTensor tensor) =>
        tensor is PackedTensor packed ? packed.PackedBytes
        : _linears.Contains(tensor.Name)
            ? quantisation!.Form((int)tensor.Sizes[0], (int)tensor.Sizes[1]).Bytes
        : tensor.Count * Math.Min(tensor.StoredType.Size, storage.Size());
}
