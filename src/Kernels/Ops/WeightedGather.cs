using System.Numerics;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y[n] = x[n] + sum of weights[k] table[ids[k]] over k = starts[n] .. starts[n + 1] - 1.
/// x[rows, cols], table[positions, cols] in any float storage, starts I32[rows + 1] rising from 0
/// to the number of ids, ids I32[terms], weights[terms] -> y like x; saves nothing. A sparse matrix
/// by rows times a table: position embeddings resampled (bicubic: 16 terms or more for a patch) to
/// the grid of each picture. Gradients of x and table; their sums have one order.
/// </summary>
/// <exception cref="ShapeException">
/// A shape does not fit, starts do not rise so, or an id is outside the table.
/// </exception>
public sealed record WeightedGather() : Op("weighted_gather")
{
    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec x = inputs.Float(this, 0, "x"), table = inputs.FloatMatrix(this, 1, "table");
        table.MustBe(this, "table", table.Shape[0], x.Shape.Cols);
        inputs.Int(this, 2, "starts").MustBe(this, "starts", checked((int)x.Shape.Rows + 1));
        Spec ids = inputs.Int(this, 3, "ids");
        ids.MustBe(this, "ids", (int)ids.Shape.Count);
        inputs.Float(this, 4, "weights").MustBe(this, "weights", (int)ids.Shape.Count);
        return new(x.As(activations));
    }

    public override bool Differentiates(int input) => input < 2;

    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Matrix<T> table = call.In(1);
        Matrix<int> starts = call.Ints(2), ids = call.Ints(3);
        Check(starts, (int)ids.Count);
        Indices.MustBeBelow(this, "ids", ids, table.Rows);
        call.Workers.For(call.Output.Rows,
            new Rows<T>(call.In(0), table, starts, ids, call.In(4), call.Output));
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        Matrix<T> dy = call.OutputGradient;
        Elementwise.Scale(call.Workers, dy, T.One, call.Gradient(0));
        if (!call.Gradient(1).Wanted) return;
        Matrix<int> starts = call.Ints(2), ids = call.Ints(3);
        Matrix<int> rowOf = call.ScratchInts((int)ids.Count);
        for (int row = 0; row < dy.Rows; row++)
            for (int k = starts[row]; k < starts[row + 1]; k++) rowOf[k] = row;
        Indices.SumById(call, ids, dy, T.One, call.Gradient(1), rowOf, call.In(4));
    }

    public override void CudaForward(in CudaCall call)
    {
        Tensor x = call.In(0), table = call.Input(1), ids = call.Input(3);
        int rows = (int)x.Shape.Rows;
        call.Launch("weighted_gather", Grid.Rows(rows), call.Output, x, table, (int)table.Type,
            call.Input(2), ids, call.Floats(4), rows, (int)ids.Shape.Count, table.Shape[0],
            x.Shape.Cols, call.Faults);
    }

    public override void CudaBackward(in CudaCall call)
    {
        call.Scale(call.OutputGradient, 1, call.Gradient(0));
        if (!call.AnyGradient(1).Wanted) return;
        int rows = (int)call.OutputGradient.Shape.Rows, terms = (int)call.Input(3).Shape.Count;
        Tensor rowOf = call.Scratch(DType.I32, terms);
        if (rows > 0)
            call.Launch("row_of_term", Grid.Elements(terms), rowOf, call.Input(2), rows, terms,
                call.Faults);
        call.SumById(1, 3, 1, KernelFault.WeightedGatherIds, rowOf, call.Floats(4));
    }

    private void Check(Matrix<int> starts, int terms)
    {
        int last = (int)starts.Count - 1;
        for (int i = 0; i <= last; i++)
        {
            int lowest = i == last ? terms : i == 0 ? 0 : starts[i - 1];
            if (starts[i] < lowest || starts[i] > (i == 0 ? 0 : terms))
                throw new ShapeException($"{Name}: starts[{i}] is {starts[i]}, expected to rise "
                    + $"from 0 to {terms}, the ids");
        }
    }

    private readonly unsafe struct Rows<T>(Matrix<T> x, Matrix<T> table, Matrix<int> starts,
        Matrix<int> ids, Matrix<T> weights, Matrix<T> y) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int r = begin; r < end; r++)
            {
                x.RowSpan(r).CopyTo(y.RowSpan(r));
                for (int k = starts[r]; k < starts[r + 1]; k++)
                    Elementwise.Map(table.Row(ids[k]), null, null, y.Row(r), y.Cols, true,
                        new Elementwise.Scaled<T>(weights[k]));
            }
        }
    }
}
