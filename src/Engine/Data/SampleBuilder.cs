using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// Turns rows into samples: text with placeholders, tokens, shifted labels, bounds of the views.
/// Samples longer than model_max_length lose their last tokens, but never a part of a picture. Any
/// number of threads may use one builder.
/// </summary>
public sealed class SampleBuilder
{
    private const int MostLetters = 2_000_000;

    private readonly RowFormat _format;
    private readonly PromptFormat _prompts;
    private readonly PlaceholderScheme _placeholders;
    private readonly int _maxLength;
    private readonly bool _official;

    /// <param name="format">What the model wants.</param>
    /// <param name="maxLength">Longest sample in tokens (model_max_length).</param>
    /// <param name="official">The official script's text and labels, its quirks included.</param>
    public SampleBuilder(RowFormat format, int maxLength, bool official = false)
    {
        (_format, _maxLength, _official) = (format, maxLength, official);
        (_prompts, _placeholders) = (format.Prompts, format.Placeholders);
    }

    /// <summary>The sample of a row; plans are those of row.Pictures, one each, and sounds the
    /// numbers of samples of row.Sounds.</summary>
    /// <exception cref="BadRowException">The row cannot be trained on.</exception>
    public Sample Build(
        Row row, IReadOnlyList<SlicePlan> plans, IReadOnlyList<int>? sounds = null)
    {
        try
        {
            return _official ? BuildOfficial(row, plans) : BuildStrict(row, plans, sounds ?? []);
        }
        catch (InputException failure)
        {
            throw row.Bad(failure.Message);
        }
    }

