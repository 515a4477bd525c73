using MiniCpmNative.Engine.Data;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// MiniCPM-V 2.6: SigLIP with 2-D position buckets, the resampler, Qwen2-7B.
/// </summary>
internal sealed class MiniCpmV26() : Family("MiniCPM-V-2_6")
{
    public override GgufNames Gguf => new("qwen2", "qwen2", 3);

    public override VideoRules? Video => FramesAsPictures;

    public override bool Is(ModelConfig config) => config.IsVision("2.6");

    public override ModelSpec Read(ModelConfig config) =>
        config.Spec(this, config.Decoder(qkvBias: true), config.Siglip());
}
