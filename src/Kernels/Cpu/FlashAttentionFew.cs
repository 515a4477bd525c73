namespace MiniCpmNative.Kernels.Cpu;

internal static unsafe partial class FlashAttention<TLanes, TVector, T>
{
    /// <summary>
    /// The same for few lanes, as when a token follows those in a cache: a tile would be mostly
    /// idle, so each lane takes its own products with the keys, along the head. Keys are read once
    /// for all lanes, from the caches nearby.
    /// </summary>
    private static void SumFew(in AttentionArguments<T> a, in AttentionBlock block,
        in LaneRows<T> rows, in AttentionScratch<T> scratch)
    {
        int dim = a.HeadDim;
        rows.Limits(block, a.Causal, scratch.Limits, Width);
        new Span<T>(scratch.Max, Width).Fill(T.NegativeInfinity);
        new Span<T>(scratch.Sum, Width).Clear();
        // Sums of the lanes one after the other, [lanes, headDim].
        new Span<T>(scratch.LeftSum, rows.Lanes * dim).Clear();
        T* k = a.K + (block.KeyStart * a.KStride) + ((nint)block.KvHead * dim);
        T* v = a.V + (block.KeyStart * a.VStride) + ((nint)block.KvHead * dim);
        T factor = ToBinary(a.Scale);
        int end = scratch.Limits[rows.Lanes - 1];
        for (int first = 0; first < end; first += AttentionScratch<T>.Depth)
        {
            for (int lane = 0; lane < rows.Lanes; lane++)
            {
                int keys = Math.Min(AttentionScratch<T>.Depth, scratch.Limits[lane] - first);
                if (keys <= 0) continue;
                T* q = rows.Row(a.Q, a.QStride, dim, lane);
                T keep = Weigh(scratch, lane, q, k + (first * a.KStride), a.KStride, keys, dim,
                    factor);
                AddRows(scratch.LeftSum + ((nint)lane * dim), keep, scratch.Scores,
                    v + (first * a.VStride), a.VStride, keys, dim);
            }
        }

        for (int lane = 0; lane < rows.Lanes; lane++)
        {
            T sum = scratch.Sum[lane];
            a.Lse[rows.Statistic(lane, a.Heads)] = sum == T.Zero
                ? T.NegativeInfinity
                : T.FusedMultiplyAdd(scratch.Max[lane], a.Scale, T.Log(sum));
            T* o = rows.Row(a.O, a.OStride, dim, lane), from = scratch.LeftSum + ((nint)lane * dim);
            T scale = sum == T.Zero ? T.Zero : T.One / sum;
            for (int i = 0; i < dim; i++) o[i] = from[i] * scale;
        }
    }

    // Leaves exp(scale * (q k - max)) of some keys in Scores; returns what the lane's sums so far
    // are to be multiplied by.
    private static T Weigh(in AttentionScratch<T> scratch, int lane, T* q, T* key, nint stride,
        int keys, int dim, T factor)
    {
        T* scores = scratch.Scores;
        T before = scratch.Max[lane], max = before;
        for (int i = 0; i < keys; i++)
        {
            scores[i] = Dot(q, key + (i * stride), dim);
            max = T.Max(max, scores[i]);
        }

        for (int i = keys; i % TLanes.Count != 0; i++) scores[i] = T.NegativeInfinity;
        TVector below = TLanes.Broadcast(-max), factors = TLanes.Broadcast(factor);
        TVector sums = default;
        for (int i = 0; i < keys; i += TLanes.Count)
        {
            TVector p = Exp2(TLanes.Multiply(TLanes.Add(TLanes.Load(scores + i), below), factors));
            TLanes.Store(scores + i, p);
            sums = TLanes.Add(sums, p);
        }

        T keep = T.Exp2((before - max) * factor);
        scratch.Max[lane] = max;
        scratch.Sum[lane] = T.FusedMultiplyAdd(scratch.Sum[lane], keep, TLanes.Sum(sums));
        return keep;
    }

    // sum[headDim] = sum * keep + weights[keys] rows[keys, headDim].
    private static void AddRows(
        T* sum, T keep, T* weights, T* rows, nint stride, int keys, int dim)
    {
        int d = 0;
        TVector kept = TLanes.Broadcast(keep);
        for (; d + TLanes.Count <= dim; d += TLanes.Count)
        {
            // Two sums, so that one product need not wait for another.
            TVector even = TLanes.Multiply(TLanes.Load(sum + d), kept), odd = default;
            int i = 0;
            for (; i + 2 <= keys; i += 2)
            {
                T* row = rows + (i * stride) + d;
                even = TLanes.Fma(TLanes.Broadcast(weights[i]), TLanes.Load(row), even);
                odd = TLanes.Fma(
                    TLanes.Broadcast(weights[i + 1]), TLanes.Load(row + stride), odd);
            }

            if (i < keys)
                even = TLanes.Fma(TLanes.Broadcast(weights[i]),
                    TLanes.Load(rows + (i * stride) + d), even);
            TLanes.Store(sum + d, TLanes.Add(even, odd));
        }

        for (; d < dim; d++)
        {
            T total = sum[d] * keep;
            for (int i = 0; i < keys; i++)
                total = T.FusedMultiplyAdd(weights[i], rows[(i * stride) + d], total);
            sum[d] = total;
        }
    }
}
