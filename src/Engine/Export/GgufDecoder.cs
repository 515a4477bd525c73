using MiniCpmNative.Engine.Data.Text;
using MiniCpmNative.Engine.Model;

namespace MiniCpmNative.Engine.Export;

/// <summary>
/// The language model as llama.cpp reads it: hyper-parameters, tokenizer, tensors under its names.
/// Its rotary embedding of "llama" and "minicpm" turns neighbours, so the rows of queries and keys
/// change places there; that of Qwen's turns halves, as the model does. Norms that the model keeps
/// centred about zero are stored as the factors that they are.
/// </summary>
internal static class GgufDecoder
{
    /// <exception cref="InputException">The tokenizer does not fit.</exception>
    public static void Write(string path, MergedWeights weights, GgufType type)
    {
        ModelSpec spec = weights.Spec;
        DecoderSpec decoder = spec.Decoder;
        GgufNames names = spec.Family.Gguf!;
        Tokenizer tokenizer = spec.Rows().Tokenizer;
        string model = Path.GetFileName(Path.TrimEndingDirectorySeparator(
            Path.GetFullPath(spec.Directory))), arch = names.Architecture;
        var file = new GgufFile(arch);
        file.Add("general.type", "model");
        file.Add("general.name", model);
        file.Add("general.file_type", type.FileType);
        if (type.IsQuantised) file.Add("general.quantization_version", 2u);
        file.Add($"{arch}.vocab_size", (uint)decoder.VocabSize);
        file.Add($"{arch}.context_length", (uint)decoder.MaxPositions);
        file.Add($"{arch}.embedding_length", (uint)decoder.HiddenSize);
        file.Add($"{arch}.block_count", (uint)decoder.Layers);
        file.Add($"{arch}.feed_forward_length", (uint)decoder.IntermediateSize);
        file.Add($"{arch}.attention.head_count", (uint)decoder.Heads);
        file.Add($"{arch}.attention.head_count_kv", (uint)decoder.KvHeads);
        file.Add($"{arch}.attention.key_length", (uint)decoder.HeadDim);
        file.Add($"{arch}.attention.value_length", (uint)decoder.HeadDim);
        file.Add($"{arch}.attention.layer_norm_rms_epsilon", decoder.RmsNormEpsilon);
        file.Add($"{arch}.rope.dimension_count",
            (uint)(decoder.RotatedColumns ?? decoder.HeadDim));
        file.Add($"{arch}.rope.freq_base", (float)decoder.RopeTheta);
        AddScales(file, arch, decoder);
        if (decoder.Delta is { } delta) GgufDelta.AddKeys(file, arch, spec, delta);
        GgufVocabulary.Write(
            file, spec.Directory, tokenizer, decoder.VocabSize, names.Splits);
        AddTokens(file, spec, tokenizer);
        var tensors = new GgufTensors(weights);
        const string Table = "embed_tokens.weight";
        string embedding = Named(Table), root = embedding[..^Table.Length];
        AddTensors(tensors, decoder, root, names.Interleaves, type);
        // Four bits are too few for what every token passes through.
        GgufType outer = type == GgufType.Q4 ? GgufType.Q8 : type;
        tensors.Add("token_embd.weight", embedding, outer);
        if (!decoder.TiedHead) tensors.Add("output.weight", Named("lm_head.weight"), outer);
        // A tied head goes on with the original where an adapter has its own embedding, or is its.
        foreach (string head in spec.Parameters.Tied.Keys.Select(module => module + ".weight"))
            if (weights.Unties(embedding, head))
                tensors.AddAs(head, "output.weight", embedding, outer);
        file.Write(path, tensors.All);

        string Named(string end) => spec.Parameters.All.First(
            parameter => parameter.Name.EndsWith(end, StringComparison.Ordinal)).Name;
    }

    private static void AddScales(GgufFile file, string arch, DecoderSpec decoder)
    {
        // Only where the model has them: readers of others know no such keys.
        if (decoder.EmbeddingScale != 1 || decoder.ResidualScale != 1 || decoder.OutputScale != 1)
        {
            file.Add($"{arch}.embedding_scale", (float)decoder.EmbeddingScale);
            file.Add($"{arch}.residual_scale", (float)decoder.ResidualScale);
            file.Add($"{arch}.logit_scale", (float)(1 / decoder.OutputScale));
        }

        RopeScaling rope = decoder.RopeScaling;
        if (rope.Short.IsEmpty) return;
        file.Add($"{arch}.rope.scaling.type", "longrope");
        file.Add($"{arch}.rope.scaling.original_context_length", (uint)rope.ShortPositions);
        file.Add($"{arch}.rope.scaling.attn_factor", (float)rope.Amplitude);
    }

