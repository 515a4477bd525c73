using System.Numerics;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y = x with row positions[i] replaced by features[i]: image features into their slots in the
/// text. x[tokens, cols], features[slots, cols], positions I32[used], used at most slots (surplus
/// feature rows are ignored, as the official scatter does) -> y like x;
/// saves nothing. dx is zero in replaced rows.
/// </summary>
/// <exception cref="ShapeException">
/// A shape does not fit, or a position is outside x or stands twice.
/// </exception>
public sealed record Splice() : Op("splice")
{
    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec x = inputs.Float(this, 0, "x"), features = inputs.Float(this, 1, "features");
        features.MustBe(this, "features", (int)features.Shape.Rows, x.Shape.Cols);
        Spec positions = inputs.Int(this, 2, "positions");
        positions.MustBe(this, "positions", (int)positions.Shape.Count);
        if (positions.Shape.Count > features.Shape.Rows)
            throw this.Wrong("positions", $"at most the {features.Shape.Rows} rows of features",
                positions);
        return new(x.As(activations));
    }

    public override bool Differentiates(int input) => input < 2;

    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Matrix<T> x = call.In(0);
        Matrix<int> from = call.ScratchInts(x.Rows);
        Indices.Invert(this, "positions", call.Ints(2), from);
        call.Workers.For(x.Rows, new ForwardRows<T>(x, call.In(1), from, call.Output));
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        Matrix<T> dy = call.OutputGradient;
        Gradient<T> dx = call.Gradient(0), dFeatures = call.Gradient(1);
        Matrix<int> positions = call.Ints(2), from = call.ScratchInts(dy.Rows);
        Indices.Invert(this, "positions", positions, from);
        if (dx.Wanted) call.Workers.For(dy.Rows, new TextRows<T>(dy, from, dx));
        if (dFeatures.Wanted)
            call.Workers.For(dFeatures.Into.Rows, new FeatureRows<T>(dy, positions, dFeatures));
    }

    public override void CudaForward(in CudaCall call)
    {
        Tensor x = call.In(0);
        call.Launch("splice_forward", Grid.Rows((int)x.Shape.Rows),
            call.Output, x, call.In(1), CudaInvert(call), x.Shape.Cols);
    }

    public override void CudaBackward(in CudaCall call)
    {
        Tensor dy = call.OutputGradient, positions = call.Input(2), from = CudaInvert(call);
        int tokens = (int)dy.Shape.Rows, cols = dy.Shape.Cols;
        GradientTarget dx = call.Gradient(0), dFeatures = call.Gradient(1);
        if (dx.Wanted)
            call.Launch("splice_text_backward", Grid.Rows(tokens),
                dx.Buffer, dy, from, cols, dx.Accumulate);
        if (dFeatures.Wanted)
            call.Launch("gather_rows", Grid.Rows((int)dFeatures.Buffer.Shape.Rows),
                dFeatures.Buffer, dy,
                positions, (int)positions.Shape.Count, tokens, cols, dFeatures.Accumulate);
    }

    // For each token, 1 + the row of features that replaces it, or 0.
    private static Tensor CudaInvert(in CudaCall call)
    {
        Tensor positions = call.Input(2);
        int tokens = (int)call.Input(0).Shape.Rows, used = (int)positions.Shape.Count;
        Tensor from = call.Scratch(DType.I32, tokens);
        call.Clear(from);
        call.Launch("splice_invert", Grid.Elements(used), from, positions, used, tokens,
            call.Faults);
        return from;
    }

    private readonly struct ForwardRows<T>(
        Matrix<T> x, Matrix<T> features, Matrix<int> from, Matrix<T> y) : IRangeBody
        where T : unmanaged
    {
        public void Run(int begin, int end, int worker)
        {
            for (int r = begin; r < end; r++)
                (from[r] < 0 ? x.RowSpan(r) : features.RowSpan(from[r])).CopyTo(y.RowSpan(r));
        }
    }

    private readonly struct TextRows<T>(Matrix<T> dy, Matrix<int> from, Gradient<T> dx) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int r = begin; r < end; r++)
                dx.PutRow(r, from[r] < 0 ? dy : default, r);
        }
    }

    private readonly struct FeatureRows<T>(
        Matrix<T> dy, Matrix<int> positions, Gradient<T> dFeatures) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int i = begin; i < end; i++)
                dFeatures.PutRow(i, i < positions.Count ? dy : default,
                    i < positions.Count ? positions[i] : 0);
        }
    }
}
