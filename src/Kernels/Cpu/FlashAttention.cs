using System.Numerics;
using System.Runtime.Intrinsics;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// Attention without a score matrix: o = softmax(scale * q k^T + mask) v, tiled over keys with a
/// running maximum and sum (Milakov and Gimelshein 2018; Dao et al. 2022), and its gradients from
/// lse. A query that sees no key gets o = 0, lse = -infinity and no gradient.
///
/// Forward works on blocks of queries. Backward works on whole heads where there are enough of them
/// for the threads, in five products for each tile; else on blocks of queries for dq and on blocks
/// of keys for dk and dv, recomputing q k^T and dO v^T: seven products. Every output element has
/// one owner that sums in a fixed order, the same in either way: the result does not depend on the
/// number of threads. A block's lanes are (query, head of the group) pairs, so that grouped heads
/// share key reads. Causal attention visits only the tiles below the diagonal.
/// </summary>
public static unsafe class FlashAttention
{
    /// <summary>Bytes of scratch that forward needs on this many threads.</summary>
    public static long ScratchBytes<T>(int headDim, int threads)
        where T : unmanaged, IBinaryFloatingPointIeee754<T> =>
        AttentionScratch<T>.Bytes(headDim, Lanes<T>()) * threads;

    /// <summary>Bytes of scratch that backward needs on this many threads.</summary>
    /// <exception cref="ShapeException">As for <see cref="Backward"/>.</exception>
    public static long BackwardScratchBytes<T>(in AttentionArguments<T> a, int threads)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        Check(a);
        var (queries, kept) = LongestSequence(a);
        return Math.Max(
            ScratchBytes<T>(a.HeadDim, threads),
            HasEnoughHeads(a, threads)
                ? AttentionHeadScratch<T>.Bytes(a.HeadDim, Lanes<T>(), queries, kept) * threads
                : 0);
    }

    /// <summary>Computes o and lse.</summary>
    /// <exception cref="ShapeException">
    /// Sizes, strides, sequence starts or scale make no sense.
    /// </exception>
    public static void Forward<T>(Workers workers, in AttentionArguments<T> arguments)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        if (Vector512.IsHardwareAccelerated)
            Forward<Lanes512<T>, Vector512<T>, T>(workers, arguments);
        else
            Forward<Lanes256<T>, Vector256<T>, T>(workers, arguments);
    }

    /// <summary>Computes the gradients asked for from q, k, v, o, lse and dO.</summary>
    /// <exception cref="ShapeException">
    /// Sizes, strides, sequence starts or scale make no sense.
    /// </exception>
    public static void Backward<T>(
        Workers workers, in AttentionArguments<T> arguments, in AttentionGradients<T> gradients)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        if (Vector512.IsHardwareAccelerated)
            Backward<Lanes512<T>, Vector512<T>, T>(workers, arguments, gradients);
        else
            Backward<Lanes256<T>, Vector256<T>, T>(workers, arguments, gradients);
    }

    internal static void Forward<TLanes, TVector, T>(Workers workers, in AttentionArguments<T> a)
        where TLanes : struct, ILanes<TVector, T>
        where TVector : struct
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        Check(a);
        RequireRow("o", a.OStride, (long)a.Heads * a.HeadDim);
        int blocks = QueryBlocks(a, FlashAttention<TLanes, TVector, T>.Width);
        workers.For(blocks, new FlashAttention<TLanes, TVector, T>.Output { Arguments = a });
    }

    internal static void Backward<TLanes, TVector, T>(
        Workers workers, in AttentionArguments<T> a, in AttentionGradients<T> g)
        where TLanes : struct, ILanes<TVector, T>
        where TVector : struct
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        Check(a);
        long row = (long)a.Heads * a.HeadDim, keyRow = (long)a.KvHeads * a.HeadDim;
        RequireRow("o", a.OStride, row);
        RequireRow("do", g.DOStride, row);
        if (g.DQ.Data is not null) RequireRow("dq", g.DQ.Stride, row);
        if (g.DK.Data is not null) RequireRow("dk", g.DK.Stride, keyRow);
        if (g.DV.Data is not null) RequireRow("dv", g.DV.Stride, keyRow);
        bool keys = g.DK.Data is not null || g.DV.Data is not null;
        if (keys && g.DQ.Data is not null && HasEnoughHeads(a, workers.Count))
        {
            var (queries, kept) = LongestSequence(a);
            workers.For(
                a.Sequences * a.KvHeads,
                new FlashAttention<TLanes, TVector, T>.HeadGradients
                {
                    Arguments = a,
                    Gradients = g,
                    MostQueries = queries,
                    KeptKeys = kept,
                });
            return;
        }

        int width = FlashAttention<TLanes, TVector, T>.Width;
        if (g.DQ.Data is not null)
        {
            workers.For(
                QueryBlocks(a, width),
                new FlashAttention<TLanes, TVector, T>.QueryGradients
                {
                    Arguments = a,
                    Gradients = g
                });
        }

        if (keys)
        {
            workers.For(
                KeyBlocks(a, width),
                new FlashAttention<TLanes, TVector, T>.KeyGradients
                {
                    Arguments = a,
                    Gradients = g
                });
        }
    }

    private static int Lanes<T>()
        where T : unmanaged, IBinaryFloatingPointIeee754<T> =>
        Vector512.IsHardwareAccelerated
            ? FlashAttention<Lanes512<T>, Vector512<T>, T>.Width
            : FlashAttention<Lanes256<T>, Vector256<T>, T>.Width;

    /// <summary>
    /// Whether five products over whole heads end before seven over blocks. Threads that take the
    /// next head when they are done are done with all of them after total / threads + (1 - 1 /
    /// threads) * largest at most (Graham 1969); blocks are many and small.
    /// </summary>
    private static bool HasEnoughHeads<T>(in AttentionArguments<T> a, int threads)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        double total = 0, largest = 0;
        for (int s = 0; s < a.Sequences; s++)
        {
            double pairs = (double)(a.CuSeqlensQ[s + 1] - a.CuSeqlensQ[s])
                * (a.CuSeqlensK[s + 1] - a.CuSeqlensK[s]);
            total += pairs * a.KvHeads;
            largest = Math.Max(largest, pairs);
        }

        return 5 * (total + ((threads - 1) * largest)) <= 7 * total;
    }

    /// <summary>
    /// Most queries of a sequence, and most keys where groups of heads share them, else 0.
    /// </summary>
    private static (int Queries, int KeptKeys) LongestSequence<T>(in AttentionArguments<T> a)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        int queries = 0, keys = 0;
        for (int s = 0; s < a.Sequences; s++)
        {
            queries = Math.Max(queries, a.CuSeqlensQ[s + 1] - a.CuSeqlensQ[s]);
            keys = Math.Max(keys, a.CuSeqlensK[s + 1] - a.CuSeqlensK[s]);
        }

        return (queries, a.Heads > a.KvHeads ? keys : 0);
    }

    /// <summary>
    /// Blocks of up to width (query, head of the group) pairs over all sequences and key heads.
    /// </summary>
    private static int QueryBlocks<T>(in AttentionArguments<T> a, int width)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        long blocks = 0;
        for (int s = 0; s < a.Sequences; s++)
            blocks += AttentionBlock.OfQueries(a, s, width) * (long)a.KvHeads;
        return checked((int)blocks);
    }

    private static int KeyBlocks<T>(in AttentionArguments<T> a, int width)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        long blocks = 0;
        for (int s = 0; s < a.Sequences; s++)
            blocks += AttentionBlock.OfKeys(a, s, width) * (long)a.KvHeads;
        return checked((int)blocks);
    }

    private static void Check<T>(in AttentionArguments<T> a)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        if (a.KvHeads < 1 || a.Heads < 1 || a.Heads % a.KvHeads != 0)
        {
            throw new ShapeException(
                $"attention: {a.Heads} query heads are not a multiple of {a.KvHeads} key heads");
        }

        if (a.HeadDim < 1)
        {
            throw new ShapeException(
                $"attention: head dimension is {a.HeadDim}, expected 1 or more");
        }

        if (!(a.Scale > T.Zero) || T.IsInfinity(a.Scale))
            throw new ShapeException($"attention: scale is {a.Scale}, expected a number above 0");
        RequireRow("q", a.QStride, (long)a.Heads * a.HeadDim);
        RequireRow("k", a.KStride, (long)a.KvHeads * a.HeadDim);
        RequireRow("v", a.VStride, (long)a.KvHeads * a.HeadDim);
        RequireRising("cu_seqlens_q", a.CuSeqlensQ, a.Sequences);
        RequireRising("cu_seqlens_k", a.CuSeqlensK, a.Sequences);
    }

    private static void RequireRow(string name, nint stride, long row)
    {
        if (stride < row)
        {
            throw new ShapeException(
                $"attention: {name} has {stride} elements between tokens, expected {row} or more");
        }
    }

    private static void RequireRising(string name, int* starts, int sequences)
    {
        if (sequences > 0 && starts[0] < 0)
            throw new ShapeException($"attention: {name}[0] is {starts[0]}, expected 0 or more");
        for (int s = 0; s < sequences; s++)
        {
            if (starts[s + 1] < starts[s])
            {
                throw new ShapeException(
                    $"attention: {name}[{s + 1}] is {starts[s + 1]}, expected {starts[s]} or more");
            }
        }
    }
}
