namespace MiniCpmNative.Engine.Config;

/// <summary>
/// The settings of the adapter that a run starts from (lora_weight_path), where the user gives
/// none, so that the configuration says what ran.
/// </summary>
public static class AdapterSettings
{
    /// <summary>The configuration with the adapter's settings where none is given.</summary>
    /// <param name="arguments">A configuration with lora_weight_path.</param>
    /// <param name="isGiven">Whether the user set a key.</param>
    /// <exception cref="InputException">The adapter's configuration cannot be used.</exception>
    public static TrainArguments Complete(TrainArguments arguments, Func<string, bool> isGiven)
    {
        string folder = arguments.LoraWeightPath!;
        if (!Directory.Exists(folder))
            throw new InputException($"lora_weight_path {folder}: there is no such folder");
        string file = Path.Combine(folder, AdapterConfig.FileName);
        AdapterConfig its = AdapterConfig.Read(file);
        if (!isGiven("lora_dropout") && its.Dropout >= 1)
            throw new InputException(
                $"{file}: key \"lora_dropout\" is 1, which drops everything: give lora_dropout "
                    + "below 1");
        // A regular expression names its layers itself.
        bool layers = isGiven("lora_layers_to_transform")
            || (isGiven("lora_target_modules") && arguments.LoraTargetModules.Pattern is not null);
        return arguments with
        {
            LoraR = isGiven("lora_r") ? arguments.LoraR : its.Rank,
            LoraAlpha = isGiven("lora_alpha") ? arguments.LoraAlpha : its.Alpha,
            LoraDropout = isGiven("lora_dropout") ? arguments.LoraDropout : its.Dropout,
            LoraBias = isGiven("lora_bias") ? arguments.LoraBias : its.Bias,
            TrainableTokenIndices = isGiven("trainable_token_indices")
                ? arguments.TrainableTokenIndices : its.Tokens,
            TargetParameters = isGiven("target_parameters") || its.TargetParameters.Count == 0
                ? arguments.TargetParameters : its.TargetParameters,
            UseDora = isGiven("use_dora") ? arguments.UseDora : its.UseDora,
            UseRslora = isGiven("use_rslora") ? arguments.UseRslora : its.UseRslora,
            RankPattern = isGiven("rank_pattern") || its.RankPattern.Count == 0
                ? arguments.RankPattern : its.RankPattern,
            AlphaPattern = isGiven("alpha_pattern") || its.AlphaPattern.Count == 0
                ? arguments.AlphaPattern : its.AlphaPattern,
            LoraTargetModules = isGiven("lora_target_modules")
                ? arguments.LoraTargetModules : its.Targets,
            ExcludeModules = isGiven("lora_target_modules") || isGiven("exclude_modules")
                ? arguments.ExcludeModules : its.Exclude,
            LoraLayersToTransform = layers
                ? arguments.LoraLayersToTransform : its.LayersToTransform,
            LoraLayerReplication = isGiven("lora_layer_replication")
                ? arguments.LoraLayerReplication : its.LayerReplication,
            LoraLayersPattern = layers || isGiven("lora_layers_pattern")
                || its.LayersPattern.Count == 0 ? arguments.LoraLayersPattern : its.LayersPattern,
            ModulesToSave = isGiven("modules_to_save")
                ? arguments.ModulesToSave : its.ModulesToSave,
        };
    }
}
