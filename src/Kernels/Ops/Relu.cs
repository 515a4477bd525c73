using System.Numerics;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y = max(x, 0); dx = dy where x > 0, else 0. x[any] -> y like x; saves nothing. Between the two
/// layers that bring sound to the decoder's width.
/// </summary>
/// <exception cref="ShapeException">x is not float.</exception>
public sealed record Relu() : Op("relu")
{
    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations) =>
        new(inputs.Float(this, 0, "x").As(activations));

    public override bool Differentiates(int input) => true;

    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Matrix<T> x = call.In(0);
        Elementwise.Map(
            call.Workers, x, x, default, call.Output, false, default(WherePositive<T>));
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        if (call.Gradient(0) is { Wanted: true } dx)
            Elementwise.Map(call.Workers, call.In(0), call.OutputGradient, default, dx.Into,
                dx.Accumulate, default(WherePositive<T>));
    }

    public override void CudaForward(in CudaCall call)
    {
        Tensor x = call.In(0);
        call.Launch("relu", Grid.Vectors(x.Shape.Count, call.Real),
            call.Output, x, Tensor.None, x.Shape.Count, false);
    }

    public override void CudaBackward(in CudaCall call)
    {
        Tensor x = call.In(0);
        if (call.Gradient(0) is { Wanted: true } dx)
            call.Launch("relu", Grid.Vectors(x.Shape.Count, call.Real), dx.Buffer, x,
                call.OutputGradient, x.Shape.Count, dx.Accumulate);
    }

    // What is no number stays none.
    private readonly struct WherePositive<T> : IMap<T>
        where T : unmanaged
    {
        public Vector<T> At(Vector<T> x, Vector<T> v, Vector<T> c) =>
            Vector.ConditionalSelect(
                Vector.LessThanOrEqual(x, Vector<T>.Zero), Vector<T>.Zero, v);
    }
}
