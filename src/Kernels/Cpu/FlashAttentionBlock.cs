using System.Numerics;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// The part of attention that one work item owns: some lanes (query and head pairs, or keys) of one
/// sequence and key head. Counts and starts are tokens of the packed buffers.
/// </summary>
internal unsafe struct AttentionBlock
{
    public int Queries, Keys, QueryStart, KeyStart, KvHead;

    /// <summary>Keys from here on are masked.</summary>
    public int VisibleKeys;

    /// <summary>Keys that stand before the first query's own, where a mask is causal.</summary>
    public int Before;

    /// <summary>First lane of the block among the sequence's, and lanes in use.</summary>
    public int First, Lanes;

    public static int OfQueries<T>(in AttentionArguments<T> a, int sequence, int width)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        long queries = a.CuSeqlensQ[sequence + 1] - a.CuSeqlensQ[sequence];
        return checked((int)(((queries * (a.Heads / a.KvHeads)) + width - 1) / width));
    }

    public static int OfKeys<T>(in AttentionArguments<T> a, int sequence, int width)
        where T : unmanaged, IBinaryFloatingPointIeee754<T> =>
        (int)(((long)a.CuSeqlensK[sequence + 1] - a.CuSeqlensK[sequence] + width - 1) / width);

    /// <summary>The item-th block, counted over sequences, then key heads, then lanes.</summary>
    public static AttentionBlock Locate<T>(
        in AttentionArguments<T> a, int item, bool lanesAreKeys, int width)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        int sequence = 0, blocks;
        while (true)
        {
            blocks = lanesAreKeys ? OfKeys(a, sequence, width) : OfQueries(a, sequence, width);
            if (item < blocks * a.KvHeads) break;
            item -= blocks * a.KvHeads;
            sequence++;
        }

        int kvHead = item / blocks, first = item % blocks * width;
        AttentionBlock block = KeyBlock(a, sequence, kvHead, first, width);
        if (!lanesAreKeys)
            block.Lanes = Math.Min(width, (block.Queries * (a.Heads / a.KvHeads)) - first);
        return block;
    }

    /// <summary>Up to width keys of a sequence, from first on.</summary>
    public static AttentionBlock KeyBlock<T>(
        in AttentionArguments<T> a, int sequence, int kvHead, int first, int width)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        int keys = a.CuSeqlensK[sequence + 1] - a.CuSeqlensK[sequence];
        int queries = a.CuSeqlensQ[sequence + 1] - a.CuSeqlensQ[sequence];
        int visible = a.KeyLengths is null ? keys : Math.Clamp(a.KeyLengths[sequence], 0, keys);
        return new AttentionBlock
        {
            Queries = queries,
            Keys = keys,
            QueryStart = a.CuSeqlensQ[sequence],
            KeyStart = a.CuSeqlensK[sequence],
            KvHead = kvHead,
            VisibleKeys = visible,
            Before = (a.Cached ? visible : keys) - queries,
            First = first,
            Lanes = Math.Min(width, keys - first),
        };
    }

    /// <summary>
    /// How many of the block's keys, the first ones, some query sees,
    /// and the first query that does.
    /// </summary>
    public readonly int SeenLanes(bool causal, out int from)
    {
        from = causal ? Math.Clamp(First - Before, 0, Queries) : 0;
        return from == Queries ? 0 : Math.Clamp(VisibleKeys - First, 0, Lanes);
    }

    /// <summary>How many keys query token (within the sequence) sees.</summary>
    public readonly int KeysSeenBy(int token, bool causal) =>
        causal ? Math.Clamp(token + 1 + Before, 0, VisibleKeys) : VisibleKeys;
}

/// <summary>
/// Where the lanes of a block lie in memory: lane l is head HeadStart + (First + l) % Group of
/// token TokenStart + (First + l) / Group. Group is 1 for keys.
/// </summary>
internal readonly unsafe struct LaneRows<T>
    where T : unmanaged, IBinaryFloatingPointIeee754<T>
{
    private readonly int _tokenStart, _headStart, _group, _first;

    private LaneRows(int tokenStart, int headStart, int group, int first, int lanes)
    {
        (_tokenStart, _headStart, _group) = (tokenStart, headStart, group);
        (_first, Lanes) = (first, lanes);
    }

    public int Lanes { get; }

    public static LaneRows<T> OfQueries(in AttentionArguments<T> a, in AttentionBlock block)
    {
        int group = a.Heads / a.KvHeads;
        return new(block.QueryStart, block.KvHead * group, group, block.First, block.Lanes);
    }

    public static LaneRows<T> OfKeys(in AttentionBlock block) =>
        new(block.KeyStart, block.KvHead, 1, block.First, block.Lanes);

    /// <summary>The headDim elements of a lane.</summary>
    public T* Row(T* data, nint stride, int headDim, int lane)
    {
        (int token, int head) = Math.DivRem(_first + lane, _group);
        return data + ((_tokenStart + token) * stride) + ((nint)(_headStart + head) * headDim);
    }

    /// <summary>Index of a lane in lse[tokens, heads].</summary>
    public nint Statistic(int lane, int heads)
    {
        (int token, int head) = Math.DivRem(_first + lane, _group);
        return ((nint)(_tokenStart + token) * heads) + _headStart + head;
    }

    /// <summary>
    /// Keys that the query of each lane sees; rising. Lanes not in use repeat the last.
    /// </summary>
    public void Limits(in AttentionBlock block, bool causal, int* limits, int width)
    {
        for (int lane = 0; lane < width; lane++)
        {
            int token = (_first + Math.Min(lane, Lanes - 1)) / _group;
            limits[lane] = block.KeysSeenBy(token, causal);
        }
    }
}
