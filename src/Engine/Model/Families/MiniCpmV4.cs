using MiniCpmNative.Engine.Data;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// MiniCPM-V 4: MiniCPM-V 2.6 with a Llama decoder whose heads have a size of their own and whose
/// rotary frequencies are divided (longrope).
/// </summary>
internal sealed class MiniCpmV4() : Family("MiniCPM-V-4")
{
    public override GgufNames Gguf => new("llama", "qwen2", 5, Interleaves: true);

    public override VideoRules? Video => FramesAsPictures;

    public override bool Is(ModelConfig config) => config.IsVision("4.0");

    public override ModelSpec Read(ModelConfig config) => config.Spec(
        this, config.Decoder() with { FinalNormDecays = false }, config.Siglip());

    // The official documentation says "llama", for which the official script has no format.
    public override RowFormat Rows(ModelSpec spec) =>
        base.Rows(spec) with { DocumentedLlmType = "llama" };
}
