using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y_e = w_e + Scale * bb_e a_e of each of Count frozen matrices: w[Count * out, in], a[Count *
/// rank, in], bb[Count * out, rank] -> y like w; saves nothing. The experts' matrices with low-rank
/// adapters, which are made whole before they are multiplied by, as PEFT does it
/// (target_parameters): as large as the matrices, and so are their gradients.
/// </summary>
/// <exception cref="ShapeException">The shapes do not fit together.</exception>
public sealed unsafe record AdaptedMatrices(int Count, double Scale) : Op("adapted_matrices")
{
    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec w = inputs.FloatMatrix(this, 0, "w"), a = inputs.FloatMatrix(this, 1, "a");
        if (w.Shape[0] % Count != 0) throw this.Wrong("w", $"rows of {Count} matrices", w);
        if (a.Shape[0] % Count != 0) throw this.Wrong("a", $"rows of {Count} matrices", a);
        a.MustBe(this, "a", a.Shape[0], w.Shape.Cols);
        inputs.FloatMatrix(this, 2, "bb").MustBe(this, "bb", w.Shape[0], a.Shape[0] / Count);
        return new(w.As(activations));
    }

    public override bool Differentiates(int input) => input > 0;

    public override bool BackwardReads(int input, ReadOnlySpan<bool> trained) =>
        (input == 1 && trained[2]) || (input == 2 && trained[1]);

    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Matrix<T> w = call.In(0), a = call.In(1), bb = call.In(2), y = call.Output;
        Elementwise.Scale(call.Workers, w, T.One, new Gradient<T>(y, false));
        int rank = a.Rows / Count, rows = w.Rows / Count;
        for (int e = 0; e < Count; e++)
            call.Gemm.Multiply(bb.Slice(e * rows, rows).View, a.Slice(e * rank, rank).View,
                y.Slice(e * rows, rows).View, Scale, beta: 1);
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        Matrix<T> dy = call.OutputGradient, a = call.In(1), bb = call.In(2);
        Gradient<T> da = call.Gradient(1), db = call.Gradient(2);
        int rank = call.Input(1).Shape[0] / Count, rows = dy.Rows / Count;
        for (int e = 0; e < Count; e++)
        {
            Matrix<T> own = dy.Slice(e * rows, rows);
            if (da.Wanted)
                call.Multiply(bb.Slice(e * rows, rows).View.T, own.View,
                    new(da.Into.Slice(e * rank, rank), da.Accumulate), Scale);
            if (db.Wanted)
                call.Multiply(own.View, a.Slice(e * rank, rank).View.T,
                    new(db.Into.Slice(e * rows, rows), db.Accumulate), Scale);
        }
    }

    public override void CudaForward(in CudaCall call)
    {
        Tensor a = call.In(1), bb = call.In(2), y = call.Output;
        call.Scale(call.In(0), 1, new GradientTarget(y, Accumulate: false));
        int rank = a.Shape[0] / Count, rows = y.Shape[0] / Count;
        for (int e = 0; e < Count; e++)
            call.Multiply(bb.Slice(e * rows, rows), a.Slice(e * rank, rank),
                (CudaMatrix)y.Slice(e * rows, rows), Scale, beta: 1);
    }

    public override void CudaBackward(in CudaCall call)
    {
        Tensor dy = call.OutputGradient, a = call.In(1), bb = call.In(2);
        GradientTarget da = call.AnyGradient(1), db = call.AnyGradient(2);
        int rank = call.Input(1).Shape[0] / Count, rows = dy.Shape[0] / Count;
        for (int e = 0; e < Count; e++)
        {
            CudaMatrix own = dy.Slice(e * rows, rows);
            if (da.Wanted)
                call.Multiply(((CudaMatrix)bb.Slice(e * rows, rows)).T, own,
                    new GradientTarget(da.Buffer.Slice(e * rank, rank), da.Accumulate), Scale);
            if (db.Wanted)
                call.Multiply(own, ((CudaMatrix)a.Slice(e * rank, rank)).T,
                    new GradientTarget(db.Buffer.Slice(e * rows, rows), db.Accumulate), Scale);
        }
    }
}
