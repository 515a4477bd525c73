using System.Text;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// Text to token ids and back, equal to Hugging Face's tokenizers. What every kind shares is here:
/// added and special tokens, named ids, clean-up. How the text between added tokens is encoded is
/// the kind's own: ByteLevelTokenizer today. Any number of threads may use one tokenizer.
/// </summary>
public abstract class Tokenizer
{
    private const long MaxFileBytes = 256 << 20;

    private readonly AddedTokens _raw;
    private readonly AddedTokens _normalized;
    private readonly Dictionary<string, AddedToken> _added = new(StringComparer.Ordinal);
    private readonly HashSet<int> _special = [];
    private readonly TokenizerConfig? _config;

    internal Tokenizer(TokenizerFile file, TokenizerConfig? config, string path)
    {
        _config = config;
        Vocabulary = file.Vocabulary;
        Prefix = [.. file.Prefix];
        Suffix = [.. file.Suffix];
        foreach (var token in file.Added) Add(token);
        if (config is not null) Merge(config, path);
        Size = 1 + Math.Max(Vocabulary.Values.DefaultIfEmpty(-1).Max(),
            _added.Values.Select(token => token.Id).DefaultIfEmpty(-1).Max());
        var matched = _added.Values
            .Where(token => config is not { SplitSpecial: true } || !token.Special).ToArray();
        _raw = new AddedTokens(matched.Where(token => !token.Normalized));
        _normalized = new AddedTokens(matched.Where(token => token.Normalized)
            .Select(token => token with
            {
                Content = file.Normalizes
                ? Nfc.Normalize(token.Content).ToString() : token.Content
            }));
    }

    private protected Dictionary<string, int> Vocabulary { get; }

    private protected IEnumerable<AddedToken> Added => _added.Values;

    /// <summary>One more than the largest id.</summary>
    public int Size { get; }

    /// <summary>Ids that encoding with special tokens puts in front (a BOS) and behind.</summary>
    public IReadOnlyList<int> Prefix { get; }

    /// <inheritdoc cref="Prefix"/>
    public IReadOnlyList<int> Suffix { get; }

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
    /// Reads tokenizer.json and, where there is one, tokenizer_config.json of a model.
    /// </summary>
    /// <exception cref="InputException">A file is missing, broken, or of another kind.</exception>
    public static Tokenizer Load(string directory)
    {
        string path = Path.Combine(directory, "tokenizer.json");
        string config = Path.Combine(directory, "tokenizer_config.json");
        if (!File.Exists(path))
            throw new InputException($"{path}: not found; a model directory needs tokenizer.json"
                + (File.Exists(Path.Combine(directory, "tokenizer.model"))
                    ? " (tokenizer.model alone, SentencePiece, is not supported yet)" : ""));
        return Parse(Bytes(path), File.Exists(config) ? Bytes(config) : null, path, config);
    }

    internal static Tokenizer Parse(
        byte[] tokenizer, byte[]? config, string path = "tokenizer.json",
        string configPath = "tokenizer_config.json") =>
        new ByteLevelTokenizer(new TokenizerFile(tokenizer, path),
            config is null ? null : new TokenizerConfig(config, configPath), path);

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
        int at = 0, from = 0;
        while (_raw.Next(text, ref at, from, out int start, out int end) is { } token)
        {
            if (start > from) EncodeNormalized(text[from..start], ids);
            ids.Add(token.Id);
            from = end;
        }
        if (from < text.Length) EncodeNormalized(text[from..], ids);
    }

    private void EncodeNormalized(ReadOnlySpan<char> piece, List<int> ids)
    {
        var text = Normalize(piece);
        int at = 0, from = 0;
        while (_normalized.Next(text, ref at, from, out int start, out int end) is { } token)
        {
            if (start > from) EncodePiece(text[from..start], ids);
            ids.Add(token.Id);
            from = end;
        }
        if (from < text.Length) EncodePiece(text[from..], ids);
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

    private protected abstract ReadOnlySpan<char> Normalize(ReadOnlySpan<char> text);

    private protected abstract void EncodePiece(ReadOnlySpan<char> piece, List<int> ids);

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
    private void Merge(TokenizerConfig config, string path)
    {
        var named = config.Special.ToHashSet(StringComparer.Ordinal);
        foreach (var entry in config.Added)
        {
            if ((IdOf(entry.Content) ?? entry.Id) is int id && id != entry.Id)
                throw new InputException(
                    $"{path}: token {Messages.Quote(entry.Content)} has id {id} "
                    + $"here, but {entry.Id} in added_tokens_decoder of tokenizer_config.json");
            Add(entry with { Special = entry.Special || named.Contains(entry.Content) });
        }
        foreach (string content in config.Special)
        {
            if (_added.ContainsKey(content) || content.Length == 0) continue;
            if (!Vocabulary.TryGetValue(content, out int id))
                id = Math.Max(Vocabulary.Count,
                    _added.Values.Select(token => token.Id + 1).DefaultIfEmpty(0).Max());
            Add(new AddedToken(id, content, SingleWord: false, LeftStrip: false, RightStrip: false,
                Normalized: false, Special: true));
        }
    }

    private static string CleanUp(string text) => new StringBuilder(text)
        .Replace(" .", ".").Replace(" ?", "?").Replace(" !", "!").Replace(" ,", ",")
        .Replace(" ' ", "'").Replace(" n't", "n't").Replace(" 'm", "'m").Replace(" 's", "'s")
        .Replace(" 've", "'ve").Replace(" 're", "'re").ToString();

    private static byte[] Bytes(string path) => InputFile.ReadAll(path, MaxFileBytes);
}
