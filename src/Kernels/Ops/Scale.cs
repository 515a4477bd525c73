using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y = Factor * x. x[any] -> y like x; saves nothing. MiniCPM decoders scale their embeddings and
/// the rows that logits are made of.
/// </summary>
/// <exception cref="ShapeException">x is not float.</exception>
public sealed record Scale(double Factor) : Op("scale")
{
    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations) =>
        new(inputs.Float(this, 0, "x").As(activations));

    public override bool Differentiates(int input) => true;

    public override bool BackwardReads(int input, ReadOnlySpan<bool> trained) => false;

    public override void CpuForward<T>(in CpuCall<T> call) => Elementwise.Scale(
        call.Workers, call.In(0), Real.Of<T>(Factor), new Gradient<T>(call.Output, false));

    public override void CpuBackward<T>(in CpuCall<T> call) => Elementwise.Scale(
        call.Workers, call.OutputGradient, Real.Of<T>(Factor), call.Gradient(0));

    public override void CudaForward(in CudaCall call) =>
        call.Scale(call.In(0), Factor, new GradientTarget(call.Output, Accumulate: false));

    public override void CudaBackward(in CudaCall call) =>
        call.Scale(call.OutputGradient, Factor, call.Gradient(0));
}
