using System.Numerics;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Runtime.Intrinsics;
using System.Text;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// Byte pair encoding of one word (Sennrich et al. 2016, on bytes as in GPT-2): while any two
/// neighbours have a merge, the pair of lowest rank, the leftmost of equals, becomes one token.
///
/// Short words scan an array of ranks for each merge; long ones keep a heap of candidates, so that
/// a word of a megabyte takes n log n. Words of up to 16 UTF-16 units are looked up first in a
/// cache of one cache line each, 2 MB per scratch; a newer word takes the place of an older one.
/// Not here: dropout, unknown-token fusion over words,
/// continuing-subword prefixes (refused on load).
/// </summary>
internal sealed class BytePairs
{
    private const uint NoRank = uint.MaxValue;
    private const int ShortWord = 128;

    private readonly Slot[] _slots;
    private readonly int _shift;
    private readonly int[] _merged;
    private readonly int[] _bytes;
    private readonly uint[] _byteRanks = new uint[256 * 256];

    private struct Slot
    {
        public ulong Pair;
        public uint Rank;
    }

    /// <param name="bytes">Token of each single byte, -1 where the vocabulary has none.</param>
    /// <param name="merges">Left and right token and what they become, in order of rank.</param>
    public BytePairs(int[] bytes, IReadOnlyList<(int Left, int Right, int Merged)> merges)
    {
        _bytes = bytes;
        int capacity = (int)BitOperations.RoundUpToPowerOf2((uint)(merges.Count * 2) + 16);
        _shift = 64 - BitOperations.Log2((uint)capacity);
        _slots = new Slot[capacity];
        _slots.AsSpan().Fill(new Slot { Pair = ulong.MaxValue, Rank = NoRank });
        _merged = new int[merges.Count];
        for (int rank = 0; rank < merges.Count; rank++)
        {
            var (left, right, merged) = merges[rank];
            _merged[rank] = merged;
            ref var slot = ref Find(Pair(left, right));
            slot = new Slot { Pair = Pair(left, right), Rank = (uint)rank };
        }
        for (int i = 0; i < _byteRanks.Length; i++)
            _byteRanks[i] = bytes[i >> 8] < 0 || bytes[i & 255] < 0
                ? NoRank : Rank(bytes[i >> 8], bytes[i & 255]);
    }

    /// <summary>Memory of one encoding at a time: the cache and the working arrays.</summary>
    internal sealed class Scratch
    {
        internal readonly CacheLine[] Cache = new CacheLine[1 << CacheBits];
        internal byte[] Bytes = new byte[3 * ShortWord];
        internal readonly int[] Ids = new int[ShortWord];
        internal readonly uint[] Ranks = new uint[ShortWord];
    }

    private const int CacheBits = 15;
    private const int CachedChars = 16;
    private const int CachedIds = 7;

    [StructLayout(LayoutKind.Sequential, Size = 64)]
    internal struct CacheLine
    {
        public Vector256<ulong> Word;
        public Ids Tokens;
        public short Chars;
        public short Count;

        [InlineArray(CachedIds)]
        public struct Ids
        {
            private int _first;
        }
    }

    /// <summary>Appends the tokens of one word.</summary>
    public void Encode(ReadOnlySpan<char> word, Scratch scratch, List<int> ids)
    {
        if (word.Length > CachedChars)
        {
            Merge(word, scratch, ids);
            return;
        }
        Span<char> padded = stackalloc char[CachedChars];
        word.CopyTo(padded);
        var key = Vector256.Create<ushort>(MemoryMarshal.Cast<char, ushort>(padded)).AsUInt64();
        ulong hash = (key[0] * 0x9E3779B97F4A7C15) ^ (key[1] * 0xC2B2AE3D27D4EB4F);
        hash ^= hash >> 29;
        hash = ((hash + (ulong)word.Length) ^ (key[2] * 0x165667B19E3779F9)
            ^ (key[3] * 0xD6E8FEB86659FD93)) * 0x9E3779B97F4A7C15;
        ref var line = ref scratch.Cache[(int)(hash >> (64 - CacheBits))];
        if (line.Chars == word.Length && line.Word == key)
        {
            ids.AddRange(((ReadOnlySpan<int>)line.Tokens)[..line.Count]);
            return;
        }
        int before = ids.Count;
        Merge(word, scratch, ids);
        int count = ids.Count - before;
        if (count > CachedIds) return;
        line.Word = key;
        line.Chars = (short)word.Length;
        line.Count = (short)count;
        for (int i = 0; i < count; i++) line.Tokens[i] = ids[before + i];
    }

