using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Model;

namespace MiniCpmNative.Engine.Generate;

/// <summary>A picture that is shown to a model, as it is cut; decoded when it is needed.</summary>
public sealed record PromptPicture(string Name, Func<Picture> Decode, SlicePlan Plan)
{
    /// <summary>Whether it is of a video.</summary>
    public bool IsFrame { get; init; }

    /// <summary>Of frames that become features together: the temporal id of each, it and those
    /// that follow; null for all other pictures.</summary>
    public IReadOnlyList<int>? Times { get; init; }

    /// <summary>The frames that follow.</summary>
    public IReadOnlyList<PromptPicture> Joined { get; init; } = [];
}

/// <summary>
/// Makes prompts of conversations with pictures, as the official chat() does; a conversation that
/// is too long is refused, where that cuts it.
/// </summary>
public sealed class PromptMaker
{
    private readonly string _model;
    private readonly RowFormat _format;
    private readonly SampleBuilder _builder;
    private readonly SlicingSpec _slicing;
    private readonly VideoRules? _videos;
    private readonly PatchStrips _strips, _frameStrips;

    /// <param name="spec">The model.</param>
    /// <param name="format">Its rows.</param>
    /// <param name="maxSliceNums">Most tiles of a picture; null takes the model's number.</param>
    /// <param name="videos">How videos are shown; null takes the model's rules.</param>
    public PromptMaker(ModelSpec spec, RowFormat format, int? maxSliceNums = null,
        VideoRules? videos = null)
    {
        (_model, _format, _videos) = (spec.Family.Name, format, videos ?? format.Video);
        _slicing = format.SlicingUpTo(maxSliceNums ?? format.Slicing.MaxSliceNums);
        _strips = format.NewStrips();
        _frameStrips = format.NewStrips(ofFrames: true);
        MaxTokens = Math.Min(spec.Family.Chat.MaxPromptTokens, spec.Decoder.MaxPositions);
        _builder = new SampleBuilder(format, MaxTokens);
    }

    /// <summary>Decodes files of videos.</summary>
    public VideoDecoder Decoder { get; init; } = VideoDecoder.Default;

    /// <summary>Most tokens of a prompt.</summary>
    public int MaxTokens { get; }

    /// <exception cref="InputException">The file is missing or no picture.</exception>
    public PromptPicture Open(string path)
    {
        PictureInfo info = PictureDecoder.Probe(path);
        return Cut(path, () => PictureDecoder.Decode(path, _format.OverWhite), info.Size);
    }

    /// <summary>The same of a file's content; name stands in messages.</summary>
    /// <inheritdoc cref="Open"/>
    public PromptPicture Open(byte[] content, string name)
    {
        using Picture picture = PictureDecoder.Decode(content, name);
        return Cut(name, () => PictureDecoder.Decode(content, name, _format.OverWhite),
            picture.Size);
    }

    /// <summary>The samples of a sound.</summary>
    /// <exception cref="InputException">It cannot be heard.</exception>
    public float[] Hear(string path) => Hear(path, () => SoundScheme.Read(path));

    /// <summary>The same of a file's content; name stands in messages.</summary>
    /// <inheritdoc cref="Hear(string)"/>
    public float[] Hear(byte[] content, string name) =>
        Hear(name, () => SoundScheme.Read(content, name));

    /// <summary>What is shown of a video: of a file, or of a folder of frames.</summary>
    /// <exception cref="InputException">It cannot be shown.</exception>
    public IReadOnlyList<PromptPicture> Watch(string path) =>
        File.Exists(path) || Directory.Exists(path)
            ? Videos.Open(new RowVideo { Path = path }, path)
            : throw new InputException($"{path}: there is no such file or folder");

    /// <summary>The same of a video that came with its frames, or its content; name stands in
    /// messages.</summary>
    /// <inheritdoc cref="Watch(string)"/>
    public IReadOnlyList<PromptPicture> Watch(RowVideo video, string name) =>
        Videos.Open(video, name);

    private PromptVideos Videos => new(_model, _format, _videos, Decoder);

    private float[] Hear(string name, Func<float[]> read)
    {
        if (_format.Sounds is null)
            throw new InputException($"{name}: the model does not hear as it is run: "
                + "--init_audio true runs a model's audio encoder, if it has one");
        float[] samples = read();
        return _format.Sounds.Tokens(samples.Length) > 0 ? samples
            : throw new InputException($"{name}: is too short to be heard");
    }

