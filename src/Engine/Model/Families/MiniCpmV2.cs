using MiniCpmNative.Engine.Data.Text;
using MiniCpmNative.Engine.Weights;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// MiniCPM-V 2.0: timm's so400m vision transformer without its last block, a resampler with stored
/// positions of its queries, MiniCPM-2B with its scaled embeddings, residuals and logits. Tiles are
/// marked the old way, and config.json holds the keys of slicing itself.
/// </summary>
internal sealed class MiniCpmV2() : Family("MiniCPM-V-2")
{
    private const string Encoder = "vit_so400m_patch14_siglip_";

    // Of so400m; the tensors tell everything else.
    private const int HeadDim = 72, Blocks = 27;

    public override string? SlicingKey => null;

    public override bool NumbersPictures => false;

    public override bool CallsOutProj => false;

    public override ChatDefaults Chat => new(MaxNewTokens: 1024, MaxPromptTokens: 2048);

    public override GgufNames Gguf => new("minicpm", "default", null, Interleaves: true);

    public override bool Is(ModelConfig config) => config.IsVision("2.0");

    public override ModelSpec Read(ModelConfig config)
    {
        JsonValue json = config.Json;
        if (json.Find("vision_encoder") is { } encoder
            && !encoder.Text().StartsWith(Encoder, StringComparison.Ordinal))
            throw encoder.Expected($"\"{Encoder}...\", the only one supported");
        DecoderSpec decoder = config.Decoder();
        decoder = decoder with
        {
            EmbeddingScale = Scale("scale_emb"),
            ResidualScale = Scale("scale_depth") / Math.Sqrt(decoder.Layers),
            OutputScale = Scale("dim_model_base") / decoder.HiddenSize,
            FinalNormDecays = false,
        };
        ModelSpec spec = config.Spec(this, decoder, Vision(config));
        // The first MiniCPM-V, which is much alike, has no keys of slicing.
        _ = (json["max_slice_nums"], json["scale_resolution"]);
        return spec with { Resampler = spec.Resampler with { QueryPositions = true } };

        double Scale(string key) => json[key].Number(1e-6, 1e6);
    }

    protected override IVisionTower Tower(
        VisionSpec spec, ModuleScope scope, Recomputation recomputation) =>
        new TimmTower(spec, scope, recomputation);

    protected override PromptFormat Prompts(Tokenizer tokenizer, string directory) =>
        new MiniCpmFormat(tokenizer, directory);

    public override string? Explain(string tensor) =>
        tensor is "vpm.pos_embed" or "vpm.norm.weight" or "vpm.norm.bias"
            || tensor.StartsWith("vpm.blocks.", StringComparison.Ordinal)
            || tensor.StartsWith("vpm.patch_embed.", StringComparison.Ordinal)
            ? "vision tower of MiniCPM-V-2" : null;

    // config.json only names the encoder. What a tensor has no size for, because it is not there or
    // has another shape, has so400m's: the check of the tensors will say what is wrong.
    private static VisionSpec Vision(ModelConfig config)
    {
        bool drops = config.Json.Find("drop_vision_last_layer")?.Bool() ?? true;
        int blocks = drops ? Blocks - 1 : Blocks;
        using Checkpoint? files = Checkpoint.IsIn(config.Directory)
            ? Checkpoint.Open(config.Directory) : null;
        int layers = files?.Tensors.Count(IsFirstOfBlock) is > 0 and var count
            ? Math.Min(count, blocks) : blocks;
        int width = Size("vpm.pos_embed", 3, 2, 1152, 1 << 17);
        if (width % HeadDim != 0)
            throw new InputException($"{files!.Get("vpm.pos_embed").Place} has {width} columns, "
                + $"expected a multiple of {HeadDim}, the encoder's heads");
        return new VisionSpec(
            width, Size("vpm.blocks.0.mlp.fc1.weight", 2, 0, 4304, 1 << 20), layers,
            width / HeadDim, 3, Size("vpm.patch_embed.proj.weight", 4, 2, 14, 1 << 8),
            (int)Math.Sqrt(Size("vpm.pos_embed", 3, 1, 27 * 27, 1 << 20)), 1e-6f, drops);

        int Size(string tensor, int rank, int axis, int otherwise, int most) =>
            files?.Find(tensor) is { } stored && stored.Sizes.Length == rank
                && stored.Sizes[axis] > 0 && stored.Sizes[axis] <= most
                ? (int)stored.Sizes[axis] : otherwise;
    }

    private static bool IsFirstOfBlock(StoredTensor tensor) =>
        tensor.Name.StartsWith("vpm.blocks.", StringComparison.Ordinal)
        && tensor.Name.EndsWith(".norm1.weight", StringComparison.Ordinal);
}
