using System.Text;
using System.Text.Json;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>Where a Metaspace pre_tokenizer puts "▁" in front of a section.</summary>
internal enum SectionMarks
{
    /// <summary>There is none: the normalizer marks spaces.</summary>
    None,
    Never,
    First,
    Always,
}

/// <summary>
/// tokenizer.json of a BPE model, byte-level or SentencePiece's, read strictly: every part that
/// would change the ids is either understood or refused by name. The vocabulary and the merges,
/// nearly all of the file, are read without a document tree.
/// </summary>
internal sealed class TokenizerFile : VocabularyFile
{
    private const int MaxAround = 64;

    private readonly string _path;
    private readonly HashSet<int> _ids = [];
    private bool _nfc, _marksSpaces, _prepends;

    /// <summary>Byte-level: the pre_tokenizer ends in ByteLevel. Else SentencePiece.</summary>
    public bool IsByteLevel { get; private set; }

    public override TextNormalizer Normalizer { get; }
    public bool IgnoreMerges { get; private set; }

    // Byte-level.
    public List<Splitter> Splitters { get; } = [];
    public bool PrefixSpace { get; private set; }

    /// <summary>
    /// The pre_tokenizer is ByteLevel alone; transformers then decides add_prefix_space.
    /// </summary>
    public bool OnlyByteLevel { get; private set; }

    // SentencePiece.
    public SectionMarks Marks { get; private set; }

    /// <summary>The decoder puts byte tokens together.</summary>
    public bool ReadsBytes { get; private set; }

    /// <summary>The decoder takes one space off the front.</summary>
    public bool StripsSpace { get; private set; }

    /// <exception cref="InputException">Not JSON, or not a BPE tokenizer.</exception>
    public TokenizerFile(ReadOnlyMemory<byte> json, string path) : base(path)
    {
        _path = path;
        var top = JsonText.Members(json, path, "");
        if (!top.TryGetValue("model", out var modelJson))
            throw Bad("has no \"model\"; expected a Hugging Face tokenizer.json");
        var model = JsonText.Members(modelJson, path, "model");
        Model(Rest(model, "vocab", "merges"));
        if (!model.TryGetValue("vocab", out var vocabulary)) throw Bad("model has no \"vocab\"");
        if (!model.TryGetValue("merges", out var merges)) throw Bad("model has no \"merges\"");
        int limit = IdLimit(json.Length);
        ReadVocabulary(vocabulary.Span, limit);
        ReadMerges(merges.Span);
        ReadAdded(Part(top, "added_tokens"), limit);
        ReadNormalizer(Part(top, "normalizer"));
        Normalizer = new FileNormalizer(_nfc, _marksSpaces, _prepends);
        ReadPreTokenizer(Part(top, "pre_tokenizer"));
        ReadPostProcessor(Part(top, "post_processor"));
        ReadDecoder(Part(top, "decoder"));
    }

    /// <summary>
    /// Ids stay below this, so that tables by id take no more than the file could fill.
    /// </summary>
    public static int IdLimit(int fileLength) => Math.Max(1 << 20, fileLength);

    private JsonElement Part(Dictionary<string, ReadOnlyMemory<byte>> top, string name) =>
        top.TryGetValue(name, out var json) ? JsonText.Parse(json, _path, name) : default;

    private Dictionary<string, JsonElement> Rest(
        Dictionary<string, ReadOnlyMemory<byte>> model, params string[] without) =>
        model.Where(pair => !without.Contains(pair.Key))
            .ToDictionary(pair => pair.Key, pair => JsonText.Parse(pair.Value, _path, pair.Key));

