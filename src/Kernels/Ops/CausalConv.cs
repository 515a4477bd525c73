using System.Numerics;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// y[t, c] = silu(s[t, c]),  s[t, c] = sum over j of w[c, j] x[t - 3 + j, c],  j = 0 .. 3: a causal
/// convolution of every channel by itself over packed sequences, before whose starts there are
/// zeros. x[tokens, channels], w[channels, 4], cu_seqlens I32[sequences + 1] -> y like x; saves
/// nothing. For generation state[sequences * 3, channels], in the type of activations, holds the
/// last three inputs before each sequence and is left with the last three after it; there is no
/// gradient then. The short convolution before a linear attention.
/// </summary>
/// <exception cref="ShapeException">
/// A shape does not fit, the starts do not cover the tokens, or a state comes into a run whose
/// backward is to follow.
/// </exception>
public sealed record CausalConv() : Op("causal_conv")
{
    private const int Taps = KernelConstants.ConvTaps, Before = Taps - 1;

    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec x = inputs.FloatMatrix(this, 0, "x");
        inputs.Float(this, 1, "w").MustBe(this, "w", x.Shape.Cols, Taps);
        Spec starts = inputs.Int(this, 2, "cu_seqlens");
        if (starts.Shape.Rank != 1 || starts.Shape.Count < 1)
            throw this.Wrong("cu_seqlens", "a list of starts and the end", starts);
        if (inputs.Length > 3 && inputs[3].Exists)
        {
            Spec state = inputs.FloatMatrix(this, 3, "state");
            int sequences = (int)starts.Shape.Count - 1;
            state.MustBe(this, "state", checked(sequences * Before), x.Shape.Cols);
            if (state.Type != activations) throw this.Wrong("state", $"of {activations}", state);
        }

