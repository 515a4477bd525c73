namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// How a conversation becomes tokens: what stands around each turn, which tokens are an answer's,
/// and where generation begins. Pictures are in the turns' texts already, as placeholders. One
/// format serves any number of threads.
/// </summary>
public abstract class PromptFormat
{
    /// <summary>The label of positions that are not learned.</summary>
    public const int Ignored = -100;

    /// <param name="tokenizer">The checkpoint's tokenizer.</param>
    /// <param name="place">The model directory, for messages.</param>
    private protected PromptFormat(Tokenizer tokenizer, string place) =>
        (Tokenizer, Place) = (tokenizer, place);

    public Tokenizer Tokenizer { get; }

    /// <summary>The model directory, for messages.</summary>
    internal string Place { get; }

    /// <summary>The name that the official script gives the format, as its llm_type.</summary>
    public abstract string LlmType { get; }

    /// <summary>
    /// What stands around turns; a text that holds one would be read as another turn.
    /// </summary>
    public abstract IReadOnlyList<string> Markers { get; }

    /// <summary>Tokens that end a generated answer, as the official chat() has them.</summary>
    public abstract IReadOnlyList<int> StopIds { get; }

    /// <summary>Whether the official script knows the format.</summary>
    public virtual bool IsOfficial => true;

    /// <summary>
    /// What the last token of an answer is to predict where something follows it, besides being
    /// predicted itself: the official script's eot_id, or eos_id where its tokenizer has none. Null
    /// where no official script has it predict anything.
    /// </summary>
    private protected abstract int? EndOfAnswer { get; }

    /// <summary>The conversation, with each answer and its end marked.</summary>
    /// <exception cref="InputException">The format has no such role.</exception>
    public abstract EncodedChat Encode(IReadOnlyList<ChatTurn> turns);

    /// <summary>
    /// The conversation as the official finetune/dataset.py encodes it, its quirks included.
    /// </summary>
    /// <exception cref="InputException">The script fails on it.</exception>
    public abstract EncodedChat EncodeOfficial(IReadOnlyList<ChatTurn> turns);

    /// <summary>How functions are written; null where the template has none.</summary>
    public virtual ToolStyle? Tools => null;

    /// <summary>Whether a prompt that asks for thoughts opens them itself.</summary>
    public virtual bool OpensThoughts => false;

    /// <summary>What an answer says with the functions that it calls.</summary>
    public virtual string Said(ChatTurn turn) => turn.Content;

    /// <exception cref="InputException">Functions, which the format does not have.</exception>
    private protected static void MustNotCall(IEnumerable<ChatTurn> turns)
    {
        if (turns.Any(turn => turn.HasFunctions))
            throw new InputException("has functions (tools, calls or their results), which the "
                + "model's chat template does not have, or not in a way that is known here: take "
                + "them out, or write them into the texts of the turns");
    }

    /// <summary>The text that asks for the next answer, as the official chat() has it.</summary>
    /// <param name="turns">The conversation so far.</param>
    /// <param name="enableThinking">False closes the answer's thoughts at once; null says nothing
    /// about them. Formats without thoughts pass over it.</param>
    /// <exception cref="InputException">The format has no such role.</exception>
    public abstract string Prompt(IReadOnlyList<ChatTurn> turns, bool? enableThinking = null);

    /// <summary>
    /// The tokens of <see cref="Prompt"/>, behind the BOS that the tokenizer itself puts in front.
    /// </summary>
    /// <param name="turns">The conversation so far.</param>
    /// <param name="enableThinking">See <see cref="Prompt"/>.</param>
    /// <param name="begun">What the answer begins with.</param>
    /// <inheritdoc cref="Prompt"/>
    public int[] EncodePrompt(
        IReadOnlyList<ChatTurn> turns, bool? enableThinking = null, string begun = "") =>
        Tokenizer.Encode(Prompt(turns, enableThinking) + begun, special: true);

    /// <summary>
    /// Shifted labels: where answer[i] holds, position i-1 predicts ids[i]; and a token behind
    /// which an answer is over predicts its end, as the official script has it.
    /// </summary>
    public int[] Labels(ReadOnlySpan<int> ids, ReadOnlySpan<bool> answer)
    {
        var labels = new int[ids.Length];
        labels.AsSpan().Fill(Ignored);
        for (int i = 1; i < ids.Length; i++)
            if (answer[i]) labels[i - 1] = ids[i];
            else if (answer[i - 1] && EndOfAnswer is { } end) labels[i - 1] = end;
        return labels;
    }

    private protected int EosId() => Tokenizer.EosId
        ?? throw new InputException($"{Place}: the tokenizer has no eos_token");
}

internal static class RequiredTokens
{
    /// <summary>The id of a token that must be cut out of every text as it stands.</summary>
    /// <exception cref="InputException">The tokenizer has no such token.</exception>
    public static int Require(this Tokenizer tokenizer, string token, string place) =>
        tokenizer.IdOfAdded(token) ?? throw new InputException(
            $"{place}: the tokenizer has no special token {Messages.Quote(token)}, which the "
            + "model's prompts use");
}
