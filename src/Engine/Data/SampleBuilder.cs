using System.Runtime.InteropServices;
using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// Turns rows into samples: text with placeholders, tokens, shifted labels, bounds of the views.
/// A turn is encoded between its markers, which are special tokens and cut every text: the ids are
/// those of the whole text, and where an answer lies is known and not searched for. Labels begin
/// behind "assistant\n" (and an empty think block that the format itself adds) and take in the
/// turn's end. Samples longer than model_max_length lose their last tokens, but never a part of a
/// picture. Any number of threads may use one builder.
/// </summary>
public sealed class SampleBuilder
{
    private readonly Tokenizer _tokenizer;
    private readonly ChatFormat _format;
    private readonly SampleOptions _options;
    private readonly ModelTokens _tokens;
    private readonly int[] _newLine, _noThought;
    private readonly int _answerHead;

    /// <param name="tokenizer">The model's tokenizer.</param>
    /// <param name="format">Its chat format.</param>
    /// <param name="options">What decides the samples.</param>
    /// <param name="place">The model directory, for messages.</param>
    /// <exception cref="InputException">The tokenizer lacks a token of MiniCPM-V.</exception>
    public SampleBuilder(
        Tokenizer tokenizer, ChatFormat format, SampleOptions options, string place = "tokenizer")
    {
        _tokenizer = tokenizer;
        _format = format;
        _options = options;
        _tokens = new ModelTokens(tokenizer, options.UseImageId, place);
        _newLine = tokenizer.Encode("\n");
        _noThought = tokenizer.Encode(ChatFormat.NoThought);
        _answerHead = tokenizer.Encode("assistant").Length + 1;
    }

    /// <summary>The sample of a row; plans are those of row.Pictures, one each.</summary>
    /// <exception cref="BadRowException">The row cannot be trained on.</exception>
    public Sample Build(Row row, IReadOnlyList<SlicePlan> plans) =>
        _options.OfficialCompat ? BuildOfficial(row, plans) : BuildStrict(row, plans);

    /// <summary>The prompt that asks for the answer in a turn of the row (index from 0).</summary>
    /// <exception cref="BadRowException">The row cannot be trained on.</exception>
    public Prompt BuildPrompt(Row row, IReadOnlyList<SlicePlan> plans, int answer)
    {
        var (turns, pictures) = Compose(row, plans);
        bool thinks = turns[answer].Content.Contains("</think>", StringComparison.Ordinal);
        var prompt = BuildPrompt(turns[..answer], pictures, enableThinking: thinks);
        int shown = 0;
        for (int views = 0; views < prompt.Bounds.Length && shown < pictures.Length; shown++)
            views += plans[pictures[shown]].Views;
        return prompt with { Pictures = pictures[..shown] };
    }

    /// <summary>
    /// The prompt of a conversation, as the official chat() hands it to generation: the parts of a
    /// turn joined by line ends, a number on every picture, an open answer at the end.
    /// </summary>
    /// <param name="turns">The conversation; pictures are indices into plans.</param>
    /// <param name="plans">How each picture is cut.</param>
    /// <param name="system">A system prompt in place of the format's.</param>
    /// <param name="enableThinking">Qwen3: false closes the thoughts of the answer at once.</param>
    public Prompt BuildPrompt(
        IReadOnlyList<PromptTurn> turns, IReadOnlyList<SlicePlan> plans, string? system = null,
        bool enableThinking = false)
    {
        var pictures = new List<int>();
        var chat = new List<ChatTurn>();
        if (system is not null) chat.Add(new ChatTurn("system", system));
        foreach (var turn in turns)
        {
            var parts = new List<string>();
            foreach (var part in turn.Parts)
            {
                parts.Add(part.Text ?? PictureText(plans[part.Picture], pictures.Count));
                if (part.Text is null) pictures.Add(part.Picture);
            }
            chat.Add(new ChatTurn(turn.Role, string.Join('\n', parts)));
        }
        return BuildPrompt(chat, [.. pictures], enableThinking);
    }

    private Prompt BuildPrompt(IReadOnlyList<ChatTurn> turns, int[] pictures, bool enableThinking)
    {
        int[] ids = _tokenizer.Encode(
            _format.Render(turns, addGenerationPrompt: true, enableThinking));
        return new Prompt(ids,
            _tokens.Bounds(ids) ?? throw new InputException("the prompt holds image "
            + "tokens as text; take them out, pictures are given beside the text"), pictures);
    }

