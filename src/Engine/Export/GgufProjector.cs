using MiniCpmNative.Engine.Model;

namespace MiniCpmNative.Engine.Export;

/// <summary>
/// Vision tower and resampler as llama.cpp reads them ("mmproj"): matrices in F16, the rest in F32.
/// As in all files of this family, ffn_down is the tower's first layer fc1 and ffn_up its second.
/// </summary>
internal static class GgufProjector
{
    // The reader's own, whatever the file says.
    private const int PositionsPerSide = 70;

    /// <summary>Why there can be none for a model; null where there can.</summary>
    public static string? WhyNot(ModelSpec spec) =>
        spec.Family.Gguf!.Projector is null ? "llama.cpp reads no vision tower of this kind"
        : spec.Vision.PositionsPerSide != PositionsPerSide
            ? $"the position table has {spec.Vision.PositionsPerSide} places a side, llama.cpp "
                + $"reads {PositionsPerSide}" : null;

    public static void Write(string path, MergedWeights weights)
    {
        ModelSpec spec = weights.Spec;
        VisionSpec vision = spec.Vision;
        var file = new GgufFile("clip");
        file.Add("clip.has_text_encoder", false);
        file.Add("clip.has_vision_encoder", true);
        file.Add("clip.has_minicpmv_projector", true);
        file.Add("general.file_type", GgufType.F16.FileType);
        file.Add("general.description", "vision tower and resampler of " + spec.Family.Name);
        file.Add("clip.projector_type", "resampler");
        file.Add("clip.minicpmv_version", spec.Family.Gguf!.Projector!.Value);
        file.Add("clip.minicpmv_query_num", (uint)spec.Resampler.Queries);
        file.Add("clip.vision.image_size", (uint)spec.Slicing.ScaleResolution);
        file.Add("clip.vision.patch_size", (uint)vision.PatchSize);
        file.Add("clip.vision.embedding_length", (uint)vision.HiddenSize);
        file.Add("clip.vision.feed_forward_length", (uint)vision.IntermediateSize);
        file.Add("clip.vision.projection_dim", 0u);
        file.Add("clip.vision.attention.head_count", (uint)vision.Heads);
        file.Add("clip.vision.attention.layer_norm_epsilon", vision.LayerNormEpsilon);
        file.Add("clip.vision.block_count", (uint)vision.Layers);
        file.Add("clip.vision.image_mean", [.. spec.Processor.Mean.Select(v => (float)v)]);
        file.Add("clip.vision.image_std", [.. spec.Processor.Std.Select(v => (float)v)]);
        file.Add("clip.use_gelu", true);
        var tensors = new GgufTensors(weights);
        AddResampler(tensors, spec.Resampler);
        AddTower(tensors, vision);
        file.Write(path, tensors.All);
    }

    private static void AddResampler(GgufTensors tensors, ResamplerSpec spec)
    {
        // The reader takes the queries to be F32.
        tensors.Add("resampler.query", "resampler.query", GgufType.F32);
        tensors.Add("resampler.pos_embed_k", Positions(spec.HiddenSize),
            PositionsPerSide * PositionsPerSide, spec.HiddenSize);
        tensors.AddTransposed("resampler.proj.weight", "resampler.proj", GgufType.F16);
        tensors.Add("resampler.kv.weight", "resampler.kv_proj.weight", GgufType.F16);
        foreach (string part in (string[])["weight", "bias"])
        {
            string[] names = ["q", "k", "v"];
            for (int i = 0; i < names.Length; i++)
                tensors.AddPart($"resampler.attn.{names[i]}.{part}",
                    $"resampler.attn.in_proj_{part}", GgufType.F16, i, names.Length);
            Same($"resampler.attn.out.{part}", $"resampler.attn.out_proj.{part}");
            foreach (string norm in (string[])["ln_q", "ln_kv", "ln_post"])
                Same($"resampler.{norm}.{part}", $"resampler.{norm}.{part}");
        }

        void Same(string name, string stored) => tensors.Add(name, stored, GgufType.F16);
    }

    private static void AddTower(GgufTensors tensors, VisionSpec vision)
    {
        tensors.Add("v.patch_embd.weight", "vpm.embeddings.patch_embedding.weight", GgufType.F16);
        tensors.Add("v.patch_embd.bias", "vpm.embeddings.patch_embedding.bias", GgufType.F32);
        tensors.Add("v.position_embd.weight", "vpm.embeddings.position_embedding.weight",
            GgufType.F16);
        for (int i = 0; i < vision.Layers; i++)
        {
            foreach (var (name, stored) in (IEnumerable<(string, string)>)[
                ("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"),
                ("attn_v", "self_attn.v_proj"), ("attn_out", "self_attn.out_proj"),
                ("ln1", "layer_norm1"), ("ln2", "layer_norm2"),
                ("ffn_down", "mlp.fc1"), ("ffn_up", "mlp.fc2")])
                foreach (string part in (string[])["weight", "bias"])
                    tensors.Add($"v.blk.{i}.{name}.{part}",
                        $"vpm.encoder.layers.{i}.{stored}.{part}", GgufType.F16);
        }

        tensors.Add("v.post_ln.weight", "vpm.post_layernorm.weight", GgufType.F32);
        tensors.Add("v.post_ln.bias", "vpm.post_layernorm.bias", GgufType.F32);
    }

    // Of every place of the grid, the column's sines and cosines, then the row's.
    private static float[] Positions(int width)
    {
        float[] line = SinCos2D.Coordinates(PositionsPerSide, width);
        int half = width / 2;
        var table = new float[PositionsPerSide * PositionsPerSide * width];
        for (int r = 0; r < PositionsPerSide; r++)
        {
            for (int c = 0; c < PositionsPerSide; c++)
            {
                Span<float> to = table.AsSpan(((r * PositionsPerSide) + c) * width, width);
                line.AsSpan(c * half, half).CopyTo(to);
                line.AsSpan(r * half, half).CopyTo(to[half..]);
            }
        }

        return table;
    }
}
