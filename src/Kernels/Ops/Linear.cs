using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y = x w^T + b. x[rows, in], w[out, in] (any float storage; row-major, or packed when frozen),
/// optional b[out] -> y[rows, out]; saves nothing. Transposed: w[in, out], y = x w + b (the
/// resampler's proj). A patch embedding is this on w[out, 3, p, p] seen as [out, 3 p p].
/// A Weight of another kind than dense takes w's place, which is then left out.
/// </summary>
/// <exception cref="ShapeException">
/// x has other columns than w's inputs, or b than its outputs; w is there beside a Weight.
/// </exception>
public sealed record Linear(bool Transposed = false, Weight? Weight = null) : Op("linear")
{
    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec x = inputs.Float(this, 0, "x");
        var (output, input) = inputs.Weight(this, 1, "w", Weight);
        if (Transposed) (output, input) = (input, output);
        if (x.Shape.Cols != input) throw this.Wrong("x", $"{input} columns, the inputs of w", x);
        if (inputs.Length > 2 && inputs[2].Exists)
            inputs.Float(this, 2, "b").MustBe(this, "b", output);
        return new(new Spec(activations, new Shape((int)x.Shape.Rows, output)));
    }

    public override bool Differentiates(int input) =>
        input != 1 || Weight is null || Weight.Tensor.Exists;

    public override bool BackwardReads(int input, ReadOnlySpan<bool> trained) =>
        input != 0 || trained[1];

    public override void CpuForward<T>(in CpuCall<T> call)
    {
        CpuWeight<T> w = call.Weight(1, Weight);
        if (Transposed) w.MultiplyTransposed(call.In(0), call.Output, bias: call.In(2));
        else w.Multiply(call.In(0), call.Output, bias: call.In(2));
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        Matrix<T> x = call.In(0), dy = call.OutputGradient;
        CpuWeight<T> w = call.Weight(1, Weight);
        if (Transposed) w.Multiply(dy, call.Gradient(0));
        else w.MultiplyTransposed(dy, call.Gradient(0));
        if (Transposed) call.Multiply(x.View.T, dy.View, call.Gradient(1));
        else call.Multiply(dy.View.T, x.View, call.Gradient(1));
        Sum.Rows(call, dy, call.Gradient(2));
    }

    public override void CudaForward(in CudaCall call)
    {
        Tensor y = call.Output, b = call.Floats(2);
        CudaWeight w = call.Weight(1, Weight);
        if (b.Exists) call.FillRows(y, b);
        if (Transposed) w.MultiplyTransposed(call.In(0), y, beta: b.Exists ? 1 : 0);
        else w.Multiply(call.In(0), y, beta: b.Exists ? 1 : 0);
    }

    public override void CudaBackward(in CudaCall call)
    {
        CudaMatrix x = call.In(0), dy = call.OutputGradient;
        CudaWeight w = call.Weight(1, Weight);
        if (Transposed) w.Multiply(dy, call.AnyGradient(0));
        else w.MultiplyTransposed(dy, call.AnyGradient(0));
        if (Transposed) call.Multiply(x.T, dy, call.AnyGradient(1));
        else call.Multiply(dy.T, x, call.AnyGradient(1));
        call.SumRows(call.OutputGradient, call.FloatGradient(2));
    }
}
