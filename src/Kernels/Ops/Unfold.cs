using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y[s, t, 3 c + j] = x[s, Stride t + j - 1, c],  j = 0 .. 2, zero outside the clip: the inputs of
/// a convolution over time of three frames and padding 1, so that it is a linear layer whose weight
/// is Conv1d's [outputs, channels, 3] as it is stored. x[clips, frames * Channels] ->
/// y[clips * frames', 3 * Channels], frames' = (frames - 1) / Stride + 1; saves nothing.
/// </summary>
/// <exception cref="ShapeException">x is not float, or no frames of Channels.</exception>
public sealed record Unfold(int Channels, int Stride) : Op("unfold")
{
    /// <summary>Frames of a window.</summary>
    public const int Taps = 3;

    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec x = inputs.FloatMatrix(this, 0, "x");
        if (x.Shape.Cols == 0 || x.Shape.Cols % Channels != 0)
            throw this.Wrong("x", $"frames of {Channels} columns, at least one", x);
        return new(new Spec(activations, new Shape(
            checked(x.Shape[0] * OutFrames(x.Shape.Cols / Channels)), checked(Taps * Channels))));
    }

    public override bool Differentiates(int input) => true;

    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Matrix<T> x = call.In(0);
        call.Workers.For(call.Output.Rows, new ForwardRows<T>(x, ClipOf(x.Cols), call.Output));
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        if (call.Gradient(0) is not { Wanted: true } dx) return;
        Clip size = ClipOf(dx.Into.Cols);
        call.Workers.For(checked(dx.Into.Rows * size.Frames),
            new BackwardRows<T>(call.OutputGradient, size, dx));
    }

    public override void CudaForward(in CudaCall call)
    {
        Tensor x = call.In(0);
        Clip size = ClipOf(x.Shape.Cols);
        call.Launch("unfold_forward", Grid.Rows((int)call.Output.Shape.Rows), call.Output, x,
            size.Frames, size.OutFrames, Channels, Stride);
    }

    public override void CudaBackward(in CudaCall call)
    {
        if (call.Gradient(0) is not { Wanted: true } dx) return;
        Clip size = ClipOf(dx.Buffer.Shape.Cols);
        call.Launch("unfold_backward",
            Grid.Rows(checked((int)dx.Buffer.Shape.Rows * size.Frames)), dx.Buffer,
            call.OutputGradient, size.Frames, size.OutFrames, Channels, Stride,
            dx.Accumulate);
    }

    private int OutFrames(int frames) => ((frames - 1) / Stride) + 1;

    private Clip ClipOf(int cols) =>
        new(cols / Channels, OutFrames(cols / Channels), Channels, Stride);

    // Frames before and behind it, of so many channels.
    private readonly record struct Clip(int Frames, int OutFrames, int Channels, int Stride);

    private readonly unsafe struct ForwardRows<T>(Matrix<T> x, Clip size, Matrix<T> y)
        : IRangeBody
        where T : unmanaged, System.Numerics.IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int row = begin; row < end; row++)
            {
                var (clip, t) = Math.DivRem(row, size.OutFrames);
                T* to = y.Row(row);
                for (int j = 0; j < Taps; j++)
                {
                    int frame = (t * size.Stride) + j - 1;
                    bool isThere = (uint)frame < (uint)size.Frames;
                    T* from = x.Row(clip) + (isThere ? (long)frame * size.Channels : 0);
                    for (int c = 0; c < size.Channels; c++)
                        to[(Taps * c) + j] = isThere ? from[c] : T.Zero;
                }
            }
        }
    }

    // dx[s, u, c] = sum over j of dy[s, t, 3 c + j] where Stride t + j - 1 = u.
    private readonly unsafe struct BackwardRows<T>(
        Matrix<T> dy, Clip size, Gradient<T> dx) : IRangeBody
        where T : unmanaged, System.Numerics.IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int row = begin; row < end; row++)
            {
                var (clip, frame) = Math.DivRem(row, size.Frames);
                T* to = dx.Into.Row(clip) + ((long)frame * size.Channels);
                if (!dx.Accumulate) new Span<T>(to, size.Channels).Clear();
                for (int j = 0; j < Taps; j++)
                {
                    var (t, rest) = Math.DivRem(frame + 1 - j, size.Stride);
                    if (rest != 0 || frame + 1 < j || t >= size.OutFrames) continue;
                    T* from = dy.Row((clip * size.OutFrames) + t);
                    for (int c = 0; c < size.Channels; c++) to[c] += from[(Taps * c) + j];
                }
            }
        }
    }
}
