using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Tests;

/// <summary>
/// Row formats over the tokenizers of tests/reference/tokenizers, as the reference used them.
/// </summary>
internal static class RowFormats
{
    /// <summary>The texts that every released checkpoint has.</summary>
    public static PlaceholderTokens Tokens { get; } = new(
        "<image>", "</image>", "<slice>", "</slice>", "<unk>", "<image_id>", "</image_id>");

    /// <summary>A tokenizer as the official class of its family reads it.</summary>
    public static Tokenizer Tokenizer(string name) => TokenizerTests.Load(name switch
    {
        "tiny-sp" or "tiny-sp-noprefix" => name + ".slow",
        "tiny-v4" => name + ".fast",
        _ => name,
    });

    /// <summary>Whether the official code uses a tokenizer with the old placeholders.</summary>
    public static bool IsOld(string tokenizer) =>
        tokenizer is "tiny-llama3" or "tiny-sp" or "tiny-sp-noprefix";

    /// <summary>The prompt format that the official code uses with a tokenizer.</summary>
    public static PromptFormat Prompts(string tokenizer)
    {
        var loaded = Tokenizer(tokenizer);
        return tokenizer switch
        {
            "tiny-llama3" => new Llama3Format(loaded),
            "tiny-sp" or "tiny-sp-noprefix" => new MiniCpmFormat(loaded),
            "tiny-v4" => new ChatMlFormat(loaded, null, Thoughts.None),
            "tiny-qwen" => ChatMlFormat.Recognize(loaded, loaded.ChatTemplate!, tokenizer),
            "tiny-qwen3" or "o-4_5" => new ChatMlFormat(
                loaded, null, Thoughts.BehindLastQuestion),
            _ => throw new ArgumentException(tokenizer),
        };
    }

    /// <summary>Placeholders of the scheme that goes with it.</summary>
    public static PlaceholderScheme Placeholders(string tokenizer, int queries)
    {
        var loaded = Tokenizer(tokenizer);
        return IsOld(tokenizer) ? PlaceholderScheme.Old(loaded, Tokens, queries)
            : PlaceholderScheme.New(loaded, Tokens, queries);
    }

    public static RowFormat Of(string tokenizer, int queries, bool numbered = true) => new(
        Prompts(tokenizer), Placeholders(tokenizer, queries), numbered,
        new SlicingSpec(9, 448, 14), Slices: true, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5],
        Tokenizer(tokenizer).Size);
}
