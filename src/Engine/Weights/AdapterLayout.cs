using System.Text.RegularExpressions;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Weights;

/// <summary>
/// What an adapter configuration means for a model, by PEFT's rules: which linear layers get A and
/// B, which modules are trained whole, which biases are trained. PEFT 0.14 does not save the biases
/// that it trains under bias "lora_only"; here they are saved under the name PEFT loads them by
/// (...q_proj.base_layer.bias), so that nothing is lost, and they may be absent when read; under
/// "all" so may those that PEFT 0.21 does not train, as the resampler's in_proj_bias.
/// </summary>
public sealed partial class AdapterLayout
{
    /// <summary>Behind a module's name: its trained rows.</summary>
    public const string TokensEnd = ".token_adapter.trainable_tokens_delta";

    /// <summary>In front of PEFT's names.</summary>
    internal const string Prefix = "base_model.model.";

    private const string AttentionOutput = ".out_proj";

    private readonly Dictionary<string, string> _attentions = new(StringComparer.Ordinal);
    private readonly Dictionary<string, AdapterTensor> _byName;

    private AdapterLayout(
        IReadOnlyList<LinearModule> targets, IReadOnlyList<ExpectedTensor> saved,
        IReadOnlyList<ExpectedTensor> biases, IReadOnlyList<TokenTarget> tokens,
        AdapterConfig config)
    {
        (Targets, Saved, Biases, Tokens, Config) = (targets, saved, biases, tokens, config);
        var wrapped = targets.Select(target => target.Name).ToHashSet(StringComparer.Ordinal);
        foreach (LinearModule target in targets)
            if (target.OnlyRead is not null)
                _attentions.Add(target.Name + AttentionOutput, target.Name);
        List<AdapterTensor> tensors = [];
        void Add(
            string own, string file, Shape shape, bool isTransposed = false, int experts = 0) =>
            tensors.Add(new(own, Prefix + file, shape)
            {
                IsTransposed = isTransposed,
                Experts = experts,
            });
        foreach (var target in targets)
        {
            string module = target.Name, file = _attentions.TryGetValue(module, out string? around)
                ? $"{around}.base_layer{AttentionOutput}" : module;
            int rank = RankOf(module);
            if (target.Experts > 0)
            {
                // The module is wrapped once for each of its parameters, the later one outside.
                file = module[..module.LastIndexOf('.')];
                if (targets.SkipWhile(t => t != target).Skip(1).Any(t => t.Experts > 0
                    && t.Name.StartsWith(file + ".", StringComparison.Ordinal)))
                    file += ".base_layer";
                Add(module + ".lora_A.weight", file + ".lora_A.weight",
                    new Shape(checked(rank * target.Experts), target.Inputs));
                Add(module + ".lora_B.weight", file + ".lora_B.weight",
                    new Shape(target.Outputs, checked(rank * target.Experts)),
                    experts: target.Experts);
                continue;
            }

            string a = EndOfA(target.IsTable), b = EndOfB(target.IsTable);
            Add(module + a, file + a, new Shape(rank, target.Inputs), target.IsTable);
            Add(module + b, file + b, new Shape(target.Outputs, rank));
            if (config.UseDora)
                Add(module + ".lora_magnitude_vector", file + ".lora_magnitude_vector",
                    new Shape(target.Outputs));
            if (config.Bias == LoraBias.True)
                Add(module + ".lora_B.bias", file + ".lora_B.bias", new Shape(target.Outputs));
        }

        foreach (TokenTarget rows in tokens)
            Add(rows.Name, rows.Name, new Shape(rows.Ids.Count, rows.Cols));

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
        _byName = tensors.ToDictionary(t => t.Name, StringComparer.Ordinal);
    }

    /// <summary>Behind a module's name: its adapter's A, a table's or a linear layer's.</summary>
    internal static string EndOfA(bool isTable) => isTable ? ".lora_embedding_A" : ".lora_A.weight";

    /// <summary>The same of B.</summary>
    internal static string EndOfB(bool isTable) => isTable ? ".lora_embedding_B" : ".lora_B.weight";

    /// <summary>A tensor by the engine's name.</summary>
    public AdapterTensor Tensor(string name) => _byName[name];

