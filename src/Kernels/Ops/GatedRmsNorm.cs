using System.Numerics;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y[r, c] = x[r, c] * rstd[r] * w[c] * silu(gate[r, c]),  rstd as <see cref="RmsNorm"/> has it.
/// x[rows, cols], w[cols], gate like x -> y like x; saves rstd[rows]. Rows are the heads of a
/// linear attention, whose output is normalised before it is gated.
/// </summary>
/// <exception cref="ShapeException">x is not float, or w or gate do not fit it.</exception>
public sealed record GatedRmsNorm(double Epsilon) : Op("gated_rms_norm")
{
    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec x = inputs.Float(this, 0, "x");
        inputs.Float(this, 1, "w").MustBe(this, "w", x.Shape.Cols);
        inputs.Float(this, 2, "gate").MustHaveShape(this, "gate", x.Shape);
        return new(x.As(activations),
            new Spec(activations.Statistics(), new Shape((int)x.Shape.Rows)));
    }

    public override bool Differentiates(int input) => true;

    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Normalisation.Forward(call.Workers, call.In(0), call.In(1), default, call.Output, default,
            call.Saved(0), Epsilon);
        Elementwise.Map(call.Workers, call.Output, call.In(2), default, call.Output, false,
            default(Gated<T>));
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        Matrix<T> x = call.In(0), w = call.In(1), gate = call.In(2), dy = call.OutputGradient;
        Gradient<T> dx = call.Gradient(0), dw = call.Gradient(1), dGate = call.Gradient(2);
        Matrix<T> between = call.Scratch(new Shape(x.Rows, x.Cols));
        if (dGate.Wanted)
        {
            // What is gated, without the gate; then dy of it times the gate's slope.
            Matrix<T> rstd = call.Scratch(new Shape(x.Rows));
            Normalisation.Forward(
                call.Workers, x, w, default, between, default, rstd, Epsilon);
            Elementwise.Map(call.Workers, gate, between, dy, dGate.Into, dGate.Accumulate,
                default(SwiGlu.GateSlope<T>));
        }

        if (!dx.Wanted && !dw.Wanted) return;
        Elementwise.Map(call.Workers, dy, gate, default, between, false, default(Gated<T>));
        Normalisation.Backward(call, between, x, w, default, call.Saved(0), dx, dw, default);
    }

    public override void CudaForward(in CudaCall call)
    {
        Tensor x = call.In(0);
        int rows = (int)x.Shape.Rows;
        call.Launch("gated_norm_forward", Warps(rows), call.Output, call.Saved(0), x,
            call.Floats(1), call.In(2), rows, x.Shape.Cols, Epsilon);
    }

    public override void CudaBackward(in CudaCall call)
    {
        const int PartRows = 256, Columns = 32;
        GradientTarget dx = call.Gradient(0), dw = call.FloatGradient(1), dGate = call.Gradient(2);
        Tensor x = call.In(0), gate = call.In(2), dy = call.OutputGradient;
        int rows = (int)x.Shape.Rows, cols = x.Shape.Cols;
        if (dx.Wanted || dGate.Wanted)
            call.Launch("gated_norm_backward", Warps(rows), dx.Buffer, dGate.Buffer, dy, x,
                call.Floats(1), gate, call.Saved(0), rows, cols, dx.Accumulate, dGate.Accumulate);
        if (!dw.Wanted) return;
        int blocks = (cols + Columns - 1) / Columns;
        var (parts, each) = call.Split(rows, blocks, perMultiprocessor: 8, PartRows, multiple: 8);
        Tensor part = call.Scratch(DType.F32, parts, cols);
        call.Launch("gated_norm_weight_parts", Grid.Blocks256(blocks, parts), part, dy, x, gate,
            call.Saved(0), rows, cols, each);
        call.SumParts(part, dw);
    }

    // A warp per row.
    private static Grid Warps(int rows) => Grid.Blocks256((rows + 7) / 8);

    private readonly struct Gated<T> : IMap<T>
        where T : unmanaged
    {
        public Vector<T> At(Vector<T> a, Vector<T> gate, Vector<T> c) =>
            a * (gate * VectorMath.Sigmoid(gate));
    }
}
