using System.Text.RegularExpressions;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Weights;

/// <summary>
/// A tensor of an adapter: its name in the engine (official module, then lora_A.weight, or the
/// plain official parameter), its name in PEFT's file, and whether PEFT may have left it out.
/// </summary>
public sealed record AdapterTensor(string Name, string FileName, Shape Shape,
    bool Optional = false);

/// <summary>
/// What an adapter configuration means for a model, by PEFT's rules: which linear layers get A and
/// B, which modules are trained whole, which biases are trained. PEFT 0.14 does not save the biases
/// that it trains under bias "lora_only"; here they are saved under the name PEFT loads them by
/// (...q_proj.base_layer.bias), so that nothing is lost, and they may be absent when read.
/// </summary>
public sealed partial class AdapterLayout
{
    private const string Prefix = "base_model.model.";

    private AdapterLayout(
        IReadOnlyList<LinearModule> targets, IReadOnlyList<ExpectedTensor> saved,
        IReadOnlyList<ExpectedTensor> biases, AdapterConfig config)
    {
        (Targets, Saved, Biases) = (targets, saved, biases);
        var wrapped = targets.Select(target => target.Name).ToHashSet(StringComparer.Ordinal);
        List<AdapterTensor> tensors = [];
        foreach (var target in targets)
        {
            string a = target.Name + ".lora_A.weight", b = target.Name + ".lora_B.weight";
            tensors.Add(new(a, Prefix + a, new Shape(config.Rank, target.Inputs)));
            tensors.Add(new(b, Prefix + b, new Shape(target.Outputs, config.Rank)));
        }

        tensors.AddRange(saved.Select(tensor =>
            new AdapterTensor(tensor.Name, Prefix + tensor.Name, tensor.Shape)));
        foreach (var bias in biases)
        {
            string module = bias.Name[..bias.Name.LastIndexOf('.')];
            string file = wrapped.Contains(module) ? module + ".base_layer.bias" : bias.Name;
            tensors.Add(
                new(bias.Name, Prefix + file, bias.Shape, config.Bias == LoraBias.LoraOnly));
        }

        Tensors = tensors;
    }

    /// <summary>Layers that get an adapter, in the order of the model.</summary>
    public IReadOnlyList<LinearModule> Targets { get; }

    /// <summary>Parameters of the modules that are trained and saved whole.</summary>
    public IReadOnlyList<ExpectedTensor> Saved { get; }

    /// <summary>Biases that are trained outside of those.</summary>
    public IReadOnlyList<ExpectedTensor> Biases { get; }

    /// <summary>All tensors of the adapter.</summary>
    public IReadOnlyList<AdapterTensor> Tensors { get; }

    /// <param name="place">What errors begin with: the adapter's or the training's configuration
    /// file.</param>
    /// <exception cref="InputException">
    /// A name matches nothing, or something no adapter can be put on.
    /// </exception>
    public static AdapterLayout Create(ParameterTable table, AdapterConfig config, string place)
    {
        var whole = WholeModules(table, config, place);
        List<ExpectedTensor> saved = [.. table.All.Where(tensor =>
            whole.Any(module => tensor.Name.StartsWith(module + ".", StringComparison.Ordinal)))];
        var savedNames = saved.Select(tensor => tensor.Name).ToHashSet(StringComparer.Ordinal);
        var targets = Select(table, config, whole, place);
        var biased = targets.Select(target => target.Name + ".bias")
            .ToHashSet(StringComparer.Ordinal);
        List<ExpectedTensor> biases =
            [.. table.All.Where(tensor => !savedNames.Contains(tensor.Name)
            && config.Bias switch
            {
                LoraBias.All => tensor.Name.Contains("bias", StringComparison.Ordinal),
                LoraBias.LoraOnly => biased.Contains(tensor.Name),
                _ => false,
            })];
        return new AdapterLayout(targets, saved, biases, config);
    }

