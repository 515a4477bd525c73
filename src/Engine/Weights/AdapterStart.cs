using MiniCpmNative.Engine.Config;

namespace MiniCpmNative.Engine.Weights;

/// <summary>
/// Starting from an adapter (lora_weight_path). Its rank, alpha, targets and biases stay: what is
/// given beside it must be the same. Dropout may change, and modules may be added that are trained
/// whole. What is not given is the adapter's (<see cref="AdapterSettings"/>).
/// </summary>
internal static class AdapterStart
{
    /// <summary>
    /// What the configuration asks for, with the layers of an adapter of the decoder alone in the
    /// names of the whole model, where no others are given.
    /// </summary>
    public static AdapterConfig Settled(AdapterConfig own, AdapterFile start) =>
        start.OfDecoder is not { } stored || Shown(own) != Shown(stored) ? own : own with
        {
            Targets = start.Config.Targets,
            Exclude = null,
            LayersToTransform = null,
            LayersPattern = [],
        };

    /// <summary>Holds what cannot change against the adapter's.</summary>
    /// <param name="own">What the configuration asks for.</param>
    /// <param name="start">The adapter.</param>
    /// <param name="table">The model's parameters.</param>
    /// <exception cref="InputException">Lists all differences with both values.</exception>
    public static void MustFit(
        AdapterConfig own, AdapterFile start, ParameterTable table)
    {
        AdapterConfig its = start.Config;
        var problems = new List<string>();
        void Same<T>(string key, T mine, T theirs, bool same)
        {
            if (!same)
                problems.Add(FormattableString.Invariant(
                    $"{key} is {mine}, the adapter's is {theirs}"));
        }

        Same("lora_r", own.Rank, its.Rank, own.Rank == its.Rank);
        Same("lora_alpha", own.Alpha, its.Alpha, own.Alpha == its.Alpha);
        Same("use_dora", own.UseDora, its.UseDora, own.UseDora == its.UseDora);
        Same("use_rslora", own.UseRslora, its.UseRslora, own.UseRslora == its.UseRslora);
        Same("rank_pattern", own.RankPattern, its.RankPattern,
            $"{own.RankPattern}" == $"{its.RankPattern}");
        Same("alpha_pattern", own.AlphaPattern, its.AlphaPattern,
            $"{own.AlphaPattern}" == $"{its.AlphaPattern}");
        Same("lora_layer_replication", own.LayerReplication, its.LayerReplication,
            $"{own.LayerReplication}" == $"{its.LayerReplication}");
        Same("target_parameters", string.Join(", ", own.TargetParameters),
            string.Join(", ", its.TargetParameters),
            own.TargetParameters.SequenceEqual(its.TargetParameters));
        Same("trainable_token_indices", own.Tokens, its.Tokens, $"{own.Tokens}" == $"{its.Tokens}");
        Same("lora_bias", Name(own.Bias), Name(its.Bias), own.Bias == its.Bias);
        string given = Shown(own), theirs = Shown(its);
        // Other spellings of the same layers are the same.
        Same("lora_target_modules", given, theirs, given == theirs
            || Layers(own, table).SetEquals(Layers(its, table)));
        if (problems.Count > 0)
            throw new InputException(
                $"lora_weight_path {start.Directory}: {string.Join("; ", problems)}: an adapter "
                + "keeps its own; leave these keys out, or start without it");
    }

    /// <summary>Refuses to leave out a module that the adapter has trained whole.</summary>
    /// <exception cref="InputException">Names what would be lost.</exception>
    public static void MustKeepModules(
        AdapterLayout own, AdapterFile start, ParameterTable table)
    {
        AdapterConfig its = start.Config;
        AdapterLayout layout = AdapterLayout.Create(
            table, its, Path.Combine(start.Directory, AdapterConfig.FileName));
        List<string> lost = [.. layout.Saved.Except(own.Saved).Select(t => t.Name)];
        if (lost.Count == 0) return;
        throw new InputException(
            $"lora_weight_path {start.Directory}: the adapter holds trained values of modules that "
            + $"modules_to_save leaves out ({Messages.List(lost)}): name its modules "
            + $"{Messages.List([.. its.ModulesToSave])} too");
    }

    private static HashSet<string> Layers(AdapterConfig config, ParameterTable table) =>
        [.. table.Hosts.Select(host => host.Name)
            .Where(name => AdapterLayout.IsChosen(name, config))];

    private static string Name(LoraBias bias) => TrainKeys.SnakeCase(bias.ToString());

    private static string Shown(AdapterConfig config)
    {
        string names = config.Exclude is { } exclude
            ? $"{config.Targets} without {exclude}" : $"{config.Targets}";
        return config.LayersToTransform is { } layers
            ? $"{names} in layers {string.Join(", ", layers)}" : names;
    }
}
