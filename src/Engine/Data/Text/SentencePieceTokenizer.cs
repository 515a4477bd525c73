using System.Buffers;
using System.Runtime.InteropServices;
using System.Text;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// SentencePiece BPE (Llama 2, MiniCPM): a section between added tokens is one word, its spaces
/// written "▁"; a letter without a token becomes the tokens of its bytes, or the unknown token.
/// Decoding is the file's: of tokenizer.json here, of tokenizer.model in
/// <see cref="SentencePieceModelTokenizer"/>.
/// </summary>
internal class SentencePieceTokenizer : Tokenizer
{
    private readonly WordMerges _merges;
    private readonly Dictionary<string, int> _letters;
    private readonly Dictionary<int, string> _bareLetters;
    private readonly SearchValues<char> _known;
    private readonly int[]? _byteIds;
    private readonly int _unknown;
    private readonly bool _fusesUnknown;

    // tokenizer.json's only.
    private readonly SectionMarks _marks;
    private readonly bool _readsBytes, _stripsSpace;

    /// <summary>tokenizer.json.</summary>
    public SentencePieceTokenizer(TokenizerFile file, TokenizerConfig? config, string path)
        : this(file, file.Vocabulary, config, path, file.IgnoreMerges)
    {
        (_marks, _readsBytes, _stripsSpace) = (file.Marks, file.ReadsBytes, file.StripsSpace);
        // transformers' LlamaTokenizerFast makes the post-processor anew from these.
        if (config?.AddsBegin is { } begin) Prefix = begin ? [Needed(BosId, "bos_token")] : [];
        if (config?.AddsEnd is { } end) Suffix = end ? [Needed(EosId, "eos_token")] : [];

        int Needed(int? id, string name) => id ?? throw new InputException(
            $"{path}: tokenizer_config.json asks for {name} around a text, but names none");
    }

    /// <param name="file">Either kind of file.</param>
    /// <param name="mergeable">The tokens that merge; ids above the vocabulary's are letters
    /// without a token.</param>
    /// <param name="config">tokenizer_config.json.</param>
    /// <param name="path">The file, for messages.</param>
    /// <param name="ignoreMerges">As of <see cref="WordMerges"/>.</param>
    private protected SentencePieceTokenizer(
        VocabularyFile file, Dictionary<string, int> mergeable, TokenizerConfig? config,
        string path, bool ignoreMerges) : base(file, config, path)
    {
        _letters = mergeable;
        _merges = new WordMerges(mergeable, file.Merges, ignoreMerges);
        int pieces = 1 + Vocabulary.Values.Max();
        _bareLetters = mergeable.Where(pair => pair.Value >= pieces)
            .ToDictionary(pair => pair.Value, pair => pair.Key);
        _known = SearchValues.Create([.. mergeable.Keys
            .Where(token => token.Length == 1).Select(token => token[0])]);
        if (file.ByteFallback)
            _byteIds = [.. Enumerable.Range(0, 256)
                .Select(value => Vocabulary[VocabularyFile.ByteToken(value)])];
        _unknown = file.Unknown is null ? -1 : Vocabulary[file.Unknown];
        _fusesUnknown = file.FusesUnknown;
        Names = new string?[Size];
        foreach (var (name, id) in Vocabulary) Names[id] = name;
        foreach (var token in Added) Names[token.Id] = token.Content;
    }

    private protected string?[] Names { get; }

    private protected override void EncodePiece(
        ReadOnlySpan<char> piece, bool atStart, List<int> ids)
    {
        bool prepends = _marks == SectionMarks.Always || (_marks == SectionMarks.First && atStart);
        if (_marks != SectionMarks.None)
            piece = FileNormalizer.Mark(piece, spaces: true,
                prepends && piece[0] is not (' ' or FileNormalizer.Space));
        int unknownAt = -1;
        EncodeWord(piece, ids, ref unknownAt);
    }

    // unknownAt is the number of ids behind the last unknown token.
    private protected void EncodeWord(
        ReadOnlySpan<char> word, List<int> ids, ref int unknownAt)
    {
        if (_merges.Whole(word, ids)) return;
        var lookup = _letters.GetAlternateLookup<ReadOnlySpan<char>>();
        int from = 0, at = 0;
        while (word[at..].IndexOfAnyExcept(_known) is var offset and >= 0)
        {
            at += offset;
            int width = word.Length - at > 1 && char.IsSurrogatePair(word[at], word[at + 1])
                ? 2 : 1;
            var letter = word.Slice(at, width);
            at += width;
            if (lookup.ContainsKey(letter)) continue;
            Merge(word[from..(at - width)], ids, ref unknownAt);
            AddUnknown(letter, ids, ref unknownAt);
            from = at;
        }
        Merge(word[from..], ids, ref unknownAt);
    }

    private void Merge(ReadOnlySpan<char> known, List<int> ids, ref int unknownAt)
    {
        if (known.IsEmpty) return;
        int before = ids.Count;
        _merges.Encode(known, ids);
        if (_bareLetters.Count == 0) return;
        var merged = CollectionsMarshal.AsSpan(ids)[before..].ToArray();
        CollectionsMarshal.SetCount(ids, before);
        foreach (int id in merged)
            if (_bareLetters.TryGetValue(id, out string? letter))
                AddUnknown(letter, ids, ref unknownAt);
            else ids.Add(id);
    }

    private void AddUnknown(ReadOnlySpan<char> letter, List<int> ids, ref int unknownAt)
    {
        if (_byteIds is not null)
        {
            Span<byte> bytes = stackalloc byte[4];
            // A lone surrogate becomes U+FFFD here.
            foreach (byte b in bytes[..Encoding.UTF8.GetBytes(letter, bytes)])
                ids.Add(_byteIds[b]);
        }
        else if (_unknown >= 0 && !(_fusesUnknown && unknownAt == ids.Count))
        {
            ids.Add(_unknown);
            unknownAt = ids.Count;
        }
    }

    private protected override string DecodeTokens(ReadOnlySpan<int> ids)
    {
        var text = new StringBuilder();
        var bytes = new List<byte>();
        foreach (int id in ids)
        {
            if (Name(id) is not { } name) continue;
            if (_readsBytes && VocabularyFile.ByteOf(name) is { } value)
            {
                bytes.Add(value);
                continue;
            }
            FlushBytes(bytes, text);
            text.Append(name.Replace(FileNormalizer.Space, ' '));
        }
        FlushBytes(bytes, text);
        if (_stripsSpace && text.Length > 0 && text[0] == ' ') text.Remove(0, 1);
        return text.ToString();
    }

    // Bytes that are no UTF-8 together become U+FFFD one by one.
    private static void FlushBytes(List<byte> bytes, StringBuilder text)
    {
        var run = CollectionsMarshal.AsSpan(bytes);
        if (System.Text.Unicode.Utf8.IsValid(run)) text.Append(Encoding.UTF8.GetString(run));
        else text.Append('\uFFFD', run.Length);
        bytes.Clear();
    }

    private protected string? Name(int id) => id >= 0 && id < Names.Length ? Names[id] : null;
}
