using System.Numerics;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y = x * sigmoid(gate) per head, gate being the second half of what a projection made for it:
/// y[t, h, c] = x[t, h, c] * sigmoid(queries[t, h, HeadDim + c]). x[tokens, heads * HeadDim],
/// queries[tokens, heads * 2 HeadDim], of each head a query and a gate -> y like x; saves nothing.
/// The query half has no gradient from here. Attention's output gate.
/// </summary>
/// <exception cref="ShapeException">x is not heads, or queries are not twice as wide.</exception>
public sealed record SigmoidGate(int HeadDim) : Op("sigmoid_gate")
{
    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec x = inputs.FloatMatrix(this, 0, "x");
        if (HeadDim < 1 || x.Shape.Cols % HeadDim != 0)
            throw this.Wrong("x", $"heads of {HeadDim} columns", x);
        inputs.Float(this, 1, "queries").MustBe(this, "queries", x.Shape[0], 2 * x.Shape.Cols);
        return new(x.As(activations));
    }

    public override bool Differentiates(int input) => true;

    public override bool BackwardReads(int input, ReadOnlySpan<bool> trained) =>
        input != 0 || trained[1];

    public override void CpuForward<T>(in CpuCall<T> call) =>
        call.Workers.For(call.Output.Rows, new ForwardRows<T>(
            call.In(0), call.In(1), new Gradient<T>(call.Output, accumulate: false), HeadDim));

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        Matrix<T> queries = call.In(1), dy = call.OutputGradient;
        if (call.Gradient(0) is { Wanted: true } dx)
            call.Workers.For(dy.Rows, new ForwardRows<T>(dy, queries, dx, HeadDim));
        if (call.Gradient(1) is { Wanted: true } dQueries)
            call.Workers.For(dy.Rows,
                new GateRows<T>(call.In(0), queries, dy, dQueries, HeadDim));
    }

    public override void CudaForward(in CudaCall call) =>
        Gate(call, call.In(0), new GradientTarget(call.Output, Accumulate: false));

    public override void CudaBackward(in CudaCall call)
    {
        Tensor dy = call.OutputGradient;
        long count = dy.Shape.Count;
        if (call.Gradient(0) is { Wanted: true } dx) Gate(call, dy, dx);
        if (call.Gradient(1) is { Wanted: true } dQueries)
            call.Launch("sigmoid_gate_backward", Grid.Vectors(count, call.Real), dQueries.Buffer,
                dy, call.In(0), call.In(1), HeadDim, count, dQueries.Accumulate);
    }

    private void Gate(in CudaCall call, in Tensor x, GradientTarget y) =>
        call.Launch("sigmoid_gate", Grid.Vectors(x.Shape.Count, call.Real), y.Buffer, x,
            call.In(1), HeadDim, x.Shape.Count, y.Accumulate);

    private readonly unsafe struct ForwardRows<T>(
        Matrix<T> x, Matrix<T> queries, Gradient<T> y, int dim) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int r = begin; r < end; r++)
                for (int c = 0; c < x.Cols; c += dim)
                    Elementwise.Map(x.Row(r) + c, queries.Row(r) + (2 * c) + dim, null,
                        y.Into.Row(r) + c, dim, y.Accumulate, default(Gated<T>));
        }
    }

    private readonly unsafe struct GateRows<T>(
        Matrix<T> x, Matrix<T> queries, Matrix<T> dy, Gradient<T> dQueries, int dim) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int r = begin; r < end; r++)
                for (int c = 0; c < x.Cols; c += dim)
                {
                    T* into = dQueries.Into.Row(r) + (2 * c);
                    if (!dQueries.Accumulate) new Span<T>(into, dim).Clear();
                    Elementwise.Map(x.Row(r) + c, queries.Row(r) + (2 * c) + dim, dy.Row(r) + c,
                        into + dim, dim, dQueries.Accumulate, default(Slope<T>));
                }
        }
    }

    // An infinite gate is a run that went wrong, and is seen: 0 * infinity is not a number.
    private readonly struct Gated<T> : IMap<T>
        where T : unmanaged
    {
        public Vector<T> At(Vector<T> x, Vector<T> gate, Vector<T> c) =>
            x * (VectorMath.Sigmoid(gate) + (Vector<T>.Zero * gate));
    }

    private readonly struct Slope<T> : IMap<T>
        where T : unmanaged
    {
        public Vector<T> At(Vector<T> x, Vector<T> gate, Vector<T> dy)
        {
            Vector<T> s = VectorMath.Sigmoid(gate);
            return dy * x * (s * (Vector<T>.One - s));
        }
    }
}
