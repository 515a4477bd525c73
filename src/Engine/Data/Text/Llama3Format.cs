namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// Llama 3's format (MiniCPM-Llama3-V-2_5): a BOS, then
/// &lt;|start_header_id|&gt;role&lt;|end_header_id|&gt;\n\n content &lt;|eot_id|&gt; for each turn,
/// white space around contents dropped. It is the template that the official script passes; the
/// checkpoint's own differs by an open answer at the end of every text, which is no training text.
/// </summary>
public sealed class Llama3Format : TemplateFormat
{
    private const string HeadStart = "<|start_header_id|>", HeadEnd = "<|end_header_id|>";
    private const string TurnEnd = "<|eot_id|>";

    private readonly int _headStart, _headEnd;

    /// <exception cref="InputException">The tokenizer lacks a token of the format.</exception>
    public Llama3Format(Tokenizer tokenizer, string place = "tokenizer")
        : base(tokenizer, TurnEnd, place)
    {
        Begin = tokenizer.BosToken
            ?? throw new InputException($"{place}: the tokenizer has no bos_token");
        tokenizer.Require(Begin, place);
        _headStart = tokenizer.Require(HeadStart, place);
        _headEnd = tokenizer.Require(HeadEnd, place);
        Markers = [Begin, HeadStart, HeadEnd, TurnEnd];
    }

    public override string LlmType => "llama3";

    public override IReadOnlyList<string> Markers { get; }

    private protected override int? EndOfAnswer => EndId;

    private protected override string Begin { get; }

    private protected override string Head(string role) => $"{HeadStart}{role}{HeadEnd}\n\n";

    // Jinja trims as Python does.
    private protected override IReadOnlyList<ChatTurn> Written(IReadOnlyList<ChatTurn> turns) =>
        [.. turns.Select(turn => turn with { Content = PythonText.Strip(turn.Content) })];

    // The n-th start of a head is paired with the n-th end, wherever they stand, and every
    // "assistant" in the middle between two begins an answer.
    private protected override IEnumerable<int> OfficialStarts(int[] ids, string text)
    {
        int[] starts = At(_headStart), ends = At(_headEnd);
        if (starts.Length != ends.Length)
            throw new InputException($"the text has {starts.Length} {HeadStart} and {ends.Length} "
                + $"{HeadEnd}, on which the official script fails");
        var twice = starts.Zip(ends, (start, end) => start + end).ToHashSet();
        return from index in Assistants(ids) where twice.Contains(2 * index) select index + 3;

        int[] At(int id) => [.. from item in ids.Index() where item.Item == id select item.Index];
    }
}
