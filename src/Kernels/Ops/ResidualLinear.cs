using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y = residual + Factor * L(f(x)), L a linear layer, as <see cref="LoraLinear"/> where a and bb are
/// given, else as <see cref="Linear"/>: what ends each half of a decoder layer. Inputs x, w[out, in],
/// optional b[out], optional a[rank, in] and bb[out, rank], residual[rows, out]. f(x) = x[rows, in]; or
/// Gated, with x[rows, 2 in] in memory gate[rows, in] and up[rows, in] one behind the other as
/// <see cref="Linears"/> makes them, f(x) = silu(gate) * up, the only result that is not kept:
/// backward computes it again where a gradient of w or a needs it. Saves h[rows, rank].
/// </summary>
/// <exception cref="ShapeException">The shapes do not fit together.</exception>
public sealed record ResidualLinear : Op
{
    private const int W = 1, Residual = 5;

    /// <param name="factor">Scales what is added.</param>
    /// <param name="gated">Whether x is gate and up.</param>
    /// <param name="layer">The key of the adapter's mask.</param>
    /// <param name="scale">alpha / rank.</param>
    /// <param name="dropout">Probability of a zero, in [0, 1).</param>
    /// <param name="weight">What stands for w where it is not dense.</param>
    public ResidualLinear(double factor = 1, bool gated = false, int layer = 0, double scale = 1,
        double dropout = 0, Weight? weight = null)
        : base("residual_linear")
    {
        _ = Philox.Threshold(dropout);
        (Factor, Gated, Layer, Scale, Dropout, Weight) =
            (factor, gated, layer, scale, dropout, weight);
    }

    public double Factor { get; }

    public bool Gated { get; }

    public int Layer { get; }

    public double Scale { get; }

    public double Dropout { get; }

    public Weight? Weight { get; }

    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec x = inputs.Float(this, 0, "x");
        var (output, input) = inputs.Weight(this, W, "w", Weight);
        int rows = (int)x.Shape.Rows, rank = 0;
        if (x.Shape.Cols != (Gated ? 2 * input : input))
            throw this.Wrong("x", $"{(Gated ? "twice " : "")}the {input} inputs of w as columns", x);
        if (inputs[W + 1].Exists) inputs.Float(this, W + 1, "b").MustBe(this, "b", output);
        if (inputs[W + 2].Exists || inputs[W + 3].Exists)
        {
            Spec a = inputs.FloatMatrix(this, W + 2, "a");
            a.MustBe(this, "a", rank = a.Shape[0], input);
            inputs.FloatMatrix(this, W + 3, "bb").MustBe(this, "bb", output, rank);
        }

