using MiniCpmNative.Engine.Data;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// MiniCPM-V 4.5: MiniCPM-V 2.6 with Qwen3-8B, whose queries and keys are normalised per head.
/// Frames of a video may become features together, each with the position of its time.
/// </summary>
internal sealed class MiniCpmV45() : Family("MiniCPM-V-4_5")
{
    public override GgufNames Gguf => new("qwen3", "qwen2", 6);

    public override VideoRules? Video => new(FrameRule.Packed, 3, 180, 1) { MaxPacking = 3 };

    public override bool Is(ModelConfig config) => config.IsVision("4.5");

    public override ChatDefaults Chat => new(MaxPromptTokens: 16384);

    public override ModelSpec Read(ModelConfig config) =>
        config.Spec(this, config.Decoder(qkNorm: true), config.Siglip());

    public override string? Explain(string tensor) =>
        tensor.EndsWith(".q_norm.weight", StringComparison.Ordinal)
            || tensor.EndsWith(".k_norm.weight", StringComparison.Ordinal)
            ? "decoder of MiniCPM-V-4_5" : null;
}