    private void Model(Dictionary<string, JsonElement> model)
    {
        string? type = model.TryGetValue("type", out var t) ? t.Text() : "BPE";
        if (type != "BPE")
            throw Bad($"model type is {Messages.Quote(type ?? "")}, expected \"BPE\"");
        ByteFallback = model.TryGetValue("byte_fallback", out var fallback) && fallback.IsTrue();
        Unknown = model.TryGetValue("unk_token", out var unknown) ? unknown.Text() : null;
        FusesUnknown = model.TryGetValue("fuse_unk", out var fuse) && fuse.IsTrue();
        if (model.TryGetValue("dropout", out var dropout)
            && dropout.ValueKind == JsonValueKind.Number && dropout.GetDouble() != 0)
            throw Bad("model has BPE dropout, which would make ids random; set it to null");
        foreach (string name in (string[])["continuing_subword_prefix", "end_of_word_suffix"])
            if (model.TryGetValue(name, out var affix) && affix.Text() is { Length: > 0 } text)
                throw Bad($"model has {name} {Messages.Quote(text)}, "
                    + "which is not supported");
        IgnoreMerges = model.TryGetValue("ignore_merges", out var ignore) && ignore.IsTrue();
    }

    private void ReadVocabulary(ReadOnlySpan<byte> json, int limit)
    {
        var names = new Dictionary<int, string>();
        var reader = new Utf8JsonReader(json);
        if (!reader.Read() || reader.TokenType != JsonTokenType.StartObject)
            throw Bad("model.vocab is not an object of token and id");
        while (reader.Read() && reader.TokenType == JsonTokenType.PropertyName)
        {
            string token = JsonText.String(ref reader, _path, "model.vocab");
            reader.Read();
            if (reader.TokenType != JsonTokenType.Number || !reader.TryGetInt32(out int id)
                || id < 0 || id >= limit)
                throw Bad($"model.vocab {Messages.Quote(token)}: the id is not a whole number "
                    + $"from 0 to {limit - 1}");
            if (names.TryGetValue(id, out string? other) && other != token)
                throw Bad($"model.vocab: {Messages.Quote(other)} and {Messages.Quote(token)} "
                    + $"have the same id {id}");
            names[id] = token;
            Vocabulary[token] = id;
        }
        if (Vocabulary.Count == 0) throw Bad("model.vocab is empty");
        _ids.UnionWith(names.Keys);
    }

    private void ReadMerges(ReadOnlySpan<byte> json)
    {
        var lookup = Vocabulary.GetAlternateLookup<ReadOnlySpan<char>>();
        var reader = new Utf8JsonReader(json);
        if (!reader.Read() || reader.TokenType != JsonTokenType.StartArray)
            throw Bad("model.merges is not a list");
        while (reader.Read() && reader.TokenType != JsonTokenType.EndArray)
        {
            string left, right;
            if (reader.TokenType == JsonTokenType.String)
            {
                string both = JsonText.String(ref reader, _path, "model.merges");
                int space = both.IndexOf(' ');
                if (space < 0 || both.IndexOf(' ', space + 1) >= 0) throw BadMerge();
                (left, right) = (both[..space], both[(space + 1)..]);
            }
            else
            {
                if (reader.TokenType != JsonTokenType.StartArray) throw BadMerge();
                left = Item(ref reader);
                right = Item(ref reader);
                if (!reader.Read() || reader.TokenType != JsonTokenType.EndArray) throw BadMerge();
            }
            if (left.Length == 0 || right.Length == 0) throw BadMerge();
            Merges.Add(new(Id(lookup, left), Id(lookup, right), Id(lookup, left + right),
                Merges.Count));
        }
    }

    private InputException BadMerge() =>
        Bad($"model.merges entry {Merges.Count + 1} is not a pair, expected \"a b\" or "
            + "[\"a\", \"b\"]");

    private string Item(ref Utf8JsonReader reader)
    {
        if (!reader.Read() || reader.TokenType != JsonTokenType.String) throw BadMerge();
        return JsonText.String(ref reader, _path, "model.merges");
    }

    private int Id(
        Dictionary<string, int>.AlternateLookup<ReadOnlySpan<char>> lookup,
        ReadOnlySpan<char> token) =>
        lookup.TryGetValue(token, out int id) ? id
            : throw Bad($"model.merges entry {Merges.Count + 1}: "
                + $"{Messages.Quote(token.ToString())} is not in the vocabulary");

