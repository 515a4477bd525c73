namespace MiniCpmNative.Kernels.Cpu;

internal static unsafe partial class FlashAttention<TLanes, TVector, T>
{
    /// <summary>
    /// o and lse of blocks of queries. 4 * headDim flops per visible (query, key) pair.
    /// </summary>
    public struct Output : IRangeBody
    {
        // A tile costs as much for a few of its lanes as for all.
        private const int FewLanes = 3;

        public AttentionArguments<T> Arguments;

        public readonly void Run(int begin, int end, int worker)
        {
            var scratch =
                new AttentionScratch<T>(Arguments.Scratch, worker, Arguments.HeadDim, Width);
            for (int item = begin; item < end; item++)
            {
                var block = AttentionBlock.Locate(Arguments, item, lanesAreKeys: false, Width);
                var rows = LaneRows<T>.OfQueries(Arguments, block);
                if (Arguments.Cached && rows.Lanes * FewLanes <= Width)
                {
                    SumFew(Arguments, block, rows, scratch);
                    continue;
                }

                Sum(block, rows, scratch);
                Finish(rows, scratch);
            }
        }

        private readonly void Sum(
            in AttentionBlock block, in LaneRows<T> rows, in AttentionScratch<T> scratch)
        {
            AttentionArguments<T> a = Arguments;
            Gather(scratch.Left, rows, a.Q, a.QStride, a.HeadDim);
            rows.Limits(block, a.Causal, scratch.Limits, Width);
            new Span<T>(scratch.Max, Width).Fill(T.NegativeInfinity);
            new Span<T>(scratch.Sum, Width).Clear();

            T* k = a.K + (block.KeyStart * a.KStride) + ((nint)block.KvHead * a.HeadDim);
            T* v = a.V + (block.KeyStart * a.VStride) + ((nint)block.KvHead * a.HeadDim);
            T factor = ToBinary(a.Scale);
            int seenByAll = scratch.Limits[0], end = scratch.Limits[Width - 1];
            for (int first = 0; first < end; first += AttentionScratch<T>.Depth)
            {
                int keys = Math.Min(AttentionScratch<T>.Depth, end - first);
                T* key = k + (first * a.KStride);
                T* value = v + (first * a.VStride);
                Product(scratch.Scores, null, key, a.KStride, 1, keys, scratch.Left, a.HeadDim);
                if (first + keys > seenByAll) MaskKeys(scratch.Scores, first, keys, scratch.Limits);
                Softmax(scratch, keys, factor);
                T* keep = first == 0 ? null : scratch.Keep;
                Product(
                    scratch.LeftSum, keep, value, 1, a.VStride, a.HeadDim, scratch.Scores, keys);
            }
        }

        /// <summary>o = tile / sum, lse = scale * max + ln(sum).</summary>
        private readonly void Finish(in LaneRows<T> rows, in AttentionScratch<T> scratch)
        {
            AttentionArguments<T> a = Arguments;
            for (int lane = 0; lane < Width; lane++)
            {
                T sum = scratch.Sum[lane];
                scratch.Keep[lane] = T.One / sum;
                if (lane >= rows.Lanes) continue;
                a.Lse[rows.Statistic(lane, a.Heads)] = sum == T.Zero
                    ? T.NegativeInfinity
                    : T.FusedMultiplyAdd(scratch.Max[lane], a.Scale, T.Log(sum));
            }

            ScaleLanes(scratch.LeftSum, scratch.Keep, a.HeadDim);
            var target = new AttentionTarget<T> { Data = a.O, Stride = a.OStride };
            Scatter(scratch.LeftSum, T.One, rows, 0, rows.Lanes, target, a.HeadDim);
            for (int lane = 0; lane < rows.Lanes; lane++)
            {
                if (scratch.Sum[lane] == T.Zero)
                    new Span<T>(rows.Row(a.O, a.OStride, a.HeadDim, lane), a.HeadDim).Clear();
            }
        }
    }
}
