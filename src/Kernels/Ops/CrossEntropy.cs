using System.Numerics;
using System.Numerics.Tensors;
using MiniCpmNative.Kernels.Cpu;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// loss = sum_i (ln sum_v exp(logits[i, v]) - logits[i, targets[i]]),  logits = h[rows] w^T: the vocabulary
/// projection of the rows that carry a label, softmax and loss in one, chunk by chunk: the logits of all
/// rows never exist. h[tokens, cols], w[vocab, cols] (any float storage; row-major, or packed when
/// frozen), rows I32[labels] rising, targets I32[labels] -> loss[1], the sum and not the mean.
/// Saves loss[labels], correct[labels] (1 where the target has the largest logit) and, when a backward
/// will come, the gradient of the sum for the labelled rows of h, dh[labels, cols]: backward scatters it,
/// and multiplies again only for a trainable w. As in Liger-Kernel's fused linear cross entropy.
/// </summary>
/// <exception cref="ShapeException">
/// A shape does not fit, rows do not rise within h, or a target is outside the vocabulary.
/// </exception>
public sealed unsafe record CrossEntropy() : Op("cross_entropy")
{
    // Elements of a chunk of logits: small vocabularies stay in the cache, large ones still reuse each
    // element of w for MinRows rows.
    private const int ChunkElements = 1 << 21, MinRows = 64, MaxRows = 512;

