using System.Numerics;
using System.Numerics.Tensors;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// loss = sum_i (ln sum_v exp(logits[i, v]) - logits[i, targets[i]]),  logits = h[rows] w^T: the
/// vocabulary projection of the rows that carry a label, softmax and loss in one, chunk by chunk:
/// the logits of all rows never exist. h[tokens, cols], w[vocab, cols] (any float storage;
/// row-major, or packed when frozen), rows I32[labels] rising, targets I32[labels] -> loss[1], the
/// sum and not the mean. Saves loss[labels], correct[labels] (1 where the target has the largest
/// logit) and, when a backward will come, the gradient of the sum for the labelled rows of h,
/// dh[labels, cols]: backward scatters it, and multiplies again only for a trainable w. As in
/// Liger-Kernel's fused linear cross entropy.
/// </summary>
/// <exception cref="ShapeException">
/// A shape does not fit, rows do not rise within h, or a target is outside the vocabulary.
/// </exception>
public sealed unsafe record CrossEntropy() : Op("cross_entropy")
{
    // Elements of a chunk of logits: small vocabularies stay in the cache, large ones still reuse
    // each element of w for MinRows rows.
    private const int ChunkElements = 1 << 21, MinRows = 64, MaxRows = 512;

    // On CUDA: bytes of a chunk of logits, which is a multiple of the rows that a product computes
    // together (512 rows for a vocabulary of 151,700); small vocabularies are limited by rows.
    private const long CudaChunkBytes = 320L << 20;
    private const int CudaTile = 128, CudaMaxRows = 2048;

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
                call.Gemm.Multiply(logits.View, call.View(1), dh.Slice(first, logits.Rows).View);
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

    public override void CudaForward(in CudaCall call)
    {
        Tensor losses = call.Saved(0), correct = call.Saved(1), dh = call.Saved(2);
        int labels = losses.Shape.Cols;
        CudaCheck(call);
        if (labels > 0)
        {
            var chunks = new CudaChunks(call, gradient: call.Recorded);
            for (int first = 0; first < labels; first += chunks.Size)
            {
                int count = chunks.Logits(call, first);
                chunks.Softmax(call, first, count, losses.Slice(first, count),
                    correct.Slice(first, count), 1, Tensor.None);
                if (call.Recorded) chunks.GradientOfRows(call, count, dh.Slice(first, count));
            }
        }

        call.Launch("cross_entropy_sum", Grid.Rows(1), call.Output, losses, labels);
    }

    public override void CudaBackward(in CudaCall call)
    {
        Tensor rows = call.Input(2), dloss = call.OutputGradient;
        int labels = (int)rows.Shape.Count;
        GradientTarget dh = call.Gradient(0), dw = call.AnyGradient(1);
        CudaCheck(call);
        if (dh.Wanted)
        {
            Shape shape = dh.Buffer.Shape;
            call.Launch("cross_entropy_scatter", Grid.Rows((int)shape.Rows), dh.Buffer,
                call.Saved(2), rows, labels, dloss, shape.Cols, dh.Accumulate);
        }

        if (!dw.Wanted) return;
        if (labels == 0 && !dw.Accumulate) call.Clear(dw.Buffer);
        if (labels == 0) return;
        var chunks = new CudaChunks(call, gradient: true);
        for (int first = 0; first < labels; first += chunks.Size)
        {
            int count = chunks.Logits(call, first);
            chunks.Softmax(call, first, count, Tensor.None, Tensor.None, 1, dloss);
            chunks.GradientOfWeight(
                call, first, count, dw.Buffer, beta: dw.Accumulate || first > 0 ? 1 : 0);
        }
    }

