using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Text;
using MiniCpmNative.Engine.Weights;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// A member of the MiniCPM-V family: how its configuration is read and of which modules it is
/// composed. Everything that is a member's own stands in its file under Families; nothing else asks
/// which one a model is.
/// </summary>
public abstract class Family(string name)
{
    public string Name { get; } = name;

    /// <summary>
    /// The key of config.json with the numbers of slicing; null where they stand beside the others.
    /// </summary>
    public virtual string? SlicingKey => "slice_config";

    /// <summary>
    /// Whether config.json says how pictures are cut; else the processor's file alone does.
    /// </summary>
    public virtual bool ConfiguresPictures => true;

    /// <summary>
    /// The processor's file of a model, and the key of it that says how pictures are cut, if not
    /// all of it does.
    /// </summary>
    public virtual (string Name, string? Key) ProcessorFile(string directory) =>
        ("preprocessor_config.json", null);

    /// <summary>
    /// Where adapters sit, as a run says it; what nobody chose may mean others of this family's.
    /// </summary>
    public virtual TargetModules Targets(TargetModules chosen) => chosen;

    /// <summary>
    /// Whether placeholders are the new ones: a picture's number, a token of their own for slices.
    /// </summary>
    public virtual bool NumbersPictures => true;

    /// <summary>
    /// Whether the resampler's attention is a class that calls its out_proj, so that an adapter
    /// there acts; nn.MultiheadAttention itself reads the weight.
    /// </summary>
    public virtual bool CallsOutProj => true;

    /// <summary>What the official chat() generates by, where nothing is said.</summary>
    public virtual ChatDefaults Chat => new();

    /// <summary>How its own code shows videos; null where it takes none.</summary>
    public virtual VideoRules? Video => null;

    /// <summary>How llama.cpp knows the member; null where it does not.</summary>
    public virtual GgufNames? Gguf => null;

    /// <summary>Whether a model's config.json says that it is of this family.</summary>
    public abstract bool Is(ModelConfig config);

    /// <exception cref="InputException">
    /// A file is missing or wrong, or asks for what is not supported.
    /// </exception>
    public abstract ModelSpec Read(ModelConfig config);

    /// <summary>The audio encoder that a model has; null where its family has none.</summary>
    /// <exception cref="InputException">What its config.json says of it is wrong.</exception>
    public virtual AudioSpec? Audio(ModelConfig config) => null;

    /// <summary>
    /// Composes the model; with a scope without tensors that only describes it. Most members are
    /// a vision tower, a resampler and a decoder of the Llama kind.
    /// </summary>
    /// <param name="spec">What Read returned.</param>
    /// <param name="root">The root of the module tree.</param>
    /// <param name="recomputation">What layers compute again in backward.</param>
    public virtual MiniCpmModel Build(ModelSpec spec, ModuleScope root, Recomputation recomputation)
    {
        // In state_dict's order.
        var decoder = new Decoder(spec.Decoder, root.In("llm"), recomputation);
        IVisionTower vision =
            Tower(spec.Vision, root.As(ModelPart.Vision).In("vpm"), recomputation);
        var joiner = new Resampler(spec.Resampler, root.As(ModelPart.Joiner).In("resampler"));
        AudioEncoder? audio = spec.Audio is { } sizes ? new(sizes, root, recomputation) : null;
        return new MiniCpmModel(vision, joiner, decoder, audio);
    }

    /// <summary>
    /// How rows become tokens and patches.
    /// </summary>
    /// <exception cref="InputException">
    /// The tokenizer or the chat template cannot be used.
    /// </exception>
    public virtual RowFormat Rows(ModelSpec spec)
    {
        var tokenizer = Tokenizer.Load(spec.Directory);
        PlaceholderTokens tokens = spec.Processor.Tokens;
        int queries = spec.Resampler.Queries;
        PromptFormat prompts = Prompts(tokenizer, spec.Directory);
        return new RowFormat(
            prompts, NumbersPictures
                ? PlaceholderScheme.New(tokenizer, tokens, queries, spec.Directory)
                : PlaceholderScheme.Old(tokenizer, tokens, queries, spec.Directory),
            spec.Processor.UseImageId, spec.Slicing, spec.SliceMode,
            spec.Processor.Mean, spec.Processor.Std, spec.Decoder.VocabSize)
        {
            Sounds = spec.Audio is { } audio ? new SoundScheme(
                tokenizer, tokens.Unknown, audio.Bands, 2 * audio.Positions, audio.Tokens,
                audio.TokensOfAPlace, spec.Directory) : null,
            Video = Video,
        };
    }

