namespace MiniCpmNative.Engine.Model;

/// <summary>MiniCPM-V 4.6, the first of the members of transformers itself.</summary>
internal sealed class MiniCpmV46() : NativeFamily(
    "MiniCPM-V-4_6", "minicpmv4_6", "MiniCPMV4_6ForConditionalGeneration")
{
    public override GgufNames Gguf => new("qwen35", "qwen35", Projector: null);

    public override string? Explain(string tensor) =>
        tensor.StartsWith("model.language_model.", StringComparison.Ordinal)
            || tensor.StartsWith("model.vision_tower.", StringComparison.Ordinal)
            || tensor.StartsWith("model.merger.", StringComparison.Ordinal)
            ? $"a part of {Name}" : null;
}
