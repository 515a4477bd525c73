using System.Numerics;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// Rotates the halves [a, b] of every head by its token's angles: [a cos - b sin, b cos + a sin].
/// x[tokens, heads * HeadDim], positions I32[tokens], cos[positions, HeadDim/2], sin alike -> y
/// like x; saves nothing. With Turned set only the first Turned columns of a head are rotated, by
/// tables of half as many columns. Base, frequency factors and attention factor come in through the
/// tables, and so do positions of several rows: a table that has a row per token.
/// Rotary position embedding, Su et al. 2021, in the "rotate half" pairing of Hugging Face.
/// </summary>
/// <exception cref="ShapeException">
/// A shape does not fit, or a position is outside the tables.
/// </exception>
public sealed record Rope(int HeadDim, int? Turned = null) : Op("rope")
{
    private int Width => Turned ?? HeadDim;

    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec x = inputs.Float(this, 0, "x");
        if (HeadDim < 2 || HeadDim % 2 != 0 || x.Shape.Cols % HeadDim != 0)
            throw this.Wrong("x", $"heads of {HeadDim} columns, an even number", x);
        if (Width < 2 || Width % 2 != 0 || Width > HeadDim)
            throw new ShapeException(
                $"{Name}: {Width} columns of a head are rotated, expected 2 to {HeadDim}, even");
        CheckTables(this, inputs, 1, Width, (int)x.Shape.Rows);
        return new(x.As(activations));
    }

    /// <summary>Positions, cos and sin of an operation, its inputs from `first` on.</summary>
    internal static void CheckTables(
        Op op, ReadOnlySpan<Spec> inputs, int first, int headDim, int rows)
    {
        inputs.Int(op, first, "positions").MustBe(op, "positions", rows);
        Spec cos = inputs.Float(op, first + 1, "cos");
        cos.MustBe(op, "cos", (int)cos.Shape.Rows, headDim / 2);
        inputs.Float(op, first + 2, "sin").MustHaveShape(op, "sin", cos.Shape);
    }

    public override bool Differentiates(int input) => input == 0;

    public override bool BackwardReads(int input, ReadOnlySpan<bool> trained) => input != 0;

    public override void CpuForward<T>(in CpuCall<T> call) =>
        Rotate(call, call.In(0), new Gradient<T>(call.Output, accumulate: false), T.One);

    // The inverse rotation.
    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        if (call.Gradient(0).Wanted)
            Rotate(call, call.OutputGradient, call.Gradient(0), T.NegativeOne);
    }

    public override void CudaForward(in CudaCall call) =>
        Rotate(call, call.In(0), new GradientTarget(call.Output, Accumulate: false), 1);

    public override void CudaBackward(in CudaCall call)
    {
        if (call.Gradient(0) is { Wanted: true } dx) Rotate(call, call.OutputGradient, dx, -1);
    }

    private void Rotate(in CudaCall call, in Tensor x, GradientTarget y, double direction)
    {
        Tensor cos = call.Floats(2);
        call.Launch("rope", Grid.Rows((int)x.Shape.Rows, x.Shape.Cols / 2, call.Real),
            y.Buffer, x, call.Input(1), cos, call.Floats(3), call.Faults, x.Shape.Cols, HeadDim,
            Width / 2, (int)cos.Shape.Rows, direction, y.Accumulate);
    }

    private void Rotate<T>(in CpuCall<T> call, Matrix<T> x, Gradient<T> y, T direction)
        where T : unmanaged, IBinaryFloatingPointIeee754<T> =>
        Rotate(this, call, 1, HeadDim, x, y, direction, Turned);

    /// <summary>
    /// y = x rotated, or adds it; y may be x. The operation's inputs from `first` on are positions,
    /// cos and sin; direction -1 rotates back.
    /// </summary>
    internal static void Rotate<T>(Op op, in CpuCall<T> call, int first, int headDim, Matrix<T> x,
        Gradient<T> y, T direction, int? turned = null)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        Matrix<T> cos = call.In(first + 1), sin = call.In(first + 2);
        Matrix<int> positions = call.Ints(first);
        Indices.MustBeBelow(op, "positions", positions, cos.Rows);
        call.Workers.For(x.Rows,
            new Rows<T>(x, positions, cos, sin, y, headDim, turned ?? headDim, direction));
    }

    private readonly unsafe struct Rows<T>(
        Matrix<T> x, Matrix<int> positions, Matrix<T> cos, Matrix<T> sin, Gradient<T> y,
        int headDim, int turned, T direction) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            int half = turned / 2;
            for (int r = begin; r < end; r++)
            {
                T* c = cos.Row(positions[r]), s = sin.Row(positions[r]);
                for (int head = 0; head < x.Cols; head += headDim)
                {
                    T* a = x.Row(r) + head, into = y.Into.Row(r) + head;
                    Turn(a, c, s, into, half);
                    if (turned < headDim)
                        Elementwise.Map(a + turned, null, null, into + turned, headDim - turned,
                            y.Accumulate, new Elementwise.Scaled<T>(T.One));
                }
            }
        }

        private void Turn(T* a, T* c, T* s, T* into, int half)
        {
            T* b = a + half, second = into + half;
            int k = 0;
            for (; k <= half - Vector<T>.Count; k += Vector<T>.Count)
            {
                Vector<T> va = Vector.Load(a + k), vb = Vector.Load(b + k);
                Vector<T> vc = Vector.Load(c + k), vs = Vector.Load(s + k) * direction;
                Vector<T> low = (va * vc) - (vb * vs), high = (vb * vc) + (va * vs);
                if (y.Accumulate)
                {
                    low += Vector.Load(into + k);
                    high += Vector.Load(second + k);
                }

                Vector.Store(low, into + k);
                Vector.Store(high, second + k);
            }

            for (; k < half; k++)
            {
                T turn = s[k] * direction;
                T low = (a[k] * c[k]) - (b[k] * turn), high = (b[k] * c[k]) + (a[k] * turn);
                into[k] = y.Accumulate ? into[k] + low : low;
                second[k] = y.Accumulate ? second[k] + high : high;
            }
        }
    }
}