    // PEFT compares ends of names, not whole components.
    private static List<string> WholeModules(ParameterTable table, AdapterConfig config,
        string place)
    {
        foreach (string name in config.ModulesToSave)
            if (!table.Modules.Any(module => module.EndsWith(name, StringComparison.Ordinal)))
                throw new InputException(
                    $"{place}: modules_to_save {Messages.Quote(name)} is no module of the"
                    + $" model (did you mean \"{TrainKeys.Nearest(name, LastNames(table.Modules))}\"?)");
        return [.. table.Modules.Where(module => config.ModulesToSave
            .Any(name => module.EndsWith(name, StringComparison.Ordinal)))];
    }

    private static List<LinearModule> Select(
        ParameterTable table, AdapterConfig config, List<string> whole, string place)
    {
        if (config.Targets.Pattern == "all-linear")
            throw new InputException(
                $"{place}: target_modules \"all-linear\" is not supported: it includes the"
                + " resampler's attention; list the suffixes instead, q_proj and so on");
        foreach (string suffix in config.Targets.Suffixes)
            if (!table.Modules.Any(module => IsOrEndsWith(module, suffix)))
                throw new InputException(
                    $"{place}: target_modules {Messages.Quote(suffix)} is no module of the"
                    + $" model (did you mean \"{TrainKeys.Nearest(suffix, LastNames(table.Modules))}\"?)");

        var matched = table.Modules
            .Where(module => config.Targets.Matches(module) && LayerIsChosen(module, config))
            .Except(whole).ToHashSet(StringComparer.Ordinal);
        List<LinearModule> targets =
            [.. table.Linears.Where(linear => matched.Remove(linear.Name))];
        if (targets.Find(target => target.NoAdapter is not null) is { } refused)
            throw new InputException(
                $"{place}: target_modules matches {refused.Name}: {refused.NoAdapter}");
        if (matched.Count > 0)
            throw new InputException($"{place}: target_modules matches what is no linear layer:"
                + $" {Messages.List([.. matched.Order(StringComparer.Ordinal)])}");
        if (targets.Count == 0)
            throw new InputException(
                $"{place}: target_modules {Shown(config)} matches no linear layer; there"
                + $" are {string.Join(", ", table.Linears.Where(l => l.NoAdapter is null).Select(l => Digits().Replace(l.Name, "N")).Distinct())}");
        List<string> inside = [.. targets.Select(target => target.Name).Where(name =>
            whole.Any(module => name.StartsWith(module + ".", StringComparison.Ordinal)))];
        if (inside.Count > 0)
            throw new InputException(
                $"{place}: target_modules matches layers of modules_to_save, which are trained"
                + $" whole: {Messages.List(inside)}");
        return targets;
    }

    /// <summary>
    /// Whether a module's layer is among layers_to_transform, if there is such a choice; a module
    /// named in full is taken whatever its layer.
    /// </summary>
    internal static bool LayerIsChosen(string module, AdapterConfig config)
    {
        if (config.LayersToTransform is not { } layers || config.Targets.Suffixes.Contains(module))
            return true;
        string[] parts = module.Split('.');
        for (int i = parts.Length - 2; i >= 2; i--)
        {
            if (!int.TryParse(parts[i], out int layer)) continue;
            if (config.LayersPattern.Count == 0 || config.LayersPattern.Contains(parts[i - 1]))
                return layers.Contains(layer);
        }

        return false;
    }

    private static bool IsOrEndsWith(string module, string suffix) =>
        module == suffix || module.EndsWith("." + suffix, StringComparison.Ordinal);

    private static IEnumerable<string> LastNames(IEnumerable<string> modules) =>
        modules.Select(module => module[(module.LastIndexOf('.') + 1)..])
            .Where(name => !int.TryParse(name, out _)).Distinct();

    private static string Shown(AdapterConfig config)
    {
        string targets = config.Targets.Pattern is { } pattern
            ? Messages.Quote(pattern)
            : Messages.List([.. config.Targets.Suffixes.Select(Messages.Quote)]);
        return config.LayersToTransform is { } layers
            ? $"{targets} with layers_to_transform {string.Join(", ", layers)}" : targets;
    }

    [GeneratedRegex(@"\d+(?=\.)")]
    private static partial Regex Digits();
}
