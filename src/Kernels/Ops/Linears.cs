using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>One of the layers of <see cref="Linears"/>.</summary>
/// <param name="Outputs">Its columns of y.</param>
/// <param name="Layer">The key of its adapter's mask, where it has one.</param>
/// <param name="Weight">What stands for w where it is not dense.</param>
public sealed record LinearPart(int Outputs, int Layer = 0, Weight? Weight = null);

/// <summary>
/// Up to three linear layers of one x, each as <see cref="LoraLinear"/> where it has an adapter,
/// else as <see cref="Linear"/>: y_i = x w_i^T + b_i + Scale * (drop_i(x) a_i^T) bb_i^T. Inputs are
/// x[rows, in], for each layer w, b, a and bb (b, and a with bb, may be absent) and, where heads
/// are rotated, positions, cos and sin as <see cref="Rope"/> takes them. y[rows, all outputs] is in
/// memory one matrix [rows, Outputs] behind the other. The heads of HeadDim columns of the first
/// Rotated layers are rotated by their positions; HeadDim is 0 where columns are no heads. Saves
/// h[adapters, rows, rank].
/// </summary>
/// <exception cref="ShapeException">
/// The shapes do not fit together, ranks differ, or a position is outside the tables.
/// </exception>
public sealed record Linears : Op
{
    private const int Most = KernelConstants.LoraAdapters, Each = 4;

    private static readonly (string W, string B, string A, string Bb)[] s_names =
        [("w", "b", "a", "bb"), ("w1", "b1", "a1", "bb1"), ("w2", "b2", "a2", "bb2")];

    private readonly LinearPart[] _parts;

    /// <param name="parts">The layers.</param>
    /// <param name="scale">alpha / rank of all adapters.</param>
    /// <param name="dropout">Probability of a zero, in [0, 1).</param>
    /// <param name="headDim">Columns of a head, or 0.</param>
    /// <param name="rotated">How many of the layers have their heads rotated.</param>
    public Linears(LinearPart[] parts, double scale = 1, double dropout = 0, int headDim = 0,
        int rotated = 0)
        : base("linears")
    {
        _ = Philox.Threshold(dropout);
        if (parts.Length is 0 or > Most || rotated > (headDim == 0 ? 0 : parts.Length))
            throw new ArgumentException($"{parts.Length} layers, {rotated} with rotated heads");
        (_parts, Scale, Dropout, HeadDim, Rotated) = (parts, scale, dropout, headDim, rotated);
    }

    public IReadOnlyList<LinearPart> Parts => _parts;

    public double Scale { get; }

    public double Dropout { get; }

    public int HeadDim { get; }

    public int Rotated { get; }

    private int Positions => 1 + (Each * _parts.Length);

    private int RotatedColumns => Begin(Rotated);

    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec x = inputs.Float(this, 0, "x");
        int rows = (int)x.Shape.Rows, adapters = 0, rank = 0;
        for (int i = 0; i < _parts.Length; i++)
        {
            int w = First(i);
            var name = s_names[i];
            var (output, input) = inputs.Weight(this, w, name.W, _parts[i].Weight);
            if (x.Shape.Cols != input)
                throw this.Wrong("x", $"{input} columns, the inputs of {name.W}", x);
            if (output != _parts[i].Outputs || (HeadDim > 0 && output % HeadDim != 0))
                throw this.Wrong(
                    name.W, $"{_parts[i].Outputs} rows in heads of {HeadDim}", inputs[w]);
            if (inputs[w + 1].Exists)
                inputs.Float(this, w + 1, name.B).MustBe(this, name.B, output);
            if (!inputs[w + 2].Exists && !inputs[w + 3].Exists) continue;
            Spec a = inputs.FloatMatrix(this, w + 2, name.A);
            if (adapters++ == 0) rank = a.Shape[0];
            a.MustBe(this, name.A, rank, input);
            inputs.FloatMatrix(this, w + 3, name.Bb).MustBe(this, name.Bb, output, rank);
        }

        if (Rotated > 0)
        {
            if (HeadDim % 2 != 0)
                throw new ShapeException($"{Name}: heads of {HeadDim} rows, expected an even "
                    + "number");
            Rope.CheckTables(this, inputs, Positions, HeadDim, rows);
        }

