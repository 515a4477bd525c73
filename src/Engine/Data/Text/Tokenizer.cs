using System.Text;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// Text to token ids and back, equal to Hugging Face's tokenizers. What every kind shares is here:
/// added and special tokens, named ids, clean-up. How the text between added tokens is encoded is
/// the kind's own: ByteLevelTokenizer or SentencePieceTokenizer, as the model's files say. Any
/// number of threads may use one tokenizer.
/// </summary>
public abstract class Tokenizer
{
    internal const long MaxFileBytes = 256 << 20;

    private readonly AddedTokens _raw;
    private readonly AddedTokens _normalized;
    private readonly TextNormalizer _normalizer;
    private readonly Dictionary<string, AddedToken> _added = new(StringComparer.Ordinal);
    private readonly HashSet<int> _special = [];
    private readonly TokenizerConfig? _config;

    internal Tokenizer(VocabularyFile file, TokenizerConfig? config, string path)
    {
        _config = config;
        _normalizer = file.Normalizer;
        Vocabulary = file.Vocabulary;
        Prefix = [.. file.Prefix];
        Suffix = [.. file.Suffix];
        foreach (var token in file.Added) Add(token);
        if (config is not null) Merge(config, file.Slow, path);
        Size = 1 + Math.Max(Vocabulary.Values.Max(),
            _added.Values.Select(token => token.Id).DefaultIfEmpty(-1).Max());
        if (_added.Values.FirstOrDefault(token => token.Content.Length > AddedToken.MaxLength)
            is { } longest)
            throw new InputException($"{path}: added token {Messages.Quote(longest.Content)} has "
                + $"{Messages.Number(longest.Content.Length)} letters, at most "
                + $"{Messages.Number(AddedToken.MaxLength)} are supported");
        var matched = _added.Values.Where(
            token => config is not { SplitSpecial: true } || !(token.Special || file.Slow));
        _raw = new AddedTokens(matched.Where(token => file.Slow || !token.Normalized));
        _normalized = new AddedTokens(matched.Where(token => !file.Slow && token.Normalized)
            .Select(token => token with
            {
                Content = _normalizer.Normalize(token.Content).ToString(),
            }));
    }

    internal Dictionary<string, int> Vocabulary { get; }

    internal IEnumerable<AddedToken> Added => _added.Values;

    /// <summary>One more than the largest id.</summary>
    public int Size { get; }

    /// <summary>Ids that encoding with special tokens puts in front (a BOS) and behind.</summary>
    public IReadOnlyList<int> Prefix { get; private protected init; }

    /// <inheritdoc cref="Prefix"/>
    public IReadOnlyList<int> Suffix { get; private protected init; }

    /// <summary>bos_token of tokenizer_config.json and its id, null without.</summary>
    public int? BosId => Named("bos_token");

    /// <inheritdoc cref="BosId"/>
    public int? EosId => Named("eos_token");

    /// <inheritdoc cref="BosId"/>
    public int? PadId => Named("pad_token");

    /// <inheritdoc cref="BosId"/>
    public int? UnknownId => Named("unk_token");

    /// <inheritdoc cref="BosId"/>
    public string? BosToken => _config?["bos_token"];

    /// <inheritdoc cref="BosId"/>
    public string? EosToken => _config?["eos_token"];

    /// <inheritdoc cref="BosId"/>
    public string? UnknownToken => _config?["unk_token"];

    /// <summary>chat_template of tokenizer_config.json, null without.</summary>
    public string? ChatTemplate => _config?.ChatTemplate;

    /// <summary>
    /// Whether decoding removes the spaces in front of punctuation unless told otherwise.
    /// </summary>
    public bool CleansUp => _config?.CleanUp ?? false;

    /// <summary>
    /// Reads the tokenizer of a model as transformers would: tokenizer.json, or tokenizer.model
    /// where there is no other or tokenizer_config.json has a Python class only; and what
    /// tokenizer_config.json adds.
    /// </summary>
    /// <exception cref="InputException">A file is missing, broken, or of another kind.</exception>
    public static Tokenizer Load(string directory)
    {
        string path = Path.Combine(directory, "tokenizer.json");
        string model = Path.Combine(directory, "tokenizer.model");
        string configPath = Path.Combine(directory, "tokenizer_config.json");
        var config = File.Exists(configPath)
            ? new TokenizerConfig(Bytes(configPath, MaxFileBytes), configPath) : null;
        if (File.Exists(model) && (!File.Exists(path) || config is { OnlySlow: true }))
            return OfModel(Bytes(model, SentencePieceFile.MaxBytes), config, model);
        if (!File.Exists(path))
            throw new InputException($"{path}: not found; a model directory needs tokenizer.json "
                + "or tokenizer.model" + (File.Exists(Path.Combine(directory, "vocab.json"))
                    ? ", vocab.json alone is not read: save the tokenizer with transformers' "
                        + "AutoTokenizer, which writes tokenizer.json" : ""));
        return OfJson(Bytes(path, MaxFileBytes), config, path);
    }

    internal static Tokenizer Parse(byte[] tokenizer, byte[]? config) =>
        OfJson(tokenizer, Config(config), "tokenizer.json");

    internal static Tokenizer ParseModel(byte[] model, byte[]? config) =>
        OfModel(model, Config(config), "tokenizer.model");

    private static TokenizerConfig? Config(byte[]? json) =>
        json is null ? null : new TokenizerConfig(json, "tokenizer_config.json");

    private static Tokenizer OfJson(byte[] json, TokenizerConfig? config, string path)
    {
        var file = new TokenizerFile(json, path);
        return file.IsByteLevel ? new ByteLevelTokenizer(file, config, path)
            : new SentencePieceTokenizer(file, config, path);
    }

