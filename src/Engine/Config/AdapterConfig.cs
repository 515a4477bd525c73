using System.Text;
using System.Text.Encodings.Web;
using System.Text.Json;

namespace MiniCpmNative.Engine.Config;

/// <summary>
/// adapter_config.json of a PEFT LoRA adapter, the part of it that this program does. Written with
/// exactly the keys and the layout of PEFT 0.14, and trainable_token_indices and target_parameters,
/// which 0.14 does not know, where there are any; read from any version: what is not supported is
/// refused by its key, and unknown keys may only have a neutral value.
/// </summary>
public sealed record AdapterConfig
{
    public const string FileName = "adapter_config.json";

    // Keys that describe, that only count together with others that are refused, or that say how
    // ms-swift trained.
    private static readonly HashSet<string> s_ignored =
    [
        "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dtype", "lorap_emb_lr",
        "lorap_lr_ratio", "megatron_core", "model_key_mapping", "peft_version", "qalora_group_size",
        "revision", "task_type",
    ];

    private static readonly HashSet<string> s_read =
    [
        "peft_type", "r", "lora_alpha", "lora_dropout", "bias", "target_modules",
        "layers_to_transform", "layers_pattern", "layer_replication", "modules_to_save",
        "init_lora_weights",
        "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "exclude_modules", "lora_bias",
        "trainable_token_indices", "target_parameters",
    ];

    public required int Rank { get; init; }

    public required double Alpha { get; init; }

    public double Dropout { get; init; }

    public LoraBias Bias { get; init; }

    /// <summary>Tokens with trained rows of their own.</summary>
    public TokenIndices? Tokens { get; init; }

    /// <summary>Rows of the adapted weights have magnitudes of their own, Liu et al.
    /// 2024.</summary>
    public bool UseDora { get; init; }

    /// <summary>Scale by alpha / sqrt(rank), Kalajdzievski 2023.</summary>
    public bool UseRslora { get; init; }

    /// <summary>Ranks and alphas of single modules.</summary>
    public NumbersByName RankPattern { get; init; } = NumbersByName.None;

    public NumbersByName AlphaPattern { get; init; } = NumbersByName.None;

    public required TargetModules Targets { get; init; }

    /// <summary>Experts' matrices with adapters, by the end of their names.</summary>
    public IReadOnlyList<string> TargetParameters { get; init; } = [];

    /// <summary>What gets no adapter although it is a target.</summary>
    public TargetModules? Exclude { get; init; }

    /// <summary>How it was started.</summary>
    public LoraStart Start { get; init; } = new("true");

    public IReadOnlyList<int>? LayersToTransform { get; init; }

    /// <summary>Names before a layer's number (layers); any when empty.</summary>
    public IReadOnlyList<string> LayersPattern { get; init; } = [];

    /// <summary>The decoder's layers that run, where they are others than the model's.</summary>
    public LayerRanges? LayerReplication { get; init; }

    public IReadOnlyList<string> ModulesToSave { get; init; } = [];

    public string? BaseModel { get; init; }

    /// <summary>Class and Python module of the base model, for PEFT's automatic loading.</summary>
    public ModelClass? ModelClass { get; init; }

    public int RankOf(string module) => (int)(RankPattern.OfModule(module) ?? Rank);

    /// <summary>The contribution of a module's adapter is multiplied by it.</summary>
    public double ScaleOf(string module)
    {
        double rank = RankOf(module);
        return (AlphaPattern.OfModule(module) ?? Alpha) / (UseRslora ? Math.Sqrt(rank) : rank);
    }

    /// <summary>
    /// That of the plain adapter which an adapter that started as a part of its weights is saved
    /// as: of twice the rank, with the same scale.
    /// </summary>
    public AdapterConfig AsSaved()
    {
        if (!Start.Splits) return this;
        double alpha = UseRslora ? Math.Sqrt(2) : 2;
        return this with
        {
            Rank = 2 * Rank,
            Alpha = alpha * Alpha,
            RankPattern = RankPattern.Times(2),
            AlphaPattern = AlphaPattern.Times(alpha),
            Start = new LoraStart("true"),
        };
    }

    /// <exception cref="InputException">
    /// Missing, malformed, or an adapter that is not supported.
    /// </exception>
    public static AdapterConfig Read(string path)
    {
        JsonValue json = JsonInput.ReadObject(path);
        JsonValue type = json["peft_type"];
        if (type.Text() != "LORA") throw type.Expected("\"LORA\"");
        foreach (var (name, value) in json.Members())
            if (!s_read.Contains(name) && !s_ignored.Contains(name) && !IsNeutral(value))
                throw value.Error(
                    "asks for something that is not supported; expected null, false or nothing");
        try
        {
            return Parse(json);
        }
        catch (InputException failure) when (
            !failure.Message.StartsWith(path, StringComparison.Ordinal))
        {
            throw new InputException($"{path}: target_modules: {failure.Message}", failure);
        }
    }