    // Made once: a span of constants allocates in unoptimised code.
    private static readonly Shape s_one = new(1);

    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec h = inputs.Float(this, 0, "h"), w = inputs.Weight(this, 1, "w");
        w.MustBe(this, "w", w.Shape[0], h.Shape.Cols);
        Spec rows = inputs.Int(this, 2, "rows");
        int labels = (int)rows.Shape.Count;
        rows.MustBe(this, "rows", labels);
        inputs.Int(this, 3, "targets").MustBe(this, "targets", labels);
        DType statistics = activations.Statistics();
        var perLabel = new Spec(statistics, new Shape(labels));
        return new(new Spec(statistics, s_one), perLabel, perLabel,
            new Spec(activations, new Shape(labels, h.Shape.Cols)));
    }

    public override bool Differentiates(int input) => input < 2;

    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Matrix<int> targets = call.Ints(3);
        Check(call, targets);
        Matrix<T> losses = call.Saved(0), correct = call.Saved(1), dh = call.Saved(2);
        var chunks = new Chunks<T>(call);
        for (int first = 0; first < targets.Cols; first += chunks.Size)
        {
            Matrix<T> logits = chunks.Logits(call, first);
            call.Workers.For(logits.Rows, new Softmax<T>(
                logits, targets, first, T.One, call.Recorded, losses, correct));
            if (call.Recorded)
                call.Gemm.Multiply(logits.View, call.Weight(1), dh.Slice(first, logits.Rows).View);
        }

        double sum = 0;
        for (int i = 0; i < targets.Cols; i++) sum += Real.ToDouble(losses[i]);
        call.Output[0] = Real.Of<T>(sum);
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        T scale = call.OutputGradient[0];
        Matrix<int> rows = call.Ints(2), targets = call.Ints(3);
        Gradient<T> dh = call.Gradient(0), dw = call.Gradient(1);
        if (dh.Wanted)
        {
            Matrix<int> from = call.ScratchInts(dh.Into.Rows);
            Indices.Invert(this, "rows", rows, from);
            call.Workers.For(dh.Into.Rows, new Scatter<T>(call.Saved(2), from, scale, dh));
        }

        if (!dw.Wanted) return;
        var chunks = new Chunks<T>(call);
        // Without a label one empty product writes the zeros.
        for (int first = 0; first < Math.Max(1, targets.Cols); first += chunks.Size)
        {
            Matrix<T> logits = chunks.Logits(call, first);
            call.Workers.For(logits.Rows, new Softmax<T>(
                logits, targets, first, scale, gradient: true, default, default));
            call.Multiply(logits.View.T, chunks.Gathered(logits.Rows).View,
                new(dw.Into, dw.Accumulate || first > 0));
        }
    }

    private void Check<T>(in CpuCall<T> call, Matrix<int> targets)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        Matrix<int> rows = call.Ints(2);
        int tokens = (int)call.Input(0).Shape.Rows, vocabulary = call.Input(1).Shape[0];
        for (int i = 0; i < rows.Cols; i++)
        {
            if (rows[i] >= tokens || rows[i] <= (i == 0 ? -1 : rows[i - 1]))
                throw new ShapeException($"{Name}: rows[{i}] is {rows[i]}, expected rising rows of "
                    + $"h below {tokens}");
            if ((uint)targets[i] >= (uint)vocabulary)
                throw new ShapeException($"{Name}: the target of row {rows[i]} is {targets[i]}, "
                    + $"expected 0 to {vocabulary - 1}");
        }
    }

    /// <summary>Scratch for a chunk of labelled rows and their logits.</summary>
    private readonly struct Chunks<T>
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        private readonly Matrix<T> _h, _logits;

        public Chunks(in CpuCall<T> call)
        {
            Shape w = call.Input(1).Shape;
            int labels = call.Ints(2).Cols;
            int fit = Math.Clamp(ChunkElements / Math.Max(1, w[0]), MinRows, MaxRows);
            Size = Math.Clamp(labels, 1, fit);
            _h = call.Scratch(new Shape(Size, w[1]));
            _logits = call.Scratch(new Shape(Size, w[0]));
        }

        public int Size { get; }

        /// <summary>The labelled rows of h of which logits were computed last.</summary>
        public Matrix<T> Gathered(int count) => _h.Slice(0, count);

        public Matrix<T> Logits(in CpuCall<T> call, int first)
        {
            Matrix<T> h = call.In(0);
            Matrix<int> rows = call.Ints(2);
            int count = Math.Min(Size, rows.Cols - first);
            Matrix<T> gathered = Gathered(count), logits = _logits.Slice(0, count);
            for (int i = 0; i < count; i++) h.RowSpan(rows[first + i]).CopyTo(gathered.RowSpan(i));
            call.Gemm.Multiply(gathered.View, call.Weight(1).T, logits.View);
            return logits;
        }
    }

    // Per row: loss and hit, and logits <- scale * (softmax - one at the target).
    private readonly struct Softmax<T>(
        Matrix<T> logits, Matrix<int> targets, int first, T scale, bool gradient,
        Matrix<T> losses, Matrix<T> correct) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        private const int Block = 1024;

        public void Run(int begin, int end, int worker)
        {
            for (int r = begin; r < end; r++)
            {
                int target = targets[first + r];
                T* row = logits.Row(r);
                T max = TensorPrimitives.Max<T>(logits.RowSpan(r)), own = row[target] - max;
                bool hit = own == T.Zero && logits.RowSpan(r).IndexOf(max) == target;
                double sum = Exponentials(row, max);
                if (losses.Exists)
                {
                    losses[first + r] = Real.Of<T>(Math.Log(sum)) - own;
                    correct[first + r] = hit ? T.One : T.Zero;
                }

                if (!gradient) continue;
                var rescale = new Elementwise.Scaled<T>(scale / Real.Of<T>(sum));
                Elementwise.Map(row, null, null, row, logits.Cols, false, rescale);
                row[target] -= scale;
            }
        }

        // row <- exp(row - max); the sum in pieces, so that 150,000 floats lose nothing.
        private double Exponentials(T* row, T max)
        {
            double sum = 0;
            for (int c = 0; c < logits.Cols; c += Block)
            {
                int count = Math.Min(Block, logits.Cols - c);
                Elementwise.Map(row + c, null, null, row + c, count, false, new Exponential(max));
                sum += Real.ToDouble(TensorPrimitives.Sum(new ReadOnlySpan<T>(row + c, count)));
            }

            return sum;
        }

        private readonly struct Exponential(T max) : IMap<T>
        {
            public Vector<T> At(Vector<T> x, Vector<T> b, Vector<T> c) =>
                VectorMath.Exp(x - Vector.Create(max));
        }
    }

    private readonly struct Scatter<T>(
        Matrix<T> saved, Matrix<int> from, T scale, Gradient<T> dh) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int r = begin; r < end; r++)
            {
                if (from[r] < 0) dh.PutRow(r, default, 0);
                else
                    Elementwise.Map(saved.Row(from[r]), null, null, dh.Into.Row(r), dh.Into.Cols,
                        dh.Accumulate, new Elementwise.Scaled<T>(scale));
            }
        }
    }
}
