namespace MiniCpmNative.Kernels;

/// <summary>
/// How elements lie in memory. Packed is the device's own form of a frozen matrix, made once when
/// the model is loaded; only matrix products read it.
/// </summary>
public enum Layout : byte
{
    RowMajor,
    Packed,
}

/// <summary>
/// Type, shape and layout of a tensor; the default value stands for an absent tensor.
/// </summary>
public readonly record struct Spec
{
    public Spec(DType type, Shape shape, Layout layout = Layout.RowMajor)
    {
        (Type, Shape, Layout, Exists) = (type, shape, layout, true);
        if (layout == Layout.Packed && (shape.Rank != 2 || !type.IsFloat()))
            throw new ShapeException($"only float matrices can be packed, not {type}{shape}");
    }

    public DType Type { get; }

    public Shape Shape { get; }

    public Layout Layout { get; }

    /// <summary>False for an optional input that was not given.</summary>
    public bool Exists { get; }

    /// <summary>Bytes of the row-major form.</summary>
    public long Bytes => Shape.Count * Type.Size();

    public Spec As(DType type) => new(type, Shape);

    public override string ToString() => Exists
        ? $"{Type}{Shape}{(Layout == Layout.Packed ? " packed" : "")}"
        : "nothing";
}

/// <summary>What an operation makes: its output, and what it saves for its backward.</summary>
public readonly record struct Outputs(
    Spec Output, Spec Saved0 = default, Spec Saved1 = default, Spec Saved2 = default,
    Spec Saved3 = default)
{
    public const int MaxSaved = 4;

    public int SavedCount =>
        Saved3.Exists ? 4 : Saved2.Exists ? 3 : Saved1.Exists ? 2 : Saved0.Exists ? 1 : 0;

    public Spec Saved(int index) =>
        index switch { 0 => Saved0, 1 => Saved1, 2 => Saved2, _ => Saved3 };
}

/// <summary>
/// The checks of which shape rules are made; each failure names op, argument, expected, got.
/// </summary>
public static class SpecChecks
{
    /// <summary>A row-major float tensor.</summary>
    public static Spec Float(this ReadOnlySpan<Spec> inputs, Op op, int index, string name)
    {
        Spec spec = inputs.Given(op, index, name);
        if (!spec.Type.IsFloat() || spec.Layout != Layout.RowMajor)
            throw op.Wrong(name, "a row-major float tensor", spec);
        return spec;
    }

    /// <summary>A row-major float matrix.</summary>
    public static Spec FloatMatrix(this ReadOnlySpan<Spec> inputs, Op op, int index, string name)
    {
        Spec spec = inputs.Float(op, index, name);
        if (spec.Shape.Rank != 2) throw op.Wrong(name, "a row-major float matrix", spec);
        return spec;
    }

    /// <summary>A float matrix, row-major or packed: a weight of a matrix product.</summary>
    public static Spec Weight(this ReadOnlySpan<Spec> inputs, Op op, int index, string name)
    {
        Spec spec = inputs.Given(op, index, name);
        if (!spec.Type.IsFloat() || spec.Shape.Rank != 2)
            throw op.Wrong(name, "a float matrix", spec);
        return spec;
    }

    /// <summary>
    /// The sizes of a weight: of this input, or of another kind, which leaves the input out.
    /// </summary>
    public static (int Outputs, int Inputs) Weight(
        this ReadOnlySpan<Spec> inputs, Op op, int index, string name, Weight? weight)
    {
        if (weight is null || weight.Tensor.Exists)
        {
            Shape w = inputs.Weight(op, index, name).Shape;
            return (w[0], w[1]);
        }

        if (index < inputs.Length && inputs[index].Exists)
            throw op.Wrong(name, $"left out beside {weight}", inputs[index]);
        return (weight.Outputs, weight.Inputs);
    }

    public static Spec Int(this ReadOnlySpan<Spec> inputs, Op op, int index, string name)
    {
        Spec spec = inputs.Given(op, index, name);
        if (spec.Type != DType.I32) throw op.Wrong(name, "an I32 tensor", spec);
        return spec;
    }

    public static Spec Given(this ReadOnlySpan<Spec> inputs, Op op, int index, string name)
    {
        if (index >= inputs.Length || !inputs[index].Exists)
            throw new ShapeException($"{op.Name}: {name} is missing");
        return inputs[index];
    }

    public static void MustBe(this Spec spec, Op op, string name, params ReadOnlySpan<int> sizes) =>
        spec.MustHaveShape(op, name, new Shape(sizes));

    public static void MustHaveShape(this Spec spec, Op op, string name, Shape expected)
    {
        if (spec.Exists && spec.Shape != expected)
            throw op.Wrong(name, $"shape {expected}", spec);
    }

    public static ShapeException Wrong(this Op op, string name, string expected, Spec got) =>
        new($"{op.Name}: {name} must be {expected}, got {got}");
}