    private void ReadAdded(JsonElement list, int limit)
    {
        foreach (var item in list.Items())
        {
            if (item.Member("content").Text() is not { } content
                || !item.Member("id").IsInt(out int id) || id < 0 || id >= limit)
                throw Bad("added_tokens has an entry without content or a usable id");
            if (Vocabulary.TryGetValue(content, out int other) && other != id)
                throw Bad($"added token {Messages.Quote(content)} has id {id}, "
                    + $"but {other} in the vocabulary");
            Added.Add(AddedTokenOf(item, id, content, special: item.Member("special").IsTrue()));
            _ids.Add(id);
        }
    }

    /// <summary>
    /// The flags of an added token; normalized is by default the opposite of special.
    /// </summary>
    public static AddedToken AddedTokenOf(JsonElement item, int id, string content,
        bool special) => new(
        id, content, item.Member("single_word").IsTrue(), item.Member("lstrip").IsTrue(),
        item.Member("rstrip").IsTrue(),
        item.Member("normalized") is { ValueKind: JsonValueKind.True or JsonValueKind.False } n
            ? n.IsTrue() : !special,
        special);

    private void ReadNormalizer(JsonElement part)
    {
        if (part.IsNull()) return;
        switch (part.Member("type").Text())
        {
            case "NFC":
                _nfc = true;
                break;
            case "Prepend" when part.Member("prepend").Text() == "\u2581":
                _prepends = true;
                break;
            case "Replace" when IsReplace(part, " ", "\u2581"):
                _marksSpaces = true;
                break;
            case "Sequence":
                foreach (var item in part.Member("normalizers").Items()) ReadNormalizer(item);
                break;
            case var other:
                throw Bad($"normalizer {Messages.Quote(other ?? "")} is not supported, expected "
                    + "NFC, or Prepend and Replace of SentencePiece's \"\u2581\"");
        }
    }

    private static bool IsReplace(JsonElement part, string from, string to) =>
        part.Member("pattern").Member("String").Text() == from
        && part.Member("content").Text() == to;

    private void ReadPreTokenizer(JsonElement part)
    {
        bool sequence = part.Member("type").Text() == "Sequence";
        JsonElement[] parts = sequence ? [.. part.Member("pretokenizers").Items()]
            : part.IsNull() ? [] : [part];
        if (sequence && parts.Length == 0)
            throw Bad("pre_tokenizer is a Sequence whose pretokenizers are no list, or empty");
        IsByteLevel = parts.Length > 0 && parts[^1].Member("type").Text() == "ByteLevel";
        if (IsByteLevel)
        {
            ReadByteLevel(parts);
            return;
        }
        CheckByteTokens();
        if (Unknown is not null && !Vocabulary.ContainsKey(Unknown))
            throw Bad($"unk_token {Messages.Quote(Unknown)} is not in the vocabulary");
        if (parts is [var only]) ReadMetaspace(only);
        else if (parts.Length > 1 || !_marksSpaces)
            throw Bad("is neither byte-level BPE (the pre_tokenizer ends in \"ByteLevel\") nor "
                + "SentencePiece's (the normalizer, or a pre_tokenizer \"Metaspace\" alone, "
                + "replaces spaces by \"\u2581\")");
    }

    private void ReadByteLevel(JsonElement[] parts)
    {
        if (_prepends || _marksSpaces || ByteFallback)
            throw Bad("mixes byte-level BPE with SentencePiece (Prepend, Replace, byte_fallback)");
        OnlyByteLevel = parts.Length == 1;
        foreach (var item in parts[..^1]) Splitters.Add(Split(item));
        PrefixSpace = parts[^1].Member("add_prefix_space").ValueKind != JsonValueKind.False;
        if (parts[^1].Member("use_regex").ValueKind != JsonValueKind.False)
            Splitters.Add(new Gpt2Splitter());
        if (PrefixSpace && parts.Length > 1)
            throw Bad("pre_tokenizer: add_prefix_space after a split is not supported");
    }

