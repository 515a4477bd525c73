using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y = x w^T + b + Scale * (drop(x) a^T) bb^T. x[rows, in], w[out, in] (any float storage;
/// row-major, or packed when frozen), optional b[out], a[rank, in], bb[out, rank] -> y[rows, out];
/// saves h = drop(x) a^T [rows, rank]. Scale is alpha / rank. The mask is <see cref="Philox"/>'s at
/// (seed, step, Layer, element of x), drawn again in backward; without dropout drop(x) = x.
/// Hu et al. 2021; a = lora_A, bb = lora_B of peft's lora.Linear. A Weight of another kind than
/// dense takes w's place, which is then left out.
/// </summary>
/// <exception cref="ShapeException">
/// The shapes do not fit together; w is there beside a Weight.
/// </exception>
public sealed record LoraLinear : Op
{
    /// <param name="layer">A number of its own for each adapter: the key of its mask.</param>
    /// <param name="scale">alpha / rank.</param>
    /// <param name="dropout">Probability of a zero, in [0, 1).</param>
    /// <param name="weight">What stands for w where it is not dense.</param>
    public LoraLinear(int layer, double scale, double dropout, Weight? weight = null)
        : base("lora_linear")
    {
        _ = Philox.Threshold(dropout);
        (Layer, Scale, Dropout, Weight) = (layer, scale, dropout, weight);
    }

    public int Layer { get; }

    public double Scale { get; }

    public double Dropout { get; }

    public Weight? Weight { get; }

    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec x = inputs.Float(this, 0, "x");
        var (output, input) = inputs.Weight(this, 1, "w", Weight);
        Spec a = inputs.FloatMatrix(this, 3, "a");
        int rows = (int)x.Shape.Rows, rank = a.Shape[0];
        if (x.Shape.Cols != input) throw this.Wrong("x", $"{input} columns, the inputs of w", x);
        if (inputs[2].Exists) inputs.Float(this, 2, "b").MustBe(this, "b", output);
        a.MustBe(this, "a", rank, input);
        inputs.FloatMatrix(this, 4, "bb").MustBe(this, "bb", output, rank);
        return new(new Spec(activations, new Shape(rows, output)),
            new Spec(activations, new Shape(rows, rank)));
    }

    public override bool Differentiates(int input) =>
        input != 1 || Weight is null || Weight.Tensor.Exists;

    public override void CpuForward<T>(in CpuCall<T> call) =>
        new CpuAdapter<T>(call, 1, Weight, Layer, Scale, Dropout)
            .Forward(call.In(0), call.Output, call.Saved(0));

    public override void CpuBackward<T>(in CpuCall<T> call) =>
        new CpuAdapter<T>(call, 1, Weight, Layer, Scale, Dropout)
            .Backward(call.In(0), call.OutputGradient, call.Saved(0), call.Gradient(0));

    public override void CudaForward(in CudaCall call) =>
        new CudaAdapter(call, 1, Weight, Layer, Scale, Dropout)
            .Forward(call.In(0), call.Output, call.Saved(0));

    public override void CudaBackward(in CudaCall call) =>
        new CudaAdapter(call, 1, Weight, Layer, Scale, Dropout)
            .Backward(call.In(0), call.OutputGradient, call.Saved(0), call.Gradient(0));
}
