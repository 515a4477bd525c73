namespace MiniCpmNative.Kernels.Cpu;

internal static unsafe partial class FlashAttention<TLanes, TVector, T>
{
    /// <summary>
    /// dq, dk and dv of one key head of a sequence, one query head after another: q k^T and dO v^T
    /// of a tile, there for dk and dv, serve dq too, 10 * headDim flops per visible (query, key)
    /// pair where QueryGradients and KeyGradients take 14. All sums are theirs, in the same order,
    /// and so are the bits. dq of a head and, where heads share keys, dk and dv of all keys are
    /// kept in scratch memory.
    /// </summary>
    public struct HeadGradients : IRangeBody
    {
        public AttentionArguments<T> Arguments;
        public AttentionGradients<T> Gradients;

        /// <summary>
        /// Most queries of a sequence, and most keys where groups of heads share them, else 0.
        /// </summary>
        public int MostQueries, KeptKeys;

        public readonly void Run(int begin, int end, int worker)
        {
            AttentionArguments<T> a = Arguments;
            byte* memory = a.Scratch
                + (worker * AttentionHeadScratch<T>.Bytes(a.HeadDim, Width, MostQueries, KeptKeys));
            var scratch = new AttentionScratch<T>(memory, 0, a.HeadDim, Width);
            var room =
                new AttentionHeadScratch<T>(memory, a.HeadDim, Width, MostQueries, KeptKeys);
            new Span<T>(scratch.Keep, Width).Fill(T.One);
            for (int item = begin; item < end; item++)
            {
                int sequence = item / a.KvHeads, group = a.Heads / a.KvHeads;
                for (int i = 0; i < group; i++) Head(sequence, item % a.KvHeads, i, scratch, room);
            }
        }

        private readonly void Head(
            int sequence, int kvHead, int member, in AttentionScratch<T> scratch,
            in AttentionHeadScratch<T> room)
        {
            AttentionArguments<T> a = Arguments;
            int group = a.Heads / a.KvHeads, head = (kvHead * group) + member;
            var tiles = new KeyTiles(a, Gradients);
            var block = AttentionBlock.KeyBlock(a, sequence, kvHead, 0, Width);
            tiles.Prepare(block, head, 0, block.Queries, room.Queries);
            nint columns = (a.HeadDim + Width - 1) / Width;
            new Span<T>(room.DQ, checked((int)(columns * block.Queries * Width))).Clear();
            for (int first = 0; first < block.Keys; first += Width)
            {
                block = AttentionBlock.KeyBlock(a, sequence, kvHead, first, Width);
                AttentionScratch<T> sums = room.WithSums(scratch, first / Width);
                int seen = block.SeenLanes(a.Causal, out int from);
                if (seen > 0)
                {
                    tiles.Load(block, sums);
                    LoadRows(block, room.Keys);
                    T* keep = member == 0 ? null : sums.Keep;
                    for (int i = from; i < block.Queries; i += AttentionScratch<T>.Depth)
                    {
                        int queries = Math.Min(AttentionScratch<T>.Depth, block.Queries - i);
                        tiles.Add(block, sums, head, i, queries, room.Queries + i, keep);
                        keep = sums.Keep;
                        AddQueries(block, sums, room, i, queries, seen);
                    }
                }

                if (member == group - 1) tiles.Store(block, sums, seen);
            }

            Store(block, head, room.DQ);
        }

        /// <summary>
        /// The block's keys as they lie, Width columns at a time: [columns / Width][Width][Width].
        /// </summary>
        private readonly void LoadRows(in AttentionBlock block, T* to)
        {
            AttentionArguments<T> a = Arguments;
            var rows = LaneRows<T>.OfKeys(block);
            for (int lane = 0; lane < block.Lanes; lane++)
            {
                T* row = rows.Row(a.K, a.KStride, a.HeadDim, lane);
                for (int d = 0; d < a.HeadDim; d += Width)
                {
                    int count = Math.Min(Width, a.HeadDim - d);
                    var into = new Span<T>(to + (((nint)d + lane) * Width), Width);
                    new ReadOnlySpan<T>(row + d, count).CopyTo(into);
                    into[count..].Clear();
                }
            }
        }

        /// <summary>dq of some queries, [columns / Width][queries][Width], plus ds k.</summary>
        private readonly void AddQueries(
            in AttentionBlock block, in AttentionScratch<T> scratch,
            in AttentionHeadScratch<T> room, int query, int queries, int seen)
        {
            T* keys = room.Keys;
            T* dq = room.DQ + ((nint)query * Width);
            for (int d = 0; d < Arguments.HeadDim; d += Width)
            {
                Product(dq, scratch.Keep, scratch.ScoreGradients, Width, 1, queries, keys, seen);
                keys += (nint)Width * Width;
                dq += (nint)block.Queries * Width;
            }
        }

        private readonly void Store(in AttentionBlock block, int head, T* dq)
        {
            AttentionTarget<T> target = Gradients.DQ;
            int dim = Arguments.HeadDim;
            TVector scale = TLanes.Broadcast(Arguments.Scale);
            for (int i = 0; i < block.Queries; i++)
            {
                T* row = target.Data + ((block.QueryStart + i) * target.Stride)
                    + ((nint)head * dim);
                for (int d = 0; d < dim; d += Width)
                {
                    T* from = dq + ((((nint)d / Width * block.Queries) + i) * Width);
                    int count = Math.Min(Width, dim - d), at = 0;
                    for (; at + TLanes.Count <= count; at += TLanes.Count)
                    {
                        T* to = row + d + at;
                        TVector value = TLanes.Multiply(TLanes.Load(from + at), scale);
                        TLanes.Store(to,
                            target.Accumulate ? TLanes.Add(value, TLanes.Load(to)) : value);
                    }

                    for (; at < count; at++)
                    {
                        T value = Arguments.Scale * from[at];
                        row[d + at] = target.Accumulate ? row[d + at] + value : value;
                    }
                }
            }
        }
    }
}