    private static SentencePieceModelTokenizer OfModel(
        byte[] model, TokenizerConfig? config, string path) => new(
        new SentencePieceFile(model, path), config ?? new TokenizerConfig("{}"u8.ToArray(), path),
        path);

    /// <summary>The id of a token given as its text ("&lt;image&gt;"), or null.</summary>
    public int? IdOf(string token) => _added.TryGetValue(token, out var added) ? added.Id
        : Vocabulary.TryGetValue(token, out int id) ? id : null;

    /// <summary>The id of a token that is cut out of every text as it stands, or null.</summary>
    internal int? IdOfAdded(string token) =>
        _added.TryGetValue(token, out var added)
        && added is { SingleWord: false, LeftStrip: false, RightStrip: false, Normalized: false }
            ? added.Id : null;

    /// <summary>Whether decoding without special tokens leaves the id out.</summary>
    public bool IsSpecial(int id) => _special.Contains(id);

    /// <summary>The ids of a text; special puts Prefix and Suffix around them.</summary>
    public int[] Encode(ReadOnlySpan<char> text, bool special = false)
    {
        var ids = new List<int>((text.Length / 3) + 8);
        if (special) ids.AddRange(Prefix);
        Encode(text, ids);
        if (special) ids.AddRange(Suffix);
        return [.. ids];
    }

    /// <summary>Appends the ids of a text, without Prefix and Suffix.</summary>
    public void Encode(ReadOnlySpan<char> text, List<int> ids)
    {
        int from = 0;
        var tokens = _raw.In(text);
        while (tokens.Next() is { } token)
        {
            if (tokens.Start > from) EncodeNormalized(text[from..tokens.Start], from == 0, ids);
            ids.Add(token.Id);
            from = tokens.End;
        }
        if (from < text.Length) EncodeNormalized(text[from..], from == 0, ids);
    }

    private void EncodeNormalized(ReadOnlySpan<char> piece, bool atStart, List<int> ids)
    {
        var text = _normalizer.Normalize(piece);
        int from = 0;
        var tokens = _normalized.In(text);
        while (tokens.Next() is { } token)
        {
            if (tokens.Start > from)
                EncodePiece(text[from..tokens.Start], atStart && from == 0, ids);
            ids.Add(token.Id);
            from = tokens.End;
        }
        if (from < text.Length) EncodePiece(text[from..], atStart && from == 0, ids);
    }

    /// <summary>The text of ids; ids that name no token are passed over.</summary>
    /// <param name="ids">Token ids.</param>
    /// <param name="skipSpecial">Leaves special tokens out.</param>
    /// <param name="cleanUp">Removes spaces before punctuation; null does as the tokenizer
    /// says.</param>
    public string Decode(ReadOnlySpan<int> ids, bool skipSpecial = false, bool? cleanUp = null)
    {
        string text;
        if (skipSpecial)
        {
            var kept = new List<int>(ids.Length);
            foreach (int id in ids)
                if (!IsSpecial(id)) kept.Add(id);
            text = DecodeTokens(System.Runtime.InteropServices.CollectionsMarshal.AsSpan(kept));
        }
        else
        {
            text = DecodeTokens(ids);
        }
        return cleanUp ?? CleansUp ? CleanUp(text) : text;
    }

    /// <summary>
    /// Appends the ids of a section between added tokens, which is not empty; atStart says that the
    /// text begins with it.
    /// </summary>
    private protected abstract void EncodePiece(
        ReadOnlySpan<char> piece, bool atStart, List<int> ids);

    private protected abstract string DecodeTokens(ReadOnlySpan<int> ids);

    private int? Named(string name) => _config?[name] is { } token ? IdOf(token) : null;

    // A token that is already there keeps its flags; it only may become special.
    private void Add(AddedToken token)
    {
        if (token.Special) _special.Add(token.Id);
        if (_added.TryGetValue(token.Content, out var old))
        {
            if (token.Special && !old.Special) _added[token.Content] = old with { Special = true };
        }
        else
        {
            _added[token.Content] = token;
        }
    }

    // transformers adds the entries of added_tokens_decoder, then every named special token that is
    // not an added token yet: a pad_token "!" is cut out of every text from then on. One that is
    // not in the vocabulary gets the next free id.
    private void Merge(TokenizerConfig config, bool slow, string path)
    {
        var named = config.Special.ToHashSet(StringComparer.Ordinal);
        foreach (var entry in config.Added)
        {
            if ((IdOf(entry.Content) ?? entry.Id) is int id && id != entry.Id)
                throw new InputException(
                    $"{path}: token {Messages.Quote(entry.Content)} has id {id} "
                    + $"here, but {entry.Id} in added_tokens_decoder of tokenizer_config.json");
            Add(entry with
            {
                Special = (entry.Special && !slow) || named.Contains(entry.Content),
            });
        }
        int next = Math.Max(Vocabulary.Count,
            _added.Values.Select(token => token.Id + 1).DefaultIfEmpty(0).Max());
        foreach (string content in config.Special)
        {
            if (_added.ContainsKey(content) || content.Length == 0) continue;
            if (!Vocabulary.TryGetValue(content, out int id)) id = next;
            next = Math.Max(next, id + 1);
            Add(new AddedToken(id, content, SingleWord: false, LeftStrip: false, RightStrip: false,
                Normalized: false, Special: true));
        }
    }

    private static string CleanUp(string text) => new StringBuilder(text)
        .Replace(" .", ".").Replace(" ?", "?").Replace(" !", "!").Replace(" ,", ",")
        .Replace(" ' ", "'").Replace(" n't", "n't").Replace(" 'm", "'m").Replace(" 's", "'s")
        .Replace(" 've", "'ve").Replace(" 're", "'re").ToString();

    private static byte[] Bytes(string path, long most) => InputFile.ReadAll(path, most);
}
