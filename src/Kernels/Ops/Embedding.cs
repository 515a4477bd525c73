using System.Numerics;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y[t] = table[ids[t]] * Scale. table[vocab, cols] in any float storage (only the rows read are
/// widened), ids I32[tokens] -> y[tokens, cols]; saves nothing. dtable is dense.
/// Scale is 1 but in MiniCPM decoders (scale_emb).
/// </summary>
/// <exception cref="ShapeException">table is no float matrix, or an id is outside it.</exception>
public sealed record Embedding(double Scale = 1) : Op("embedding")
{
    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec table = inputs.FloatMatrix(this, 0, "table");
        Spec ids = inputs.Int(this, 1, "ids");
        ids.MustBe(this, "ids", (int)ids.Shape.Count);
        return new(new Spec(activations, new Shape((int)ids.Shape.Count, table.Shape.Cols)));
    }

    public override bool Differentiates(int input) => input == 0;

    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Tensor table = call.Input(0);
        Matrix<int> ids = call.Ints(1);
        Indices.MustBeBelow(this, "ids", ids, table.Shape[0]);
        call.Workers.For(
            call.Output.Rows, new Rows<T>(table, ids, call.Output, Real.Of<T>(Scale)));
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        if (call.Gradient(0).Wanted)
            Indices.SumById(call, call.Ints(1), call.OutputGradient, Real.Of<T>(Scale),
                call.Gradient(0));
    }

    public override void CudaForward(in CudaCall call) =>
        call.Lookup(0, 1, Tensor.None, Scale, KernelFault.EmbeddingIds);

    public override void CudaBackward(in CudaCall call) =>
        call.SumById(0, 1, Scale, KernelFault.EmbeddingIds);

    private readonly unsafe struct Rows<T>(Tensor table, Matrix<int> ids, Matrix<T> y, T scale)
        : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int r = begin; r < end; r++)
            {
                T* row = y.Row(r);
                Indices.Read(table, ids[r], row);
                if (scale != T.One)
                    Elementwise.Map(row, null, null, row, y.Cols, false,
                        new Elementwise.Scaled<T>(scale));
            }
        }
    }
}