    /// <summary>Frames as a list of pictures, one of each second, as the members' own documentation
    /// has it.</summary>
    protected static VideoRules FramesAsPictures { get; } = new(FrameRule.Steps, 1, 64, 2);

    /// <summary>Most members have SigLIP.</summary>
    protected virtual IVisionTower Tower(VisionSpec spec, ModuleScope scope,
        Recomputation recomputation) =>
        new SiglipTower(spec, scope, recomputation);

    /// <summary>Most members have ChatML, as their template says.</summary>
    protected virtual PromptFormat Prompts(Tokenizer tokenizer, string directory) =>
        ChatMlFormat.Load(directory, tokenizer);

    /// <summary>
    /// What a tensor of this family is, for a message of another one that has no place for it.
    /// </summary>
    public virtual string? Explain(string tensor) => null;

    public sealed override string ToString() => Name;
}

/// <summary>
/// What the official chat() hands to generation: drawn with temperature 0.7, top_p 0.8, top_k 100
/// and this penalty, or 3 beams with a penalty of 1.2, whatever generation_config.json says.
/// </summary>
public sealed record ChatDefaults(
    int MaxNewTokens = 2048, int MaxPromptTokens = 8192, double RepetitionPenalty = 1.05);

/// <summary>What llama.cpp calls the parts of a member, in GGUF files.</summary>
/// <param name="Architecture">The decoder: general.architecture.</param>
/// <param name="Splits">How texts are split into words: tokenizer.ggml.pre.</param>
/// <param name="Projector">clip.minicpmv_version of a resampler; null where its reader has
/// none.</param>
/// <param name="Interleaves">Whether its rotary embedding turns neighbours, not halves.</param>
/// <param name="Note">What a user should know about it there, if anything.</param>
public sealed record GgufNames(
    string Architecture, string Splits, int? Projector, bool Interleaves = false,
    string? Note = null);

/// <summary>All members that can be run, and telling them apart.</summary>
public static class Families
{
    public static IReadOnlyList<Family> All { get; } =
    [
        new MiniCpmV2(),
        new MiniCpmLlama3V25(),
        new MiniCpmV26(),
        new MiniCpmO26(),
        new MiniCpmV4(),
        new MiniCpmV45(),
        new MiniCpmO45(),
        new MiniCpmV46(),
        new MiniCpmV47(),
        new MiniCpmOcr(),
    ];

    /// <exception cref="InputException">The model is none of <see cref="All"/>.</exception>
    public static Family Require(ModelConfig config) =>
        All.FirstOrDefault(family => family.Is(config)) ?? throw new InputException(
            $"{config.Json.File}: {config.ModelName} is not supported yet; supported: "
            + string.Join(", ", All));

    /// <summary>
    /// What a tensor is that a model has no place for, where that is known: a part of a relative, a
    /// layer that was dropped, a recomputed buffer, quantisation data.
    /// </summary>
    public static string? Explain(string tensor)
    {
        foreach (Family family in All)
            if (family.Explain(tensor) is { } what) return what;
        if (StartsWith("vpm.encoder.layers."))
            return "vision layer that config.json does not have or drops";
        if (tensor == "llm.lm_head.weight") return "config.json ties it to embed_tokens";
        if (StartsWith("model.")) return "a model of another kind";
        if (StartsWith("base_model.")) return "a PEFT adapter";
        if (tensor == "resampler.pos_embed" || EndsWith("inv_freq") || EndsWith("position_ids"))
            return "buffer that is not stored";
        return tensor.Contains(".absmax", StringComparison.Ordinal)
            || tensor.Contains("quant_", StringComparison.Ordinal) ? "quantised checkpoint" : null;

        bool StartsWith(string prefix) => tensor.StartsWith(prefix, StringComparison.Ordinal);
        bool EndsWith(string suffix) => tensor.EndsWith(suffix, StringComparison.Ordinal);
    }
}
