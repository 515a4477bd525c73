using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Text;
using MiniCpmNative.Engine.Weights;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// The members that are models of transformers itself: SigLIP that merges patches on its way, a
/// merger of 2 x 2 neighbours in place of the resampler, so that a picture has as many features as
/// its size gives, Qwen3.5's decoder, whose layers are not all attention, and its template.
/// </summary>
/// <param name="name">The member.</param>
/// <param name="type">Its model_type, and the module of its class.</param>
/// <param name="modelClass">Its class.</param>
internal abstract class NativeFamily(string name, string type, string modelClass) : Family(name)
{
    private const string Decoder = "model.language_model";

    protected virtual NativeDefaults Defaults { get; } = new();

    public override bool ConfiguresPictures => false;

    public override (string Name, string? Key) ProcessorFile(string directory) =>
        NativeConfig.ProcessorFile(directory);

    public override ChatDefaults Chat => new(MaxPromptTokens: 32768, RepetitionPenalty: 1);

    // Its video processor cuts frames as pictures are cut.
    public override VideoRules? Video => new(FrameRule.Seconds, 1, 128, 9)
    {
        Native = true,
        Numbered = NumbersVideos,
    };

    /// <summary>Whether a number stands in front of a video.</summary>
    protected virtual bool NumbersVideos => true;

    public override bool Is(ModelConfig config) => config.Type == type;

    public override ModelSpec Read(ModelConfig config)
    {
        config.RefuseQuantised();
        DecoderSpec decoder = NativeConfig.Decoder(config, Defaults);
        VisionSpec vision = NativeConfig.Vision(config, Defaults);
        var joiner = new MergerSpec(
            decoder.HiddenSize, vision.HiddenSize, vision.MergesAfter is not null);
        ProcessorSpec processor = NativeConfig.Processor(
            config, vision, joiner.Merges, Defaults);
        return new ModelSpec(
            this, config.Directory, vision, joiner, decoder, processor.Slicing,
            processor.UseImageId, processor.SliceMode, processor, config.Generation(),
            new ModelClass(modelClass, $"transformers.models.{type}.modeling_{type}"));
    }

    public override MiniCpmModel Build(ModelSpec spec, ModuleScope root,
        Recomputation recomputation)
    {
        ModuleScope model = root.In("model");
        // Predicts several tokens at once; the class passes it over.
        root.PassOver("mtp");
        var vision = new SiglipTower(
            spec.Vision, model.As(ModelPart.Vision).In("vision_tower"), recomputation);
        var decoder = new Decoder(spec.Decoder, root, recomputation, Decoder);
        var joiner = new BlockMerger(
            (MergerSpec)spec.Joiner, model.As(ModelPart.Joiner).In("merger"));
        return new MiniCpmModel(vision, joiner, decoder);
    }

    public override RowFormat Rows(ModelSpec spec)
    {
        var tokenizer = Tokenizer.Load(spec.Directory);
        var placeholders = PlaceholderScheme.Merged(
            tokenizer, spec.Processor.Tokens, spec.Slicing.Multiple, spec.Directory);
        ModelConfig config = ModelConfig.Open(spec.Directory);
        if (config.Json.Find("image_token_id") is { } id && id.Int() != placeholders.UnknownId)
            throw id.Expected($"{placeholders.UnknownId}, the tokenizer's "
                + $"{spec.Processor.Tokens.Unknown}");
        if (placeholders.VideoId is { } known && config.Json.Find("video_token_id") is { } video
            && video.Int() != known)
            throw video.Expected($"{known}, the tokenizer's {spec.Processor.Tokens.Video}");
        return new RowFormat(
            ThinkingFormat.Load(spec.Directory, tokenizer), placeholders,
            spec.Processor.UseImageId, spec.Slicing, spec.SliceMode, spec.Processor.Mean,
            spec.Processor.Std, spec.Decoder.VocabSize)
        {
            OverWhite = true,
            Video = placeholders.VideoId is null || Video is not { } rules
                ? null : NativeConfig.Video(spec.Directory, rules),
        };
    }

    // The default means the decoders of the other members.
    public override TargetModules Targets(TargetModules chosen) =>
        chosen.Pattern != new TrainArguments().LoraTargetModules.Pattern ? chosen : new(
            @".*language_model\.layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|o_proj)|"
            + @"linear_attn\.(in_proj_qkv|in_proj_z|in_proj_b|in_proj_a|out_proj))");
}
