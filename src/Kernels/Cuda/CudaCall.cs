namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// One run of an operation on a CUDA device. Kernels take activations in the device's storage type
/// ("real") and small vectors and tables as F32: inputs stored otherwise are cast into scratch when
/// asked for, and gradients wanted in another type than a kernel writes are cast when the operation
/// is done. Scratch lives until the operation returns.
/// </summary>
public readonly ref struct CudaCall(CudaDevice device, Op op, OpCall call)
{
    private readonly OpCall _call = call;

    /// <summary>The storage type of activations.</summary>
    public DType Real => device.Activations;

    public Randomness Random => device.Random;

    /// <summary>Where kernels leave a wrong index; see <see cref="KernelFault"/>.</summary>
    public Tensor Faults => device.Faults;

    /// <summary>Number of multiprocessors, to size grids that need not cover everything.</summary>
    public int Multiprocessors => device.Context.Multiprocessors;

    /// <summary>Whether tiles of attention must be small; see <see
    /// cref="CudaContext.SmallShared"/>.</summary>
    public bool SmallShared => device.Context.SmallShared;

    /// <summary>False in a forward whose backward will never come.</summary>
    public bool Recorded => _call.Recorded;

    /// <summary>The tensor as it is stored, for kernels that read any type.</summary>
    public Tensor Input(int index) =>
        index < _call.Inputs.Length ? _call.Inputs[index] : Tensor.None;

    /// <summary>An input in the storage type of activations.</summary>
    public Tensor In(int index) => As(Input(index), Real);

    /// <summary>An input as F32.</summary>
    public Tensor Floats(int index) => As(Input(index), DType.F32);

    /// <summary>
    /// The weight of the operation: of this input, or of another kind where there is no input.
    /// </summary>
    public CudaWeight Weight(int index, Weight? weight) => new(this, Input(index), weight);

    public Tensor Output => _call.Output;

    public Tensor Saved(int index) => _call.Saved[index];

    public Tensor OutputGradient => _call.OutputGradient;

    /// <summary>
    /// Where a kernel writes an input's gradient in the storage type of activations.
    /// </summary>
    public GradientTarget Gradient(int index) => Gradient(index, Real);

    /// <summary>Where a kernel writes an input's gradient as F32: that of a weight.</summary>
    public GradientTarget FloatGradient(int index) => Gradient(index, DType.F32);

    /// <summary>The gradient's own buffer, for products, which write either type.</summary>
    public GradientTarget AnyGradient(int index) =>
        index < _call.Gradients.Length ? _call.Gradients[index] : GradientTarget.None;

    /// <summary>A tensor of undefined content that lives until the operation returns.</summary>
    public Tensor Scratch(DType type, params ReadOnlySpan<int> sizes) =>
        device.Step.Push(new Spec(type, new Shape(sizes)), op.Name);

    /// <inheritdoc cref="CudaDevice.Unpacked"/>
    public Tensor Unpacked(Weight weight, out bool isThere) => device.Unpacked(
        weight, new Spec(Real, new Shape(weight.Outputs, weight.Inputs)), op.Name, out isThere);

    /// <summary>Where scratch begins that is given back before the operation returns, once what
    /// reads it is queued.</summary>
    public ArenaMark Mark() => device.Step.Mark();

    /// <summary>Gives back the scratch since the mark.</summary>
    public void Pop(ArenaMark mark) => device.Step.Pop(mark);

    /// <summary>Queues zeros into a tensor.</summary>
    public void Clear(in Tensor tensor) => device.Fill(tensor, 0);

    /// <summary>Whether the device has a kernel of that name.</summary>
    public bool Has(string kernel) => device.Kernels.Has(kernel);

    /// <summary>Queues a kernel; an empty grid is no launch.</summary>
    public void Launch(string kernel, Grid grid, params ReadOnlySpan<KernelArgument> arguments) =>
        device.Launch(kernel, grid, arguments);

    /// <summary>c = alpha a b + beta c; a and b of one type.</summary>
    public void Multiply(CudaMatrix a, CudaMatrix b, CudaMatrix c, double alpha = 1,
        double beta = 0) =>
        device.Multiply(a, b, c, alpha, beta);

    /// <summary>gradient = alpha a b, or adds it, if it is wanted.</summary>
    public void Multiply(CudaMatrix a, CudaMatrix b, GradientTarget gradient, double alpha = 1)
    {
        if (gradient.Wanted)
            device.Multiply(a, b, gradient.Buffer, alpha, gradient.Accumulate ? 1 : 0);
    }

    /// <summary>
    /// gradient[c] = sum of x[r, c] over the rows, or adds it, if it is wanted: a bias.
    /// </summary>
    public void SumRows(in Tensor x, GradientTarget gradient)
    {
        const int FewestRows = 64, BlocksPerMultiprocessor = 2;
        if (!gradient.Wanted) return;
        int rows = (int)x.Shape.Rows, cols = x.Shape.Cols;
        int blocks = CeilingOf(cols, 32 * 16 / Real.Size());
        var (parts, each) = Split(rows, blocks, BlocksPerMultiprocessor, FewestRows, multiple: 1);
        Tensor part = Scratch(DType.F32, parts, cols);
        Launch("sum_rows", Grid.Blocks256(blocks, parts), part, x, rows, cols, each);
        SumParts(part, gradient);
    }

    /// <summary>y[r, c] = b[c], b as F32: a bias that a product is added to.</summary>
    public void FillRows(in Tensor y, in Tensor b)
    {
        int rows = (int)y.Shape.Rows, cols = y.Shape.Cols;
        if (rows > 0) Launch("fill_rows", Grid.ColumnVectors(cols, rows, Real), y, b, rows, cols);
    }

    /// <summary>into = scale * x, or adds it, if it is wanted.</summary>
    public void Scale(in Tensor x, double scale, GradientTarget into)
    {
        if (into.Wanted)
            Launch("scale_rows", Grid.Vectors(x.Shape.Count, Real), into.Buffer, x, scale,
                x.Shape.Count, into.Accumulate);
    }

    /// <summary>
    /// Splits a sum's terms into parts (at least one), where the blocks of one part leave
    /// multiprocessors idle: so many that there are about perMultiprocessor blocks for each, but no
    /// part smaller than fewest, and each a multiple of some number.
    /// </summary>
    public (int Parts, int Each) Split(
        int terms, int blocks, int perMultiprocessor, int fewest, int multiple)
    {
        int wanted = perMultiprocessor * Multiprocessors / Math.Max(1, blocks);
        int parts = Math.Max(1, Math.Min(wanted, terms / fewest));
        int each = CeilingOf(Math.Max(1, CeilingOf(terms, parts)), multiple) * multiple;
        return (Math.Max(1, CeilingOf(terms, each)), each);
    }

    /// <summary>gradient[c] = sum of part[p, c] over p in order, or adds it; part is F32.</summary>
    public void SumParts(in Tensor part, GradientTarget gradient) => Launch(
        "sum_parts", Grid.Elements(part.Shape.Cols), gradient.Buffer, part, (int)part.Shape.Rows,
        part.Shape.Cols, gradient.Accumulate);

    /// <summary>output[n] = x[n] + scale * table[ids[n]]; x may be absent.</summary>
    public void Lookup(int table, int ids, in Tensor x, double scale, KernelFault fault)
    {
        Tensor from = Input(table);
        Launch("lookup_rows", Grid.Rows((int)Output.Shape.Rows), Output, x, from, (int)from.Type,
            Input(ids), from.Shape[0], from.Shape.Cols, scale, Faults, (int)fault);
    }

    /// <summary>
    /// The gradient of a lookup's table, if it is wanted: scale times the sum of the output
    /// gradient over the tokens of each row, in their order. With rowOf and weights term k of the
    /// lookup is weights[k] times row rowOf[k] of the output gradient.
    /// </summary>
    public void SumById(int table, int ids, double scale, KernelFault fault,
        Tensor rowOf = default, Tensor weights = default)
    {
        GradientTarget gradient = FloatGradient(table);
        if (!gradient.Wanted) return;
        int tokens = (int)Input(ids).Shape.Count, limit = gradient.Buffer.Shape[0];
        Tensor order = Scratch(DType.I32, tokens), sorted = Scratch(DType.I32, tokens);
        if (!gradient.Accumulate) Clear(gradient.Buffer);
        Launch("order_by_id", Grid.Elements(tokens), order, sorted, Input(ids), tokens,
            limit, Faults, (int)fault);
        Launch("sum_by_id", Grid.Rows(tokens), gradient.Buffer, OutputGradient, order,
            sorted, rowOf, weights, tokens, limit, gradient.Buffer.Shape.Cols, scale,
            gradient.Accumulate);
    }

    /// <summary>The tensor itself if it has this type, else a copy in scratch.</summary>
    public Tensor As(in Tensor tensor, DType type)
    {
        if (!tensor.Exists || tensor.Type == type) return tensor;
        Tensor copy = device.Step.Push(new Spec(type, tensor.Shape), op.Name);
        device.Cast(tensor, copy, accumulate: false);
        return copy;
    }

    internal static int CeilingOf(int value, int divisor) => (value + divisor - 1) / divisor;

    private GradientTarget Gradient(int index, DType type)
    {
        GradientTarget target = AnyGradient(index);
        if (!target.Wanted || target.Buffer.Type == type) return target;
        Tensor scratch = device.Step.Push(target.Buffer.Spec.As(type), op.Name);
        device.CastWhenDone(scratch, target);
        return new GradientTarget(scratch, Accumulate: false);
    }
}
