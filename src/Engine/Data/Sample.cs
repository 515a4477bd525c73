using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Data;

/// <summary>Rows [Start, End) of the token sequence that take the features of one view.</summary>
public readonly record struct ImageBound(int Start, int End);

/// <summary>
/// One row as the model takes it: input_ids[T]; labels[T], already shifted (position t is to
/// predict labels[t]) and -100 where nothing is learned; the bounds of the views in order; and
/// which of the row's pictures they show, in the order of their features.
/// </summary>
/// <param name="FullLength">Tokens before the cut to model_max_length.</param>
/// <param name="AnswersCut">Answers that lose their end, or all of it, in the cut.</param>
/// <param name="Views">
/// Views of all pictures listed: as many as bounds, except with official_compat, which lets a
/// picture be shown twice (more bounds than features: the official model
/// then fails) or never (features left over).
/// </param>
public sealed record Sample(
    int[] InputIds, int[] Labels, ImageBound[] Bounds, int[] Pictures, int FullLength,
    int AnswersCut, int Views)
{
    /// <summary>The places of its sounds, in order.</summary>
    public ImageBound[] SoundBounds { get; init; } = [];

    public bool Cut => FullLength > InputIds.Length;

    /// <summary>Positions that carry a label.</summary>
    public int Supervised => Labels.Length - Labels.AsSpan().Count(PromptFormat.Ignored);
}

/// <summary>A prompt for generation, as Sample without labels.</summary>
public sealed record Prompt(int[] InputIds, ImageBound[] Bounds, int[] Pictures)
{
    /// <summary>The places of sounds, in order.</summary>
    public ImageBound[] SoundBounds { get; init; } = [];
}

/// <summary>A part of what is said to the model: text, or the picture, the sound or the video of
/// that index.</summary>
public readonly record struct PromptPart(string? Text, int Picture, int Sound = -1, int Video = -1)
{
    public static implicit operator PromptPart(string text) => new(text, -1);

    public static implicit operator PromptPart(int picture) => new(null, picture);
}

/// <summary>One turn of a prompt; its parts are joined by line ends.</summary>
public sealed record PromptTurn(string Role, IReadOnlyList<PromptPart> Parts)
{
    /// <summary>Functions that an answer calls.</summary>
    public IReadOnlyList<ToolCall>? Calls { get; init; }
}