    /// <summary>
    /// The file's text as PEFT 0.14 writes it: sorted keys, two spaces, no newline at the end.
    /// </summary>
    public string ToJson()
    {
        var members = new SortedDictionary<string, Action<Utf8JsonWriter>>(StringComparer.Ordinal)
        {
            ["alpha_pattern"] = AlphaPattern.Write,
            ["auto_mapping"] = WriteModelClass,
            ["base_model_name_or_path"] = json => json.WriteStringValue(BaseModel),
            ["bias"] = json => json.WriteStringValue(BiasName(Bias)),
            ["eva_config"] = Null,
            ["exclude_modules"] = json => WriteModules(json, Exclude),
            ["fan_in_fan_out"] = False,
            ["inference_mode"] = json => json.WriteBooleanValue(true),
            ["init_lora_weights"] = Start.Write,
            ["layer_replication"] = json =>
            {
                if (LayerReplication is { } ranges) ranges.Write(json);
                else json.WriteNullValue();
            },
            ["layers_pattern"] = json => WriteList(json, LayersPattern, json.WriteStringValue),
            ["layers_to_transform"] = json =>
                WriteList(json, LayersToTransform ?? [], json.WriteNumberValue),
            ["loftq_config"] = Empty,
            ["lora_alpha"] = json => json.WriteRawValue(PythonJson.Short(Alpha)),
            ["lora_bias"] = json => json.WriteBooleanValue(Bias == LoraBias.True),
            ["lora_dropout"] = json => json.WriteRawValue(PythonJson.Float(Dropout)),
            ["megatron_config"] = Null,
            ["megatron_core"] = json => json.WriteStringValue("megatron.core"),
            ["modules_to_save"] = json => WriteList(json, ModulesToSave, json.WriteStringValue),
            ["peft_type"] = json => json.WriteStringValue("LORA"),
            ["r"] = json => json.WriteNumberValue(Rank),
            ["rank_pattern"] = RankPattern.Write,
            ["revision"] = Null,
            ["target_modules"] = json => WriteModules(json, Targets),
            ["task_type"] = Null,
            ["use_dora"] = json => json.WriteBooleanValue(UseDora),
            ["use_rslora"] = json => json.WriteBooleanValue(UseRslora),
        };
        if (TargetParameters.Count > 0)
            members["target_parameters"] =
                json => WriteList(json, TargetParameters, json.WriteStringValue);
        if (Tokens is not null) members["trainable_token_indices"] = Tokens.Write;
        using var buffer = new MemoryStream();
        using (var json = new Utf8JsonWriter(buffer, new JsonWriterOptions
        {
            Indented = true,
            NewLine = "\n",
            Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping,
        }))
        {
            json.WriteStartObject();
            foreach (var (name, write) in members)
            {
                json.WritePropertyName(name);
                write(json);
            }

            json.WriteEndObject();
        }

        return Encoding.UTF8.GetString(buffer.ToArray());
    }

    private static AdapterConfig Parse(JsonValue json)
    {
        IReadOnlyList<int>? layers = json.Find("layers_to_transform") is not { } indices ? null
            : indices.IsArray ? [.. indices.Items().Select(i => i.Int(0))] : [indices.Int(0)];
        IReadOnlyList<string> parameters = Names(json, "target_parameters");
        TargetModules targets = parameters.Count > 0
            && (json.Find("target_modules") is not { } modules || IsNeutral(modules))
                ? new TargetModules([]) : ParseTargets(json["target_modules"]);
        if (targets.Pattern is not null && layers is { Count: > 0 })
            throw json["layers_to_transform"]
                .Error("cannot go with a regular expression in target_modules");
        IReadOnlyList<string> before = TextOf(json, "layers_pattern") is { Length: 0 }
            ? [] : Names(json, "layers_pattern");
        if (before.Count > 0 && layers is not { Count: > 0 })
            throw json["layers_pattern"].Error("needs layers_to_transform");
        string? bias = json.Find("bias")?.Text();
        bool ofB = json.Find("lora_bias")?.Bool() ?? false;
        if (ofB && bias is not (null or "none"))
            throw json["lora_bias"].Error(
                $"is true beside bias {Messages.Quote(bias)}, which together are not supported");
        return new AdapterConfig
        {
            Rank = json["r"].Int(1, 1 << 16),
            Alpha = json.Find("lora_alpha")?.Number(0, 1e9) ?? 8,
            Dropout = json.Find("lora_dropout")?.Number(0, 1) ?? 0,
            Bias = bias switch
            {
                null or "none" => ofB ? LoraBias.True : LoraBias.None,
                "all" => LoraBias.All,
                "lora_only" => LoraBias.LoraOnly,
                _ => throw json["bias"].Expected("\"none\", \"all\" or \"lora_only\""),
            },
            UseDora = json.Find("use_dora")?.Bool() ?? false,
            UseRslora = json.Find("use_rslora")?.Bool() ?? false,
            RankPattern = Numbers(json, "rank_pattern", value => value.Int(1, 1 << 16)),
            AlphaPattern = Numbers(json, "alpha_pattern", value => value.Number(0, 1e9)),
            Targets = targets,
            Exclude = json.Find("exclude_modules") is { } exclude && !IsNeutral(exclude)
                ? ParseTargets(exclude) : null,
            Start = ParseStart(json),
            LayersToTransform = layers is { Count: > 0 } ? layers : null,
            LayersPattern = before,
            LayerReplication = json.Find("layer_replication") is { } ranges && !IsNeutral(ranges)
                ? LayerRanges.Of(ranges.Element)
                    ?? throw ranges.Error($"is no list of {LayerRanges.Form}")
                : null,
            Tokens = json.Find("trainable_token_indices") is { } tokens && !IsNeutral(tokens)
                ? TokenIndices.Of(tokens.Element)
                    ?? throw tokens.Error($"is no {TokenIndices.Form}")
                : null,
            TargetParameters = parameters,
            ModulesToSave = Names(json, "modules_to_save"),
            BaseModel = TextOf(json, "base_model_name_or_path"),
            ModelClass = json.Find("auto_mapping") is { IsObject: true } map
                && TextOf(map, "base_model_class") is { } name
                && TextOf(map, "parent_library") is { } library
                ? new ModelClass(name, library) : null,
        };
    }

