using System.Runtime.InteropServices;
using Microsoft.ML.Tokenizers;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// Byte pair encoding of one word (Sennrich et al. 2016): while any two neighbours have a merge,
/// the pair of lowest rank, the leftmost of equals, becomes one token. A word is written in the
/// vocabulary's own letters; a letter without a token is left out.
///
/// Microsoft.ML.Tokenizers does it. Its time is quadratic in a word's length, so a word of more
/// than <see cref="LongWord"/> letters is merged here, in n log n, to the same ids; so is every
/// word where merges share a rank, which the package's list of merges cannot say.
/// </summary>
internal sealed class WordMerges
{
    /// <summary>The package's longest word, in UTF-16 units.</summary>
    public const int LongWord = 4096;

    private readonly Dictionary<string, int> _vocabulary;
    private readonly Dictionary<(int Left, int Right), Merge> _merges;
    private readonly bool _ignoreMerges;
    private readonly BpeTokenizer? _package;

    /// <param name="vocabulary">Every token and its id; no two share an id.</param>
    /// <param name="merges">In any order; the last of the same two tokens counts.</param>
    /// <param name="ignoreMerges">A word that is a token is left whole, whatever merges could
    /// reach.</param>
    public WordMerges(
        Dictionary<string, int> vocabulary, IReadOnlyList<Merge> merges, bool ignoreMerges = false)
    {
        (_vocabulary, _ignoreMerges) = (vocabulary, ignoreMerges);
        _merges = new(merges.Count);
        foreach (var merge in merges) _merges[(merge.Left, merge.Right)] = merge;
        var ranked = _merges.Values.OrderBy(merge => merge.Rank).ToArray();
        for (int i = 1; i < ranked.Length; i++)
            if (ranked[i].Rank == ranked[i - 1].Rank) return;
        var names = vocabulary.ToDictionary(pair => pair.Value, pair => pair.Key);
        _package = BpeTokenizer.Create(new BpeOptions(vocabulary)
        {
            // "a b", so a token with a space is out; no word has one, both spellings replace it.
            Merges = ranked.Select(merge => (names[merge.Left], names[merge.Right]))
                .Where(pair => !pair.Item1.Contains(' ') && !pair.Item2.Contains(' '))
                .Select(pair => $"{pair.Item1} {pair.Item2}"),
        });
    }

    /// <summary>Two tokens and what they become; the lowest rank goes first.</summary>
    public readonly record struct Merge(int Left, int Right, int Merged, int Rank);

    /// <summary>Whether a word is a token that is left whole, which is appended.</summary>
    public bool Whole(ReadOnlySpan<char> word, List<int> ids)
    {
        if (!_ignoreMerges || !_vocabulary.GetAlternateLookup<ReadOnlySpan<char>>()
            .TryGetValue(word, out int whole)) return false;
        ids.Add(whole);
        return true;
    }

    /// <summary>Appends the tokens that merging leaves of one word.</summary>
    public void Encode(ReadOnlySpan<char> word, List<int> ids)
    {
        if (_package is null || word.Length > LongWord) EncodeLong(word, ids);
        else EncodeByPackage(word, ids);
    }

    internal void EncodeByPackage(ReadOnlySpan<char> word, List<int> ids) =>
        ids.AddRange(_package!.EncodeToIds(
            word, considerPreTokenization: false, considerNormalization: false));

    // A candidate in the heap is rank and place. It is stale when the pair at its place has got
    // another rank since.
    internal void EncodeLong(ReadOnlySpan<char> word, List<int> ids)
    {
        var tokens = Letters(word);
        int count = tokens.Count;
        var pairs = new Merge?[count];
        var next = new int[count];
        var previous = new int[count];
        var heap = new PriorityQueue<int, (int Rank, int Place)>(count);
        for (int i = 0; i < count; i++)
        {
            next[i] = i + 1;
            previous[i] = i - 1;
            Look(i);
        }
        while (heap.TryDequeue(out int at, out var priority))
        {
            if (pairs[at] is not { } merge || merge.Rank != priority.Rank) continue;
            int gone = next[at];
            tokens[at] = merge.Merged;
            pairs[gone] = null;
            next[at] = next[gone];
            if (next[at] < count) previous[next[at]] = at;
            Look(at);
            if (previous[at] >= 0) Look(previous[at]);
        }
        for (int i = 0; i < count; i = next[i]) ids.Add(tokens[i]);

        void Look(int i)
        {
            pairs[i] = next[i] < count
                && _merges.TryGetValue((tokens[i], tokens[next[i]]), out var merge) ? merge : null;
            if (pairs[i] is { } found) heap.Enqueue(i, (found.Rank, i));
        }
    }

    private List<int> Letters(ReadOnlySpan<char> word)
    {
        var lookup = _vocabulary.GetAlternateLookup<ReadOnlySpan<char>>();
        var tokens = new List<int>(word.Length);
        for (int i = 0, width; i < word.Length; i += width)
        {
            width = i + 1 < word.Length && char.IsSurrogatePair(word[i], word[i + 1]) ? 2 : 1;
            if (lookup.TryGetValue(word.Slice(i, width), out int id)) tokens.Add(id);
        }
        return tokens;
    }
}
