using System.Numerics;
using System.Runtime.CompilerServices;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>The element-wise parts: masks, softmax and its gradient.</summary>
internal static unsafe partial class FlashAttention<TLanes, TVector, T>
{
    /// <summary>scale * log2(e), so that exp(scale * s) = 2^(s * factor).</summary>
    private static T ToBinary(T scale) =>
        T.CreateTruncating(double.CreateTruncating(scale) * 1.4426950408889634);

    /// <summary>Sets scores[key, lane] to -infinity for keys from the lane's limit on.</summary>
    private static void MaskKeys(T* scores, int firstKey, int keys, int* limits)
    {
        for (int lane = 0; lane < Width; lane++)
        {
            for (int key = Math.Max(0, limits[lane] - firstKey); key < keys; key++)
                scores[((nint)key * Width) + lane] = T.NegativeInfinity;
        }
    }

    /// <summary>
    /// Running softmax of a tile s[keys, Width] of raw q . k: s becomes p = exp(scale * (s - max))
    /// under the new maximum, Sum takes the new terms in, Keep gets what earlier sums shrink by.
    /// </summary>
    private static void Softmax(in AttentionScratch<T> scratch, int keys, T factor)
    {
        TVector scale = TLanes.Broadcast(factor), minusOne = TLanes.Broadcast(-T.One);
        TVector lowest = Constant(typeof(T) == typeof(float) ? float.MinValue : double.MinValue);
        for (int v = 0; v < Width; v += TLanes.Count)
        {
            T* s = scratch.Scores + v;
            TVector before = TLanes.Load(scratch.Max + v);
            TVector max = before;
            for (int key = 0; key < keys; key++)
                max = TLanes.Max(TLanes.Load(s + ((nint)key * Width)), max);
            TLanes.Store(scratch.Max + v, max);
            // Where nothing was visible yet the maximum is -infinity; 0 in its place gives p = 0.
            TVector minus = TLanes.ZeroBelow(max, lowest, TLanes.Multiply(max, minusOne));
            TVector keep = Exp2(TLanes.Multiply(TLanes.Add(before, minus), scale));
            TVector sum = default;
            for (int key = 0; key < keys; key++)
            {
                T* at = s + ((nint)key * Width);
                TVector p = Exp2(TLanes.Multiply(TLanes.Add(TLanes.Load(at), minus), scale));
                TLanes.Store(at, p);
                sum = TLanes.Add(sum, p);
            }

            TLanes.Store(scratch.Keep + v, keep);
            TLanes.Store(scratch.Sum + v, TLanes.Fma(TLanes.Load(scratch.Sum + v), keep, sum));
        }
    }

    /// <summary>
    /// -lse / scale as a sum of two numbers, so that p = exp(scale * (s + High + Low)) keeps its
    /// precision at large logits. 0 where no key was visible, as p = exp(-infinity) = 0 is wanted
    /// there.
    /// </summary>
    private static (T High, T Low) Offset(T lse, T scale)
    {
        if (T.IsNegativeInfinity(lse)) return (T.Zero, T.Zero);
        T high = -lse / scale;
        return (high, -T.FusedMultiplyAdd(high, scale, lse) / scale);
    }

    /// <summary>
    /// ScoreGradients[key, lane] becomes p * (dp - delta), p from raw scores; queries as lanes.
    /// </summary>
    private static void QueryScoreGradients(in AttentionScratch<T> scratch, int keys, T factor)
    {
        TVector scale = TLanes.Broadcast(factor), minusOne = TLanes.Broadcast(-T.One);
        for (int v = 0; v < Width; v += TLanes.Count)
        {
            TVector high = TLanes.Load(scratch.OffsetsHigh + v);
            TVector low = TLanes.Load(scratch.OffsetsLow + v);
            TVector minusDelta = TLanes.Multiply(TLanes.Load(scratch.Deltas + v), minusOne);
            for (int key = 0; key < keys; key++)
            {
                nint at = ((nint)key * Width) + v;
                TVector x = TLanes.Add(TLanes.Add(TLanes.Load(scratch.Scores + at), high), low);
                TVector p = Exp2(TLanes.Multiply(x, scale));
                TVector dp = TLanes.Add(TLanes.Load(scratch.ScoreGradients + at), minusDelta);
                TLanes.Store(scratch.ScoreGradients + at, TLanes.Multiply(p, dp));
            }
        }
    }