    private static TargetModules ParseTargets(JsonValue json)
    {
        if (json.IsText) return new TargetModules(json.Text());
        List<string> names = [.. json.Items().Select(item => item.Text())];
        return names.Count > 0 && names.All(name => name.Length > 0)
            ? new TargetModules(names) : throw json.Error("names no module");
    }

    // Files of PEFT's that were not converted mean other base weights than those that are there.
    private static LoraStart ParseStart(JsonValue json)
    {
        if (json.Find("init_lora_weights") is not { } start) return new LoraStart("true");
        if (start.IsBool) return new LoraStart(start.Bool() ? "true" : "false");
        return LoraStart.Parse(start.Text()) switch
        {
            null => throw start.Error(
                $"is {Messages.Quote(start.Text())}, which is not supported; expected true, false"
                + " or \"gaussian\""),
            { Splits: true } => throw start.Error($"is {Messages.Quote(start.Text())}, which is "
                + "not supported as it means changed base weights; PEFT's save_pretrained makes it "
                + "a plain adapter with path_initial_model_for_weight_conversion"),
            var plain => plain,
        };
    }

    private static NumbersByName Numbers(
        JsonValue json, string key, Func<JsonValue, double> number) =>
        json.Find(key) is { } value
            ? new NumbersByName([.. value.Members().Select(m => (m.Name, number(m.Value)))])
            : NumbersByName.None;

    private static bool IsNeutral(JsonValue value) => value.Element.ValueKind switch
    {
        JsonValueKind.Null or JsonValueKind.False => true,
        JsonValueKind.Object => value.Members().All(member => IsNeutral(member.Value)),
        JsonValueKind.Array => !value.Items().Any(),
        _ => false,
    };

    private static List<string> Names(JsonValue json, string key)
    {
        if (json.Find(key) is not { } value) return [];
        List<string> names = value.IsText
            ? [value.Text()] : [.. value.Items().Select(item => item.Text())];
        return names.All(name => name.Length > 0)
            ? names : throw value.Error("holds an empty name");
    }

    private static string? TextOf(JsonValue json, string key) =>
        json.Find(key) is { IsText: true } value ? value.Text() : null;

    private static string BiasName(LoraBias bias) => bias switch
    {
        LoraBias.All => "all",
        LoraBias.LoraOnly => "lora_only",
        _ => "none",
    };

    private static void Null(Utf8JsonWriter json) => json.WriteNullValue();

    private static void False(Utf8JsonWriter json) => json.WriteBooleanValue(false);

    private static void Empty(Utf8JsonWriter json)
    {
        json.WriteStartObject();
        json.WriteEndObject();
    }

    private static void WriteList<T>(Utf8JsonWriter json, IReadOnlyList<T> items, Action<T> write)
    {
        if (items.Count == 0)
        {
            json.WriteNullValue();
            return;
        }

        json.WriteStartArray();
        foreach (T item in items) write(item);
        json.WriteEndArray();
    }

    private static void WriteModules(Utf8JsonWriter json, TargetModules? modules)
    {
        if (modules?.Pattern is { } pattern) json.WriteStringValue(pattern);
        else WriteList(json, modules?.Suffixes ?? [], json.WriteStringValue);
    }

    private void WriteModelClass(Utf8JsonWriter json)
    {
        if (ModelClass is not { } model)
        {
            json.WriteNullValue();
            return;
        }

        json.WriteStartObject();
        json.WriteString("base_model_class", model.Name);
        json.WriteString("parent_library", model.Module);
        json.WriteEndObject();
    }
}

/// <summary>Where the model's own code lives: MiniCPMV in modeling_minicpmv.</summary>
public sealed record ModelClass(string Name, string Module);
