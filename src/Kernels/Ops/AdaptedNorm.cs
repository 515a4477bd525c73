using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// n[j] = ||w_j + Scale * bb_j a||, the norms of the rows of an adapted weight, which DoRA divides
/// by: w[out, in] (or a Weight in its place), a[rank, in], bb[out, rank], squares[out] = ||w_j||^2
/// -> n[out] (F32). The sum is never made: n^2 = squares + bb (2 Scale a w^T + Scale^2 bb a a^T),
/// which costs the weight's product with rank rows. Nothing is differentiated: Liu et al. 2024 hold
/// the norm constant in backward, section 4.3, as PEFT does.
/// </summary>
/// <exception cref="ShapeException">The shapes do not fit together.</exception>
public sealed unsafe record AdaptedNorm(double Scale, Weight? Weight = null) : Op("adapted_norm")
{
    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        var (output, input) = inputs.Weight(this, 0, "w", Weight);
        Spec a = inputs.FloatMatrix(this, 1, "a");
        a.MustBe(this, "a", a.Shape[0], input);
        inputs.FloatMatrix(this, 2, "bb").MustBe(this, "bb", output, a.Shape[0]);
        inputs.Float(this, 3, "squares").MustBe(this, "squares", output);
        return new(new Spec(activations.Statistics(), new Shape(output)));
    }

    public override bool Differentiates(int input) => false;

    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Matrix<T> a = call.In(1), bb = call.In(2), squares = call.In(3), n = call.Output;
        int rank = a.Rows, outputs = bb.Rows;
        Matrix<T> p = call.Scratch(new Shape(rank, outputs));
        Matrix<T> q = call.Scratch(new Shape(rank, rank));
        Matrix<T> z = call.Scratch(new Shape(outputs, rank));
        call.Weight(0, Weight).Multiply(a, p);
        call.Gemm.Multiply(a.View, a.View.T, q.View);
        call.Gemm.Multiply(bb.View, q.View, z.View);
        T once = Real.Of<T>(2 * Scale), twice = Real.Of<T>(Scale * Scale);
        for (int j = 0; j < outputs; j++)
        {
            T sum = squares[j];
            for (int k = 0; k < rank; k++)
            {
                int at = (j * rank) + k;
                sum += bb[at] * ((once * p[(k * outputs) + j]) + (twice * z[at]));
            }

            n[j] = T.Sqrt(T.Max(sum, T.Zero));
        }
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
    }

    // All but w in F32: the norm divides everything.
    public override void CudaForward(in CudaCall call)
    {
        Tensor a = call.Floats(1), bb = call.Floats(2);
        int rank = a.Shape[0], outputs = bb.Shape[0];
        Tensor p = call.Scratch(DType.F32, rank, outputs);
        Tensor q = call.Scratch(DType.F32, rank, rank), z = call.Scratch(DType.F32, outputs, rank);
        call.Weight(0, Weight).Multiply(call.In(1), p);
        call.Multiply(a, ((CudaMatrix)a).T, q);
        call.Multiply(bb, q, z);
        call.Launch("adapted_norm", Grid.Elements(outputs), call.Output, call.Floats(3), bb, p, z,
            outputs, rank, Scale);
    }

    public override void CudaBackward(in CudaCall call)
    {
    }
}
