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
/// (...q_proj.base_layer.bias), so that nothing is lost, and they may be absent when read; under
/// "all" so may those that PEFT 0.21 does not train, as the resampler's in_proj_bias.
/// </summary>
public sealed partial class AdapterLayout
{
    private const string Prefix = "base_model.model.";

    private AdapterLayout(
        IReadOnlyList<LinearModule> targets, IReadOnlyList<ExpectedTensor> saved,
        IReadOnlyList<ExpectedTensor> biases, AdapterConfig config)
    {
        (Targets, Saved, Biases, Config) = (targets, saved, biases, config);
        var wrapped = targets.Select(target => target.Name).ToHashSet(StringComparer.Ordinal);
        List<AdapterTensor> tensors = [];
        foreach (var target in targets)
        {
            string a = target.Name + ".lora_A.weight", b = target.Name + ".lora_B.weight";
            int rank = config.RankOf(target.Name);
            tensors.Add(new(a, Prefix + a, new Shape(rank, target.Inputs)));
            tensors.Add(new(b, Prefix + b, new Shape(target.Outputs, rank)));
            if (!config.UseDora) continue;
            string magnitude = target.Name + ".lora_magnitude_vector";
            tensors.Add(new(magnitude, Prefix + magnitude, new Shape(target.Outputs)));
        }

        tensors.AddRange(saved.Select(tensor =>
            new AdapterTensor(tensor.Name, Prefix + tensor.Name, tensor.Shape)));
        foreach (var bias in biases)
        {
            string module = bias.Name[..bias.Name.LastIndexOf('.')];
            string file = wrapped.Contains(module) ? module + ".base_layer.bias" : bias.Name;
            tensors.Add(new(bias.Name, Prefix + file, bias.Shape, config.Bias == LoraBias.LoraOnly
                || !bias.Name.EndsWith(".bias", StringComparison.Ordinal)));
        }

        Tensors = tensors;
    }

    /// <summary>The configuration, "all-linear" as a list of names.</summary>
    public AdapterConfig Config { get; }

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
        config = Resolve(table, config);
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

    /// <summary>
    /// With "all-linear" as the list of names that PEFT 0.21 makes of it, and what takes no adapter
    /// excluded; with a pattern that matches other modules too, as those of ms-swift do, which
    /// passes them over, as one that PEFT takes: of the linear layers alone.
    /// </summary>
    public static AdapterConfig Resolve(ParameterTable table, AdapterConfig config)
    {
        if (config.Targets is { Pattern: not null, IsAllLinear: false })
        {
            var linears = table.Linears.Select(l => l.Name).ToHashSet(StringComparer.Ordinal);
            string[] chosen = [.. table.Modules.Where(module => IsChosen(module, config)
                && !config.ModulesToSave.Any(name => module.EndsWith(name, StringComparison.Ordinal)))];
            string[] named = [.. chosen.Where(linears.Contains)];
            return named.Length == 0 || named.Length == chosen.Length ? config
                : config with { Targets = ForeignAdapter.Exactly(named) };
        }

        if (!config.Targets.IsAllLinear) return config;
        List<string> names = [.. LastNames(table.Linears.Where(l => l.Name != table.Head
            && l.NoAdapter is null).Select(l => l.Name)).Order(StringComparer.Ordinal)];
        List<string> without = [.. table.Linears.Where(l => l.NoAdapter is not null
            && names.Exists(name => IsOrEndsWith(l.Name, name))).Select(l => l.Name)];
        TargetModules? exclude = (config.Exclude, without.Count) switch
        {
            (var given, 0) => given,
            ({ Pattern: { } pattern }, _) => new TargetModules(
                string.Join('|', [$"(?:{pattern})", .. without.Select(Regex.Escape)])),
            (var given, _) => new TargetModules([.. given?.Suffixes ?? [], .. without]),
        };
        return config with { Targets = new TargetModules(names), Exclude = exclude };
    }

    /// <summary>Whether a module is to have an adapter, if it can.</summary>
    internal static bool IsChosen(string module, AdapterConfig config) =>
        config.Targets.Matches(module) && config.Exclude?.Matches(module) != true
        && LayerIsChosen(module, config);

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
        foreach (string suffix in config.Targets.Suffixes)
            if (!table.Modules.Any(module => IsOrEndsWith(module, suffix)))
                throw new InputException(
                    $"{place}: target_modules {Messages.Quote(suffix)} is no module of the"
                    + $" model (did you mean \"{TrainKeys.Nearest(suffix, LastNames(table.Modules))}\"?)");

        var matched = table.Modules.Where(module => IsChosen(module, config))
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
        List<LinearModule> inside = [.. targets.Where(target => whole.Any(module =>
            target.Name.StartsWith(module + ".", StringComparison.Ordinal)))];
        if (inside.Count == targets.Count)
            throw new InputException(
                $"{place}: target_modules matches nothing but layers of modules_to_save, which are"
                + $" trained whole: {Messages.List([.. inside.Select(target => target.Name)])}");
        // As PEFT 0.21 does; 0.14 hangs an adapter there that is never used.
        return [.. targets.Except(inside)];
    }

    /// <summary>
    /// Whether a module's layer is among layers_to_transform, if there is such a choice; a module
    /// named in full is taken whatever its layer.
    /// </summary>
    private static bool LayerIsChosen(string module, AdapterConfig config)
    {
        if (config.LayersToTransform is not { } layers || config.Targets.Suffixes.Contains(module))
            return true;
        foreach (string before in config.LayersPattern.DefaultIfEmpty(@"[^.]*"))
        {
            try
            {
                Match match =
                    PythonRegex.Search($@"\A.*\.{before}\.(?P<layer>\d+)\.").Match(module);
                if (match.Success)
                    return int.TryParse(match.Groups["layer"].ValueSpan, out int layer)
                        && layers.Contains(layer);
            }
            catch (RegexMatchTimeoutException failure)
            {
                throw new InputException($"layers_pattern {Messages.Quote(before)} takes too long "
                    + "to be matched: say it with fewer repetitions", failure);
            }
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
        if (config.Exclude is { } exclude) targets += $" without {exclude}";
        return config.LayersToTransform is { } layers
            ? $"{targets} with layers_to_transform {string.Join(", ", layers)}" : targets;
    }

    [GeneratedRegex(@"\d+(?=\.)")]
    private static partial Regex Digits();
}