    /// <param name="turns">The conversation; pictures and sounds are indices.</param>
    /// <param name="pictures">What they stand for.</param>
    /// <param name="system">A system prompt in place of the format's.</param>
    /// <param name="enableThinking">Leaves the answer's thoughts open.</param>
    /// <param name="number">See <see cref="GenerationInput"/>.</param>
    /// <param name="sounds">Samples of sounds, whose parts are in their order.</param>
    /// <param name="videos">What is shown of videos; parts are indices.</param>
    /// <param name="tools">Functions that may be called, each as templates write it.</param>
    /// <param name="begun">What the answer begins with.</param>
    /// <exception cref="InputException">The conversation cannot be asked.</exception>
    public GenerationInput Make(
        IReadOnlyList<PromptTurn> turns, IReadOnlyList<PromptPicture> pictures,
        string? system = null, bool enableThinking = false, ulong number = 0,
        IReadOnlyList<float[]>? sounds = null,
        IReadOnlyList<IReadOnlyList<PromptPicture>>? videos = null,
        IReadOnlyList<string>? tools = null, string begun = "")
    {
        int[] lengths = [.. (sounds ?? []).Select(samples => samples.Length)];
        var shownOf = new List<int[]>();
        foreach (IReadOnlyList<PromptPicture> video in videos ?? [])
        {
            shownOf.Add([.. Enumerable.Range(pictures.Count, video.Count)]);
            pictures = [.. pictures, .. video];
        }

        Prompt prompt = _builder.BuildPrompt(
            turns, [.. pictures.Select(picture => picture.Plan)], system, enableThinking, lengths,
            shownOf, tools, begun);
        int tokens = prompt.InputIds.Length, largest = prompt.InputIds.Max();
        if (tokens > MaxTokens)
            throw new InputException(
                $"the conversation has {Messages.Number(tokens)} tokens, the model is asked with "
                + $"{Messages.Number(MaxTokens)} at most: begin anew, say less, or show fewer or "
                + "smaller pictures" + (shownOf.Count > 0 ? " (video_max_frames, "
                + "video_max_slice_nums)" : ""));
        if (largest >= _format.Vocabulary)
            throw new InputException(
                $"the tokenizer gives the token id {largest}, the model has "
                + $"{Messages.Number(_format.Vocabulary)}: they do not belong together");
        // The tokens that a picture's views take, from the first one's to the last one's.
        var places = new ImageBound[prompt.Pictures.Length];
        for (int i = 0, view = 0; i < places.Length; i++)
        {
            int views = pictures[prompt.Pictures[i]].Plan.Views;
            places[i] = new(
                prompt.Bounds[view].Start, prompt.Bounds[(view += views) - 1].End);
        }

        CanvasPlace[]? canvas = _format.Places(
            prompt.InputIds, prompt.Pictures.Select(picture => pictures[picture].Plan));
        return new GenerationInput(tokens, batch => Append(batch, 0, tokens), number)
        {
            Ids = prompt.InputIds,
            Pictures = [.. places, .. _format.Sounds?.Places(prompt.SoundBounds, lengths) ?? []],
            AppendPart = Append,
        };

        void Append(Batch batch, int from, int to)
        {
            batch.AddRow(prompt.InputIds.AsSpan(0, to),
                [.. prompt.Bounds.Where(bound => bound.End <= to)], from, canvas?[..to]);
            for (int i = 0; i < places.Length; i++)
            {
                if (places[i].Start < from || places[i].End > to) continue;
                PromptPicture shown = pictures[prompt.Pictures[i]];
                if (!TryAdd(batch, shown, _format.Placeholders.Features(shown.Plan)))
                    throw new InputException($"{shown.Name}: has too many patches");
            }

            if (lengths.Length > 0)
                _format.Sounds!.Add(
                    batch, prompt.SoundBounds, lengths, from, to, sound => sounds![sound]);
        }
    }

    private bool TryAdd(Batch batch, PromptPicture shown, int features)
    {
        if (shown.Times is { } times)
        {
            PromptPicture[] frames = [shown, .. shown.Joined];
            return batch.TryAddFrames(_frameStrips, frame => frames[frame].Decode(),
                [.. frames.Select(frame => frame.Plan)], times, features);
        }

        using Picture picture = shown.Decode();
        return batch.TryAddPicture(
            shown.IsFrame ? _frameStrips : _strips, picture, shown.Plan, features);
    }

    private PromptPicture Cut(string name, Func<Picture> decode, PictureSize size) => new(
        name, decode, _slicing.Plan(size, decode));
}
