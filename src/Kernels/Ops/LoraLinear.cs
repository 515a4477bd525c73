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
        var (rows, output, rank) = Check(this, inputs, Weight);
        return new(new Spec(activations, new Shape(rows, output)),
            new Spec(activations, new Shape(rows, rank)));
    }

    /// <summary>x, w, b, a and bb, which are the first inputs, fit together.</summary>
    internal static (int Rows, int Outputs, int Rank) Check(
        Op op, ReadOnlySpan<Spec> inputs, Weight? weight)
    {
        Spec x = inputs.Float(op, 0, "x");
        var (output, input) = inputs.Weight(op, 1, "w", weight);
        Spec a = inputs.FloatMatrix(op, 3, "a");
        int rank = a.Shape[0];
        if (x.Shape.Cols != input) throw op.Wrong("x", $"{input} columns, the inputs of w", x);
        if (inputs[2].Exists) inputs.Float(op, 2, "b").MustBe(op, "b", output);
        a.MustBe(op, "a", rank, input);
        inputs.FloatMatrix(op, 4, "bb").MustBe(op, "bb", output, rank);
        return ((int)x.Shape.Rows, output, rank);
    }

    public override bool Differentiates(int input) =>
        input != 1 || Weight is null || Weight.Tensor.Exists;

    public override bool CanSkipOutput => true;

    public override void CpuForward<T>(in CpuCall<T> call) =>
        new CpuAdapter<T>(call, 1, Weight, Layer, Scale, Dropout)
            .Forward(call.In(0), call.HasOutput ? call.Output : default, call.Saved(0));

    public override void CpuBackward<T>(in CpuCall<T> call) =>
        new CpuAdapter<T>(call, 1, Weight, Layer, Scale, Dropout)
            .Backward(call.In(0), call.OutputGradient, call.Saved(0), call.Gradient(0));

    // Without a mask every product is cuBLAS's: h = x a^T reads x once too. With one, h reads x
    // once and draws the mask on the way, where a dropped copy of x would be written and read
    // again. The adapter's part is stored first, in y and in dx, and the frozen weight's added to
    // it: what is rounded twice is then the smaller part, and nothing while bb is 0.
    public override void CudaForward(in CudaCall call)
    {
        CudaMatrix x = call.In(0);
        Tensor a = call.In(3), y = call.Output, h = call.Saved(0), b = call.Floats(2);
        if (CudaLoraProducts.Drops(call, Dropout))
            new CudaLoraProducts(call, x, [a], [Layer], Dropout).Down(call, x, h);
        else call.Multiply(x, ((CudaMatrix)a).T, h);
        if (!y.Exists) return;
        if (b.Exists) call.FillRows(y, b);
        call.Multiply(h, ((CudaMatrix)call.In(4)).T, y, Scale, beta: b.Exists ? 1 : 0);
        call.Weight(1, Weight).Multiply(x, y, beta: 1);
    }

    public override void CudaBackward(in CudaCall call)
    {
        CudaMatrix x = call.In(0), dy = call.OutputGradient;
        Tensor h = call.Saved(0);
        call.Multiply(dy.T, x, call.AnyGradient(1));
        call.SumRows(call.OutputGradient, call.FloatGradient(2));
        call.Multiply(dy.T, h, call.AnyGradient(4), Scale);
        GradientTarget dx = call.Gradient(0), da = call.FloatGradient(3);
        if (!dx.Wanted && !da.Wanted) return;
        Tensor t = call.Scratch(call.Real, x.Rows, h.Shape.Cols);
        call.Multiply(dy, call.In(4), t, Scale);
        if (CudaLoraProducts.Drops(call, Dropout))
        {
            var masked = new CudaLoraProducts(call, x, [call.In(3)], [Layer], Dropout);
            if (da.Wanted) masked.GradientA(call, x, t, [da]);
            if (dx.Wanted) masked.GradientX(call, t, dx);
        }
        else
        {
            call.Multiply(((CudaMatrix)t).T, x, da);
            if (dx.Wanted) call.Multiply(t, call.In(3), dx);
        }

        if (dx.Wanted) call.Weight(1, Weight).MultiplyTransposed(dy, dx.Buffer, beta: 1);
    }
}
