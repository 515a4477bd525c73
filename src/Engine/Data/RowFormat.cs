using System.Collections.Immutable;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// All that decides how a row becomes tokens and patches, besides the run's own settings. A family
/// fills it from the checkpoint's files; nothing behind it knows families.
/// </summary>
/// <param name="Prompts">How a conversation becomes tokens.</param>
/// <param name="Placeholders">What stands for a picture.</param>
/// <param name="Numbered">Whether each picture carries its number (use_image_id of the shipped
/// processor), in a scheme that has numbers; the official script numbers sliced ones,
/// always.</param>
/// <param name="Slicing">How pictures are cut; a run sets its own max_slice_nums.</param>
/// <param name="Slices">False where config.json's slice_mode turns cutting off.</param>
/// <param name="Mean">Subtracted from a pixel in 0..1, per channel.</param>
/// <param name="Std">What it is divided by then.</param>
/// <param name="Vocabulary">Token ids the model has (vocab_size).</param>
public sealed record RowFormat(
    PromptFormat Prompts, PlaceholderScheme Placeholders, bool Numbered, SlicingSpec Slicing,
    bool Slices, ImmutableArray<double> Mean, ImmutableArray<double> Std, int Vocabulary)
{
    /// <summary>
    /// The llm_type that the official documentation gives for the model although the official
    /// script has no such format ("llama" of V-4); null where the two agree.
    /// </summary>
    public string? DocumentedLlmType { get; init; }

    /// <summary>
    /// By what the places of tokens are found, where pictures lie on canvases; else null.
    /// </summary>
    public CanvasTokens? Canvas { get; init; }

    /// <summary>What stands for a sound, where the model hears; else null.</summary>
    public SoundScheme? Sounds { get; init; }

    /// <summary>How videos are shown; null where the model takes none.</summary>
    public VideoRules? Video { get; init; }

    /// <summary>Whether pictures are resized as torchvision does, not as Pillow.</summary>
    public bool NarrowResize { get; init; }

    /// <summary>
    /// Whether what is transparent is laid over white; else its colours are taken as stored.
    /// </summary>
    public bool OverWhite { get; init; }

    public Tokenizer Tokenizer => Prompts.Tokenizer;

    /// <summary>
    /// What a text must not hold: it would be read as a turn or a picture. No two are one token.
    /// </summary>
    internal IReadOnlyList<string> Markers =>
        Sounds is null ? _markers : [.. _markers, .. SoundScheme.Markers];

    private readonly string[] _markers = Distinct(Prompts, Placeholders);

    private static string[] Distinct(PromptFormat prompts, PlaceholderScheme placeholders)
    {
        string[] markers = [.. prompts.Markers, .. placeholders.Markers];
        foreach (var same in markers.GroupBy(prompts.Tokenizer.IdOfAdded))
            if (same.Key is not null && same.Count() > 1)
                throw new InputException($"{prompts.Place}: the tokenizer has one token for "
                    + $"{string.Join(" and ", same.Select(Messages.Quote))}, which must be "
                    + "different ones (\"unk\" holds the places of picture features)");
        return markers;
    }

    /// <summary>The slicing of a run that allows this many slices.</summary>
    public SlicingSpec SlicingUpTo(int maxSliceNums) =>
        Slicing with { MaxSliceNums = Slices ? maxSliceNums : 1 };

    /// <summary>
    /// The slicing of frames: all of them are enlarged where they are small.
    /// </summary>
    public SlicingSpec SlicingOfFrames(int maxSliceNums) =>
        SlicingUpTo(maxSliceNums) with
        {
            Small = SmallPictures.Always,
            ScaleResolution = Video?.ScaleResolution ?? Slicing.ScaleResolution,
        };

    /// <summary>
    /// The places of a row's tokens with these pictures; null where they are counted.
    /// </summary>
    public CanvasPlace[]? Places(ReadOnlySpan<int> ids, IEnumerable<SlicePlan> shown) =>
        Canvas?.Places(ids, [.. shown.SelectMany(plan =>
            Enumerable.Range(0, plan.Views).Select(view => Placeholders.Grid(plan, view)))]);

    /// <summary>Makes patches of pictures; for one thread.</summary>
    /// <param name="ofFrames">Of a video's: the members of transformers have one way for
    /// those.</param>
    public PatchStrips NewStrips(bool ofFrames = false) => new(
        [.. Mean.Select(v => (float)v)], [.. Std.Select(v => (float)v)], Slicing.PatchSize,
        NarrowResize || (ofFrames && Video is { Native: true }));

    /// <summary>Checks a configuration's llm_type against the model's prompts.</summary>
    /// <exception cref="InputException">They differ, or the official script has no such type.
    /// </exception>
    public void RequireLlmType(string? llmType, bool officialCompat)
    {
        if (officialCompat && !Prompts.IsOfficial)
            throw new InputException($"{Prompts.Place}: the official script does not know this "
                + "model: leave official_compat out");
        if (llmType is null || llmType == Prompts.LlmType) return;
        if (llmType != DocumentedLlmType)
            throw new InputException($"llm_type is {Messages.Quote(llmType)}, but the model's "
                + $"prompts are \"{Prompts.LlmType}\": set that, or leave llm_type out");
        if (officialCompat)
            throw new InputException($"llm_type is {Messages.Quote(llmType)}, as the official "
                + "documentation has it, but the official script has no such format and fails on "
                + $"every row: with official_compat set \"{Prompts.LlmType}\", the model's own "
                + "chat format, or leave llm_type out");
    }
}

/// <summary>How a picture is cut (slice_config of config.json).</summary>
public sealed record SlicingSpec(int MaxSliceNums, int ScaleResolution, int PatchSize)
{
    /// <summary>Patches that are merged into one along each side of a view.</summary>
    public int Merges { get; init; } = 1;

    /// <summary>What becomes of pictures that are small.</summary>
    public SmallPictures Small { get; init; }

    /// <summary>What the sides of views are multiples of, in pixels.</summary>
    public int Multiple => PatchSize * Merges;
}

/// <summary>Texts of the special tokens around and inside a picture's placeholder.</summary>
public sealed record PlaceholderTokens(
    string ImageStart, string ImageEnd, string SliceStart, string SliceEnd, string Unknown,
    string ImageIdStart, string ImageIdEnd)
{
    /// <summary>What holds a feature's place in a video's frame, where that is another.</summary>
    public string? Video { get; init; }
}
