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

    public override void CudaForward(in CudaCall call) => throw new NotImplementedException();

    public override void CudaBackward(in CudaCall call) => throw new NotImplementedException();

    private readonly struct Gated<T> : IMap<T>
        where T : unmanaged
    {
        public Vector<T> At(Vector<T> a, Vector<T> gate, Vector<T> c) =>
            a * (gate * VectorMath.Sigmoid(gate));
    }
}
