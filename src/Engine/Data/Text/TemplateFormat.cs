using System.Text;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// A format of one text, in which special tokens stand around each turn. They cut every text: a
/// turn encoded alone has the ids it has in the whole, and where an answer lies is known and not
/// searched for, except as the official script does it.
/// </summary>
public abstract class TemplateFormat : PromptFormat
{
    private readonly int _assistant;

    private protected TemplateFormat(
        Tokenizer tokenizer, string end, string place, ToolStyle? tools = null)
        : base(tokenizer, place)
    {
        (End, Tools) = (end, tools);
        EndId = tokenizer.Require(end, place);
        // Where the word is several tokens the script finds no answer.
        _assistant = tokenizer.IdOf("assistant") ?? -1;
    }

    /// <inheritdoc/>
    public override ToolStyle? Tools { get; }

    /// <summary>The special token behind each turn.</summary>
    private protected string End { get; }

    private protected int EndId { get; }

    /// <summary>The end of a turn, and of a text.</summary>
    public override IReadOnlyList<int> StopIds =>
        [.. ((int?[])[EndId, Tokenizer.EosId, Tokenizer.IdOfAdded("<|endoftext|>")])
            .OfType<int>().Distinct()];

    /// <summary>What stands in front of the first turn.</summary>
    private protected virtual string Begin => "";

    /// <summary>What stands behind End.</summary>
    private protected virtual string Tail => "";

    /// <summary>What stands in front of a turn's content; a special token first.</summary>
    private protected abstract string Head(string role);

    /// <summary>The turns as they are written, a default system prompt among them.</summary>
    private protected abstract IReadOnlyList<ChatTurn> Written(IReadOnlyList<ChatTurn> turns);

    /// <inheritdoc/>
    public override string Said(ChatTurn turn) => turn.Content + Called(turn, turn.Content);

    /// <summary>An answer's calls, as they stand behind its content.</summary>
    private protected string Called(ChatTurn turn, string content) =>
        turn.Calls is { Count: > 0 } calls && Tools is { } tools
            ? tools.Calls(calls, content.Length > 0) : "";

    private IReadOnlyList<ChatTurn> Checked(IReadOnlyList<ChatTurn> turns)
    {
        if (Tools is null) MustNotCall(turns);
        return Written(turns);
    }

    /// <summary>Tokens at the start of a written answer that the format put there itself.</summary>
    private protected virtual int Added(ChatTurn answer) => 0;

    /// <summary>The text of a conversation, equal to apply_chat_template(tokenize=False).</summary>
    public string Render(IReadOnlyList<ChatTurn> turns)
    {
        var text = new StringBuilder(turns.Count > 0 ? Begin : "");
        foreach (var turn in Checked(turns))
            text.Append(Head(turn.Role)).Append(turn.Content).Append(End).Append(Tail);
        return text.ToString();
    }

    /// <inheritdoc/>
    public override string Prompt(IReadOnlyList<ChatTurn> turns, bool? enableThinking = null) =>
        Render(turns) + Head("assistant");

    /// <inheritdoc/>
    public override EncodedChat Encode(IReadOnlyList<ChatTurn> turns)
    {
        var ids = new List<int>(256);
        var answers = new List<Range>();
        int head = Tokenizer.Encode(Head("assistant")).Length;
        Tokenizer.Encode(Begin, ids);
        foreach (var turn in Checked(turns))
        {
            int from = ids.Count;
            Tokenizer.Encode(Head(turn.Role) + turn.Content, ids);
            int end = ids.Count;
            Tokenizer.Encode(End + Tail, ids);
            // An answer of white space may have joined the head's last token.
            if (turn.Role == "assistant" && turn.Trained != false)
                answers.Add(Math.Min(from + head + Added(turn), end)..(end + 1));
        }

        var answer = new bool[ids.Count];
        foreach (var range in answers) answer.AsSpan()[range].Fill(true);
        return new EncodedChat([.. ids], answer);
    }

    /// <inheritdoc/>
    public override EncodedChat EncodeOfficial(IReadOnlyList<ChatTurn> turns)
    {
        string text = Render(turns);
        int[] ids = Tokenizer.Encode(text);
        var answer = new bool[ids.Length];
        foreach (int start in OfficialStarts(ids, text))
        {
            // An end in the first place of an answer is passed over: an empty one runs on.
            if (start + 1 >= ids.Length) continue;
            int end = Array.IndexOf(ids, EndId, start + 1);
            if (end >= 0) answer.AsSpan()[start..(end + 1)].Fill(true);
        }

        return new EncodedChat(ids, answer);
    }

    /// <summary>Where the official script takes answers to start.</summary>
    private protected abstract IEnumerable<int> OfficialStarts(int[] ids, string text);

    /// <summary>Where the word "assistant" stands, by which the script finds answers.</summary>
    private protected IEnumerable<int> Assistants(int[] ids) =>
        from item in ids.Index() where item.Item == _assistant select item.Index;
}
