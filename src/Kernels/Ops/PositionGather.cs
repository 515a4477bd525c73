using System.Numerics;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y[n] = x[n] + table[ids[n]]. x[rows, cols], table[positions, cols] in any float storage, ids
/// I32[rows] -> y like x; saves nothing. The learned position embedding of the vision tower.
/// </summary>
/// <exception cref="ShapeException">
/// A shape does not fit, or an id is outside the table.
/// </exception>
public sealed record PositionGather() : Op("position_gather")
{
    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec x = inputs.Float(this, 0, "x"), table = inputs.FloatMatrix(this, 1, "table");
        table.MustBe(this, "table", table.Shape[0], x.Shape.Cols);
        inputs.Int(this, 2, "ids").MustBe(this, "ids", (int)x.Shape.Rows);
        return new(x.As(activations));
    }

    public override bool Differentiates(int input) => input < 2;

    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Tensor table = call.Input(1);
        Matrix<int> ids = call.Ints(2);
        Indices.MustBeBelow(this, "ids", ids, table.Shape[0]);
        call.Workers.For(call.Output.Rows, new Rows<T>(call.In(0), table, ids, call.Output));
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        Elementwise.Scale(call.Workers, call.OutputGradient, T.One, call.Gradient(0));
        if (call.Gradient(1).Wanted)
            Indices.SumById(call, call.Ints(2), call.OutputGradient, T.One, call.Gradient(1));
    }

    public override void CudaForward(in CudaCall call) =>
        call.Lookup(1, 2, call.In(0), 1, KernelFault.PositionGatherIds);

    public override void CudaBackward(in CudaCall call)
    {
        call.Scale(call.OutputGradient, 1, call.Gradient(0));
        call.SumById(1, 2, 1, KernelFault.PositionGatherIds);
    }

    private readonly unsafe struct Rows<T>(Matrix<T> x, Tensor table, Matrix<int> ids, Matrix<T> y)
        : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int r = begin; r < end; r++)
            {
                Indices.Read(table, ids[r], y.Row(r));
                Elementwise.Map(x.Row(r), null, null, y.Row(r), y.Cols, accumulate: true,
                    new Elementwise.Scaled<T>(T.One));
            }
        }
    }
}