        inputs.Float(this, Residual, "residual").MustBe(this, "residual", rows, output);
        return new(new Spec(activations, new Shape(rows, output)),
            rank > 0 ? new Spec(activations, new Shape(rows, rank)) : default);
    }

    public override bool Differentiates(int input) => input != W || Weight is null;

    public override bool PassesGradient(int input) => input == Residual;

    public override bool CanSkipOutput => true;

    // Gate and up are read for their own gradients too.
    public override bool BackwardReads(int input, ReadOnlySpan<bool> trained) => input switch
    {
        0 => Gated || trained[W] || trained[W + 2],
        Residual => false,
        _ => true,
    };

    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Matrix<T> x = call.In(0), y = call.HasOutput ? call.Output : default;
        Layers(call).Forward(
            Gated ? Gate(call, x) : x, y, call.Input(W + 2).Exists ? call.Saved(0) : default);
        if (y.Exists) Add.Forward(call, call.In(Residual), y, Factor, y);
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        Matrix<T> x = call.In(0), dy = call.OutputGradient;
        Elementwise.Scale(call.Workers, dy, T.One, call.Gradient(Residual));
        if (Factor != 1)
        {
            Matrix<T> scaled = call.Scratch(new Shape(dy.Rows, dy.Cols));
            Elementwise.Scale(call.Workers, dy, Real.Of<T>(Factor), new Gradient<T>(scaled, false));
            dy = scaled;
        }

        CpuAdapter<T> layer = Layers(call);
        Matrix<T> h = call.Input(W + 2).Exists ? call.Saved(0) : default;
        Gradient<T> dx = call.Gradient(0);
        if (!Gated)
        {
            layer.Backward(x, dy, h, dx);
            return;
        }

        Gradient<T> inner = dx.Wanted
            ? new Gradient<T>(call.Scratch(new Shape(x.Rows, x.Cols / 2)), false)
            : default;
        layer.Backward(layer.ReadsX ? Gate(call, x) : default, dy, h, inner);
        if (dx.Wanted)
            SwiGlu.Backward(call, Half(x, 0), Half(x, 1), inner.Into,
                new Gradient<T>(Half(dx.Into, 0), dx.Accumulate),
                new Gradient<T>(Half(dx.Into, 1), dx.Accumulate));
    }

    public override void CudaForward(in CudaCall call)
    {
        Tensor x = call.In(0), y = call.Output;
        Layers(call).Forward(
            Gated ? Gate(call, x) : x, y, call.Input(W + 2).Exists ? call.Saved(0) : Tensor.None);
        if (y.Exists) Add.Forward(call, call.In(Residual), y, Factor, y);
    }

    public override void CudaBackward(in CudaCall call)
    {
        Tensor x = call.In(0), dy = call.OutputGradient;
        call.Scale(dy, 1, call.Gradient(Residual));
        if (Factor != 1)
        {
            Tensor scaled = call.Scratch(call.Real, (int)dy.Shape.Rows, dy.Shape.Cols);
            call.Scale(dy, Factor, new GradientTarget(scaled, Accumulate: false));
            dy = scaled;
        }

        CudaAdapter layer = Layers(call);
        Tensor h = call.Input(W + 2).Exists ? call.Saved(0) : Tensor.None;
        GradientTarget dx = call.Gradient(0);
        if (!Gated)
        {
            layer.Backward(x, dy, h, dx);
            return;
        }

        int rows = (int)x.Shape.Rows, cols = x.Shape.Cols / 2;
        GradientTarget inner = dx.Wanted
            ? new(call.Scratch(call.Real, rows, cols), Accumulate: false)
            : GradientTarget.None;
        // Where nothing reads f(x), only its sizes count.
        layer.Backward(layer.ReadsX ? Gate(call, x) : Half(x, 0), dy, h, inner);
        if (dx.Wanted)
            SwiGlu.Backward(call, Half(x, 0), Half(x, 1), inner.Buffer,
                dx with { Buffer = Half(dx.Buffer, 0) }, dx with { Buffer = Half(dx.Buffer, 1) });
    }

    private static Tensor Half(in Tensor x, int index)
    {
        var spec = new Spec(x.Type, new Shape((int)x.Shape.Rows, x.Shape.Cols / 2));
        return new(x.Data + (nint)(index * spec.Bytes), spec);
    }

    private static unsafe Matrix<T> Half<T>(Matrix<T> x, int index)
        where T : unmanaged => new(x.Data + (index * (x.Count / 2)), x.Rows, x.Cols / 2);

    private static Matrix<T> Gate<T>(in CpuCall<T> call, Matrix<T> x)
        where T : unmanaged, System.Numerics.IBinaryFloatingPointIeee754<T>
    {
        Matrix<T> y = call.Scratch(new Shape(x.Rows, x.Cols / 2));
        SwiGlu.Forward(call, Half(x, 0), Half(x, 1), y);
        return y;
    }

    private static Tensor Gate(in CudaCall call, in Tensor x)
    {
        Tensor y = call.Scratch(call.Real, (int)x.Shape.Rows, x.Shape.Cols / 2);
        SwiGlu.Forward(call, Half(x, 0), Half(x, 1), y);
        return y;
    }

    private CpuAdapter<T> Layers<T>(in CpuCall<T> call)
        where T : unmanaged, System.Numerics.IBinaryFloatingPointIeee754<T> =>
        new(call, W, Weight, Layer, Scale, Dropout);

    private CudaAdapter Layers(in CudaCall call) =>
        new(call, W, Weight, Layer, Scale, Dropout);
}
