using System.Numerics;
using System.Numerics.Tensors;
using MiniCpmNative.Kernels.Cpu;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// loss = sum_i (ln sum_v exp(logits[i, v]) - logits[i, targets[i]]),  logits = h[rows] w^T: the
/// vocabulary projection of the rows that carry a label, softmax and loss in one, chunk by chunk:
/// the logits of all rows never exist. h[tokens, cols], w[vocab, cols] (any float storage;
/// row-major, or packed when frozen), rows I32[labels] rising, targets I32[labels] -> loss[1], the
/// sum and not the mean. With u[tokens, rank] and bb[vocab, rank] logits have Scale * u[rows] bb^T
/// too: a low-rank adapter of the projection, or rows of its own for some tokens. Saves
/// loss[labels], correct[labels] (1 where the target has the largest logit) and, when a backward
/// will come, the gradients of the sum for the labelled rows of h and u, dh[labels, cols] and
/// du[labels, rank]: backward scatters them, and multiplies again only for a trainable w or bb. As
/// in Liger-Kernel's fused linear cross entropy.
/// </summary>
/// <exception cref="ShapeException">
/// A shape does not fit, rows do not rise within h, or a target is outside the vocabulary.
/// </exception>
public sealed unsafe partial record CrossEntropy(double Scale = 1) : Op("cross_entropy")
{
    // Elements of a chunk of logits: small vocabularies stay in the cache, large ones still reuse
    // each element of w for MinRows rows.
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
        var dh = new Spec(activations, new Shape(labels, h.Shape.Cols));
        if (inputs.Length < 6) return new(new Spec(statistics, s_one), perLabel, perLabel, dh);
        Spec u = inputs.Float(this, 4, "u");
        u.MustBe(this, "u", (int)h.Shape.Rows, u.Shape.Cols);
        inputs.FloatMatrix(this, 5, "bb").MustBe(this, "bb", w.Shape[0], u.Shape.Cols);
        return new(new Spec(statistics, s_one), perLabel, perLabel, dh,
            new Spec(activations, new Shape(labels, u.Shape.Cols)));
    }

    public override bool Differentiates(int input) => input is < 2 or 4 or 5;

    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Matrix<int> targets = call.Ints(3);
        Check(call, targets);
        Matrix<T> losses = call.Saved(0), correct = call.Saved(1), dh = call.Saved(2);
        var chunks = new Chunks<T>(call);
        for (int first = 0; first < targets.Cols; first += chunks.Size)
        {
            Matrix<T> logits = chunks.Logits(call, first, Scale);
            call.Workers.For(logits.Rows, new Softmax<T>(
                logits, targets, first, T.One, call.Recorded, losses, correct));
            if (!call.Recorded) continue;
            call.Gemm.Multiply(logits.View, call.View(1), dh.Slice(first, logits.Rows).View);
            if (call.Input(5).Exists)
                call.Gemm.Multiply(logits.View, call.View(5),
                    call.Saved(3).Slice(first, logits.Rows).View, Scale);
        }

        double sum = 0;
        for (int i = 0; i < targets.Cols; i++) sum += Real.ToDouble(losses[i]);
        call.Output[0] = Real.Of<T>(sum);
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        T scale = call.OutputGradient[0];
        Matrix<int> targets = call.Ints(3);
        Gradient<T> dw = call.Gradient(1), db = call.Gradient(5);
        Spread(call, call.Gradient(0), 2, scale);
        Spread(call, call.Gradient(4), 3, scale);
        if (!dw.Wanted && !db.Wanted) return;
        var chunks = new Chunks<T>(call);
        // Without a label one empty product writes the zeros.
        for (int first = 0; first < Math.Max(1, targets.Cols); first += chunks.Size)
        {
            Matrix<T> logits = chunks.Logits(call, first, Scale);
            call.Workers.For(logits.Rows, new Softmax<T>(
                logits, targets, first, scale, gradient: true, default, default));
            call.Multiply(logits.View.T, chunks.Gathered(logits.Rows).View,
                new(dw.Into, dw.Accumulate || first > 0));
            if (db.Wanted)
                call.Multiply(logits.View.T, chunks.GatheredLow(logits.Rows).View,
                    new(db.Into, db.Accumulate || first > 0), Scale);
        }
    }

    private void Spread<T>(in CpuCall<T> call, Gradient<T> into, int saved, T scale)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        if (!into.Wanted) return;
        Matrix<int> from = call.ScratchInts(into.Into.Rows);
        Indices.Invert(this, "rows", call.Ints(2), from);
        call.Workers.For(into.Into.Rows, new Scatter<T>(call.Saved(saved), from, scale, into));
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
        private readonly Matrix<T> _h, _u, _logits;

        public Chunks(in CpuCall<T> call)
        {
            Shape w = call.Input(1).Shape;
            int labels = call.Ints(2).Cols;
            int fit = Math.Clamp(ChunkElements / Math.Max(1, w[0]), MinRows, MaxRows);
            Size = Math.Clamp(labels, 1, fit);
            _h = call.Scratch(new Shape(Size, w[1]));
            _logits = call.Scratch(new Shape(Size, w[0]));
            if (call.Input(5).Exists) _u = call.Scratch(new Shape(Size, call.Input(5).Shape.Cols));
        }

        public int Size { get; }

        /// <summary>The labelled rows of h of which logits were computed last.</summary>
        public Matrix<T> Gathered(int count) => _h.Slice(0, count);

        /// <summary>The same of u.</summary>
        public Matrix<T> GatheredLow(int count) => _u.Slice(0, count);

        public Matrix<T> Logits(in CpuCall<T> call, int first, double scale)
        {
            Matrix<int> rows = call.Ints(2);
            int count = Math.Min(Size, rows.Cols - first);
            Matrix<T> logits = _logits.Slice(0, count);
            Gather(call.In(0), rows, first, Gathered(count));
            call.Gemm.Multiply(Gathered(count).View, call.View(1).T, logits.View);
            if (!_u.Exists) return logits;
            Gather(call.In(4), rows, first, GatheredLow(count));
            call.Gemm.Multiply(
                GatheredLow(count).View, call.View(5).T, logits.View, scale, beta: 1);
            return logits;
        }

        private static void Gather(Matrix<T> from, Matrix<int> rows, int first, Matrix<T> to)
        {
            for (int i = 0; i < to.Rows; i++)
                from.RowSpan(rows[first + i]).CopyTo(to.RowSpan(i));
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
