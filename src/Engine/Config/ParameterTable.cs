using System.Collections.Frozen;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Config;

/// <summary>
/// A linear layer y = x W^T (+ b) with W[Outputs, Inputs], by its official module name.
/// </summary>
public sealed record LinearModule(string Name, int Inputs, int Outputs, bool HasBias);

/// <summary>
/// All parameters of a MiniCPM-V-2_6 model under their official names, in the order of PyTorch's
/// state_dict, and the modules they belong to. Buffers that are recomputed (rotary frequencies, the
/// resampler's positions) are not stored and not listed.
/// </summary>
public sealed class ParameterTable
{
    private readonly List<ExpectedTensor> _tensors = [];
    private readonly List<LinearModule> _linears = [];
    private readonly FrozenDictionary<string, ExpectedTensor> _byName;

    internal ParameterTable(VisionSpec vision, ResamplerSpec resampler, DecoderSpec decoder)
    {
        AddDecoder(decoder);
        AddVision(vision);
        AddResampler(resampler);
        _byName = _tensors.ToFrozenDictionary(tensor => tensor.Name, StringComparer.Ordinal);
        Modules = ModulesOf(_tensors, decoder.Layers, vision.Layers);
    }

    /// <summary>Every parameter, in the order of state_dict.</summary>
    public IReadOnlyList<ExpectedTensor> All => _tensors;

    public IEnumerable<string> Names => _tensors.Select(tensor => tensor.Name);

    /// <summary>
    /// Layers an adapter can be put on. The resampler's attention is not among them.
    /// </summary>
    public IReadOnlyList<LinearModule> Linears => _linears;

    /// <summary>Every named module of the official model, in no particular order.</summary>
    public IReadOnlyList<string> Modules { get; }

    public ExpectedTensor? Find(string name) => _byName.GetValueOrDefault(name);

    /// <summary>
    /// What an unmatched tensor is, where that is known: parts of relatives, layers that were
    /// dropped, recomputed buffers, quantisation data.
    /// </summary>
    public static string? Explain(string name)
    {
        if (StartsWith("apm.") || StartsWith("audio_projection_layer."))
            return "audio of a MiniCPM-o model";
        if (StartsWith("tts.")) return "speech output of a MiniCPM-o model";
        if (StartsWith("vpm.blocks.") || StartsWith("vpm.pos_embed")
            || StartsWith("vpm.patch_embed."))
            return "vision tower of MiniCPM-V-2";
        if (StartsWith("vpm.encoder.layers."))
            return "vision layer that config.json does not have or drops";
        if (StartsWith("model.")) return "MiniCPM-V-4_6, or a model of another kind";
        if (StartsWith("base_model.")) return "a PEFT adapter";
        if (EndsWith(".q_norm.weight") || EndsWith(".k_norm.weight"))
            return "decoder of MiniCPM-V-4_5";
        if (EndsWith("inv_freq") || EndsWith("position_ids") || name == "resampler.pos_embed")
            return "buffer that is not stored";
        if (name == "llm.lm_head.weight") return "config.json ties it to embed_tokens";
        return name.Contains(".absmax", StringComparison.Ordinal)
            || name.Contains("quant_", StringComparison.Ordinal) ? "quantised checkpoint" : null;

        bool StartsWith(string prefix) => name.StartsWith(prefix, StringComparison.Ordinal);
        bool EndsWith(string suffix) => name.EndsWith(suffix, StringComparison.Ordinal);
    }