        return new(x.As(activations));
    }

    public override bool Differentiates(int input) => input <= 1;

    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Matrix<T> x = call.In(0), y = call.Output, state = call.In(3);
        Matrix<int> starts = Starts(call);
        if (call.Recorded && state.Exists) throw PackedRows.HasNoGradient(this);
        call.Workers.For(
            x.Rows, new SumRows<T>(new(x, starts, state), WeightsAcross(call), y, activate: true));
        if (state.Exists) Keep(x, starts, state);
    }

    // ds = dy silu'(s);  dx[t] = sum of w[j] ds[t + 3 - j];  dw[j] = sum of ds[t] x[t - 3 + j].
    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        const int GroupRows = 64;
        Matrix<T> x = call.In(0), w = WeightsAcross(call), dy = call.OutputGradient;
        Gradient<T> dx = call.Gradient(0), dw = call.Gradient(1);
        var rows = new Rows<T>(x, Starts(call), default);
        Matrix<T> ds = call.Scratch(new Shape(x.Rows, x.Cols));
        call.Workers.For(x.Rows, new SumRows<T>(rows, w, ds, activate: false));
        Elementwise.Map(call.Workers, ds, dy, default, ds, false, default(Slope<T>));
        if (dx.Wanted) call.Workers.For(x.Rows, new InputRows<T>(rows, w, ds, dx));
        if (!dw.Wanted) return;
        int groups = (x.Rows + GroupRows - 1) / GroupRows;
        Matrix<T> parts = call.Scratch(new Shape(Math.Max(1, groups), Taps * x.Cols));
        Matrix<T> sum = call.Scratch(new Shape(Taps * x.Cols));
        call.Workers.For(groups, new WeightGroups<T>(rows, ds, parts, GroupRows));
        Sum.Rows(parts.Slice(0, groups), new Gradient<T>(sum, accumulate: false));
        for (int c = 0; c < x.Cols; c++)
            for (int j = 0; j < Taps; j++) dw.Put((c * Taps) + j, sum[(j * x.Cols) + c]);
    }

    public override void CudaForward(in CudaCall call)
    {
        Tensor x = call.In(0), starts = call.Input(2), state = call.Input(3);
        if (call.Recorded && state.Exists) throw PackedRows.HasNoGradient(this);
        int tokens = x.Shape[0], cols = x.Shape.Cols, sequences = (int)starts.Shape.Count - 1;
        call.Launch("conv_forward", Blocks(call, tokens, cols), call.Output, x, call.Floats(1),
            state, starts, call.Faults, sequences, tokens, cols);
        if (state.Exists)
            call.Launch("conv_state", Grid.Blocks256((cols + 255) / 256, sequences), state, x,
                starts, tokens, cols);
    }

    public override void CudaBackward(in CudaCall call)
    {
        GradientTarget dx = call.Gradient(0), dw = call.FloatGradient(1);
        Tensor x = call.In(0), starts = call.Input(2);
        int tokens = x.Shape[0], cols = x.Shape.Cols;
        Grid grid = Blocks(call, tokens, cols);
        Tensor parts = dw.Wanted
            ? call.Scratch(DType.F32, grid.Blocks.Y, Taps * cols) : Tensor.None;
        if (dx.Wanted || dw.Wanted)
            call.Launch("conv_backward", grid, dx.Buffer, parts, call.OutputGradient, x,
                call.Floats(1), starts, call.Faults, (int)starts.Shape.Count - 1, tokens, cols,
                dx.Accumulate);
        if (dw.Wanted) call.SumParts(parts, dw);
    }

    // A thread per 16 bytes of channels, a row of blocks for some tokens.
    private static Grid Blocks(in CudaCall call, int tokens, int cols)
    {
        const int Tokens = KernelConstants.ConvTokens;
        int vectors = ((cols * call.Real.Size()) + 15) / 16;
        return Grid.Blocks256((vectors + 255) / 256, (tokens + Tokens - 1) / Tokens);
    }

    private Matrix<int> Starts<T>(in CpuCall<T> call)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        Matrix<int> starts = call.Ints(2);
        PackedRows.MustCover(this, starts, (int)call.Input(0).Shape.Rows);
        return starts;
    }

    // w[channels, 4] as rows of channels.
    private static unsafe Matrix<T> WeightsAcross<T>(in CpuCall<T> call)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        Matrix<T> w = call.In(1), across = call.Scratch(new Shape(Taps, w.Rows));
        for (int c = 0; c < w.Rows; c++)
            for (int j = 0; j < Taps; j++) across.Row(j)[c] = w.Row(c)[j];
        return across;
    }

    // The last inputs, of which a short sequence has fewer than are kept.
    private static void Keep<T>(Matrix<T> x, Matrix<int> starts, Matrix<T> state)
        where T : unmanaged
    {
        for (int s = 0; s + 1 < starts.Count; s++)
        {
            int length = starts[s + 1] - starts[s];
            for (int j = 0; j < Before; j++)
            {
                int from = length - Before + j;
                Span<T> row = from >= 0
                    ? x.RowSpan(starts[s] + from) : state.RowSpan((s * Before) + length + j);
                row.CopyTo(state.RowSpan((s * Before) + j));
            }
        }
    }

    private readonly unsafe struct Rows<T>(Matrix<T> x, Matrix<int> starts, Matrix<T> state)
        where T : unmanaged
    {
        public readonly Matrix<T> X = x;

        public int Sequence(int token) => PackedRows.SequenceOf(starts, token);

        public int End(int sequence) => starts[sequence + 1];

        /// <summary>The input `back` tokens before one; null before the sequence.</summary>
        public T* Before(int token, int back, int sequence)
        {
            int into = token - back - starts[sequence];
            return into >= 0 ? X.Row(token - back)
                : state.Exists ? state.Row(((sequence + 1) * CausalConv.Before) + into)
                : null;
        }
    }

    private readonly unsafe struct SumRows<T>(
        Rows<T> rows, Matrix<T> w, Matrix<T> y, bool activate) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int t = begin; t < end; t++)
            {
                int sequence = rows.Sequence(t);
                for (int back = 0; back < Taps; back++)
                    if (rows.Before(t, back, sequence) is var from && from is not null)
                        Elementwise.Map(from, w.Row(Before - back), null, y.Row(t), y.Cols,
                            accumulate: back > 0, default(Product<T>));
                if (activate)
                    Elementwise.Map(
                        y.Row(t), null, null, y.Row(t), y.Cols, false, default(Silu<T>));
            }
        }
    }

    private readonly unsafe struct InputRows<T>(
        Rows<T> rows, Matrix<T> w, Matrix<T> ds, Gradient<T> dx) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int t = begin; t < end; t++)
            {
                int last = rows.End(rows.Sequence(t));
                for (int ahead = 0; ahead < Taps && t + ahead < last; ahead++)
                    Elementwise.Map(ds.Row(t + ahead), w.Row(Before - ahead), null,
                        dx.Into.Row(t), ds.Cols, dx.Accumulate || ahead > 0, default(Product<T>));
            }
        }
    }

    private readonly unsafe struct WeightGroups<T>(
        Rows<T> rows, Matrix<T> ds, Matrix<T> parts, int groupRows) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int group = begin; group < end; group++)
            {
                parts.RowSpan(group).Clear();
                int last = Math.Min(ds.Rows, (group + 1) * groupRows);
                for (int t = group * groupRows; t < last; t++)
                {
                    int sequence = rows.Sequence(t);
                    for (int back = 0; back < Taps; back++)
                        if (rows.Before(t, back, sequence) is var from && from is not null)
                            Elementwise.Map(ds.Row(t), from, null,
                                parts.Row(group) + ((Before - back) * ds.Cols), ds.Cols,
                                accumulate: true, default(Product<T>));
                }
            }
        }
    }

    private readonly struct Product<T> : IMap<T>
        where T : unmanaged
    {
        public Vector<T> At(Vector<T> a, Vector<T> b, Vector<T> c) => a * b;
    }

    private readonly struct Silu<T> : IMap<T>
        where T : unmanaged
    {
        public Vector<T> At(Vector<T> s, Vector<T> b, Vector<T> c) => s * VectorMath.Sigmoid(s);
    }

    private readonly struct Slope<T> : IMap<T>
        where T : unmanaged
    {
        public Vector<T> At(Vector<T> s, Vector<T> dy, Vector<T> c)
        {
            Vector<T> sigmoid = VectorMath.Sigmoid(s);
            return dy * (sigmoid + (s * sigmoid * (Vector<T>.One - sigmoid)));
        }
    }
}
