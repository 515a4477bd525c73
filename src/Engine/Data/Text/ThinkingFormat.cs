using System.Text;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// ChatML as V-4_6 has it: contents without white space around them, no default system prompt, and
/// a think block, empty if nothing was thought, in every answer behind the last question; earlier
/// answers lose theirs. A prompt closes the thoughts of the answer at once unless they are asked
/// for. No official script knows it.
/// </summary>
public sealed class ThinkingFormat : TemplateFormat
{
    private const string TurnStart = "<|im_start|>", TurnEnd = "<|im_end|>";
    private const string Open = "<think>", Close = "</think>";
    private const string NoThought = Open + "\n\n" + Close + "\n\n";

    private readonly int _noThought;

    /// <param name="tokenizer">The checkpoint's tokenizer.</param>
    /// <param name="place">The model directory, for messages.</param>
    /// <param name="tools">How functions are written; null where the template has none.</param>
    /// <exception cref="InputException">The tokenizer lacks a token of the format.</exception>
    public ThinkingFormat(
        Tokenizer tokenizer, string place = "tokenizer", ToolStyle? tools = null)
        : base(tokenizer, TurnEnd, place, tools)
    {
        tokenizer.Require(TurnStart, place);
        _noThought = tokenizer.Encode(NoThought).Length;
    }

    public override string LlmType => "qwen3_5";

    public override IReadOnlyList<string> Markers { get; } = [TurnStart, TurnEnd];

    public override bool IsOfficial => false;

    public override bool OpensThoughts => true;

    private protected override int? EndOfAnswer => null;

    private protected override string Tail => "\n";

    /// <summary>The format of a model directory, whose template is recognised, not run.</summary>
    /// <exception cref="InputException">No template, or one of another kind.</exception>
    public static ThinkingFormat Load(string directory, Tokenizer tokenizer)
    {
        var (text, file) = ChatMlFormat.Template(directory, tokenizer);
        foreach (string part in (string[])[TurnStart, TurnEnd, Close, "trim", "<|image_pad|>"])
            if (!text.Contains(part, StringComparison.Ordinal))
                throw new InputException($"{file}: chat_template has no {Messages.Quote(part)}; "
                    + "only the template that came with the model is supported");
        return new ThinkingFormat(tokenizer, directory, ToolStyle.Of(text));
    }

    /// <inheritdoc/>
    public override string Prompt(IReadOnlyList<ChatTurn> turns, bool? enableThinking = null) =>
        base.Prompt(turns) + (enableThinking == true ? Open + "\n" : NoThought);

    /// <inheritdoc/>
    public override EncodedChat EncodeOfficial(IReadOnlyList<ChatTurn> turns) =>
        throw new InputException("the official script does not know this model");

    private protected override string Head(string role) => $"{TurnStart}{role}\n";

    private protected override int Added(ChatTurn answer) =>
        answer.Content.StartsWith(NoThought, StringComparison.Ordinal) ? _noThought : 0;

    private protected override IEnumerable<int> OfficialStarts(int[] ids, string text) => [];

    private protected override IReadOnlyList<ChatTurn> Written(IReadOnlyList<ChatTurn> turns)
    {
        turns = [.. turns.Select(turn => turn with { Content = PythonText.Strip(turn.Content) })];
        int question = Tools is null
            ? turns.ToList().FindLastIndex(turn => turn.Role == "user")
            : ToolStyle.LastQuestion(turns);
        if (question < 0 && turns.Count > 0)
            throw new InputException("the conversation has no question, without which the model's "
                + "template fails");
        var written = new List<ChatTurn>(turns.Count);
        for (int i = 0; i < turns.Count; i++)
        {
            if (turns[i].Role == "tool")
            {
                if (i == 0 || turns[i - 1].Role != "tool")
                    written.Add(new ChatTurn("user", ToolStyle.Results(turns.Skip(i))));
            }
            else if (turns[i].Role == "assistant")
                written.Add(Answer(turns[i], behind: i > question));
            else if (turns[i].Tools is { Count: > 0 } tools)
                written.Add(turns[i] with { Content = Tools!.System(turns[i].Content, tools) });
            else written.Add(turns[i]);
        }

        return written;
    }

    private ChatTurn Answer(ChatTurn turn, bool behind)
    {
        string content = turn.Content, thought = turn.Thought ?? "";
        int close = content.IndexOf(Close, StringComparison.Ordinal);
        if (close >= 0 && turn.Thought is null)
        {
            thought = content[..close].TrimEnd('\n');
            int open = thought.LastIndexOf(Open, StringComparison.Ordinal);
            if (open >= 0) thought = thought[(open + Open.Length)..];
            content = content[(content.LastIndexOf(Close, StringComparison.Ordinal)
                + Close.Length)..].TrimStart('\n');
        }

        content += Called(turn, PythonText.Strip(content));
        return turn with
        {
            Content = behind
                ? $"{Open}\n{PythonText.Strip(thought)}\n{Close}\n\n{content}" : content,
        };
    }
}