    private static void CudaCheck(in CudaCall call)
    {
        Tensor rows = call.Input(2);
        int labels = (int)rows.Shape.Count;
        call.Launch("cross_entropy_check", Grid.Elements(labels), rows, call.Input(3), labels,
            (int)call.Input(0).Shape.Rows, call.Input(1).Shape[0], call.Faults);
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
            call.Gemm.Multiply(gathered.View, call.View(1).T, logits.View);
            return logits;
        }
    }

    /// <summary>
    /// Scratch for a chunk of labelled rows and their logits in F32, whose memory the gradient of
    /// those then takes in the storage type. Each chunk reads all of w for each product: with few
    /// rows that, not arithmetic, would take the time (1 GB for 151,700 x 3584), so chunks are
    /// large rather than small enough for the cache. Products of a size that is no multiple of
    /// eight run at a third of the rate on tensor cores, and vocabularies have any size: the last
    /// few tokens are products of their own.
    /// </summary>
    private readonly struct CudaChunks
    {
        private const int Multiple = 8;

        private readonly CudaMatrix _weight;
        private readonly Tensor _h, _gathered, _logits, _gradient;
        private readonly int _bulk, _rest;

        public CudaChunks(in CudaCall call, bool gradient)
        {
            _weight = call.In(1);
            _bulk = _weight.Rows / Multiple * Multiple;
            _rest = _weight.Rows - _bulk;
            Tensor h = call.In(0);
            int labels = (int)call.Input(2).Shape.Count, tokens = (int)h.Shape.Rows;
            _h = h.Reshape(tokens, h.Shape.Cols);
            // Padded: products and kernels read rows 16 bytes at a time in either type.
            int stride = RoundedUp(_weight.Rows, Multiple);
            long fit = CudaChunkBytes / ((long)sizeof(float) * Math.Max(1, stride));
            int most = (int)Math.Clamp(fit / CudaTile * CudaTile, CudaTile, CudaMaxRows);
            int chunks = (labels + most - 1) / most, share = (labels + chunks - 1) / chunks;
            Size = Math.Min(labels, RoundedUp(share, CudaTile));
            // As many labels as tokens: rising rows are all of them.
            if (labels < tokens) _gathered = call.Scratch(call.Real, Size, h.Shape.Cols);
            _logits = call.Scratch(DType.F32, Size, stride);
            if (!gradient) return;
            var row = new Shape(Size, stride * sizeof(float) / call.Real.Size());
            _gradient = _logits with { Spec = new Spec(call.Real, row) };
        }

        /// <summary>Labels of a chunk; the last may have fewer.</summary>
        public int Size { get; }

        /// <summary>
        /// Computes the logits of the chunk from a label on; how many rows it has.
        /// </summary>
        public int Logits(in CudaCall call, int first)
        {
            Tensor rows = call.Input(2);
            int count = Math.Min(Size, (int)rows.Shape.Count - first), tokens = _h.Shape[0];
            if (_gathered.Exists)
                call.Launch("gather_rows", Grid.Rows(count), _gathered, _h,
                    rows.Slice(first, count), count, tokens, _h.Shape.Cols, false);
            var logits = new CudaMatrix(_logits, count, _weight.Rows, false);
            CudaMatrix h = Gathered(first, count);
            call.Multiply(h, _weight.RowsFrom(0, _bulk).T, logits.ColumnsFrom(0, _bulk));
            call.Multiply(h, _weight.RowsFrom(_bulk, _rest).T, logits.ColumnsFrom(_bulk, _rest));
            return count;
        }

        /// <summary>
        /// Losses and hits of the logits computed last and, where there will be a gradient,
        /// scale * *by * (softmax - one at the target) in their place.
        /// </summary>
        public void Softmax(in CudaCall call, int first, int count, in Tensor losses,
            in Tensor correct, double scale, in Tensor by) =>
            call.Launch("cross_entropy_rows", Grid.LongRows(count), losses, correct, _gradient,
                _logits, call.Input(3).Slice(first, count), _weight.Rows, _logits.Shape.Cols,
                scale, by);

        /// <summary>dh = g w of the gradient computed last, the smaller part first: what is rounded
        /// twice is that one.</summary>
        public void GradientOfRows(in CudaCall call, int count, in Tensor dh)
        {
            CudaMatrix g = Gradient(count);
            if (_rest > 0)
                call.Multiply(g.ColumnsFrom(_bulk, _rest), _weight.RowsFrom(_bulk, _rest), dh);
            call.Multiply(g.ColumnsFrom(0, _bulk), _weight.RowsFrom(0, _bulk), dh,
                beta: _rest > 0 ? 1 : 0);
        }

        /// <summary>dw = g^T h + beta dw.</summary>
        public void GradientOfWeight(
            in CudaCall call, int first, int count, CudaMatrix dw, double beta)
        {
            CudaMatrix g = Gradient(count), h = Gathered(first, count);
            call.Multiply(g.ColumnsFrom(0, _bulk).T, h, dw.RowsFrom(0, _bulk), beta: beta);
            call.Multiply(g.ColumnsFrom(_bulk, _rest).T, h, dw.RowsFrom(_bulk, _rest), beta: beta);
        }

        // The labelled rows of h of which logits were computed last.
        private CudaMatrix Gathered(int first, int count) =>
            _gathered.Exists ? _gathered.Slice(0, count) : _h.Slice(first, count);

        private CudaMatrix Gradient(int count) => new(_gradient, count, _weight.Rows, false);

        private static int RoundedUp(int value, int multiple) =>
            checked((value + multiple - 1) / multiple * multiple);
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
