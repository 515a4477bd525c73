using MiniCpmNative.Engine.Data;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// MiniCPM-o 2.6: MiniCPM-V 2.6 with Qwen2.5 and ids of its own. Its audio encoder runs where a
/// run asks for it; its speech output is handed on untouched.
/// </summary>
internal sealed class MiniCpmO26() : Family("MiniCPM-o-2_6")
{
    public override GgufNames Gguf => new("qwen2", "qwen2", 4);

    public override VideoRules? Video => FramesAsPictures;

    public override bool Is(ModelConfig config) => config.IsOmni("2.6");

    public override ChatDefaults Chat => new(MaxPromptTokens: 32768);

    public override ModelSpec Read(ModelConfig config) =>
        config.Spec(this, config.Decoder(qkvBias: true), config.Siglip());

    public override AudioSpec? Audio(ModelConfig config) =>
        AudioSpec.Read(config, poolStep: 2, splitsPlaces: true);

    public override MiniCpmModel Build(ModelSpec spec, ModuleScope root,
        Recomputation recomputation)
    {
        if (spec.Audio is null) root.PassOver("apm", "audio_projection_layer");
        root.PassOver("tts");
        return base.Build(spec, root, recomputation);
    }

    public override string? Explain(string tensor) =>
        tensor.StartsWith("apm.", StringComparison.Ordinal)
            || tensor.StartsWith("audio_projection_layer.", StringComparison.Ordinal)
            ? "audio of a MiniCPM-o model"
        : tensor.StartsWith("tts.", StringComparison.Ordinal)
            ? "speech output of a MiniCPM-o model" : null;
}
