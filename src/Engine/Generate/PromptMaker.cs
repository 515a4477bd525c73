using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Model;

namespace MiniCpmNative.Engine.Generate;

/// <summary>A picture that is shown to a model, as it is cut; decoded when it is needed.</summary>
public sealed record PromptPicture(string Name, Func<Picture> Decode, SlicePlan Plan);

/// <summary>
/// Makes prompts of conversations with pictures, as the official chat() does; a conversation that
/// is too long is refused, where that cuts it.
/// </summary>
public sealed class PromptMaker
{
    private readonly RowFormat _format;
    private readonly SampleBuilder _builder;
    private readonly SlicingSpec _slicing;
    private readonly PatchStrips _strips;

    /// <param name="spec">The model.</param>
    /// <param name="format">Its rows.</param>
    /// <param name="maxSliceNums">Most tiles of a picture; null takes the model's number.</param>
    public PromptMaker(ModelSpec spec, RowFormat format, int? maxSliceNums = null)
    {
        _format = format;
        _slicing = format.SlicingUpTo(maxSliceNums ?? format.Slicing.MaxSliceNums);
        _strips = format.NewStrips();
        MaxTokens = Math.Min(spec.Family.Chat.MaxPromptTokens, spec.Decoder.MaxPositions);
        _builder = new SampleBuilder(format, MaxTokens);
    }

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
    /// <exception cref="InputException">The conversation cannot be asked.</exception>
    public GenerationInput Make(
        IReadOnlyList<PromptTurn> turns, IReadOnlyList<PromptPicture> pictures,
        string? system = null, bool enableThinking = false, ulong number = 0,
        IReadOnlyList<float[]>? sounds = null)
    {
        int[] lengths = [.. (sounds ?? []).Select(samples => samples.Length)];
        Prompt prompt = _builder.BuildPrompt(
            turns, [.. pictures.Select(picture => picture.Plan)], system, enableThinking, lengths);
        int tokens = prompt.InputIds.Length, largest = prompt.InputIds.Max();
        if (tokens > MaxTokens)
            throw new InputException(
                $"the conversation has {Messages.Number(tokens)} tokens, the model is asked with "
                + $"{Messages.Number(MaxTokens)} at most: begin anew, say less, or show fewer or "
                + "smaller pictures");
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
                using Picture picture = shown.Decode();
                if (!batch.TryAddPicture(_strips, picture, shown.Plan,
                    _format.Placeholders.Features(shown.Plan)))
                    throw new InputException($"{shown.Name}: has too many patches");
            }

            if (lengths.Length > 0)
                _format.Sounds!.Add(
                    batch, prompt.SoundBounds, lengths, from, to, sound => sounds![sound]);
        }
    }

    private PromptPicture Cut(string name, Func<Picture> decode, PictureSize size) => new(
        name, decode, _slicing.Plan(size, decode));
}