    /// <summary>A matrix of so many columns, transposed.</summary>
    internal static float[] Transposed(float[] values, int cols)
    {
        var turned = new float[values.Length];
        int rows = values.Length / Math.Max(1, cols);
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < cols; c++) turned[(c * rows) + r] = values[(r * cols) + c];
        return turned;
    }

    /// <summary>The configuration, "all-linear" as a list of names.</summary>
    public AdapterConfig Config { get; }

    /// <summary>Layers that get an adapter, in the order of the model.</summary>
    public IReadOnlyList<LinearModule> Targets { get; }

    /// <summary>Parameters of the modules that are trained and saved whole.</summary>
    public IReadOnlyList<ExpectedTensor> Saved { get; }

    /// <summary>Biases that are trained outside of those.</summary>
    public IReadOnlyList<ExpectedTensor> Biases { get; }

    /// <summary>Tokens with trained rows.</summary>
    public IReadOnlyList<TokenTarget> Tokens { get; }

    public int RankOf(string module) =>
        Config.RankOf(_attentions.GetValueOrDefault(module, module));

    /// <summary>
    /// What a module's adapter is multiplied by; the output of an attention that has one as a whole
    /// counts twice, as PEFT 0.21 computes it.
    /// </summary>
    public double ScaleOf(string module) => _attentions.TryGetValue(module, out string? around)
        ? 2 * Config.ScaleOf(around) : Config.ScaleOf(module);

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
        var tokens = TokensOf(table, config, whole, targets, place);
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
        return new AdapterLayout(targets, saved, biases, tokens, config);
    }

    /// <summary>
    /// With "all-linear" as the list of names that PEFT 0.21 makes of it, and what takes no adapter
    /// excluded; with a pattern that matches other modules too, as those of ms-swift do, which
    /// passes them over, as one that PEFT takes: of linear layers and the embedding alone.
    /// </summary>
    public static AdapterConfig Resolve(ParameterTable table, AdapterConfig config)
    {
        if (config.Targets is { Pattern: not null, IsAllLinear: false })
        {
            var hosts = table.Hosts.ToDictionary(host => host.Name, StringComparer.Ordinal);
            string[] chosen = [.. table.Modules.Where(module => IsChosen(module, config)
                && !config.ModulesToSave.Any(name =>
                    module.EndsWith(name, StringComparison.Ordinal)))];
            if (Array.TrueForAll(chosen, hosts.ContainsKey)) return config;
            string[] named = [.. chosen.Where(module =>
                hosts.TryGetValue(module, out var host) && host.OnlyRead is null)];
            return named.Length == 0 ? config
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
                    + " model (did you mean "
                    + $"\"{TrainKeys.Nearest(name, LastNames(table.Modules))}\"?)");
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
                    + " model (did you mean "
                    + $"\"{TrainKeys.Nearest(suffix, LastNames(table.Modules))}\"?)");

        var matched = table.Modules.Where(module => IsChosen(module, config))
            .Except(whole).ToHashSet(StringComparer.Ordinal);
        List<LinearModule> targets =
            [.. table.Hosts.Where(host => matched.Remove(host.Name))];
        if (targets.Find(target => target.NoAdapter is not null) is { } refused)
            throw new InputException(
                $"{place}: target_modules matches {refused.Name}: {refused.NoAdapter}");
        if (matched.Count > 0)
            throw new InputException($"{place}: target_modules matches what is no linear layer:"
                + $" {Messages.List([.. matched.Order(StringComparer.Ordinal)])}");
        if (targets.Count == 0 && config.TargetParameters.Count == 0)
            throw new InputException(
                $"{place}: target_modules {Shown(config)} matches no linear layer; there"
                + $" are {string.Join(", ", table.Linears.Where(l => l.NoAdapter is null).Select(l => Digits().Replace(l.Name, "N")).Distinct())}");
        List<LinearModule> inside = [.. targets.Where(target => whole.Any(module =>
            target.Name.StartsWith(module + ".", StringComparison.Ordinal)))];
        if (inside.Count == targets.Count && targets.Count > 0)
            throw new InputException(
                $"{place}: target_modules matches nothing but layers of modules_to_save, which are"
                + $" trained whole: {Messages.List([.. inside.Select(target => target.Name)])}");
        // As PEFT 0.21 does; 0.14 hangs an adapter there that is never used.
        targets = [.. targets.Except(inside)];
        foreach (LinearModule attention in targets.FindAll(t => t.OnlyRead is not null))
            if (!targets.Exists(t => t.Name == attention.Name + AttentionOutput))
                targets.Add(table.Linears.Single(l => l.Name == attention.Name + AttentionOutput));
        targets.AddRange(ExpertsOf(table, config, whole, place));
        foreach (LinearModule target in targets)
            MustBePlain(table, target, config, place);
        return targets;
    }

    private static List<LinearModule> ExpertsOf(
        ParameterTable table, AdapterConfig config, List<string> whole, string place)
    {
        foreach (string name in config.TargetParameters)
            if (!table.Experts.Any(experts => IsOrEndsWith(experts.Name, name)))
                throw new InputException($"{place}: target_parameters {Messages.Quote(name)} is no "
                    + "matrix of experts" + (table.Experts.Count == 0 ? ", which this model has "
                    + "none of"
                        : $"; expected {string.Join(" or ", LastNames(
                            table.Experts.Select(experts => experts.Name)).Select(n =>
                                "mlp.experts." + n))}"));
        List<LinearModule> found = [.. table.Experts.Where(experts =>
            config.TargetParameters.Any(name => IsOrEndsWith(experts.Name, name)))];
        if (found.Find(experts => whole.Exists(w => experts.Name.StartsWith(
            w + ".", StringComparison.Ordinal))) is { } both)
            throw new InputException($"{place}: target_parameters and modules_to_save both train "
                + $"{both.Name}: leave one of them out");
        return found;
    }

    // Embedding, head, attention and experts have low-rank parts alone.
    private static void MustBePlain(
        ParameterTable table, LinearModule target, AdapterConfig config, string place)
    {
        if (!target.IsTable && target.Name != table.Head && target.OnlyRead is null
            && target.Experts == 0) return;
        string? key = config.UseDora ? "use_dora"
            : config.Start.Splits ? $"init_lora_weights={config.Start.Text}"
            : config.Bias == LoraBias.True ? "lora_bias=true" : null;
        if (key is not null)
            throw new InputException($"{place}: "
                + $"{(target.Experts > 0 ? "target_parameters" : "target_modules")} matches "
                + $"{target.Name}, on which {key}"
                + " is not supported: leave one of the two out");
    }

    private static List<TokenTarget> TokensOf(ParameterTable table, AdapterConfig config,
        List<string> whole, List<LinearModule> targets, string place)
    {
        const string key = "trainable_token_indices";
        List<LinearModule> possible = [.. table.Hosts
            .Where(l => l.IsTable || (l.Name == table.Head && !table.Tied.ContainsKey(l.Name)))];
        var found = new List<TokenTarget>();
        foreach (var (name, ids) in config.Tokens?.List ?? [])
        {
            LinearModule module =
                possible.Find(l => l.Name.EndsWith(name, StringComparison.Ordinal))
                ?? throw new InputException($"{place}: {key} {Messages.Quote(name)} has no rows of "
                    + $"tokens; expected {string.Join(" or ", possible.Select(l => l.Name))}");
            int rows = module.IsTable ? module.Inputs : module.Outputs, last = ids.Max();
            if (last >= rows)
                throw new InputException($"{place}: {key} {last} is no token of {module.Name}, "
                    + $"expected 0 to {rows - 1}");
            bool isTarget = targets.Exists(t => t.Name == module.Name
                || (module.IsTable && table.Tied.ContainsKey(t.Name)));
            if (isTarget || whole.Exists(w => $"{module.Name}.".StartsWith($"{w}.",
                StringComparison.Ordinal)))
                throw new InputException($"{place}: {key} trains rows of {module.Name}, which "
                    + (isTarget ? "target_modules" : "modules_to_save")
                    + " trains too: leave one of them out");
            if (found.Exists(t => t.Module == module))
                throw new InputException($"{place}: {key} names {module.Name} twice");
            found.Add(new TokenTarget(module, ids));
        }

        return found;
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
