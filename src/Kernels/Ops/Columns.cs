using System.Numerics;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y[r, c] = x[r, Begin + c], c below Count. x[rows, cols] -> y[rows, Count]; saves nothing. dx is
/// zero in the other columns. Takes apart what one projection makes: the fused qkv of timm.
/// </summary>
/// <exception cref="ShapeException">x is not float, or has too few columns.</exception>
public sealed record Columns(int Begin, int Count) : Op("columns")
{
    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec x = inputs.Float(this, 0, "x");
        if (Begin < 0 || Count < 0 || Begin > x.Shape.Cols - Count)
            throw this.Wrong("x", $"columns {Begin} to {(long)Begin + Count - 1}", x);
        return new(new Spec(activations, new Shape(checked((int)x.Shape.Rows), Count)));
    }

    public override bool Differentiates(int input) => true;

    public override void CpuForward<T>(in CpuCall<T> call) =>
        call.Workers.For(call.Output.Rows, new ForwardRows<T>(call.In(0), Begin, call.Output));

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        if (call.Gradient(0) is { Wanted: true } dx)
            call.Workers.For(dx.Into.Rows, new BackwardRows<T>(call.OutputGradient, Begin, dx));
    }

    public override void CudaForward(in CudaCall call)
    {
        Tensor x = call.In(0);
        call.Launch("columns_forward", Grid.Rows((int)x.Shape.Rows),
            call.Output, x, x.Shape.Cols, Begin, Count);
    }

    public override void CudaBackward(in CudaCall call)
    {
        if (call.Gradient(0) is { Wanted: true } dx)
            call.Launch("columns_backward", Grid.Rows((int)dx.Buffer.Shape.Rows), dx.Buffer,
                call.OutputGradient, dx.Buffer.Shape.Cols, Begin, Count, dx.Accumulate);
    }

    private readonly struct ForwardRows<T>(Matrix<T> x, int first, Matrix<T> y) : IRangeBody
        where T : unmanaged
    {
        public void Run(int begin, int end, int worker)
        {
            for (int r = begin; r < end; r++)
                x.RowSpan(r).Slice(first, y.Cols).CopyTo(y.RowSpan(r));
        }
    }

    private readonly unsafe struct BackwardRows<T>(Matrix<T> dy, int first, Gradient<T> dx)
        : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int r = begin; r < end; r++)
            {
                if (!dx.Accumulate) dx.Into.RowSpan(r).Clear();
                Elementwise.Map(dy.Row(r), null, null, dx.Into.Row(r) + first, dy.Cols,
                    dx.Accumulate, new Elementwise.Scaled<T>(T.One));
            }
        }
    }
}