    /// <summary>s[lane] becomes exp(scale * s - lse); one query, keys as lanes.</summary>
    private static void Probabilities(T* s, T factor, in AttentionQuery<T> query)
    {
        TVector high = TLanes.Broadcast(query.OffsetHigh), low = TLanes.Broadcast(query.OffsetLow);
        for (int v = 0; v < Width; v += TLanes.Count)
        {
            TVector x = TLanes.Add(TLanes.Add(TLanes.Load(s + v), high), low);
            TLanes.Store(s + v, Exp2(TLanes.Multiply(x, TLanes.Broadcast(factor))));
        }
    }

    /// <summary>dp[lane] becomes p * (dp - delta); one query, keys as lanes.</summary>
    private static void KeyScoreGradients(T* dp, T* p, T delta)
    {
        for (int v = 0; v < Width; v += TLanes.Count)
        {
            TVector difference = TLanes.Add(TLanes.Load(dp + v), TLanes.Broadcast(-delta));
            TLanes.Store(dp + v, TLanes.Multiply(TLanes.Load(p + v), difference));
        }
    }

    /// <summary>tile[row, lane] *= factors[lane].</summary>
    private static void ScaleLanes(T* tile, T* factors, int rows)
    {
        for (int v = 0; v < Width; v += TLanes.Count)
        {
            TVector factor = TLanes.Load(factors + v);
            for (int row = 0; row < rows; row++)
            {
                T* at = tile + ((nint)row * Width) + v;
                TLanes.Store(at, TLanes.Multiply(TLanes.Load(at), factor));
            }
        }
    }

    /// <summary>sum_d x[d] * y[d].</summary>
    private static T Dot(T* x, T* y, int n)
    {
        TVector sums = default;
        int i = 0;
        for (; i + TLanes.Count <= n; i += TLanes.Count)
            sums = TLanes.Fma(TLanes.Load(x + i), TLanes.Load(y + i), sums);
        T sum = TLanes.Sum(sums);
        for (; i < n; i++) sum = T.FusedMultiplyAdd(x[i], y[i], sum);
        return sum;
    }

    /// <summary>
    /// 2^x: x = n + f with |f| at most 1/2, Taylor series of 2^f (to the last bit of T), times 2^n.
    /// Not a number stays so; below the smallest normal numbers the result is 0.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    internal static TVector Exp2(TVector x)
    {
        bool single = typeof(T) == typeof(float);
        TVector limit = Constant(single ? -125 : -1021);
        // Adding 1.5 * 2^(bits of the fraction) rounds to an integer and leaves it in the low bits.
        TVector magic = Constant(single ? 12582912.0 : 6755399441055744.0);
        TVector inRange = TLanes.Max(limit, x);
        TVector shifted = TLanes.Add(inRange, magic);
        TVector minusOne = Constant(-1);
        TVector n = TLanes.Fma(magic, minusOne, shifted);
        TVector f = TLanes.Fma(n, minusOne, inRange);
        TVector p;
        if (single)
        {
            p = Constant(1.525273380405984e-05);
        }
        else
        {
            p = Constant(1.3691488853904128e-12);
            p = TLanes.Fma(p, f, Constant(2.567843599348821e-11));
            p = TLanes.Fma(p, f, Constant(4.445538271870812e-10));
            p = TLanes.Fma(p, f, Constant(7.054911620801122e-09));
            p = TLanes.Fma(p, f, Constant(1.0178086009239699e-07));
            p = TLanes.Fma(p, f, Constant(1.3215486790144309e-06));
            p = TLanes.Fma(p, f, Constant(1.525273380405984e-05));
        }

        p = TLanes.Fma(p, f, Constant(0.0001540353039338161));
        p = TLanes.Fma(p, f, Constant(0.0013333558146428443));
        p = TLanes.Fma(p, f, Constant(0.009618129107628477));
        p = TLanes.Fma(p, f, Constant(0.05550410866482158));
        p = TLanes.Fma(p, f, Constant(0.2402265069591007));
        p = TLanes.Fma(p, f, Constant(0.6931471805599453));
        p = TLanes.Fma(p, f, Constant(1));
        return TLanes.ZeroBelow(x, limit, TLanes.Multiply(p, TLanes.PowerOfTwo(shifted)));
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static TVector Constant(double value) => TLanes.Broadcast(T.CreateTruncating(value));
}
