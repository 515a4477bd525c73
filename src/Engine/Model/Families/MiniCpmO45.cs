using MiniCpmNative.Engine.Data;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// MiniCPM-o 4.5: MiniCPM-V 4.5 without times in its resampler, and with an audio encoder, which
/// runs where a run asks for it, and speech output, which is handed on untouched.
/// </summary>
internal sealed class MiniCpmO45() : Family("MiniCPM-o-4_5")
{
    public override GgufNames Gguf => new("qwen3", "qwen2", 100045);

    public override VideoRules? Video => FramesAsPictures;

    public override bool Is(ModelConfig config) => config.IsOmni("4.5");

    public override bool CallsOutProj => false;

    public override ChatDefaults Chat => new(MaxNewTokens: 4096, RepetitionPenalty: 1.02);

    public override ModelSpec Read(ModelConfig config) =>
        config.Spec(this, config.Decoder(qkNorm: true), config.Siglip());

    public override AudioSpec? Audio(ModelConfig config) =>
        AudioSpec.Read(config, poolStep: 5, splitsPlaces: false);

    public override MiniCpmModel Build(ModelSpec spec, ModuleScope root,
        Recomputation recomputation)
    {
        if (spec.Audio is null) root.PassOver("apm", "audio_projection_layer");
        root.PassOver("tts");
        return base.Build(spec, root, recomputation);
    }
}
