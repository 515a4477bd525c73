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
        Elementwise.Map(
            call.Workers, call.In(0), call.In(1), default, call.Output, false, default(Value<T>));

    // Two passes: sigmoid twice costs less than a loop with two results would in code.
    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        Matrix<T> gate = call.In(0), up = call.In(1), dy = call.OutputGradient;
        Gradient<T> dGate = call.Gradient(0), dUp = call.Gradient(1);
        if (dGate.Wanted)
            Elementwise.Map(call.Workers, gate, up, dy, dGate.Into, dGate.Accumulate,
                default(GateSlope<T>));
        if (dUp.Wanted)
            Elementwise.Map(call.Workers, gate, dy, default, dUp.Into, dUp.Accumulate,
                default(Value<T>));
    }

    public override void CudaForward(in CudaCall call)
    {
        Tensor gate = call.In(0);
        call.Launch("swiglu_forward", Grid.Vectors(gate.Shape.Count, call.Real),
            call.Output, gate, call.In(1), gate.Shape.Count);
    }

    public override void CudaBackward(in CudaCall call)
    {
        GradientTarget dGate = call.Gradient(0), dUp = call.Gradient(1);
        Tensor gate = call.In(0);
        if (dGate.Wanted || dUp.Wanted)
            call.Launch("swiglu_backward", Grid.Vectors(gate.Shape.Count, call.Real),
                dGate.Buffer, dUp.Buffer, call.OutputGradient, gate, call.In(1), gate.Shape.Count,
                dGate.Accumulate, dUp.Accumulate);
    }

    internal readonly struct Value<T> : IMap<T>
        where T : unmanaged
    {
        public Vector<T> At(Vector<T> gate, Vector<T> up, Vector<T> c) =>
            gate * VectorMath.Sigmoid(gate) * up;
    }

    // silu'(g) = s + g s (1 - s), s = sigmoid(g).
    internal readonly struct GateSlope<T> : IMap<T>
        where T : unmanaged
    {
        public Vector<T> At(Vector<T> gate, Vector<T> up, Vector<T> dy)
        {
            Vector<T> s = VectorMath.Sigmoid(gate);
            return dy * up * (s + (gate * s * (Vector<T>.One - s)));
        }
    }
}
