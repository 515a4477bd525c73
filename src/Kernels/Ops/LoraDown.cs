using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// h = drop(x) a^T, the first half of <see cref="LoraLinear"/> alone, where the second is a part of
/// something else: the output head's product is a part of the loss. x[rows, in], a[rank, in] ->
/// h[rows, rank]; saves nothing. The mask is LoraLinear's.
/// </summary>
/// <exception cref="ShapeException">The shapes do not fit together.</exception>
public sealed unsafe record LoraDown : Op
{
    /// <param name="layer">A number of its own for each adapter: the key of its mask.</param>
    /// <param name="dropout">Probability of a zero, in [0, 1).</param>
    public LoraDown(int layer, double dropout)
        : base("lora_down")
    {
        _ = Philox.Threshold(dropout);
        (Layer, Dropout) = (layer, dropout);
    }

    public int Layer { get; }

    public double Dropout { get; }

    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec x = inputs.Float(this, 0, "x"), a = inputs.FloatMatrix(this, 1, "a");
        a.MustBe(this, "a", a.Shape[0], x.Shape.Cols);
        return new(new Spec(activations, new Shape((int)x.Shape.Rows, a.Shape[0])));
    }

    public override bool Differentiates(int input) => true;

    public override void CpuForward<T>(in CpuCall<T> call) =>
        Adapter(call).Down(call.In(0), call.Output);

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        Gradient<T> dx = call.Gradient(0);
        if (dx is { Wanted: true, Accumulate: false })
            new Span<T>(dx.Into.Data, checked((int)dx.Into.Count)).Clear();
        Adapter(call).BackDown(call.In(0), call.OutputGradient, dx);
    }

    public override void CudaForward(in CudaCall call)
    {
        CudaMatrix x = call.In(0);
        Tensor a = call.In(1);
        if (CudaLoraProducts.Drops(call, Dropout))
            new CudaLoraProducts(call, x, [a], [Layer], Dropout).Down(call, x, call.Output);
        else call.Multiply(x, ((CudaMatrix)a).T, call.Output);
    }

    public override void CudaBackward(in CudaCall call)
    {
        CudaMatrix x = call.In(0), t = call.OutputGradient;
        GradientTarget dx = call.Gradient(0), da = call.FloatGradient(1);
        if (!dx.Wanted && !da.Wanted) return;
        if (CudaLoraProducts.Drops(call, Dropout))
        {
            var masked = new CudaLoraProducts(call, x, [call.In(1)], [Layer], Dropout);
            if (da.Wanted) masked.GradientA(call, x, call.OutputGradient, [da]);
            if (dx.Wanted) masked.GradientX(call, call.OutputGradient, dx);
            return;
        }

        call.Multiply(t.T, x, da);
        call.Multiply(t, call.In(1), dx);
    }

    private CpuAdapter<T> Adapter<T>(in CpuCall<T> call)
        where T : unmanaged, System.Numerics.IBinaryFloatingPointIeee754<T> =>
        new(call, -1, null, Layer, 1, Dropout);
}
