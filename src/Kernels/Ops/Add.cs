using System.Numerics;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y = a + Scale * b. a[any], b like a -> y like a; saves nothing. The residual sum; Scale is 1 but
/// in decoders with scaled residuals (MiniCPM: scale_depth / sqrt(layers)).
/// </summary>
/// <exception cref="ShapeException">a is not float, or b differs from it in shape.</exception>
public sealed record Add(double Scale = 1) : Op("add")
{
    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec a = inputs.Float(this, 0, "a");
        inputs.Float(this, 1, "b").MustHaveShape(this, "b", a.Shape);
        return new(a.As(activations));
    }

    public override bool Differentiates(int input) => true;

    public override bool BackwardReads(int input, ReadOnlySpan<bool> trained) => false;

    public override bool PassesGradient(int input) => input == 0 || Scale == 1;

    public override void CpuForward<T>(in CpuCall<T> call) =>
        Elementwise.Map(call.Workers, call.In(0), call.In(1), default, call.Output, false,
            new Scaled<T>(Real.Of<T>(Scale)));

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        Elementwise.Scale(call.Workers, call.OutputGradient, T.One, call.Gradient(0));
        Elementwise.Scale(
            call.Workers, call.OutputGradient, Real.Of<T>(Scale), call.Gradient(1));
    }

    public override void CudaForward(in CudaCall call)
    {
        Tensor y = call.Output;
        call.Launch("add_forward", Grid.Vectors(y.Shape.Count, call.Real),
            y, call.In(0), call.In(1), Scale, y.Shape.Count);
    }

    public override void CudaBackward(in CudaCall call)
    {
        call.Scale(call.OutputGradient, 1, call.Gradient(0));
        call.Scale(call.OutputGradient, Scale, call.Gradient(1));
    }

    private readonly struct Scaled<T>(T scale) : IMap<T>
        where T : unmanaged
    {
        public Vector<T> At(Vector<T> a, Vector<T> b, Vector<T> c) => a + (b * scale);
    }
}
