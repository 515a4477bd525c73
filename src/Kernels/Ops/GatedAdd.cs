using System.Numerics;
using System.Numerics.Tensors;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y[r, c] = x[r, c] + up[r, c] * sigmoid(gate[r]). x[rows, cols], up like x, gate[rows, 1] -> y
/// like x; saves nothing. The expert that every token goes to, beside those of its choice.
/// </summary>
/// <exception cref="ShapeException">A shape does not fit.</exception>
public sealed record GatedAdd() : Op("gated_add")
{
    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec x = inputs.FloatMatrix(this, 0, "x");
        inputs.Float(this, 1, "up").MustHaveShape(this, "up", x.Shape);
        inputs.Float(this, 2, "gate").MustBe(this, "gate", x.Shape[0], 1);
        return new(x.As(activations));
    }

    public override bool Differentiates(int input) => true;

    public override bool PassesGradient(int input) => input == 0;

    public override bool BackwardReads(int input, ReadOnlySpan<bool> trained) =>
        input == 2 || (input == 1 && trained[2]);

    public override void CpuForward<T>(in CpuCall<T> call) =>
        call.Workers.For(call.Output.Rows,
            new ForwardRows<T>(call.In(0), call.In(1), call.In(2), call.Output));

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        Matrix<T> dy = call.OutputGradient;
        Elementwise.Scale(call.Workers, dy, T.One, call.Gradient(0));
        Gradient<T> dUp = call.Gradient(1), dGate = call.Gradient(2);
        Matrix<T> up = dGate.Wanted ? call.In(1) : default;
        call.Workers.For(dy.Rows, new BackwardRows<T>(up, call.In(2), dy, dUp, dGate));
    }

    public override void CudaForward(in CudaCall call)
    {
        Tensor y = call.Output;
        call.Launch("gated_add", Grid.Rows(y.Shape[0], y.Shape.Cols, call.Real), y, call.In(0),
            call.In(1), call.In(2), y.Shape.Cols);
    }

    public override void CudaBackward(in CudaCall call)
    {
        Tensor dy = call.OutputGradient;
        call.Scale(dy, 1, call.Gradient(0));
        GradientTarget dUp = call.Gradient(1), dGate = call.Gradient(2);
        if (dUp.Wanted || dGate.Wanted)
            call.Launch("gated_add_backward", Grid.Rows(dy.Shape[0], dy.Shape.Cols, call.Real),
                dUp.Buffer, dGate.Buffer, dy, dGate.Wanted ? call.In(1) : Tensor.None, call.In(2),
                dy.Shape.Cols, dUp.Accumulate, dGate.Accumulate);
    }

    private readonly unsafe struct ForwardRows<T>(
        Matrix<T> x, Matrix<T> up, Matrix<T> gate, Matrix<T> y) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            // An infinite gate is a run that went wrong, and is seen.
            for (int r = begin; r < end; r++)
                TensorPrimitives.MultiplyAdd(
                    up.RowSpan(r), VectorMath.Sigmoid(gate[r]) + (T.Zero * gate[r]),
                    x.RowSpan(r), y.RowSpan(r));
        }
    }

    private readonly unsafe struct BackwardRows<T>(Matrix<T> up, Matrix<T> gate, Matrix<T> dy,
        Gradient<T> dUp, Gradient<T> dGate) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int r = begin; r < end; r++)
            {
                T s = VectorMath.Sigmoid(gate[r]);
                if (dUp.Wanted)
                    Elementwise.Map(dy.Row(r), null, null, dUp.Into.Row(r), dy.Cols,
                        dUp.Accumulate, new Elementwise.Scaled<T>(s));
                if (dGate.Wanted)
                    dGate.Put(r, s * (T.One - s)
                        * TensorPrimitives.Dot<T>(dy.RowSpan(r), up.RowSpan(r)));
            }
        }
    }
}
