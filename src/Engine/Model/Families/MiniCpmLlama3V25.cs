using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// MiniCPM-Llama3-V 2.5: SigLIP over pictures as strips (<see cref="StripLayout"/>), the resampler,
/// Llama 3 8B with its template, slices in one pair of tokens.
/// </summary>
internal sealed class MiniCpmLlama3V25() : Family("MiniCPM-Llama3-V-2_5")
{
    public override bool NumbersPictures => false;

    public override bool CallsOutProj => false;

    public override ChatDefaults Chat => new(MaxNewTokens: 1024, MaxPromptTokens: 2048);

    public override GgufNames Gguf => new("llama", "llama-bpe", 2, Interleaves: true, Note:
        "llama.cpp places a picture's patches by row and column; the released code, and training, "
        + "in one row (the numbers of pictures differ a little)");

    public override bool Is(ModelConfig config) => config.IsVision("2.5");

    public override ModelSpec Read(ModelConfig config)
    {
        ModelSpec spec = config.Spec(
            this, config.Decoder() with { FinalNormDecays = false }, config.Siglip() with
            {
                Layout = new StripLayout(config.Flag("batch_vision_input", true)),
            });
        // Its class of config.json slices whatever slice_mode says.
        return spec with { SliceMode = true };
    }

    protected override PromptFormat Prompts(Tokenizer tokenizer, string directory) =>
        new Llama3Format(tokenizer, directory);
}