    private void Merge(ReadOnlySpan<char> word, Scratch scratch, List<int> ids)
    {
        var buffer = scratch.Bytes;
        if (word.Length * 3 > buffer.Length) buffer = new byte[Encoding.UTF8.GetByteCount(word)];
        var bytes = buffer.AsSpan(0, Encoding.UTF8.GetBytes(word, buffer));
        if (bytes.Length == 1)
        {
            if (_bytes[bytes[0]] >= 0) ids.Add(_bytes[bytes[0]]);
        }
        else if (bytes.Length <= ShortWord)
        {
            MergeShort(bytes, scratch, ids);
        }
        else
        {
            MergeLong(bytes, ids);
        }
    }

    private void MergeShort(ReadOnlySpan<byte> bytes, Scratch scratch, List<int> ids)
    {
        var tokens = scratch.Ids.AsSpan();
        var ranks = scratch.Ranks.AsSpan();
        int count = 0, last = 0;
        foreach (byte b in bytes)
        {
            if (_bytes[b] < 0) continue;
            if (count > 0) ranks[count - 1] = _byteRanks[(last << 8) | b];
            tokens[count++] = _bytes[b];
            last = b;
        }
        while (count > 1)
        {
            int at = 0;
            uint best = ranks[0];
            for (int i = 1; i < count - 1; i++)
            {
                if (ranks[i] >= best) continue;
                best = ranks[i];
                at = i;
            }
            if (best == NoRank) break;
            tokens[at] = _merged[best];
            tokens[(at + 2)..count].CopyTo(tokens[(at + 1)..]);
            if (at + 2 < count) ranks[(at + 1)..(count - 1)].CopyTo(ranks[at..]);
            count--;
            if (at > 0) ranks[at - 1] = Rank(tokens[at - 1], tokens[at]);
            if (at < count - 1) ranks[at] = Rank(tokens[at], tokens[at + 1]);
        }
        ids.AddRange(tokens[..count]);
    }

    // A candidate in the heap is rank and place. It is stale when the pair at its place has got
    // another rank since; a rank names its pair.
    private void MergeLong(ReadOnlySpan<byte> bytes, List<int> ids)
    {
        var tokens = new int[bytes.Length];
        int count = 0;
        foreach (byte b in bytes)
            if (_bytes[b] >= 0) tokens[count++] = _bytes[b];
        var ranks = new uint[count];
        var next = new int[count];
        var previous = new int[count];
        var heap = new PriorityQueue<int, ulong>(count);
        for (int i = 0; i < count; i++)
        {
            next[i] = i + 1;
            previous[i] = i - 1;
            Look(i);
        }
        while (heap.TryDequeue(out int at, out ulong priority))
        {
            uint rank = (uint)(priority >> 32);
            if (ranks[at] != rank) continue;
            int gone = next[at];
            tokens[at] = _merged[rank];
            ranks[gone] = NoRank;
            next[at] = next[gone];
            if (next[at] < count) previous[next[at]] = at;
            Look(at);
            if (previous[at] >= 0) Look(previous[at]);
        }
        for (int i = 0; i < count; i = next[i]) ids.Add(tokens[i]);

        void Look(int i)
        {
            ranks[i] = next[i] < count ? Rank(tokens[i], tokens[next[i]]) : NoRank;
            if (ranks[i] != NoRank) heap.Enqueue(i, ((ulong)ranks[i] << 32) | (uint)i);
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private uint Rank(int left, int right) => Find(Pair(left, right)).Rank;

    private static ulong Pair(int left, int right) => ((ulong)(uint)left << 32) | (uint)right;

    // The slot of the pair, or the empty one where it belongs: linear probing, at most half full.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private ref Slot Find(ulong pair)
    {
        var slots = _slots;
        int i = (int)((pair * 0x9E3779B97F4A7C15) >> _shift);
        while (slots[i].Pair != pair && slots[i].Pair != ulong.MaxValue)
            i = (i + 1) & (slots.Length - 1);
        return ref slots[i];
    }
}