    private static void AddTokens(GgufFile file, ModelSpec spec, Tokenizer tokenizer)
    {
        int? end = tokenizer.EosId ?? spec.Generation.EosTokenIds.Cast<int?>().FirstOrDefault();
        Id("bos", tokenizer.BosId ?? spec.Generation.BosTokenId);
        Id("eos", end);
        // The end of a turn, where it is another one.
        foreach (int id in spec.Generation.EosTokenIds.Where(id => id != end).Take(1))
            Id("eot", id);
        Id("unknown", tokenizer.UnknownId);
        Id("padding", tokenizer.PadId);
        file.Add("tokenizer.ggml.add_bos_token", tokenizer.Prefix.Count > 0);
        file.Add("tokenizer.ggml.add_eos_token", tokenizer.Suffix.Count > 0);
        string template = Path.Combine(spec.Directory, "chat_template.jinja");
        if (File.Exists(template)) file.Add("tokenizer.chat_template", File.ReadAllText(template));
        else if (tokenizer.ChatTemplate is { } text) file.Add("tokenizer.chat_template", text);

        void Id(string name, int? id)
        {
            if (id is >= 0) file.Add($"tokenizer.ggml.{name}_token_id", (uint)id);
        }
    }

    private static void AddTensors(
        GgufTensors tensors, DecoderSpec decoder, string root, bool interleaves, GgufType type)
    {
        GgufChange? norm = decoder.ZeroCentredNorms ? new(Value: value => value + 1) : null;
        RopeScaling rope = decoder.RopeScaling;
        if (!rope.Short.IsEmpty)
        {
            var far = rope.Long.IsEmpty ? rope.Short : rope.Long;
            tensors.Add("rope_factors_long.weight", [.. far.Select(v => (float)v)], far.Length);
            tensors.Add("rope_factors_short.weight", [.. rope.Short.Select(v => (float)v)],
                far.Length);
        }

        for (int i = 0; i < decoder.Layers; i++)
        {
            string to = $"blk.{i}.", from = $"{root}layers.{i}.";
            tensors.Add(to + "attn_norm.weight", from + "input_layernorm.weight", type, norm);
            if (decoder.Delta is { } delta && delta.Layers[i])
                GgufDelta.AddLayer(tensors, delta, to, from + "linear_attn.", type);
            else AddAttention(tensors, decoder, to, from + "self_attn.", interleaves, type, norm);
            tensors.Add(to + (decoder.Delta is null ? "ffn_norm" : "post_attention_norm")
                + ".weight", from + "post_attention_layernorm.weight", type, norm);
            foreach (string name in (string[])["gate", "up", "down"])
                tensors.Add($"{to}ffn_{name}.weight", $"{from}mlp.{name}_proj.weight", type);
        }

        tensors.Add("output_norm.weight", root + "norm.weight", type, norm);
    }

    private static void AddAttention(GgufTensors tensors, DecoderSpec decoder, string to,
        string from, bool interleaves, GgufType type, GgufChange? norm)
    {
        foreach (string name in (string[])["q", "k", "v"])
        {
            GgufChange? order = interleaves && name != "v" ? new(Rows: Interleaved(
                (name == "q" ? decoder.Heads : decoder.KvHeads) * decoder.HeadDim,
                decoder.HeadDim)) : null;
            foreach (string part in decoder.QkvBias ? (string[])["weight", "bias"] : ["weight"])
                tensors.Add($"{to}attn_{name}.{part}", $"{from}{name}_proj.{part}", type, order);
        }

        tensors.Add(to + "attn_output.weight", from + "o_proj.weight", type);
        if (!decoder.QkNorm) return;
        foreach (string name in (string[])["q", "k"])
            tensors.Add($"{to}attn_{name}_norm.weight", $"{from}{name}_norm.weight", type, norm);
    }

    // Row j of the first half of a head becomes row 2j, row j of the second 2j + 1.
    private static int[] Interleaved(int rows, int headDim) => [.. Enumerable.Range(0, rows)
        .Select(r => (r / headDim * headDim) + (r % headDim / 2)
            + (r % 2 == 0 ? 0 : headDim / 2))];
}
