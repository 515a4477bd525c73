using System.Numerics;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y = silu(gate) * up,  silu(g) = g / (1 + e^-g). gate[any], up like gate -> y like gate; saves
/// nothing. Shazeer 2020; the gated feed-forward of every decoder of the family.
/// </summary>
/// <exception cref="ShapeException">gate is not float, or up differs from it in shape.</exception>
public sealed record SwiGlu() : Op("swiglu")
{
    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec gate = inputs.Float(this, 0, "gate");
        inputs.Float(this, 1, "up").MustHaveShape(this, "up", gate.Shape);
        return new(gate.As(activations));
    }

    public override bool Differentiates(int input) => true;

    public override void CpuForward<T>(in CpuCall<T> call) =>
        Forward(call, call.In(0), call.In(1), call.Output);

    public override void CpuBackward<T>(in CpuCall<T> call) =>
        Backward(call, call.In(0), call.In(1), call.OutputGradient, call.Gradient(0),
            call.Gradient(1));

    public override void CudaForward(in CudaCall call) =>
        Forward(call, call.In(0), call.In(1), call.Output);

    public override void CudaBackward(in CudaCall call) =>
        Backward(call, call.In(0), call.In(1), call.OutputGradient, call.Gradient(0),
            call.Gradient(1));

    internal static void Forward<T>(
        in CpuCall<T> call, Matrix<T> gate, Matrix<T> up, Matrix<T> y)
        where T : unmanaged, IBinaryFloatingPointIeee754<T> =>
        Elementwise.Map(call.Workers, gate, up, default, y, false, default(Value<T>));

    // Two passes: sigmoid twice costs less than a loop with two results would in code.
    internal static void Backward<T>(in CpuCall<T> call, Matrix<T> gate, Matrix<T> up,
        Matrix<T> dy, Gradient<T> dGate, Gradient<T> dUp)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        if (dGate.Wanted)
            Elementwise.Map(call.Workers, gate, up, dy, dGate.Into, dGate.Accumulate,
                default(GateSlope<T>));
        if (dUp.Wanted)
            Elementwise.Map(call.Workers, gate, dy, default, dUp.Into, dUp.Accumulate,
                default(Value<T>));
    }

    internal static void Forward(in CudaCall call, in Tensor gate, in Tensor up, in Tensor y) =>
        call.Launch("swiglu_forward", Grid.Vectors(gate.Shape.Count, call.Real),
            y, gate, up, gate.Shape.Count);

    internal static void Backward(in CudaCall call, in Tensor gate, in Tensor up, in Tensor dy,
        GradientTarget dGate, GradientTarget dUp)
    {
        if (dGate.Wanted || dUp.Wanted)
            call.Launch("swiglu_backward", Grid.Vectors(gate.Shape.Count, call.Real),
                dGate.Buffer, dUp.Buffer, dy, gate, up, gate.Shape.Count, dGate.Accumulate,
                dUp.Accumulate);
    }

    private readonly struct Value<T> : IMap<T>
        where T : unmanaged
    {
        public Vector<T> At(Vector<T> gate, Vector<T> up, Vector<T> c) =>
            gate * VectorMath.Sigmoid(gate) * up;
    }

    // silu'(g) = s + g s (1 - s), s = sigmoid(g).
    private readonly struct GateSlope<T> : IMap<T>
        where T : unmanaged
    {
        public Vector<T> At(Vector<T> gate, Vector<T> up, Vector<T> dy)
        {
            Vector<T> s = VectorMath.Sigmoid(gate);
            return dy * up * (s + (gate * s * (Vector<T>.One - s)));
        }
    }
}
