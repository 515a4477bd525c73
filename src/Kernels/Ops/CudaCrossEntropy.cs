using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

public sealed unsafe partial record CrossEntropy
{
    // On CUDA: bytes of a chunk of logits, which is a multiple of the rows that a product computes
    // together (512 rows for a vocabulary of 151,700); small vocabularies are limited by rows.
    private const long CudaChunkBytes = 320L << 20;
    private const int CudaTile = 128, CudaMaxRows = 2048;

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
                int count = chunks.Logits(call, first, Scale);
                chunks.Softmax(call, first, count, losses.Slice(first, count),
                    correct.Slice(first, count), 1, Tensor.None);
                if (!call.Recorded) continue;
                chunks.GradientOfRows(call, call.In(1), count, dh.Slice(first, count));
                if (call.Input(5).Exists)
                    chunks.GradientOfRows(
                        call, call.In(5), count, call.Saved(3).Slice(first, count), Scale);
            }
        }

        call.Launch("cross_entropy_sum", Grid.Rows(1), call.Output, losses, labels);
    }

    public override void CudaBackward(in CudaCall call)
    {
        Tensor rows = call.Input(2), dloss = call.OutputGradient;
        int labels = (int)rows.Shape.Count;
        GradientTarget dw = call.AnyGradient(1), db = call.AnyGradient(5);
        CudaCheck(call);
        CudaSpread(call, call.Gradient(0), 2);
        CudaSpread(call, call.Gradient(4), 3);
        if (!dw.Wanted && !db.Wanted) return;
        if (labels == 0)
        {
            foreach (GradientTarget each in (ReadOnlySpan<GradientTarget>)[dw, db])
                if (each is { Wanted: true, Accumulate: false }) call.Clear(each.Buffer);
            return;
        }

        var chunks = new CudaChunks(call, gradient: true);
        for (int first = 0; first < labels; first += chunks.Size)
        {
            int count = chunks.Logits(call, first, Scale);
            chunks.Softmax(call, first, count, Tensor.None, Tensor.None, 1, dloss);
            if (dw.Wanted)
                chunks.GradientOfWeight(call, chunks.Rows(first, count), dw.Buffer, 1,
                    beta: dw.Accumulate || first > 0 ? 1 : 0);
            if (db.Wanted)
                chunks.GradientOfWeight(call, chunks.LowRows(first, count), db.Buffer, Scale,
                    beta: db.Accumulate || first > 0 ? 1 : 0);
        }
    }

    private static void CudaSpread(in CudaCall call, GradientTarget into, int saved)
    {
        if (!into.Wanted) return;
        Tensor rows = call.Input(2);
        Shape shape = into.Buffer.Shape;
        call.Launch("cross_entropy_scatter", Grid.Rows((int)shape.Rows), into.Buffer,
            call.Saved(saved), rows, (int)rows.Shape.Count, call.OutputGradient, shape.Cols,
            into.Accumulate);
    }

    private static void CudaCheck(in CudaCall call)
    {
        Tensor rows = call.Input(2);
        int labels = (int)rows.Shape.Count;
        call.Launch("cross_entropy_check", Grid.Elements(labels), rows, call.Input(3), labels,
            (int)call.Input(0).Shape.Rows, call.Input(1).Shape[0], call.Faults);
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
        private readonly Tensor _h, _u, _gathered, _gatheredLow, _logits, _gradient;
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
            if (call.Input(5).Exists)
            {
                _u = call.In(4);
                _u = _u.Reshape(tokens, _u.Shape.Cols);
                if (labels < tokens) _gatheredLow = call.Scratch(call.Real, Size, _u.Shape.Cols);
            }

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
        public int Logits(in CudaCall call, int first, double scale)
        {
            int count = Math.Min(Size, (int)call.Input(2).Shape.Count - first);
            Gather(call, first, count, _h, _gathered);
            Multiply(call, Rows(first, count), _weight, count, 1, beta: 0);
            if (!_u.Exists) return count;
            Gather(call, first, count, _u, _gatheredLow);
            Multiply(call, LowRows(first, count), call.In(5), count, scale, beta: 1);
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

        /// <summary>dh = scale * g w of the gradient computed last, the smaller part first: what is
        /// rounded twice is that one.</summary>
        public void GradientOfRows(
            in CudaCall call, CudaMatrix weight, int count, in Tensor dh, double scale = 1)
        {
            CudaMatrix g = Gradient(count);
            if (_rest > 0)
                call.Multiply(g.ColumnsFrom(_bulk, _rest), weight.RowsFrom(_bulk, _rest), dh,
                    scale);
            call.Multiply(g.ColumnsFrom(0, _bulk), weight.RowsFrom(0, _bulk), dh, scale,
                beta: _rest > 0 ? 1 : 0);
        }

        /// <summary>dw = scale * g^T h + beta dw.</summary>
        public void GradientOfWeight(
            in CudaCall call, CudaMatrix h, CudaMatrix dw, double scale, double beta)
        {
            CudaMatrix g = Gradient(h.Rows);
            call.Multiply(g.ColumnsFrom(0, _bulk).T, h, dw.RowsFrom(0, _bulk), scale, beta);
            call.Multiply(g.ColumnsFrom(_bulk, _rest).T, h, dw.RowsFrom(_bulk, _rest), scale, beta);
        }

        /// <summary>The labelled rows of h of which logits were computed last.</summary>
        public CudaMatrix Rows(int first, int count) =>
            _gathered.Exists ? _gathered.Slice(0, count) : _h.Slice(first, count);

        /// <summary>The same of u.</summary>
        public CudaMatrix LowRows(int first, int count) =>
            _gatheredLow.Exists ? _gatheredLow.Slice(0, count) : _u.Slice(first, count);

        private void Multiply(in CudaCall call, CudaMatrix rows, CudaMatrix weight, int count,
            double scale, double beta)
        {
            var logits = new CudaMatrix(_logits, count, _weight.Rows, false);
            call.Multiply(rows, weight.RowsFrom(0, _bulk).T, logits.ColumnsFrom(0, _bulk), scale,
                beta);
            call.Multiply(rows, weight.RowsFrom(_bulk, _rest).T, logits.ColumnsFrom(_bulk, _rest),
                scale, beta);
        }

        private static void Gather(
            in CudaCall call, int first, int count, in Tensor from, in Tensor to)
        {
            if (!to.Exists) return;
            call.Launch("gather_rows", Grid.Rows(count), to, from,
                call.Input(2).Slice(first, count), count, from.Shape[0], from.Shape.Cols, false);
        }

        private CudaMatrix Gradient(int count) => new(_gradient, count, _weight.Rows, false);

        private static int RoundedUp(int value, int multiple) =>
            checked((value + multiple - 1) / multiple * multiple);
    }
}
