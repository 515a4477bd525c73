namespace MiniCpmNative.Kernels;

/// <summary>
/// Where a contiguous tensor lies: address, spec and, if it lives in the step arena, the slot and
/// serial number by which a read after its scope ended is caught. A plain value: nothing to
/// dispose, no reference count. Variable is the autograd tape's number for it, 0 for a constant.
/// </summary>
public readonly record struct Tensor(nint Data, Spec Spec, int Slot = 0, int Serial = 0,
    int Variable = 0)
{
    /// <summary>An optional input that is not given.</summary>
    public static Tensor None => default;

    public bool Exists => Spec.Exists;

    public Shape Shape => Spec.Shape;

    public DType Type => Spec.Type;

    /// <summary>
    /// Rows begin..begin+count of a row-major matrix, as a constant: the tape does not know it.
    /// </summary>
    public Tensor Slice(int begin, int count)
    {
        if (Spec.Layout != Layout.RowMajor || begin < 0 || count < 0 || begin + count > Shape[0])
            throw new ShapeException($"slice {begin}..{begin + count} of {Spec}");
        Span<int> sizes = stackalloc int[Shape.Rank];
        long stride = Type.Size();
        for (int axis = 0; axis < sizes.Length; axis++)
        {
            sizes[axis] = axis == 0 ? count : Shape[axis];
            if (axis > 0) stride *= Shape[axis];
        }

        return new(Data + (nint)(begin * stride), new Spec(Type, new Shape(sizes)), Slot, Serial);
    }

    /// <summary>The same elements seen in another shape.</summary>
    public Tensor Reshape(params ReadOnlySpan<int> sizes)
    {
        var shape = new Shape(sizes);
        if (shape.Count != Shape.Count || Spec.Layout != Layout.RowMajor)
            throw new ShapeException($"{Spec} cannot be seen as {shape}");
        return this with { Spec = new Spec(Type, shape) };
    }
}

/// <summary>
/// Where a backward writes one input's gradient, and whether it adds to what is there.
/// </summary>
public readonly record struct GradientTarget(Tensor Buffer, bool Accumulate)
{
    /// <summary>Nobody asked for this gradient.</summary>
    public static GradientTarget None => default;

    public bool Wanted => Buffer.Exists;
}
