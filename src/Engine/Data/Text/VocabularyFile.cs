using System.Globalization;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>What each kind of tokenizer file says; tokenizer_config.json adds to it.</summary>
internal abstract class VocabularyFile(string path)
{
    /// <summary>Every token and its id; no two share an id.</summary>
    public Dictionary<string, int> Vocabulary { get; } = new(StringComparer.Ordinal);

    /// <summary>Pairs of tokens that become one.</summary>
    public List<WordMerges.Merge> Merges { get; } = [];

    /// <summary>Tokens that are cut out of a text before it is normalized.</summary>
    public List<AddedToken> Added { get; } = [];

    /// <summary>Ids that encoding with special tokens puts in front.</summary>
    public List<int> Prefix { get; } = [];

    /// <summary>Ids that encoding with special tokens puts behind.</summary>
    public List<int> Suffix { get; } = [];

    /// <summary>What is done to the text between added tokens.</summary>
    public abstract TextNormalizer Normalizer { get; }

    /// <summary>
    /// transformers' Python tokenizers ("slow"): added tokens are cut out before anything is
    /// normalized, special are those alone that tokenizer_config.json names.
    /// </summary>
    public virtual bool Slow => false;

    /// <summary>The name of the unknown token, null without one.</summary>
    public string? Unknown { get; protected set; }

    /// <summary>Several unknown letters in a row are one unknown token.</summary>
    public bool FusesUnknown { get; protected set; }

    /// <summary>A letter without a token is written as the tokens of its bytes.</summary>
    public bool ByteFallback { get; protected set; }

    protected InputException Bad(string what, Exception? inner = null) =>
        new($"{path}: {what}", inner);

    /// <summary>The token of one byte in a vocabulary with byte fallback.</summary>
    public static string ByteToken(int value) => $"<0x{value:X2}>";

    /// <summary>The byte that a token's text stands for, null for others.</summary>
    public static byte? ByteOf(string token) =>
        token is ['<', '0', 'x', _, _, '>'] && byte.TryParse(token.AsSpan(3, 2),
            NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out byte value)
            ? value : null;

    protected void CheckByteTokens()
    {
        for (int value = 0; ByteFallback && value < 256; value++)
            if (!Vocabulary.ContainsKey(ByteToken(value)))
                throw Bad($"has byte fallback, but no token \"{ByteToken(value)}\"");
    }
}
