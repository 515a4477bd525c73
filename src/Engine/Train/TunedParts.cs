using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// Which tensors a configuration trains. Without adapters: the resampler always, the vision tower
/// and the language model as tune_vision and tune_llm say, as the official script does, the audio
/// encoder as tune_audio says. With
/// adapters: their A and B (kept in F32, as PEFT keeps them),
/// the modules trained whole beside them, and biases.
/// </summary>
public sealed record TunedParts(
    Adapters Adapters, AdapterConfig? Config, AdapterLayout? Layout,
    IReadOnlyList<TunedTensor> Tensors)
{
    /// <param name="spec">The model.</param>
    /// <param name="arguments">The configuration.</param>
    /// <param name="adapter">The adapter to make or to start from; null without use_lora.</param>
    /// <param name="storage">Type of weights that are trained whole.</param>
    /// <exception cref="InputException">
    /// Nothing is trained, or a named module does not exist.
    /// </exception>
    public static TunedParts Choose(
        ModelSpec spec, TrainArguments arguments, AdapterConfig? adapter, DType storage)
    {
        var rules = new LearningRules(spec.Parameters, arguments);
        if (adapter is null)
        {
            return new TunedParts(Adapters.None, null, null, rules.Apply(spec.Parameters.All
                .Where(p => !p.Fixed && IsTrained(p.Part, arguments))
                .Select(p => (p.Name, p.Shape, storage))));
        }

        var layout = AdapterLayout.Create(spec.Parameters, adapter, "lora_target_modules");
        adapter = layout.Config;
        RefuseTied(spec.Parameters, adapter);
        if (layout.Targets.FirstOrDefault(t => t.OnlyRead is not null) is { } attention)
            throw new InputException(
                $"lora_target_modules matches {attention.Name}: {attention.OnlyRead}");
        // An adapter that is there already may have any.
        if (arguments.LoraWeightPath is null)
        {
            MustMatch("rank_pattern", adapter.RankPattern, layout);
            MustMatch("alpha_pattern", adapter.AlphaPattern, layout);
        }

        var whole = layout.Saved.Concat(layout.Biases).Select(p => p.Name).ToHashSet();
        return new TunedParts(Adapters.Of(adapter, layout), adapter, layout,
            rules.Apply(layout.Tensors.Select(t => (
                t.Name, t.OwnShape, whole.Contains(t.Name) ? storage : DType.F32))));
    }

    /// <summary>
    /// What layers compute again in backward as a configuration says it; nothing where it leaves
    /// that to the memory there is.
    /// </summary>
    public Recomputation NewRecomputation(ModelSpec spec, TrainArguments arguments)
    {
        bool vision = Tensors.Any(t => spec.Parameters.PartOf(t.Name) == ModelPart.Vision);
        var found = new Recomputation(spec.Decoder.Layers, vision ? spec.Vision.Layers : 0);
        found.Amount = found.Of(arguments.Recomputes);
        return found;
    }

    /// <summary>The adapter that a configuration asks for, or null without use_lora.</summary>
    public static AdapterConfig? AdapterOf(TrainArguments arguments, ModelSpec spec) =>
        !arguments.UseLora ? null : new AdapterConfig
        {
            Rank = arguments.LoraR,
            Alpha = arguments.LoraAlpha,
            Dropout = arguments.LoraDropout,
            Bias = arguments.LoraBias,
            Tokens = arguments.TrainableTokenIndices,
            TargetParameters = arguments.TargetParameters ?? [],
            UseDora = arguments.UseDora,
            UseRslora = arguments.UseRslora,
            RankPattern = arguments.RankPattern ?? NumbersByName.None,
            AlphaPattern = arguments.AlphaPattern ?? NumbersByName.None,
            Start = arguments.InitLoraWeights,
            Targets = spec.Family.Targets(arguments.LoraTargetModules),
            Exclude = arguments.ExcludeModules,
            LayersToTransform = arguments.LoraLayersToTransform,
            LayersPattern = arguments.LoraLayersPattern ?? [],
            LayerReplication = arguments.LoraLayerReplication,
            ModulesToSave = arguments.TrainedWhole,
            BaseModel = arguments.ModelNameOrPath,
            ModelClass = spec.ModelClass with { Module = LoadedAs(arguments, spec.ModelClass) },
        };

    // Transformers imports a folder's code under this name, where AutoPeftModel finds it; its own
    // classes have theirs.
    private static string LoadedAs(TrainArguments arguments, ModelClass model)
    {
        if (model.Module.StartsWith("transformers.", StringComparison.Ordinal)) return model.Module;
        string folder = Path.GetFileName(Path.TrimEndingDirectorySeparator(
            Path.GetFullPath(arguments.ModelNameOrPath ?? ".")));
        return $"transformers_modules.{folder}.{model.Module}";
    }

    /// <summary>
    /// What there is to say of an adapter on a matrix that two modules have, as PEFT says it too.
    /// </summary>
    public string? OfTied(ParameterTable table)
    {
        foreach (var (module, to) in table.Tied)
            if (Layout?.Targets.FirstOrDefault(t => t.Name == module || t.Name == to) is { } target)
                return $"{module} and {to} are one matrix (tie_word_embeddings), of which the "
                    + "adapter "
                    + $"is {target.Name}'s alone: cpmx merge writes two, which PEFT's merge does "
                    + "not";
        return null;
    }

    // PEFT passes over a pattern without a module.
    private static void MustMatch(string key, NumbersByName numbers, AdapterLayout layout)
    {
        List<string> idle = [.. numbers.List.Select(item => item.Pattern).Where(pattern =>
        {
            var alone = new NumbersByName([(pattern, 1)]);
            return !layout.Targets.Any(target => alone.OfModule(target.Name) is not null);
        })];
        if (idle.Count > 0)
            throw new InputException($"{key} {Messages.List([.. idle.Select(Messages.Quote)])}: "
                + "matches "
                + "no module with an adapter; expected regular expressions for a module's name or "
                + "its end, as q_proj");
    }

    // A module that is another one's tensor has no weight of its own to train.
    private static void RefuseTied(ParameterTable table, AdapterConfig adapter)
    {
        foreach (var (module, to) in table.Tied)
            foreach (string name in adapter.ModulesToSave)
                if (module.EndsWith(name, StringComparison.Ordinal))
                    throw new InputException(
                        $"modules_to_save {Messages.Quote(name)}: this model's {module} is {to}"
                        + " (tie_word_embeddings) and has no weight of its own; leave it out");
    }

    private static bool IsTrained(ModelPart part, TrainArguments arguments) => part switch
    {
        ModelPart.Vision => arguments.TuneVision,
        ModelPart.Audio => arguments.TuneAudio,
        ModelPart.Decoder => arguments.TuneLlm,
        _ => true,
    };
}