    private void AddDecoder(DecoderSpec d)
    {
        Add("llm.model.embed_tokens.weight", d.VocabSize, d.HiddenSize);
        for (int i = 0; i < d.Layers; i++)
        {
            string layer = $"llm.model.layers.{i}.";
            AddLinear(layer + "self_attn.q_proj", d.HiddenSize, d.Heads * d.HeadDim, d.QkvBias);
            AddLinear(layer + "self_attn.k_proj", d.HiddenSize, d.KvHeads * d.HeadDim, d.QkvBias);
            AddLinear(layer + "self_attn.v_proj", d.HiddenSize, d.KvHeads * d.HeadDim, d.QkvBias);
            AddLinear(layer + "self_attn.o_proj", d.Heads * d.HeadDim, d.HiddenSize, false);
            AddLinear(layer + "mlp.gate_proj", d.HiddenSize, d.IntermediateSize, false);
            AddLinear(layer + "mlp.up_proj", d.HiddenSize, d.IntermediateSize, false);
            AddLinear(layer + "mlp.down_proj", d.IntermediateSize, d.HiddenSize, false);
            Add(layer + "input_layernorm.weight", d.HiddenSize);
            Add(layer + "post_attention_layernorm.weight", d.HiddenSize);
        }

        Add("llm.model.norm.weight", d.HiddenSize);
        if (!d.TiedHead) AddLinear("llm.lm_head", d.HiddenSize, d.VocabSize, false);
    }

    private void AddVision(VisionSpec v)
    {
        Add("vpm.embeddings.patch_embedding.weight", v.HiddenSize, v.Channels, v.PatchSize,
            v.PatchSize);
        Add("vpm.embeddings.patch_embedding.bias", v.HiddenSize);
        Add("vpm.embeddings.position_embedding.weight", v.PositionsPerSide * v.PositionsPerSide,
            v.HiddenSize);
        for (int i = 0; i < v.Layers; i++)
        {
            string layer = $"vpm.encoder.layers.{i}.";
            foreach (string part in new[] { "k_proj", "v_proj", "q_proj", "out_proj" })
                AddLinear($"{layer}self_attn.{part}", v.HiddenSize, v.HiddenSize, true);
            AddNorm(layer + "layer_norm1", v.HiddenSize);
            AddLinear(layer + "mlp.fc1", v.HiddenSize, v.IntermediateSize, true);
            AddLinear(layer + "mlp.fc2", v.IntermediateSize, v.HiddenSize, true);
            AddNorm(layer + "layer_norm2", v.HiddenSize);
        }

        AddNorm("vpm.post_layernorm", v.HiddenSize);
    }

    private void AddResampler(ResamplerSpec r)
    {
        Add("resampler.query", r.Queries, r.HiddenSize);
        Add("resampler.proj", r.HiddenSize, r.HiddenSize);
        AddLinear("resampler.kv_proj", r.VisionSize, r.HiddenSize, false);
        Add("resampler.attn.in_proj_weight", 3 * r.HiddenSize, r.HiddenSize);
        Add("resampler.attn.in_proj_bias", 3 * r.HiddenSize);
        Add("resampler.attn.out_proj.weight", r.HiddenSize, r.HiddenSize);
        Add("resampler.attn.out_proj.bias", r.HiddenSize);
        foreach (string norm in new[] { "ln_q", "ln_kv", "ln_post" })
            AddNorm("resampler." + norm, r.HiddenSize);
    }

    private void Add(string name, params ReadOnlySpan<int> sizes) =>
        _tensors.Add(new(name, new Shape(sizes)));

    private void AddNorm(string module, int size)
    {
        Add(module + ".weight", size);
        Add(module + ".bias", size);
    }

    private void AddLinear(string module, int inputs, int outputs, bool bias)
    {
        Add(module + ".weight", outputs, inputs);
        if (bias) Add(module + ".bias", outputs);
        _linears.Add(new LinearModule(module, inputs, outputs, bias));
    }

    // Modules without parameters count too: a pattern that hits one stops PEFT.
    private static List<string> ModulesOf(List<ExpectedTensor> tensors, int decoderLayers,
        int visionLayers)
    {
        var modules =
            new HashSet<string>(StringComparer.Ordinal) { "llm.model.rotary_emb", "llm.lm_head" };
        for (int i = 0; i < decoderLayers; i++) modules.Add($"llm.model.layers.{i}.mlp.act_fn");
        for (int i = 0; i < visionLayers; i++)
            modules.Add($"vpm.encoder.layers.{i}.mlp.activation_fn");
        foreach (var tensor in tensors)
            for (int dot = tensor.Name.LastIndexOf('.'); dot > 0;
                dot = tensor.Name.LastIndexOf('.', dot - 1))
                if (!modules.Add(tensor.Name[..dot])) break;
        return [.. modules];
    }
}
