using System.Buffers;
using System.Runtime.InteropServices;
using System.Text;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// tokenizer.model as transformers' LlamaTokenizer (legacy) uses it: the sections between added
/// tokens are encoded by SentencePiece one by one; decoding puts spaces where that class does.
/// </summary>
internal sealed class SentencePieceModelTokenizer : SentencePieceTokenizer
{
    private readonly SentencePieceFile _file;
    private readonly bool _prefixSpace;
    private readonly HashSet<int> _apart;

    public SentencePieceModelTokenizer(
        SentencePieceFile file, TokenizerConfig config, string path)
        : base(file, file.Mergeable, config.WithDefaults(file), path, ignoreMerges: false)
    {
        if (config.Legacy == false)
            throw new InputException($"{path}: tokenizer_config.json has legacy false, which is "
                + "not supported for tokenizer.model; save the tokenizer as tokenizer.json");
        if (Added.FirstOrDefault(token => token.SingleWord) is { } word)
            throw new InputException($"{path}: token {Messages.Quote(word.Content)} is "
                + "single_word, which is not supported for tokenizer.model");
        _file = file;
        _prefixSpace = config.PrefixSpace ?? true;
        _apart = [.. Added.Where(token => !IsSpecial(token.Id) || (token.Id >= file.Kinds.Count
            && config.Additional.Contains(token.Content))).Select(token => token.Id)];
        Prefix = config.AddsBegin ?? true ? [BosId!.Value] : [];
        Suffix = config.AddsEnd ?? false ? [EosId!.Value] : [];
    }

    private protected override void EncodePiece(
        ReadOnlySpan<char> piece, bool atStart, List<int> ids)
    {
        int from = 0, unknownAt = -1;
        var pieces = _file.UserDefined.In(piece);
        while (pieces.Next() is { } token)
        {
            EncodeWord(piece[from..pieces.Start], ids, ref unknownAt);
            ids.Add(token.Id);
            from = pieces.End;
        }
        EncodeWord(piece[from..], ids, ref unknownAt);
    }

    // PreTrainedTokenizer._decode: added tokens that are not special stand between spaces.
    private protected override string DecodeTokens(ReadOnlySpan<int> ids)
    {
        var parts = new List<string>();
        var run = new List<int>();
        foreach (int id in ids)
        {
            if (Name(id) is not { } name) continue;
            if (!_apart.Contains(id))
            {
                run.Add(id);
                continue;
            }
            if (DecodeRun(run) is { Length: > 0 } text) parts.Add(text);
            run.Clear();
            parts.Add(name);
        }
        if (run.Count > 0) parts.Add(DecodeRun(run));
        return string.Join(' ', parts);
    }

    // LlamaTokenizer.convert_tokens_to_string: special tokens as they are, SentencePiece's decoding
    // between them.
    private string DecodeRun(List<int> ids)
    {
        var text = new StringBuilder();
        var pieces = new List<(int Id, string Text)>();
        bool afterSpecial = false;
        for (int i = 0; i < ids.Count; i++)
        {
            string name = Names[ids[i]]!;
            if (i == 0 && _prefixSpace && name.StartsWith(FileNormalizer.Space)) name = name[1..];
            if (IsSpecial(ids[i]))
            {
                if (!afterSpecial && i != 0) text.Append(' ');
                Decode(pieces, text);
                text.Append(name);
                pieces.Clear();
                afterSpecial = true;
                continue;
            }
            if (afterSpecial && i == 1 && _prefixSpace && !name.StartsWith(FileNormalizer.Space))
                text.Append(' ');
            pieces.Add((ids[i], name));
            afterSpecial = false;
        }
        Decode(pieces, text);
        return text.ToString();
    }

    // SentencePieceProcessor::Decode. A piece is what its text says, which the removal of a leading
    // space may have changed.
    private void Decode(List<(int Id, string Text)> pieces, StringBuilder to)
    {
        int start = to.Length;
        var bytes = new List<byte>();
        bool atStart = true, sawSpace = false;
        foreach (var (_, text) in pieces)
        {
            int id = Vocabulary.TryGetValue(text, out int found) ? found : -1;
            var kind = id < 0 ? SentencePieceFile.Kind.Unknown : _file.Kinds[id];
            if (kind == SentencePieceFile.Kind.Byte)
            {
                bytes.Add(VocabularyFile.ByteOf(text)!.Value);
                continue;
            }
            AppendBytes(bytes, to);
            if (sawSpace || to.Length > start) atStart = false;
            (string surface, sawSpace) = Surface(text, id, kind, atStart);
            to.Append(surface);
        }
        AppendBytes(bytes, to);
    }

    private (string Text, bool SawSpace) Surface(
        string text, int id, SentencePieceFile.Kind kind, bool atStart)
    {
        if (kind == SentencePieceFile.Kind.Control) return ("", false);
        if (kind == SentencePieceFile.Kind.Unknown)
            return (id >= 0 ? _file.UnknownSurface : text, false);
        bool saw = atStart && _file.StripsSpace && text.StartsWith(FileNormalizer.Space);
        if (saw) text = text[1..];
        return (text.Replace(FileNormalizer.Space, ' '), saw && !_file.StripsSpaces);
    }

    // Bytes that begin no letter become U+FFFD one by one.
    private static void AppendBytes(List<byte> bytes, StringBuilder to)
    {
        ReadOnlySpan<byte> rest = CollectionsMarshal.AsSpan(bytes);
        Span<char> letter = stackalloc char[2];
        while (!rest.IsEmpty)
        {
            bool valid = Rune.DecodeFromUtf8(rest, out var rune, out int width)
                == OperationStatus.Done;
            to.Append(letter[..(valid ? rune : Rune.ReplacementChar).EncodeToUtf16(letter)]);
            rest = rest[(valid ? width : 1)..];
        }
        bytes.Clear();
    }
}
