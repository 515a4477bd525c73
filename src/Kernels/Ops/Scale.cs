using System.Numerics;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>y = Factor * x. x[any] -> y like x; saves nothing.</summary>
/// <exception cref="ShapeException">x is not float.</exception>
public sealed record Scale(double Factor) : Op("scale")
{
    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations) =>
        new(inputs.Float(this, 0, "x").As(activations));

    public override bool Differentiates(int input) => true;

    public override void CpuForward<T>(in CpuCall<T> call) => Elementwise.Scale(
        call.Workers, call.In(0), Real.Of<T>(Factor), new Gradient<T>(call.Output, false));

    public override void CpuBackward<T>(in CpuCall<T> call) => Elementwise.Scale(
        call.Workers, call.OutputGradient, Real.Of<T>(Factor), call.Gradient(0));

    public override void CudaForward(in CudaCall call) =>
        Into(call, call.In(0), new GradientTarget(call.Output, false));

    public override void CudaBackward(in CudaCall call) =>
        Into(call, call.OutputGradient, call.Gradient(0));

    private void Into(in CudaCall call, in Tensor x, GradientTarget y)
    {
        if (y.Wanted)
            call.Launch("scale_rows", Grid.Vectors(x.Shape.Count, call.Real),
                y.Buffer, x, Factor, x.Shape.Count, y.Accumulate);
    }
}
