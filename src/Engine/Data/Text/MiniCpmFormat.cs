using System.Text;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// The format of MiniCPM-V-2: &lt;用户&gt;question&lt;AI&gt;answer, and the end token behind the
/// last turn. In training every prefix and every message is encoded by itself, without a BOS; a
/// prompt for generation is one text behind the BOS. So it is in the official code, and the ids
/// around a prefix differ between the two. There is no system turn.
/// </summary>
public sealed class MiniCpmFormat : PromptFormat
{
    private const string Question = "<用户>", Answer = "<AI>";

    private readonly int[] _question, _answer;
    private readonly int _end;

    /// <exception cref="InputException">The tokenizer has no end token.</exception>
    public MiniCpmFormat(Tokenizer tokenizer, string place = "tokenizer")
        : base(tokenizer, place)
    {
        _end = EosId();
        (_question, _answer) = (tokenizer.Encode(Question), tokenizer.Encode(Answer));
        Markers = [Question, Answer, tokenizer.EosToken!, .. BosToken()];

        string[] BosToken() => tokenizer.BosToken is { } bos ? [bos] : [];
    }

    public override string LlmType => "minicpm";

    public override IReadOnlyList<string> Markers { get; }

    public override IReadOnlyList<int> StopIds => [_end];

    private protected override int? EndOfAnswer => _end;

    /// <inheritdoc/>
    public override EncodedChat Encode(IReadOnlyList<ChatTurn> turns)
    {
        MustNotCall(turns);
        var ids = new List<int>(256);
        var answer = new List<bool>(256);
        for (int i = 0; i < turns.Count; i++)
        {
            bool answers = IsAnswer(turns[i]);
            ids.AddRange(answers ? _answer : _question);
            answer.AddRange(Enumerable.Repeat(false, ids.Count - answer.Count));
            Tokenizer.Encode(turns[i].Content, ids);
            if (i == turns.Count - 1) ids.Add(_end);
            answer.AddRange(Enumerable.Repeat(
                answers && turns[i].Trained != false, ids.Count - answer.Count));
        }

        return new EncodedChat([.. ids], [.. answer]);
    }

    /// <summary>
    /// The same: official finetune/dataset.py means this. As published it fails on every row of
    /// this format, where it asks a list for its shape.
    /// </summary>
    /// <inheritdoc/>
    public override EncodedChat EncodeOfficial(IReadOnlyList<ChatTurn> turns) => Encode(turns);

    /// <inheritdoc/>
    public override string Prompt(IReadOnlyList<ChatTurn> turns, bool? enableThinking = null)
    {
        MustNotCall(turns);
        var text = new StringBuilder();
        foreach (var turn in turns)
            text.Append(IsAnswer(turn) ? Answer : Question).Append(turn.Content);
        return text.Append(Answer).ToString();
    }

    private static bool IsAnswer(ChatTurn turn) => turn.Role switch
    {
        "assistant" => true,
        "user" => false,
        _ => throw new InputException($"the model's prompts have no turn of role "
            + $"{Messages.Quote(turn.Role)}, only user and assistant"),
    };
}
