using System.Collections.Concurrent;
using System.Runtime.InteropServices;
using System.Text;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// Byte-level BPE (GPT-2, Llama 3, Qwen): NFC where the file says so, a split into words, byte
/// pairs merged inside each. The vocabulary writes bytes as printable characters: the printable
/// ones of Latin-1 as themselves, the others from U+0100 on.
/// </summary>
internal sealed class ByteLevelTokenizer : Tokenizer
{
    private const int MaxKept = 1 << 16;

    private static readonly char[] s_charOfByte = CharOfByte();

    private readonly WordMerges _merges;
    private readonly Splitter[] _splitters;
    private readonly bool _prefixSpace;
    private readonly byte[] _bytes;
    private readonly int[] _ends;
    private readonly ConcurrentBag<Scratch> _idle = [];

    // One for each thread at work; kept for the next.
    private sealed class Scratch(int levels)
    {
        public readonly List<int>[] Ends =
            [.. Enumerable.Range(0, levels).Select(_ => new List<int>())];

        public byte[] Bytes = new byte[256];
        public char[] Letters = new char[256];
    }

    public ByteLevelTokenizer(TokenizerFile file, TokenizerConfig? config, string path)
        : base(file, config, path)
    {
        _merges = new WordMerges(file.Vocabulary, file.Merges, file.IgnoreMerges);
        _splitters = [.. file.Splitters];
        _prefixSpace = file.OnlyByteLevel && config is not null
            ? config.PrefixSpace ?? false : file.PrefixSpace;
        (_bytes, _ends) = TokenBytes();
    }

    private protected override void EncodePiece(
        ReadOnlySpan<char> piece, bool atStart, List<int> ids)
    {
        if (!_idle.TryTake(out var scratch)) scratch = new Scratch(_splitters.Length);
        if (_prefixSpace && piece[0] != ' ') piece = string.Concat(" ", piece);
        Split(piece, 0, scratch, ids);
        if (scratch.Bytes.Length <= MaxKept) _idle.Add(scratch);
    }

    private void Split(ReadOnlySpan<char> text, int level, Scratch scratch, List<int> ids)
    {
        if (level == _splitters.Length)
        {
            var word = Letters(text, scratch);
            if (!_merges.Whole(word, ids)) _merges.Encode(word, ids);
            return;
        }
        var ends = scratch.Ends[level];
        ends.Clear();
        _splitters[level].Cut(text, ends);
        int start = 0;
        foreach (int end in CollectionsMarshal.AsSpan(ends))
        {
            Split(text[start..end], level + 1, scratch, ids);
            start = end;
        }
        if (ends.Capacity > MaxKept) scratch.Ends[level] = [];
    }

    // A lone surrogate becomes U+FFFD, as in Hugging Face's UTF-8.
    private static ReadOnlySpan<char> Letters(ReadOnlySpan<char> word, Scratch scratch)
    {
        int most = Encoding.UTF8.GetMaxByteCount(word.Length);
        if (scratch.Bytes.Length < most)
            (scratch.Bytes, scratch.Letters) = (new byte[most], new char[most]);
        int count = Encoding.UTF8.GetBytes(word, scratch.Bytes);
        for (int i = 0; i < count; i++) scratch.Letters[i] = s_charOfByte[scratch.Bytes[i]];
        return scratch.Letters.AsSpan(0, count);
    }

    private protected override string DecodeTokens(ReadOnlySpan<int> ids)
    {
        int length = 0;
        foreach (int id in ids) length += Bytes(id).Length;
        var bytes = new byte[length];
        var rest = bytes.AsSpan();
        foreach (int id in ids)
        {
            var token = Bytes(id);
            token.CopyTo(rest);
            rest = rest[token.Length..];
        }
        return Encoding.UTF8.GetString(bytes);
    }

    private ReadOnlySpan<byte> Bytes(int id) => id < 0 || id >= _ends.Length ? []
        : _bytes.AsSpan((id == 0 ? 0 : _ends[id - 1]).._ends[id]);

    private (byte[] Bytes, int[] Ends) TokenBytes()
    {
        var names = new string?[Size];
        foreach (var (name, id) in Vocabulary) names[id] = name;
        foreach (var token in Added) names[token.Id] = token.Content;
        var byteOfChar = new Dictionary<char, byte>();
        for (int b = 0; b < 256; b++) byteOfChar[s_charOfByte[b]] = (byte)b;
        using var all = new MemoryStream();
        var ends = new int[Size];
        for (int id = 0; id < Size; id++)
        {
            // A name with any other character, as only added tokens have, stands for itself.
            string name = names[id] ?? "";
            if (name.All(byteOfChar.ContainsKey))
                foreach (char c in name) all.WriteByte(byteOfChar[c]);
            else
                all.Write(Encoding.UTF8.GetBytes(name));
            ends[id] = (int)all.Length;
        }
        return (all.ToArray(), ends);
    }

    private static char[] CharOfByte()
    {
        var map = new char[256];
        int next = 0x100;
        for (int b = 0; b < 256; b++)
            map[b] = b is (>= '!' and <= '~') or (>= 0xA1 and <= 0xAC) or (>= 0xAE and <= 0xFF)
                ? (char)b : (char)next++;
        return map;
    }
}
