using System.Runtime.InteropServices;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels;

/// <summary>
/// The blocks of attention over packed sequences as a list that the host makes once per batch and
/// all layers use: a row for every <see cref="Rows"/> queries (or keys) of a sequence, the longest
/// work first, so that none of it starts last. A row is eight numbers: the sequence's first query
/// token, its queries, its first key token, its keys, its number, the tile's first query (or key)
/// within it, 0, 0. Kernels of smaller tiles take a row for several.
/// </summary>
public static class AttentionTiles
{
    /// <summary>Queries, or keys, of a row.</summary>
    public const int Rows = KernelConstants.AttentionTileRows;

    /// <summary>Numbers of a row.</summary>
    public const int Fields = 8;

    /// <summary>Rows of the list of sequences that start there.</summary>
    public static int Count(ReadOnlySpan<int> starts)
    {
        int count = 0;
        for (int s = 1; s < starts.Length; s++)
            count += (Math.Max(0, starts[s] - starts[s - 1]) + Rows - 1) / Rows;
        return count;
    }

    /// <summary>
    /// Writes the list of query tiles, or of key tiles; into has Count(starts) * Fields numbers.
    /// </summary>
    /// <exception cref="ShapeException">Starts do not rise from 0, or are not as many.</exception>
    public static void Fill(Span<int> into, ReadOnlySpan<int> startsQ, ReadOnlySpan<int> startsK,
        bool causal, bool ofKeys)
    {
        Check("cu_seqlens_q", startsQ, startsQ.Length);
        Check("cu_seqlens_k", startsK, startsQ.Length);
        Span<Row> rows = MemoryMarshal.Cast<int, Row>(into);
        int at = 0;
        for (int s = 0; s + 1 < startsQ.Length; s++)
        {
            int queries = startsQ[s + 1] - startsQ[s], keys = startsK[s + 1] - startsK[s];
            int length = ofKeys ? keys : queries;
            for (int first = 0; first < length; first += Rows)
                rows[at++] = new(startsQ[s], queries, startsK[s], keys, s, first,
                    Work(queries, keys, first, causal, ofKeys), 0);
        }

        // Of equal ones the earlier first. Tiles of keys, which wait for their sequence's earlier
        // ones in backward, stand apart; of queries a sequence's tiles stay together.
        rows.Sort((a, b) =>
            a.Work != b.Work ? b.Work.CompareTo(a.Work)
            : ofKeys && a.First != b.First ? a.First.CompareTo(b.First)
            : a.Sequence != b.Sequence ? a.Sequence.CompareTo(b.Sequence)
            : a.First.CompareTo(b.First));
        foreach (ref Row row in rows) row = row with { Work = 0 };
    }

    // Keys that the tile's last query sees, or queries that see the tile's first key.
    private static int Work(int queries, int keys, int first, bool causal, bool ofKeys)
    {
        if (!causal) return ofKeys ? queries : keys;
        int before = keys - queries;
        return ofKeys
            ? Math.Clamp(queries - (first - before), 0, queries)
            : Math.Clamp(Math.Min(queries, first + Rows) + before, 0, keys);
    }

    private static void Check(string name, ReadOnlySpan<int> starts, int count)
    {
        if (starts.Length != count)
            throw new ShapeException(
                $"attention: {name} has {starts.Length} numbers, expected {count}");
        for (int s = 0; s < starts.Length; s++)
            if (starts[s] < (s == 0 ? 0 : starts[s - 1]) || (s == 0 && starts[s] > 0))
                throw new ShapeException(
                    $"attention: {name}[{s}] is {starts[s]}, expected to rise from 0");
    }

    private readonly record struct Row(int FirstToken, int Queries, int FirstKeyToken, int Keys,
        int Sequence, int First, int Work, int Unused);
}