        return new(new Spec(activations, new Shape(rows, Begin(_parts.Length))),
            adapters > 0 ? new Spec(activations, new Shape(adapters, rows, rank)) : default);
    }

    // x is a factor of every weight's gradient.
    public override bool BackwardReads(int input, ReadOnlySpan<bool> trained)
    {
        if (input != 0) return true;
        for (int i = 0; i < _parts.Length; i++)
            if (trained[First(i)] || trained[First(i) + 2]) return true;
        return false;
    }

    public override bool Differentiates(int input) => input < Positions
        && (input == 0 || (input - 1) % Each != 0 || _parts[(input - 1) / Each].Weight is null);

    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Matrix<T> x = call.In(0);
        for (int i = 0, adapter = 0; i < _parts.Length; i++)
        {
            Matrix<T> y = Part(call.Output, i);
            Layer(call, i).Forward(x, y, Down(call, i, ref adapter));
            if (i < Rotated)
                Rope.Rotate(this, call, Positions, HeadDim, y, new Gradient<T>(y, false), T.One);
        }
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        Matrix<T> x = call.In(0);
        for (int i = 0, adapter = 0; i < _parts.Length; i++)
        {
            Matrix<T> dy = Part(call.OutputGradient, i);
            if (i < Rotated)
            {
                Matrix<T> back = call.Scratch(new Shape(dy.Rows, dy.Cols));
                Rope.Rotate(this, call, Positions, HeadDim, dy, new Gradient<T>(back, false),
                    T.NegativeOne);
                dy = back;
            }

            Gradient<T> dx = call.Gradient(0);
            if (dx.Wanted && i > 0) dx = new Gradient<T>(dx.Into, accumulate: true);
            Layer(call, i).Backward(x, dy, Down(call, i, ref adapter), dx);
        }
    }

    // Dense weights that lie behind each other are multiplied by as one, which a GPU does faster:
    // its result has the layers side by side, in scratch, from which heads are brought to where
    // attention takes them. Where no adapter's part is stored first it is added in the end.
    public override void CudaForward(in CudaCall call)
    {
        CudaMatrix x = call.In(0);
        Tensor y = call.Output, h = Adapters(call) > 0 ? call.Saved(0) : Tensor.None;
        bool heads = HeadDim > 0, all = Adapters(call) == _parts.Length;
        Tensor side = heads ? call.Scratch(call.Real, x.Rows, y.Shape.Cols) : Tensor.None;
        Down(call, x, h);
        if (heads && Together(call) is { } together)
        {
            if (all) Up(call, h, side, y, before: true);
            call.Multiply(x, together.T, side, beta: all ? 1 : 0);
            if (!all) Up(call, h, side, y, before: false);
        }
        else
        {
            Up(call, h, side, y, before: true);
            for (int i = 0; i < _parts.Length; i++)
            {
                bool there = call.Input(First(i) + 2).Exists
                    || (!heads && call.Input(First(i) + 1).Exists);
                call.Weight(First(i), _parts[i].Weight)
                    .Multiply(x, Of(side, y, i), beta: there ? 1 : 0);
            }
        }

        if (heads) Heads(call, y, side, forward: true);
    }

    public override void CudaBackward(in CudaCall call)
    {
        CudaMatrix x = call.In(0);
        Tensor dy = call.OutputGradient;
        int adapters = Adapters(call);
        bool heads = HeadDim > 0;
        Tensor side = heads ? call.Scratch(call.Real, x.Rows, dy.Shape.Cols) : Tensor.None;
        if (heads) Heads(call, side, dy, forward: false);
        for (int i = 0; i < _parts.Length; i++)
            call.Multiply(Of(side, dy, i).T, x, call.AnyGradient(First(i)));
        BiasGradients(call, side, dy);
        GradientTarget dx = call.Gradient(0);
        if (adapters > 0) AdapterGradients(call, x, side, dy, dx);
        if (!dx.Wanted) return;
        bool there = adapters > 0 || dx.Accumulate;
        if (heads && Together(call) is { } together)
        {
            call.Multiply(side, together, dx.Buffer, beta: there ? 1 : 0);
            return;
        }

        for (int i = 0; i < _parts.Length; i++)
            call.Weight(First(i), _parts[i].Weight).MultiplyTransposed(
                Of(side, dy, i), dx.Buffer, beta: there || i > 0 ? 1 : 0);
    }

    private static int First(int part) => 1 + (Each * part);

    // Where a layer's columns begin.
    private int Begin(int part)
    {
        int begin = 0;
        for (int i = 0; i < part; i++) begin += _parts[i].Outputs;
        return begin;
    }

    private unsafe Matrix<T> Part<T>(Matrix<T> y, int part)
        where T : unmanaged =>
        new(y.Data + ((long)y.Rows * Begin(part)), y.Rows, _parts[part].Outputs);

    // h of a layer that has an adapter, the next of those saved.
    private static Matrix<T> Down<T>(in CpuCall<T> call, int part, ref int adapter)
        where T : unmanaged, System.Numerics.IBinaryFloatingPointIeee754<T>
    {
        int rows = call.In(0).Rows;
        return call.Input(First(part) + 2).Exists
            ? call.Saved(0).Slice(adapter++ * rows, rows) : default;
    }

    private CpuAdapter<T> Layer<T>(in CpuCall<T> call, int part)
        where T : unmanaged, System.Numerics.IBinaryFloatingPointIeee754<T> =>
        new(call, First(part), _parts[part].Weight, _parts[part].Layer, Scale, Dropout);

    private int Adapters(in CudaCall call)
    {
        int count = 0;
        for (int i = 0; i < _parts.Length; i++) count += call.Input(First(i) + 2).Exists ? 1 : 0;
        return count;
    }

    // A layer's matrix [rows, Outputs] of an output.
    private Tensor Part(in Tensor y, int part)
    {
        int rows = (int)y.Shape.Rows;
        return new(y.Data + (nint)((long)rows * Begin(part) * y.Type.Size()),
            new Spec(y.Type, new Shape(rows, _parts[part].Outputs)));
    }

    // A layer's columns, of those side by side if there are such.
    private CudaMatrix Of(in Tensor side, in Tensor behind, int part) => side.Exists
        ? ((CudaMatrix)side).ColumnsFrom(Begin(part), _parts[part].Outputs)
        : Part(behind, part);

    // All weights as one matrix, where they lie so.
    private CudaMatrix? Together(in CudaCall call)
    {
        Tensor first = call.Input(First(0));
        nint end = first.Data;
        for (int i = 0; i < _parts.Length; i++)
        {
            Tensor w = call.Input(First(i));
            if (!w.Exists || w.Type != call.Real || w.Data != end) return null;
            end += (nint)w.Spec.Bytes;
        }

        return new CudaMatrix(first, Begin(_parts.Length), first.Shape.Cols, false);
    }

    // The adapters' first matrices, and the keys of their masks.
    private int First(in CudaCall call, Span<Tensor> a, Span<int> layers)
    {
        int count = 0;
        for (int i = 0; i < _parts.Length; i++)
        {
            if (!call.Input(First(i) + 2).Exists) continue;
            a[count] = call.In(First(i) + 2);
            layers[count++] = _parts[i].Layer;
        }

        return count;
    }

    // h = drop(x) a^T of all adapters.
    private void Down(in CudaCall call, CudaMatrix x, in Tensor h)
    {
        Span<Tensor> a = [Tensor.None, Tensor.None, Tensor.None];
        Span<int> layers = [0, 0, 0];
        int count = First(call, a, layers);
        if (count == 0) return;
        if (CudaLoraProducts.Drops(call, Dropout))
        {
            new CudaLoraProducts(call, x, a[..count], layers[..count], Dropout).Down(call, x, h);
            return;
        }

        for (int n = 0; n < count; n++)
            call.Multiply(x, ((CudaMatrix)a[n]).T, h.Slice(n, 1));
    }

    // y = Scale * h bb^T of the layers with adapters, with the bias where no heads add it later; or
    // added to what is there.
    private void Up(in CudaCall call, in Tensor h, in Tensor side, in Tensor y, bool before)
    {
        for (int i = 0, n = 0; i < _parts.Length; i++)
        {
            Tensor b = side.Exists ? Tensor.None : call.Floats(First(i) + 1);
            if (b.Exists) call.FillRows(Part(y, i), b);
            if (call.Input(First(i) + 2).Exists)
                call.Multiply(h.Slice(n++, 1), ((CudaMatrix)call.In(First(i) + 3)).T,
                    Of(side, y, i), Scale, beta: before && !b.Exists ? 0 : 1);
        }
    }

    private void AdapterGradients(
        in CudaCall call, CudaMatrix x, in Tensor side, in Tensor dy, GradientTarget dx)
    {
        Tensor h = call.Saved(0);
        Span<Tensor> a = [Tensor.None, Tensor.None, Tensor.None];
        Span<int> layers = [0, 0, 0];
        Span<GradientTarget> da =
            [GradientTarget.None, GradientTarget.None, GradientTarget.None];
        int count = First(call, a, layers);
        Tensor t = call.Scratch(call.Real, count, x.Rows, h.Shape.Cols);
        bool anyA = false;
        for (int i = 0, n = 0; i < _parts.Length; i++)
        {
            int w = First(i);
            if (!call.Input(w + 2).Exists) continue;
            CudaMatrix own = Of(side, dy, i);
            call.Multiply(own.T, h.Slice(n, 1), call.AnyGradient(w + 3), Scale);
            call.Multiply(own, call.In(w + 3), t.Slice(n, 1), Scale);
            da[n++] = call.FloatGradient(w + 2);
            anyA |= da[n - 1].Wanted;
        }

        if (!anyA && !dx.Wanted) return;
        if (CudaLoraProducts.Drops(call, Dropout))
        {
            var masked = new CudaLoraProducts(call, x, a[..count], layers[..count], Dropout);
            if (anyA) masked.GradientA(call, x, t, da[..count]);
            if (dx.Wanted) masked.GradientX(call, t, dx);
            return;
        }

        for (int n = 0; n < count; n++)
        {
            CudaMatrix own = t.Slice(n, 1);
            call.Multiply(own.T, x, da[n]);
            call.Multiply(own, a[n], new GradientTarget(dx.Buffer, dx.Accumulate || n > 0));
        }
    }

    private void BiasGradients(in CudaCall call, in Tensor side, in Tensor dy)
    {
        bool any = false;
        for (int i = 0; i < _parts.Length; i++) any |= call.AnyGradient(First(i) + 1).Wanted;
        if (!any) return;
        Tensor sums = side.Exists ? call.Scratch(DType.F32, 1, dy.Shape.Cols) : Tensor.None;
        if (side.Exists) call.SumRows(side, new GradientTarget(sums, Accumulate: false));
        for (int i = 0; i < _parts.Length; i++)
        {
            GradientTarget db = call.FloatGradient(First(i) + 1);
            if (!db.Wanted) continue;
            if (side.Exists)
                call.SumParts(new Tensor(sums.Data + (nint)(Begin(i) * sizeof(float)),
                    new Spec(DType.F32, new Shape(1, _parts[i].Outputs))), db);
            else
                call.SumRows(Part(dy, i), db);
        }
    }

    // Between columns side by side and matrices behind each other, biases and rotations on the way.
    private void Heads(in CudaCall call, in Tensor y, in Tensor x, bool forward)
    {
        Tensor cos = Rotated > 0 ? call.Floats(Positions + 1) : Tensor.None;
        Tensor sin = Rotated > 0 ? call.Floats(Positions + 2) : Tensor.None;
        Tensor positions = Rotated > 0 ? call.Input(Positions) : Tensor.None;
        int rows = (int)y.Shape.Rows, cols = y.Shape.Cols;
        call.Launch("heads", Grid.Rows(rows, cols / 2, call.Real), y, x, Bias(call, 0, forward),
            Bias(call, 1, forward), Bias(call, 2, forward), positions, cos, sin, call.Faults, rows,
            Columns(0), Columns(1), Columns(2), RotatedColumns, HeadDim / 2,
            cos.Exists ? (int)cos.Shape.Rows : 0, forward ? 1.0 : -1.0);
    }

    private Tensor Bias(in CudaCall call, int part, bool forward) =>
        forward && part < _parts.Length ? call.Floats(First(part) + 1) : Tensor.None;

    private int Columns(int part) => part < _parts.Length ? _parts[part].Outputs : 0;
}
