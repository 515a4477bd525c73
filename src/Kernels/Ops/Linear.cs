using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y = x w^T + b. x[rows, in], w[out, in] (any float storage; row-major, or packed when frozen),
/// optional b[out] -> y[rows, out]; saves nothing. Transposed: w[in, out], y = x w + b (the
/// resampler's proj). A patch embedding is this on w[out, 3, p, p] seen as [out, 3 p p].
/// </summary>
/// <exception cref="ShapeException">
/// x has other columns than w's inputs, or b than its outputs.
/// </exception>
public sealed unsafe record Linear(bool Transposed = false) : Op("linear")
{
    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec x = inputs.Float(this, 0, "x"), w = inputs.Weight(this, 1, "w");
        var (output, input) = Transposed ? (w.Shape[1], w.Shape[0]) : (w.Shape[0], w.Shape[1]);
        if (x.Shape.Cols != input)
            throw this.Wrong("x", $"{input} columns, the inputs of w {w}", x);
        if (inputs.Length > 2 && inputs[2].Exists)
            inputs.Float(this, 2, "b").MustBe(this, "b", output);
        return new(new Spec(activations, new Shape((int)x.Shape.Rows, output)));
    }

    public override bool Differentiates(int input) => true;

    public override void CpuForward<T>(in CpuCall<T> call)
    {
        MatrixView x = call.In(0).View, w = call.Weight(1);
        call.Gemm.Multiply(x, Transposed ? w : w.T, call.Output.View, bias: call.In(2).Data);
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        MatrixView x = call.In(0).View, w = call.Weight(1), dy = call.OutputGradient.View;
        Gradient<T> dx = call.Gradient(0), dw = call.Gradient(1);
        call.Multiply(dy, Transposed ? w.T : w, dx);
        if (Transposed) call.Multiply(x.T, dy, dw);
        else call.Multiply(dy.T, x, dw);
        Sum.Rows(call, call.OutputGradient, call.Gradient(2));
    }

    public override void CudaForward(in CudaCall call)
    {
        CudaMatrix x = call.In(0), w = call.In(1);
        Tensor y = call.Output, b = call.Floats(2);
        if (b.Exists) call.FillRows(y, b);
        call.Multiply(x, Transposed ? w : w.T, y, beta: b.Exists ? 1 : 0);
    }

    public override void CudaBackward(in CudaCall call)
    {
        CudaMatrix x = call.In(0), w = call.In(1), dy = call.OutputGradient;
        call.Multiply(dy, Transposed ? w.T : w, call.AnyGradient(0));
        if (Transposed) call.Multiply(x.T, dy, call.AnyGradient(1));
        else call.Multiply(dy.T, x, call.AnyGradient(1));
        call.SumRows(call.OutputGradient, call.FloatGradient(2));
    }
}
