using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// Which tensors a configuration trains. Without adapters: the resampler always, the vision tower
/// and the language model as tune_vision and tune_llm say, as the official script does. With
/// adapters: their A and B (kept in F32, as PEFT keeps them),
/// the modules trained whole beside them, and biases.
/// </summary>
public sealed record TrainedParts(
    Adapters Adapters, AdapterConfig? Config, AdapterLayout? Layout,
    IReadOnlyList<Trainable> Tensors)
{
    // Modules of type nn.LayerNorm, which the Hugging Face Trainer exempts from weight decay; RMS
    // norms are exempt only where their name contains layernorm, so the decoder's last norm decays.
    private static readonly string[] s_layerNorms =
        ["layer_norm1", "layer_norm2", "post_layernorm", "ln_q", "ln_kv", "ln_post"];

    private static readonly string[] s_exempt = ["bias", "layernorm", "rmsnorm"];

    /// <param name="spec">The model.</param>
    /// <param name="arguments">The configuration.</param>
    /// <param name="adapter">The adapter to make or to start from; null without use_lora.</param>
    /// <param name="storage">Type of weights that are trained whole.</param>
    /// <exception cref="InputException">
    /// Nothing is trained, or a named module does not exist.
    /// </exception>
    public static TrainedParts Choose(
        ModelSpec spec, TrainArguments arguments, AdapterConfig? adapter, DType storage)
    {
        if (adapter is null)
        {
            return new TrainedParts(Adapters.None, null, null, [.. spec.Parameters.All
                .Where(p => InOfficialParts(p.Name, arguments))
                .Select(p => new Trainable(p.Name, p.Shape, storage, Decays(p.Name, arguments)))]);
        }

        var layout = AdapterLayout.Create(spec.Parameters, adapter, "lora_target_modules");
        RefuseHead(spec, adapter, layout);
        var adapters = new Adapters(
            [.. layout.Targets.Select((m, i) => new Adapter(
                m.Name, i, adapter.Rank, adapter.Scale, m.Inputs, m.Outputs))], adapter.Dropout);
        var whole = layout.Saved.Concat(layout.Biases).Select(p => p.Name).ToHashSet();
        return new TrainedParts(adapters, adapter, layout,
            [.. layout.Tensors.Select(t => new Trainable(
            t.Name, t.Shape, whole.Contains(t.Name) ? storage : DType.F32,
            Decays(t.Name, arguments)))]);
    }

    /// <summary>The adapter that a configuration asks for, or null without use_lora.</summary>
    public static AdapterConfig? AdapterOf(TrainArguments arguments, ModelSpec spec) =>
        !arguments.UseLora ? null : new AdapterConfig
        {
            Rank = arguments.LoraR,
            Alpha = arguments.LoraAlpha,
            Dropout = arguments.LoraDropout,
            Bias = arguments.LoraBias,
            Targets = arguments.LoraTargetModules,
            LayersToTransform = arguments.LoraLayersToTransform,
            ModulesToSave = arguments.TrainedWhole,
            BaseModel = arguments.ModelNameOrPath,
            ModelClass = spec.ModelClass,
        };

    /// <summary>Whether weight decay applies to a parameter.</summary>
    public static bool Decays(string name, TrainArguments arguments)
    {
        if (arguments.WeightDecayScope == DecayScope.All) return true;
        foreach (string part in s_exempt)
            if (name.Contains(part, StringComparison.OrdinalIgnoreCase)) return false;
        foreach (string part in name.Split('.'))
            if (s_layerNorms.Contains(part)) return false;
        return true;
    }

    // The loss is fused with the head's product, which has no place for an adapter; a tied head has
    // no weight of its own to train.
    private static void RefuseHead(ModelSpec spec, AdapterConfig adapter, AdapterLayout layout)
    {
        const string head = "llm.lm_head";
        if (layout.Targets.Any(target => target.Name == head))
            throw new InputException(
                $"lora_target_modules matches {head}: an adapter on the output head is "
                + "not supported; leave it out, or name lm_head in modules_to_save to train it whole");
        if (!spec.Decoder.TiedHead) return;
        foreach (string name in adapter.ModulesToSave)
            if (head.EndsWith(name, StringComparison.Ordinal))
                throw new InputException(
                    $"modules_to_save {Messages.Quote(name)}: this model's {head} is "
                    + "embed_tokens (tie_word_embeddings) and has no weight of its own; leave it out");
    }

    private static bool InOfficialParts(string name, TrainArguments arguments) =>
        name.StartsWith("resampler.", StringComparison.Ordinal)
        || (arguments.TuneVision && name.StartsWith("vpm.", StringComparison.Ordinal))
        || (arguments.TuneLlm && name.StartsWith("llm.", StringComparison.Ordinal));
}