    private (ChatTurn[] Turns, int[] Pictures) Compose(Row row, IReadOnlyList<SlicePlan> plans) =>
        RowText.Compose(row, (picture, number) => PictureText(plans[picture], number),
            _tokens.Structural);

    private string PictureText(SlicePlan plan, int? number) => Placeholder.Text(
        plan, _options.Queries, _options.UseImageId ? number : null, _tokens.Unknown);

    private Sample BuildStrict(Row row, IReadOnlyList<SlicePlan> plans)
    {
        var (turns, pictures) = Compose(row, plans);
        var ids = new List<int>(256);
        var answers = new List<(int Start, int End)>();
        foreach (var turn in _format.Turns(turns))
        {
            int marker = ids.Count;
            ids.Add(_tokens.TurnStart);
            _tokenizer.Encode($"{turn.Role}\n{turn.Content}", ids);
            int end = ids.Count;
            ids.Add(_tokens.TurnEnd);
            ids.AddRange(_newLine);
            if (turn.Role != "assistant") continue;
            int start = marker + 1 + _answerHead;
            if (_format.Thinks
                && turn.Content.StartsWith(ChatFormat.NoThought, StringComparison.Ordinal))
                start += _noThought.Length;
            answers.Add((Math.Min(start, end), end + 1));
        }
        var answer = new bool[ids.Count];
        foreach (var (start, end) in answers) answer.AsSpan(start, end - start).Fill(true);
        int views = pictures.Sum(picture => plans[picture].Views);
        var bounds = _tokens.Bounds(CollectionsMarshal.AsSpan(ids))!;
        CheckFit(row, ids.Count, bounds, pictures, plans);
        return Finish(row, ids, answer, bounds, pictures, views);
    }

    // Only text is cut: a picture with half its rows is none.
    private void CheckFit(
        Row row, int tokens, ImageBound[] bounds, int[] pictures, IReadOnlyList<SlicePlan> plans)
    {
        if (bounds.Length == 0 || bounds[^1].End < _options.MaxLength) return;
        int fit = bounds.Count(bound => bound.End < _options.MaxLength), whole = 0;
        while ((fit -= plans[pictures[whole]].Views) >= 0) whole++;
        throw row.Bad($"has {Messages.Number(tokens)} tokens, model_max_length is "
            + $"{Messages.Number(_options.MaxLength)}: picture {whole + 1} of {pictures.Length} would be "
            + "cut; raise model_max_length, lower max_slice_nums or show fewer pictures");
    }

    private Sample BuildOfficial(Row row, IReadOnlyList<SlicePlan> plans)
    {
        var turns = OfficialText.Compose(row, (picture, number) =>
            PictureText(plans[picture], number),
            [.. plans.Select(plan => plan.Sliced)]);
        string text = _format.Render(turns);
        var ids = new List<int>(256);
        _tokenizer.Encode(text, ids);
        var answer = OfficialText.Answers(CollectionsMarshal.AsSpan(ids), text, _tokens);
        return Finish(row, ids, answer, null, [.. Enumerable.Range(0, plans.Count)],
            plans.Sum(plan => plan.Views));
    }

    private Sample Finish(
        Row row, List<int> tokens, bool[] answer, ImageBound[]? bounds, int[] pictures, int views)
    {
        int[] ids = [.. tokens.Take(_options.MaxLength)];
        if (Array.IndexOf(answer, true, 0, ids.Length) < 0)
            throw row.Bad(ids.Length < tokens.Count
                ? $"has {Messages.Number(tokens.Count)} tokens, and no answer is left within "
                    + $"model_max_length {Messages.Number(_options.MaxLength)}"
                : "no token is supervised: no answer was found");
        bounds ??= _tokens.Bounds(ids)
            ?? throw row.Bad(
                "image starts and ends do not pair up: a tag in a later turn or special "
                + "tokens in the text" + (ids.Length < tokens.Count ? ", or a picture cut by "
                + $"model_max_length {Messages.Number(_options.MaxLength)}" : ""));
        var labels = _tokens.Labels(ids, answer.AsSpan(0, ids.Length));
        int cut = AnswersBeyond(answer, ids.Length);
        return new Sample(ids, labels, bounds, pictures, tokens.Count, cut, views);
    }

    // Answers, each a run of tokens, that do not end within the first length tokens.
    private static int AnswersBeyond(ReadOnlySpan<bool> answer, int length)
    {
        int beyond = 0;
        for (int t = length; t < answer.Length; t++)
            if (answer[t] && (t == length || !answer[t - 1])) beyond++;
        return beyond;
    }
}
