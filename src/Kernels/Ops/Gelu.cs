using System.Numerics;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>Which of the two functions in use under the name GELU.</summary>
public enum GeluKind
{
    /// <summary>Its tanh approximation, "gelu_pytorch_tanh": SigLIP.</summary>
    Tanh,

    /// <summary>Exact, through the error function, "gelu".</summary>
    Erf,
}

/// <summary>
/// Gaussian error linear unit, Hendrycks and Gimpel 2016. Erf: y = x * Phi(x) with the normal
/// distribution Phi; Tanh: y = 0.5 x (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3), computed as
/// x * sigmoid(2u), the same function. x[any] -> y like x; saves nothing.
/// </summary>
/// <exception cref="ShapeException">x is not float.</exception>
public sealed record Gelu(GeluKind Kind) : Op("gelu")
{
    private const double Slope = 2 * 0.79788456080286535588, Cubic = 0.044715;

    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations) =>
        new(inputs.Float(this, 0, "x").As(activations));

    public override bool Differentiates(int input) => true;

    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Matrix<T> x = call.In(0), none = default;
        if (Kind == GeluKind.Tanh)
            Elementwise.Map(call.Workers, x, none, none, call.Output, false, default(TanhValue<T>));
        else
            Elementwise.Map(call.Workers, x, none, none, call.Output, false, default(ErfValue<T>));
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        Matrix<T> x = call.In(0), dy = call.OutputGradient;
        Gradient<T> dx = call.Gradient(0);
        if (!dx.Wanted) return;
        if (Kind == GeluKind.Tanh)
            Elementwise.Map(call.Workers, x, dy, default, dx.Into, dx.Accumulate,
                default(TanhSlope<T>));
        else
            Elementwise.Map(call.Workers, x, dy, default, dx.Into, dx.Accumulate,
                default(ErfSlope<T>));
    }

    public override void CudaForward(in CudaCall call)
    {
        Tensor x = call.In(0);
        call.Launch("gelu_forward", Grid.Vectors(x.Shape.Count, call.Real),
            call.Output, x, Kind == GeluKind.Erf, x.Shape.Count);
    }

    public override void CudaBackward(in CudaCall call)
    {
        GradientTarget dx = call.Gradient(0);
        Tensor x = call.In(0);
        if (dx.Wanted)
            call.Launch("gelu_backward", Grid.Vectors(x.Shape.Count, call.Real), dx.Buffer,
                call.OutputGradient, x, Kind == GeluKind.Erf, x.Shape.Count, dx.Accumulate);
    }

    private readonly struct TanhValue<T> : IMap<T>
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public Vector<T> At(Vector<T> x, Vector<T> b, Vector<T> c) => x * Gate(x);

        public static Vector<T> Gate(Vector<T> x)
        {
            Vector<T> bend = (x * x * Real.Of<T>(Cubic)) + Vector<T>.One;
            return VectorMath.Sigmoid(x * bend * Real.Of<T>(Slope));
        }
    }

    // y' = s + x s (1 - s) (2u)' with s = sigmoid(2u).
    private readonly struct TanhSlope<T> : IMap<T>
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public Vector<T> At(Vector<T> x, Vector<T> dy, Vector<T> c)
        {
            Vector<T> s = TanhValue<T>.Gate(x);
            Vector<T> slope = (x * x * Real.Of<T>(3 * Cubic * Slope))
                + Vector.Create(Real.Of<T>(Slope));
            return dy * (s + (x * s * (Vector<T>.One - s) * slope));
        }
    }

    private readonly struct ErfValue<T> : IMap<T>
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public Vector<T> At(Vector<T> x, Vector<T> b, Vector<T> c) =>
            x * VectorMath.NormalCdf(x, out _);
    }

    private readonly struct ErfSlope<T> : IMap<T>
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public Vector<T> At(Vector<T> x, Vector<T> dy, Vector<T> c) =>
            dy * (VectorMath.NormalCdf(x, out Vector<T> density) + (x * density));
    }
}
