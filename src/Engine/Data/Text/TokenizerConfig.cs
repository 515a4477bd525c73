using System.Globalization;
using System.Text.Json;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// What tokenizer_config.json adds to tokenizer.json, as transformers applies it.
/// </summary>
internal sealed class TokenizerConfig
{
    private static readonly string[] s_named =
    [
        "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
    ];

    private readonly Dictionary<string, string> _tokens = [];

    /// <summary>Entries of added_tokens_decoder, in the order of the file.</summary>
    public List<AddedToken> Added { get; } = [];

    /// <summary>Contents of bos_token ... mask_token and additional_special_tokens.</summary>
    public List<string> Special { get; } = [];

    /// <summary>Contents of additional_special_tokens.</summary>
    public HashSet<string> Additional { get; } = new(StringComparer.Ordinal);

    public bool CleanUp { get; }
    public bool SplitSpecial { get; }

    // Null where the file does not say.
    public bool? PrefixSpace { get; }
    public bool? AddsBegin { get; }
    public bool? AddsEnd { get; }
    public bool? Legacy { get; }

    /// <summary>auto_map names a Python class and no fast one: transformers reads
    /// tokenizer.model.</summary>
    public bool OnlySlow { get; }

    public string? ChatTemplate { get; }

    /// <summary>The content of a named token such as "eos_token", or null.</summary>
    public string? this[string name] => _tokens.GetValueOrDefault(name);

    /// <exception cref="InputException">Not JSON, or an entry is no token.</exception>
    public TokenizerConfig(ReadOnlyMemory<byte> json, string path)
    {
        var config = JsonText.Parse(json, path, "");
        if (config.ValueKind != JsonValueKind.Object)
            throw new InputException($"{path}: is not a JSON object");
        var added = config.Member("added_tokens_decoder");
        if (added.ValueKind == JsonValueKind.Object)
            foreach (var member in added.EnumerateObject())
                Added.Add(Entry(member, path, json.Length));
        foreach (string name in s_named)
            if (Content(config.Member(name)) is { } content)
            {
                _tokens[name] = content;
                Special.Add(content);
            }
        foreach (var item in config.Member("additional_special_tokens").Items())
            if (Content(item) is { } content)
            {
                Special.Add(content);
                Additional.Add(content);
            }
        CleanUp = config.Member("clean_up_tokenization_spaces").IsTrue();
        SplitSpecial = config.Member("split_special_tokens").IsTrue();
        PrefixSpace = config.Member("add_prefix_space").Flag();
        AddsBegin = config.Member("add_bos_token").Flag();
        AddsEnd = config.Member("add_eos_token").Flag();
        Legacy = config.Member("legacy").Flag();
        OnlySlow = config.Member("auto_map").Member("AutoTokenizer").Items().ToArray()
            is [{ ValueKind: JsonValueKind.String }, { ValueKind: JsonValueKind.Null }];
        ChatTemplate = Template(config.Member("chat_template"));
    }

    /// <summary>The named tokens that LlamaTokenizer has without being told.</summary>
    public TokenizerConfig WithDefaults(SentencePieceFile file)
    {
        foreach (var (name, content) in (ReadOnlySpan<(string, string)>)
            [("bos_token", file.Begin), ("eos_token", file.End), ("unk_token", file.Unknown!)])
            if (_tokens.TryAdd(name, content)) Special.Add(content);
        return this;
    }

    private static AddedToken Entry(JsonProperty member, string path, int length)
    {
        if (!int.TryParse(member.Name, NumberStyles.None, CultureInfo.InvariantCulture, out int id)
            || id >= TokenizerFile.IdLimit(length)
            || member.Value.Member("content").Text() is not { } content)
            throw new InputException(
                $"{path}: added_tokens_decoder {Messages.Quote(member.Name)} is not an id "
                + "with a token's content");
        bool special = member.Value.Member("special").IsTrue();
        return TokenizerFile.AddedTokenOf(member.Value, id, content, special);
    }

    private static string? Content(JsonElement token) =>
        token.ValueKind == JsonValueKind.Object ? token.Member("content").Text() : token.Text();

    // Several templates are a list of {name, template}; the one named default is the chat template.
    private static string? Template(JsonElement template) =>
        template.ValueKind == JsonValueKind.Array
            ? template.Items().Where(item => item.Member("name").Text() == "default")
                .Select(item => item.Member("template").Text()).FirstOrDefault()
            : template.Text();
}
