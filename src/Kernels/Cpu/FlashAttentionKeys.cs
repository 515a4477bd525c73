namespace MiniCpmNative.Kernels.Cpu;

internal static unsafe partial class FlashAttention<TLanes, TVector, T>
{
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
            var tiles = new KeyTiles(Arguments, Gradients);
            for (int item = begin; item < end; item++)
                Sum(tiles, AttentionBlock.Locate(Arguments, item, lanesAreKeys: true, Width),
                    scratch);
        }

        private readonly void Sum(
            in KeyTiles tiles, in AttentionBlock block, in AttentionScratch<T> scratch)
        {
            int seen = block.SeenLanes(Arguments.Causal, out int from);
            if (seen > 0)
            {
                tiles.Load(block, scratch);
                int group = Arguments.Heads / Arguments.KvHeads, head = block.KvHead * group;
                T* keep = null;
                for (int end = head + group; head < end; head++)
                {
                    for (int i = from; i < block.Queries; i += AttentionScratch<T>.Depth)
                    {
                        int queries = Math.Min(AttentionScratch<T>.Depth, block.Queries - i);
                        tiles.Prepare(block, head, i, queries, scratch.Queries);
                        tiles.Add(block, scratch, head, i, queries, scratch.Queries, keep);
                        keep = scratch.Keep;
                    }
                }
            }

            tiles.Store(block, scratch, seen);
        }
    }

    /// <summary>
    /// Tiles of up to Depth queries of a head and a block of keys, which are the lanes.
    /// </summary>
    private readonly struct KeyTiles(in AttentionArguments<T> arguments,
        in AttentionGradients<T> gradients)
    {
        private readonly AttentionArguments<T> _a = arguments;
        private readonly AttentionGradients<T> _g = gradients;

        /// <summary>Transposes k and v of the block's keys.</summary>
        public void Load(in AttentionBlock block, in AttentionScratch<T> scratch)
        {
            var rows = LaneRows<T>.OfKeys(block);
            Gather(scratch.Left, rows, _a.K, _a.KStride, _a.HeadDim);
            Gather(scratch.Right, rows, _a.V, _a.VStride, _a.HeadDim);
        }

        /// <summary>What every tile needs of each of some queries.</summary>
        public void Prepare(
            in AttentionBlock block, int head, int query, int queries, AttentionQuery<T>* to)
        {
            nint token = block.QueryStart + query, column = (nint)head * _a.HeadDim;
            T* dO = _g.DO + (token * _g.DOStride) + column;
            T* o = _a.O + (token * _a.OStride) + column;
            T* lse = _a.Lse + (token * _a.Heads) + head;
            for (int i = 0; i < queries; i++)
            {
                (to[i].OffsetHigh, to[i].OffsetLow) = Offset(lse[(nint)i * _a.Heads], _a.Scale);
                to[i].Delta = Dot(dO + (i * _g.DOStride), o + (i * _a.OStride), _a.HeadDim);
            }
        }

        /// <summary>
        /// Adds to the sums of dk and dv what some queries give; leaves ds in ScoreGradients where
        /// dk or dq is wanted. Without keep the sums begin here.
        /// </summary>
        public void Add(
            in AttentionBlock block, in AttentionScratch<T> scratch, int head, int query,
            int queries, AttentionQuery<T>* prepared, T* keep)
        {
            int dim = _a.HeadDim;
            nint token = block.QueryStart + query, column = (nint)head * dim;
            T* q = _a.Q + (token * _a.QStride) + column;
            T* dO = _g.DO + (token * _g.DOStride) + column;
            T factor = ToBinary(_a.Scale);
            Product(scratch.Scores, null, q, _a.QStride, 1, queries, scratch.Left, dim);
            for (int i = 0; i < queries; i++)
            {
                T* scores = scratch.Scores + ((nint)i * Width);
                int limit = block.KeysSeenBy(query + i, _a.Causal) - block.First;
                for (int lane = Math.Max(0, limit); lane < Width; lane++)
                    scores[lane] = T.NegativeInfinity;
                Probabilities(scores, factor, prepared[i]);
            }

            if (_g.DV.Data is not null)
                Product(scratch.RightSum, keep, dO, 1, _g.DOStride, dim, scratch.Scores, queries);
            if (_g.DK.Data is null && _g.DQ.Data is null) return;
            T* dp = scratch.ScoreGradients;
            Product(dp, null, dO, _g.DOStride, 1, queries, scratch.Right, dim);
            for (int i = 0; i < queries; i++)
            {
                nint row = (nint)i * Width;
                KeyScoreGradients(dp + row, scratch.Scores + row, prepared[i].Delta);
            }

            if (_g.DK.Data is not null)
                Product(scratch.LeftSum, keep, q, 1, _a.QStride, dim, dp, queries);
        }

        /// <summary>
        /// Writes dk and dv of the block: sums in the lanes that are seen, else 0.
        /// </summary>
        public void Store(in AttentionBlock block, in AttentionScratch<T> scratch, int seen)
        {
            var rows = LaneRows<T>.OfKeys(block);
            if (_g.DK.Data is not null)
                Scatter(scratch.LeftSum, _a.Scale, rows, 0, seen, _g.DK, _a.HeadDim);
            if (_g.DV.Data is not null)
                Scatter(scratch.RightSum, T.One, rows, 0, seen, _g.DV, _a.HeadDim);
        }
    }
}
