namespace MiniCpmNative.Kernels.Cpu;

internal static unsafe partial class FlashAttention<TLanes, TVector, T>
{
    /// <summary>
    /// dq of blocks of queries: p = exp(scale * q k^T - lse), ds = p * (dO v^T - delta), delta = dO
    /// . o, dq = scale * ds k. 6 * headDim flops per visible (query, key) pair.
    /// </summary>
    public struct QueryGradients : IRangeBody
    {
        public AttentionArguments<T> Arguments;
        public AttentionGradients<T> Gradients;

        public readonly void Run(int begin, int end, int worker)
        {
            var scratch =
                new AttentionScratch<T>(Arguments.Scratch, worker, Arguments.HeadDim, Width);
            new Span<T>(scratch.Keep, Width).Fill(T.One);
            for (int item = begin; item < end; item++)
            {
                var block = AttentionBlock.Locate(Arguments, item, lanesAreKeys: false, Width);
                var rows = LaneRows<T>.OfQueries(Arguments, block);
                Load(block, rows, scratch);
                Sum(block, scratch);
                int blind = 0;
                while (blind < rows.Lanes && scratch.Limits[blind] == 0) blind++;
                Scatter(
                    scratch.LeftSum, Arguments.Scale, rows, blind, rows.Lanes, Gradients.DQ,
                    Arguments.HeadDim);
            }
        }

        private readonly void Load(
            in AttentionBlock block, in LaneRows<T> rows, in AttentionScratch<T> scratch)
        {
            AttentionArguments<T> a = Arguments;
            AttentionGradients<T> g = Gradients;
            Gather(scratch.Left, rows, a.Q, a.QStride, a.HeadDim);
            Gather(scratch.Right, rows, g.DO, g.DOStride, a.HeadDim);
            rows.Limits(block, a.Causal, scratch.Limits, Width);
            new Span<T>(scratch.OffsetsHigh, Width).Clear();
            new Span<T>(scratch.OffsetsLow, Width).Clear();
            new Span<T>(scratch.Deltas, Width).Clear();
            for (int lane = 0; lane < rows.Lanes; lane++)
            {
                T lse = a.Lse[rows.Statistic(lane, a.Heads)];
                (scratch.OffsetsHigh[lane], scratch.OffsetsLow[lane]) = Offset(lse, a.Scale);
                scratch.Deltas[lane] = Dot(
                    rows.Row(g.DO, g.DOStride, a.HeadDim, lane),
                    rows.Row(a.O, a.OStride, a.HeadDim, lane), a.HeadDim);
            }
        }

        private readonly void Sum(in AttentionBlock block, in AttentionScratch<T> scratch)
        {
            AttentionArguments<T> a = Arguments;
            T* k = a.K + (block.KeyStart * a.KStride) + ((nint)block.KvHead * a.HeadDim);
            T* v = a.V + (block.KeyStart * a.VStride) + ((nint)block.KvHead * a.HeadDim);
            T factor = ToBinary(a.Scale);
            T* dp = scratch.ScoreGradients;
            int seenByAll = scratch.Limits[0], end = scratch.Limits[Width - 1];
            // As many keys at a time as KeyTiles has, whose sums these must equal.
            for (int first = 0; first < end; first += Width)
            {
                int keys = Math.Min(Width, end - first);
                T* key = k + (first * a.KStride);
                T* value = v + (first * a.VStride);
                Product(scratch.Scores, null, key, a.KStride, 1, keys, scratch.Left, a.HeadDim);
                if (first + keys > seenByAll) MaskKeys(scratch.Scores, first, keys, scratch.Limits);
                Product(dp, null, value, a.VStride, 1, keys, scratch.Right, a.HeadDim);
                QueryScoreGradients(scratch, keys, factor);
                T* keep = first == 0 ? null : scratch.Keep;
                Product(scratch.LeftSum, keep, key, 1, a.KStride, a.HeadDim, dp, keys);
            }
        }
    }
}
