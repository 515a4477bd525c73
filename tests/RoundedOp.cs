using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Tests;

/// <summary>
/// An operation whose path on the CPU rounds to a storage type what a GPU stores on the way.
/// </summary>
internal abstract record RoundedOp(Op Whole, DType To) : Op(Whole.Name)
{
    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations) =>
        Whole.Infer(inputs, activations);

    public override bool Differentiates(int input) => Whole.Differentiates(input);

    public override void CudaForward(in CudaCall call) => Whole.CudaForward(call);

    public override void CudaBackward(in CudaCall call) => Whole.CudaBackward(call);

    // A product that is added to what is there.
    protected double[] Added(double[] product) => CudaUnderTest.IsReal ? Rounded(product) : product;

    protected double[] Rounded(double[] values) => Storage.Round(values, To);
}
