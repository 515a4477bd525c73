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
            for (int first = 0; first < end; first += AttentionScratch<T>.Depth)
            {
                int keys = Math.Min(AttentionScratch<T>.Depth, end - first);
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

    /// <summary>
    /// dk and dv of blocks of keys, over all heads of the group and all queries, in their order:
    /// dv = p^T dO, dk = scale * ds^T q. 8 * headDim flops per visible (query, key) pair.
    /// </summary>
    public struct KeyGradients : IRangeBody
    {
        public AttentionArguments<T> Arguments;
        public AttentionGradients<T> Gradients;

        public readonly void Run(int begin, int end, int worker)
        {
            var scratch =
                new AttentionScratch<T>(Arguments.Scratch, worker, Arguments.HeadDim, Width);
            new Span<T>(scratch.Keep, Width).Fill(T.One);
            for (int item = begin; item < end; item++)
                Sum(AttentionBlock.Locate(Arguments, item, lanesAreKeys: true, Width), scratch);
        }

        private readonly void Sum(in AttentionBlock block, in AttentionScratch<T> scratch)
        {
            AttentionArguments<T> a = Arguments;
            var rows = LaneRows<T>.OfKeys(block);
            int seen = Math.Clamp(block.VisibleKeys - block.First, 0, block.Lanes);
            int from = a.Causal
                ? Math.Clamp(block.First - (block.Keys - block.Queries), 0, block.Queries)
                : 0;
            if (from == block.Queries) seen = 0;
            if (seen > 0)
            {
                Gather(scratch.Left, rows, a.K, a.KStride, a.HeadDim);
                Gather(scratch.Right, rows, a.V, a.VStride, a.HeadDim);
                int group = a.Heads / a.KvHeads, head = block.KvHead * group;
                T* keep = null;
                for (int end = head + group; head < end; head++)
                {
                    for (int i = from; i < block.Queries; i += AttentionScratch<T>.Depth)
                    {
                        Tile(block, scratch, head, i, keep);
                        keep = scratch.Keep;
                    }
                }
            }

            if (Gradients.DK.Data is not null)
                Scatter(scratch.LeftSum, a.Scale, rows, 0, seen, Gradients.DK, a.HeadDim);
            if (Gradients.DV.Data is not null)
                Scatter(scratch.RightSum, T.One, rows, 0, seen, Gradients.DV, a.HeadDim);
        }

        /// <summary>Adds what up to Depth queries of one head give to the block's keys.</summary>
        private readonly void Tile(
            in AttentionBlock block, in AttentionScratch<T> scratch, int head, int query, T* keep)
        {
            AttentionArguments<T> a = Arguments;
            AttentionGradients<T> g = Gradients;
            int queries = Math.Min(AttentionScratch<T>.Depth, block.Queries - query);
            int dim = a.HeadDim;
            nint token = block.QueryStart + query, column = (nint)head * dim;
            T* q = a.Q + (token * a.QStride) + column;
            T* dO = g.DO + (token * g.DOStride) + column;
            T* o = a.O + (token * a.OStride) + column;
            T* lse = a.Lse + (token * a.Heads) + head;
            T factor = ToBinary(a.Scale);
            Product(scratch.Scores, null, q, a.QStride, 1, queries, scratch.Left, dim);
            for (int i = 0; i < queries; i++)
            {
                T* scores = scratch.Scores + ((nint)i * Width);
                int limit = block.KeysSeenBy(query + i, a.Causal) - block.First;
                for (int lane = Math.Max(0, limit); lane < Width; lane++)
                    scores[lane] = T.NegativeInfinity;
                Probabilities(scores, factor, Offset(lse[(nint)i * a.Heads], a.Scale));
            }

            if (g.DV.Data is not null)
                Product(scratch.RightSum, keep, dO, 1, g.DOStride, dim, scratch.Scores, queries);
            if (g.DK.Data is null) return;
            T* dp = scratch.ScoreGradients;
            Product(dp, null, dO, g.DOStride, 1, queries, scratch.Right, dim);
            for (int i = 0; i < queries; i++)
            {
                T delta = Dot(dO + (i * g.DOStride), o + (i * a.OStride), dim);
                nint row = (nint)i * Width;
                KeyScoreGradients(dp + row, scratch.Scores + row, delta);
            }

            Product(scratch.LeftSum, keep, q, 1, a.QStride, dim, dp, queries);
        }
    }
}