    /// <summary>The prompt that asks for the answer in a turn of the row (index from 0; behind
    /// the last one where nothing answers it).</summary>
    /// <exception cref="BadRowException">The row cannot be trained on.</exception>
    public Prompt BuildPrompt(Row row, IReadOnlyList<SlicePlan> plans, int answer,
        IReadOnlyList<int>? sounds = null)
    {
        var (turns, pictures) = Compose(row, plans, sounds ?? []);
        if (answer > 0 && turns[answer - 1].Role is not ("user" or "tool"))
            throw row.Bad("no question stands before the answer", answer + 1);
        bool thinks = answer < turns.Length
            && turns[answer].Content.Contains("</think>", StringComparison.Ordinal);
        Prompt prompt;
        try
        {
            prompt = BuildPrompt(turns[..answer], pictures, enableThinking: thinks);
        }
        catch (InputException failure)
        {
            throw row.Bad(failure.Message);
        }

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
    /// <param name="sounds">Samples of each sound.</param>
    /// <param name="videos">What each video shows, as indices into plans.</param>
    /// <param name="tools">Functions that may be called, each as templates write it.</param>
    /// <param name="begun">What the answer begins with.</param>
    public Prompt BuildPrompt(
        IReadOnlyList<PromptTurn> turns, IReadOnlyList<SlicePlan> plans, string? system = null,
        bool enableThinking = false, IReadOnlyList<int>? sounds = null,
        IReadOnlyList<int[]>? videos = null, IReadOnlyList<string>? tools = null,
        string begun = "")
    {
        var pictures = new List<int>();
        int features = 0, stills = 0, watched = 0;
        bool numbered = Numbers(turns.Any(turn => turn.Parts.Any(part => part.Video >= 0)));
        var chat = new List<ChatTurn>();
        if (system is not null || tools is { Count: > 0 })
            chat.Add(new ChatTurn("system", system ?? "") { Tools = tools });
        foreach (var turn in turns)
        {
            var parts = new List<string>();
            foreach (var part in turn.Parts)
            {
                if (part.Sound >= 0)
                {
                    parts.Add(_format.Sounds!.Text(sounds![part.Sound]));
                    features += _format.Sounds.Tokens(sounds[part.Sound]);
                    continue;
                }

                if (part.Video >= 0)
                {
                    int[] frames = videos![part.Video];
                    parts.Add(VideoText([.. frames.Select(frame => plans[frame])], watched++));
                    pictures.AddRange(frames);
                    continue;
                }

                parts.Add(part.Text ?? _placeholders.Text(
                    plans[part.Picture], numbered ? stills++ : null));
                if (part.Text is null) pictures.Add(part.Picture);
            }
            chat.Add(new ChatTurn(turn.Role, string.Join('\n', parts), Calls: turn.Calls));
        }

        // What functions return may be anybody's text.
        foreach (string text in
            chat.Where(turn => turn.HasFunctions).SelectMany(turn => turn.Texts))
            if (RowText.Marker(text, _format.Markers) is { } problem)
                throw new InputException($"functions, their calls or results: {problem}");
        Prompt prompt = BuildPrompt(chat, [.. pictures], enableThinking, begun);
        if (prompt.Bounds.Length != pictures.Sum(picture => plans[picture].Views))
            throw ImageTokens();
        return prompt.SoundBounds.Sum(bound => bound.End - bound.Start) == features ? prompt
            : throw new InputException(
                "the prompt holds audio tokens as text; take them out, sounds are given beside the "
                    + "text");
    }

    private Prompt BuildPrompt(IReadOnlyList<ChatTurn> turns, int[] pictures, bool enableThinking,
        string begun = "")
    {
        int[] ids = _prompts.EncodePrompt(turns, enableThinking, begun);
        return new Prompt(ids,
            _placeholders.Bounds(ids) ?? throw ImageTokens(), pictures)
        {
            SoundBounds = _format.Sounds?.Bounds(ids) ?? [],
        };
    }

    private static InputException ImageTokens() => new("the prompt holds image tokens as text; take "
        + "them out, pictures are given beside the text");

    private (ChatTurn[] Turns, int[] Pictures) Compose(
        Row row, IReadOnlyList<SlicePlan> plans, IReadOnlyList<int> sounds)
    {
        var (turns, pictures) = RowText.Compose(SoundText.Tagged(row), (picture, number) =>
            row.VideoAt(picture) is { } video
                ? VideoText([.. video.Shown(row).Select(frame => plans[frame])], number)
                : _placeholders.Text(
                    plans[picture], Numbers(row.Videos.Count > 0) ? number : null),
            _format.Markers);
        return (SoundText.Filled(row, turns, k => _format.Sounds!.Text(sounds[k])), pictures);
    }

    // Beside a video the older processors are asked for no numbers.
    private bool Numbers(bool besideVideo) =>
        _format.Numbered && (!besideVideo || _format.Video is { Native: true });

    private string VideoText(SlicePlan[] frames, int number)
    {
        bool native = _format.Video is { Native: true };
        bool numbered = _format.Numbered && _format.Video is { Numbered: true };
        return string.Join(native ? "" : "\n", frames.Select((frame, i) =>
            _placeholders.Text(frame, numbered && i == 0 ? number : null, isFrame: true)));
    }

    private Sample BuildStrict(
        Row row, IReadOnlyList<SlicePlan> plans, IReadOnlyList<int> sounds)
    {
        var (turns, pictures) = Compose(row, plans, sounds);
        MustBeShort(row, turns);
        var chat = _prompts.Encode(turns);
        var bounds = _placeholders.Bounds(chat.Ids)!;
        CheckFit(row, chat.Ids.Length, bounds, pictures, plans);
        ImageBound[] heard = sounds.Count > 0 ? _format.Sounds!.Bounds(chat.Ids)! : [];
        if (heard.Length > 0 && heard[^1].End >= _maxLength)
            throw row.Bad($"has {Messages.Number(chat.Ids.Length)} tokens, model_max_length is "
                + $"{Messages.Number(_maxLength)}: its audio would be cut; raise model_max_length "
                + "or cut the sound");
        return Finish(row, chat, bounds, pictures, pictures.Sum(picture => plans[picture].Views))
            with
        { SoundBounds = heard };
    }

    // A token takes some 50 bytes while it is made: no row may fill the memory for what is cut off.
    private static void MustBeShort(Row row, IEnumerable<ChatTurn> turns)
    {
        long letters = turns.Sum(turn => turn.Texts.Sum(text => (long)text.Length));
        if (letters > MostLetters)
            throw row.Bad($"has {Messages.Number(letters)} characters, at most "
                + $"{Messages.Number(MostLetters)} can be read: shorten it or make several rows of "
                + "it");
    }

    // Only text is cut: a picture with half its rows is none.
    private void CheckFit(
        Row row, int tokens, ImageBound[] bounds, int[] pictures, IReadOnlyList<SlicePlan> plans)
    {
        if (bounds.Length == 0 || bounds[^1].End < _maxLength) return;
        int fit = bounds.Count(bound => bound.End < _maxLength), whole = 0;
        while ((fit -= plans[pictures[whole]].Views) >= 0) whole++;
        throw row.Bad($"has {Messages.Number(tokens)} tokens, model_max_length is "
            + $"{Messages.Number(_maxLength)}: picture {whole + 1} of {pictures.Length} would be "
            + "cut; raise model_max_length, lower max_slice_nums or show fewer pictures");
    }

    private Sample BuildOfficial(Row row, IReadOnlyList<SlicePlan> plans)
    {
        if (row.Sounds.Count > 0)
            throw row.Bad("has audio, which the official script cannot read; it works without "
                + "official_compat");
        if (row.Videos.Count > 0)
            throw row.Bad("has a video, which the official script does not know: leave "
                + "official_compat out");
        var turns = OfficialText.Compose(row, (picture, number) =>
            _placeholders.Text(plans[picture], number),
            [.. plans.Select(plan => plan.Sliced)]);
        MustBeShort(row, turns);
        return Finish(row, _prompts.EncodeOfficial(turns), null,
            [.. Enumerable.Range(0, plans.Count)], plans.Sum(plan => plan.Views));
    }

    private Sample Finish(
        Row row, EncodedChat chat, ImageBound[]? bounds, int[] pictures, int views)
    {
        int length = Math.Min(chat.Ids.Length, _maxLength);
        bool cut = length < chat.Ids.Length;
        int[] ids = chat.Ids[..length];
        var answer = chat.Answer.AsSpan(0, length);
        if (!answer.Contains(true))
            throw row.Bad(cut
                ? $"has {Messages.Number(chat.Ids.Length)} tokens, and no answer is left within "
                    + $"model_max_length {Messages.Number(_maxLength)}"
                : "no token is supervised: no answer was found");
        bounds ??= _placeholders.Bounds(ids)
            ?? throw row.Bad(
                "image starts and ends do not pair up: a tag in a later turn or special "
                + "tokens in the text" + (cut ? ", or a picture cut by "
                + $"model_max_length {Messages.Number(_maxLength)}" : ""));
        return new Sample(ids, _prompts.Labels(ids, answer), bounds, pictures, chat.Ids.Length,
            AnswersBeyond(chat.Answer, length), views);
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
