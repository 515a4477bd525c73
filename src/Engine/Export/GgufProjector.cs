using MiniCpmNative.Engine.Model;

namespace MiniCpmNative.Engine.Export;

/// <summary>
/// Vision tower and resampler, or mergers, as llama.cpp reads them ("mmproj"): matrices in F16, the
/// rest in F32. As in all files with a resampler, ffn_down is the tower's first layer fc1 there and
/// ffn_up its second; with mergers they are what they say.
/// </summary>
internal static class GgufProjector
{
    // The reader's own, whatever the file says.
    private const int PositionsPerSide = 70;

    /// <summary>Why there can be none for a model; null where there can.</summary>
    public static string? WhyNot(ModelSpec spec) =>
        spec.Joiner is MergerSpec { Halved: false }
            ? "llama.cpp reads no vision tower of downsample_mode 4x"
        : spec.Joiner is ResamplerSpec && spec.Family.Gguf!.Projector is null
            ? "llama.cpp reads no vision tower of this kind"
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
        file.Add("general.file_type", GgufType.F16.FileType);
        file.Add("general.description", "vision tower of " + spec.Family.Name);
        file.Add("clip.vision.image_size", (uint)spec.Slicing.ScaleResolution);
        file.Add("clip.vision.patch_size", (uint)vision.PatchSize);
        file.Add("clip.vision.embedding_length", (uint)vision.HiddenSize);
        file.Add("clip.vision.feed_forward_length", (uint)vision.IntermediateSize);
        file.Add("clip.vision.attention.head_count", (uint)vision.Heads);
        file.Add("clip.vision.attention.layer_norm_epsilon", vision.LayerNormEpsilon);
        file.Add("clip.vision.block_count", (uint)vision.Layers);
        file.Add("clip.vision.image_mean", [.. spec.Processor.Mean.Select(v => (float)v)]);
        file.Add("clip.vision.image_std", [.. spec.Processor.Std.Select(v => (float)v)]);
        file.Add("clip.use_gelu", true);
        var tensors = new GgufTensors(weights);
        const string First = "embeddings.patch_embedding.weight";
        string tower = spec.Parameters.All.First(parameter =>
            parameter.Name.EndsWith(First, StringComparison.Ordinal)).Name[..^First.Length];
        if (spec.Joiner is MergerSpec merger)
        {
            file.Add("clip.projector_type", "minicpmv4_6");
            file.Add("clip.vision.projection_dim", (uint)merger.HiddenSize);
            file.Add("clip.vision.projector.scale_factor", (uint)merger.Merges);
            file.Add("clip.vision.wa_layer_indexes", (int[])[vision.MergesAfter!.Value]);
            AddMergers(tensors, tower);
        }
        else
        {
            file.Add("clip.has_minicpmv_projector", true);
            file.Add("clip.projector_type", "resampler");
            file.Add("clip.vision.projection_dim", 0u);
            file.Add("clip.minicpmv_version", spec.Family.Gguf!.Projector!.Value);
            file.Add("clip.minicpmv_query_num", (uint)spec.Resampler.Queries);
            AddResampler(tensors, spec.Resampler);
        }

        AddTower(tensors, vision, tower, swapped: spec.Joiner is ResamplerSpec);
        file.Write(path, tensors.All);
    }

    private static void AddMergers(GgufTensors tensors, string tower)
    {
        foreach (var (name, stored) in (IEnumerable<(string, string)>)[
            ("v.vit_merger.attn_q", tower + "vit_merger.self_attn.q_proj"),
            ("v.vit_merger.attn_k", tower + "vit_merger.self_attn.k_proj"),
            ("v.vit_merger.attn_v", tower + "vit_merger.self_attn.v_proj"),
            ("v.vit_merger.attn_out", tower + "vit_merger.self_attn.out_proj"),
            ("v.vit_merger.ln1", tower + "vit_merger.layer_norm1"),
            ("v.vit_merger.ds_ln", tower + "vit_merger.pre_norm"),
            ("v.vit_merger.ds_ffn_up", tower + "vit_merger.linear_1"),
            ("v.vit_merger.ds_ffn_down", tower + "vit_merger.linear_2"),
            ("mm.input_norm", "model.merger.mlp.0.pre_norm"),
            ("mm.up", "model.merger.mlp.0.linear_1"),
            ("mm.down", "model.merger.mlp.0.linear_2")])
            foreach (string part in (string[])["weight", "bias"])
                tensors.Add($"{name}.{part}", $"{stored}.{part}", GgufType.F16);
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
                tensors.Add($"resampler.attn.{names[i]}.{part}",
                    $"resampler.attn.in_proj_{part}", GgufType.F16, new(Rows:
                        [.. Enumerable.Range(i * spec.HiddenSize, spec.HiddenSize)]));
            Same($"resampler.attn.out.{part}", $"resampler.attn.out_proj.{part}");
            foreach (string norm in (string[])["ln_q", "ln_kv", "ln_post"])
                Same($"resampler.{norm}.{part}", $"resampler.{norm}.{part}");
        }

        void Same(string name, string stored) => tensors.Add(name, stored, GgufType.F16);
    }

    private static void AddTower(
        GgufTensors tensors, VisionSpec vision, string tower, bool swapped)
    {
        tensors.Add("v.patch_embd.weight", tower + "embeddings.patch_embedding.weight",
            GgufType.F16);
        tensors.Add("v.patch_embd.bias", tower + "embeddings.patch_embedding.bias", GgufType.F32);
        tensors.Add("v.position_embd.weight", tower + "embeddings.position_embedding.weight",
            GgufType.F16);
        for (int i = 0; i < vision.Layers; i++)
        {
            foreach (var (name, stored) in (IEnumerable<(string, string)>)[
                ("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"),
                ("attn_v", "self_attn.v_proj"), ("attn_out", "self_attn.out_proj"),
                ("ln1", "layer_norm1"), ("ln2", "layer_norm2"),
                (swapped ? "ffn_down" : "ffn_up", "mlp.fc1"),
                (swapped ? "ffn_up" : "ffn_down", "mlp.fc2")])
                foreach (string part in (string[])["weight", "bias"])
                    tensors.Add($"v.blk.{i}.{name}.{part}",
                        $"{tower}encoder.layers.{i}.{stored}.{part}", GgufType.F16);
        }

        tensors.Add("v.post_ln.weight", tower + "post_layernorm.weight", GgufType.F32);
        tensors.Add("v.post_ln.bias", tower + "post_layernorm.bias", GgufType.F32);
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
