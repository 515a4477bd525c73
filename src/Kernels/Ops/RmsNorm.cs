using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y[r, c] = x[r, c] * rstd[r] * w[c],  rstd[r] = 1 / sqrt(mean_c(x[r, c]^2) + epsilon); with
/// 1 + w[c] in the place of w[c] where weights are centred at zero.
/// x[rows, cols], w[cols] -> y[rows, cols]; saves rstd[rows].
/// Root mean square layer normalisation, Zhang and Sennrich 2019;
/// the decoder norms of the whole family.
/// </summary>
/// <exception cref="ShapeException">x is not float, or w does not have x's columns.</exception>
public sealed record RmsNorm(double Epsilon, bool ZeroCentred = false) : Op("rms_norm")
{
    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec x = inputs.Float(this, 0, "x");
        inputs.Float(this, 1, "w").MustBe(this, "w", x.Shape.Cols);
        return new(x.As(activations),
            new Spec(activations.Statistics(), new Shape((int)x.Shape.Rows)));
    }

    public override bool Differentiates(int input) => true;

    public override void CpuForward<T>(in CpuCall<T> call) =>
        Normalisation.Forward(
            call.Workers, call.In(0), Weights(call), default, call.Output, default, call.Saved(0),
            Epsilon);

    public override void CpuBackward<T>(in CpuCall<T> call) =>
        Normalisation.Backward(call, call.OutputGradient, call.In(0), Weights(call), default,
            call.Saved(0), call.Gradient(0), call.Gradient(1), default);

    public override void CudaForward(in CudaCall call) =>
        CudaNormalisation.Forward(
            call, Tensor.None, call.Saved(0), Epsilon, ZeroCentred ? 1 : 0);

    public override void CudaBackward(in CudaCall call) =>
        CudaNormalisation.Backward(
            call, Tensor.None, call.Saved(0), ZeroCentred ? 1 : 0);

    private Matrix<T> Weights<T>(in CpuCall<T> call)
        where T : unmanaged, System.Numerics.IBinaryFloatingPointIeee754<T>
    {
        Matrix<T> w = call.In(1);
        if (!ZeroCentred) return w;
        Matrix<T> moved = call.Scratch(new Shape(w.Cols));
        for (int c = 0; c < w.Cols; c++) moved[c] = T.One + w[c];
        return moved;
    }
}
