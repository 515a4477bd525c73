using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;

namespace MiniCpmNative.Engine.Generate;

/// <summary>
/// How the next token is chosen, under the names of Hugging Face's GenerationConfig. A penalty, as
/// everything here, sees the generated tokens alone, as the official chat() has it, which hands the
/// prompt over as embeddings.
/// </summary>
public sealed record GenerationSettings
{
    /// <summary>Drawn from the probabilities; else the most likely token, or beams.</summary>
    public bool DoSample { get; init; }

    /// <summary>Scores are divided by it before anything is left out.</summary>
    public double Temperature { get; init; } = 1;

    /// <summary>Only the most likely so many tokens, ties included; 0 keeps all.</summary>
    public int TopK { get; init; }

    /// <summary>Only the most likely tokens that together have this probability.</summary>
    public double TopP { get; init; } = 1;

    /// <summary>Positive scores of tokens said before are divided by it, others times it.</summary>
    public double RepetitionPenalty { get; init; } = 1;

    /// <summary>Above 1 a search over so many beams, without drawing.</summary>
    public int NumBeams { get; init; } = 1;

    /// <summary>A finished beam's score is divided by its length to this power.</summary>
    public double LengthPenalty { get; init; } = 1;

    /// <summary>Whether num_beams ended beams end a search, though better could come.</summary>
    public bool EarlyStopping { get; init; }

    /// <summary>Most tokens of an answer, that which stops it included.</summary>
    public int MaxNewTokens { get; init; } = 2048;

    /// <summary>Stop tokens are ruled out for so many.</summary>
    public int MinNewTokens { get; init; }

    /// <summary>Key of all draws.</summary>
    public ulong Seed { get; init; } = 42;

    /// <summary>Tokens that end an answer.</summary>
    public IReadOnlyList<int> StopIds { get; init; } = [];

    // Of data files: enough for most answers, and a model that never ends is seen soon.
    private const int MostOfRows = 512;

    /// <summary>
    /// What a configuration says; what it leaves open is greedy without a penalty, or in a
    /// conversation as the official chat() has it: drawn, or beams with their own penalty. All that
    /// is given holds, where that drops what its preset does not have.
    /// </summary>
    public static GenerationSettings Of(
        TrainArguments arguments, ModelSpec spec, IReadOnlyList<int> stopIds, bool chats)
    {
        bool beams = arguments.NumBeams > 1;
        bool draws = arguments.DoSample ?? (chats && !beams);
        ChatDefaults chat = spec.Family.Chat;
        return new GenerationSettings
        {
            DoSample = draws,
            Temperature = arguments.Temperature ?? (chats ? 0.7 : 1),
            TopP = arguments.TopP ?? (chats ? 0.8 : 1),
            TopK = arguments.TopK ?? (chats ? 100 : 0),
            RepetitionPenalty = arguments.RepetitionPenalty
                ?? (!chats ? 1 : beams ? 1.2 : chat.RepetitionPenalty),
            NumBeams = arguments.NumBeams,
            LengthPenalty = arguments.LengthPenalty,
            EarlyStopping = arguments.EarlyStopping,
            MaxNewTokens = arguments.MaxNewTokens
                ?? (chats ? chat.MaxNewTokens : Math.Min(MostOfRows, chat.MaxNewTokens)),
            MinNewTokens = arguments.MinNewTokens,
            Seed = (ulong)arguments.Seed,
            StopIds = stopIds,
        }.Checked();
    }

    /// <exception cref="InputException">Names what makes no sense, and what would.</exception>
    public GenerationSettings Checked()
    {
        Require(Temperature is > 0 and <= 1e6, "temperature", Temperature, "above 0");
        Require(TopK >= 0, "top_k", TopK, "at least 0 (0 keeps all tokens)");
        Require(TopP is >= 0 and <= 1, "top_p", TopP, "0 to 1");
        Require(RepetitionPenalty is > 0 and <= 1e6, "repetition_penalty", RepetitionPenalty,
            "above 0");
        Require(NumBeams is >= 1 and <= 64, "num_beams", NumBeams, "1 to 64");
        Require(MaxNewTokens >= 1, "max_new_tokens", MaxNewTokens, "at least 1");
        Require(MinNewTokens >= 0 && MinNewTokens <= MaxNewTokens, "min_new_tokens", MinNewTokens,
            "0 to max_new_tokens");
        if (DoSample && NumBeams > 1)
            throw new InputException(
                $"do_sample is true and num_beams is {NumBeams}: beams are searched without "
                + "drawing; set do_sample to false, or num_beams to 1");
        return this;

        static void Require(bool holds, string name, double value, string expected)
        {
            if (!holds)
                throw new InputException(
                    FormattableString.Invariant($"{name} is {value}, expected {expected}"));
        }
    }
}
