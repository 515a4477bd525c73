using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y[r, c] = (x[r, c] - mean[r]) * rstd[r] * w[c] + b[c],  rstd = 1 / sqrt(variance + epsilon),
/// with the population variance. x[rows, cols], w[cols], b[cols] -> y[rows, cols]; saves
/// mean[rows], rstd[rows]. Ba, Kiros and Hinton 2016; the norms of vision tower and resampler.
/// </summary>
/// <exception cref="ShapeException">x is not float, or w or b do not have x's columns.</exception>
public sealed record LayerNorm(double Epsilon) : Op("layer_norm")
{
    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec x = inputs.Float(this, 0, "x");
        inputs.Float(this, 1, "w").MustBe(this, "w", x.Shape.Cols);
        inputs.Float(this, 2, "b").MustBe(this, "b", x.Shape.Cols);
        var statistic = new Spec(activations.Statistics(), new Shape((int)x.Shape.Rows));
        return new(x.As(activations), statistic, statistic);
    }

    public override bool Differentiates(int input) => true;

    public override void CpuForward<T>(in CpuCall<T> call) =>
        Normalisation.Forward(call.Workers, call.In(0), call.In(1), call.In(2),
            call.Output, call.Saved(0), call.Saved(1), Epsilon);

    public override void CpuBackward<T>(in CpuCall<T> call) =>
        Normalisation.Backward(call, call.OutputGradient, call.In(0), call.In(1), call.Saved(0),
            call.Saved(1), call.Gradient(0), call.Gradient(1), call.Gradient(2));

    public override void CudaForward(in CudaCall call) =>
        CudaNormalisation.Forward(call, call.Saved(0), call.Saved(1), Epsilon);

    public override void CudaBackward(in CudaCall call) =>
        CudaNormalisation.Backward(call, call.Saved(0), call.Saved(1));
}