    private void ReadMetaspace(JsonElement part)
    {
        string? type = part.Member("type").Text();
        if (type != "Metaspace" || part.Member("replacement").Text() != "\u2581"
            || part.Member("split").Flag() != false)
            throw Bad($"pre_tokenizer {Messages.Quote(type ?? "")} is not supported, expected "
                + "\"ByteLevel\", or \"Metaspace\" of \"\u2581\" with split false");
        Marks = part.Member("prepend_scheme").Text() switch
        {
            "always" or null => SectionMarks.Always,
            "first" => SectionMarks.First,
            "never" => SectionMarks.Never,
            var other => throw Bad(
                $"pre_tokenizer Metaspace has prepend_scheme {Messages.Quote(other)}"),
        };
    }

    private Splitter Split(JsonElement item)
    {
        string? type = item.Member("type").Text();
        if (type != "Split")
            throw Bad($"pre_tokenizer {Messages.Quote(type ?? "")} is not supported, "
                + "expected \"Split\"");
        string? behavior = item.Member("behavior").Text();
        if (behavior != "Isolated" || item.Member("invert").IsTrue())
            throw Bad($"pre_tokenizer Split has behavior {Messages.Quote(behavior ?? "")} (or "
                + "invert), expected \"Isolated\"");
        var pattern = item.Member("pattern");
        if (pattern.Member("Regex").Text() is { } regex) return Splitter.For(regex, _path);
        throw Bad("pre_tokenizer Split has no pattern of kind Regex");
    }

    private void ReadPostProcessor(JsonElement part)
    {
        if (part.IsNull()) return;
        string? type = part.Member("type").Text();
        if (type == "Sequence")
            foreach (var item in part.Member("processors").Items()) ReadPostProcessor(item);
        else if (type == "TemplateProcessing")
            Template(part);
        else if (type != "ByteLevel")
            throw Bad($"post_processor {Messages.Quote(type ?? "")} is not supported");
    }

    private void Template(JsonElement part)
    {
        bool behind = false;
        foreach (var item in part.Member("single").Items())
        {
            if (item.Member("Sequence").ValueKind == JsonValueKind.Object)
            {
                behind = true;
                continue;
            }
            string? name = item.Member("SpecialToken").Member("id").Text();
            var ids = part.Member("special_tokens").Member(name ?? "").Member("ids");
            if (ids.ValueKind != JsonValueKind.Array)
                throw Bad($"post_processor: special token {Messages.Quote(name ?? "")} has no ids");
            foreach (var id in ids.Items())
                (behind ? Suffix : Prefix).Add(id.IsInt(out int value) && _ids.Contains(value)
                    ? value
                    : throw Bad($"post_processor: special token {Messages.Quote(name ?? "")} "
                        + "has an id that no token has"));
            if (Prefix.Count + Suffix.Count > MaxAround)
                throw Bad($"post_processor puts more than {MaxAround} tokens around a text");
        }
    }

    private void ReadDecoder(JsonElement part)
    {
        JsonElement[] parts = part.Member("type").Text() == "Sequence"
            ? [.. part.Member("decoders").Items()] : [part];
        string[] types = [.. parts.Select(item => item.Member("type").Text() ?? "null")];
        bool known = IsByteLevel ? types is ["ByteLevel"] : IsSentencePieceDecoder(parts, types);
        if (!known)
            throw Bad($"decoder {Messages.List([.. types.Select(Messages.Quote)])} is not "
                + "supported, expected " + (IsByteLevel ? "\"ByteLevel\"" : "Replace of "
                    + "\"\u2581\", ByteFallback, Fuse and Strip of one space at the start"));
    }

    private bool IsSentencePieceDecoder(JsonElement[] parts, string[] types)
    {
        ReadsBytes = types.Contains("ByteFallback");
        StripsSpace = types.Contains("Strip");
        string[] expected = ["Replace", .. (string[])(ReadsBytes ? ["ByteFallback"] : []), "Fuse",
            .. (string[])(StripsSpace ? ["Strip"] : [])];
        return types.SequenceEqual(expected) && IsReplace(parts[0], "\u2581", " ")
            && (!StripsSpace || (parts[^1].Member("content").Text() == " "
                && parts[^1].Member("start").IsInt(out int start) && start == 1
                && parts[^1].Member("stop").IsInt(out int stop) && stop == 0));
    }
}
