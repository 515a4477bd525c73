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

    public bool CleanUp { get; }
    public bool SplitSpecial { get; }
    public bool PrefixSpace { get; }
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
            if (Content(item) is { } content) Special.Add(content);
        CleanUp = config.Member("clean_up_tokenization_spaces").IsTrue();
        SplitSpecial = config.Member("split_special_tokens").IsTrue();
        PrefixSpace = config.Member("add_prefix_space").IsTrue();
        ChatTemplate = Template(config.Member("chat_template"));
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
