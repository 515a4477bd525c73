using System.Collections.Immutable;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Weights;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// A model directory's configuration, and how what the families share is read from it and checked.
/// Keys it does not know are left alone: the official classes add many when they save. Sizes must
/// be stated; what is only a switch may be absent.
/// </summary>
public sealed class ModelConfig
{
    internal const int MaxWidth = 1 << 17;
    internal const int MaxLayers = 1000;
    internal const int MaxVocabulary = 1 << 24;
    internal const int MaxSide = 1 << 14;

    private ModelConfig(string directory, JsonValue json) => (Directory, Json) = (directory, json);

    public string Directory { get; }

    /// <summary>config.json.</summary>
    public JsonValue Json { get; }

    /// <summary>
    /// The model's family; where there is none what it calls itself: line and version, or "model
    /// type ... (architecture ...)" of a foreign one.
    /// </summary>
    public string ModelName
    {
        get
        {
            if (Families.All.FirstOrDefault(f => f.Is(this)) is { } family) return family.Name;
            // Later ones have their version in the type, as minicpmv4_6.
            const string Later = "minicpmv";
            bool isLater = !IsMiniCpmV && Type.StartsWith(Later, StringComparison.Ordinal);
            if (!IsOmniModel && !IsMiniCpmV && !isLater)
                return $"model type {Messages.Quote(Type)} "
                    + $"(architecture {Messages.Quote(Architecture)})";
            string version = isLater && !IsOmniModel
                ? Messages.OneLine(Type[Later.Length..]) : Version;
            if (version.EndsWith(".0", StringComparison.Ordinal)) version = version[..^2];
            return $"MiniCPM-{(IsOmniModel ? 'o' : 'V')}-{version.Replace('.', '_')}";
        }
    }

    /// <summary>model_type.</summary>
    public string Type => Json.Find("model_type")?.Text() ?? "";

    private string Architecture => Json.Find("architectures")?.Items()
        .FirstOrDefault() is { IsText: true } first ? first.Text() : "";

    private bool IsMiniCpmV => Type == "minicpmv" || Architecture == "MiniCPMV";

    private bool IsOmniModel => Type == "minicpmo" || Architecture == "MiniCPMO";

    // Files write it as number (4.0) or as text ("2.5"). Version 2 has no such key and a timm
    // tower; later classes without one are told by their tower, the omni ones by how many audio
    // frames they pool.
    private string Version
    {
        get
        {
            if (Json.Find("version") is { } version)
                return Messages.OneLine(version.IsText ? version.Text() : version.Number().ToString(
                    "0.0##", System.Globalization.CultureInfo.InvariantCulture));
            if (IsOmniModel)
                return Json.Find("audio_pool_step") is { IsNumber: true } step && step.Number() == 5
                    ? "4.5" : "2.6";
            if (Json.Find("vision_encoder") is not null || Json.Find("scale_emb") is not null)
                return "2.0";
            return Json.Find("vision_config")?.Find("model_type")?.Text() == "idefics2"
                ? "2.5" : "2.6";
        }
    }

    /// <exception cref="InputException">
    /// There is no such directory, or its config.json cannot be read.
    /// </exception>
    public static ModelConfig Open(string directory)
    {
        if (!System.IO.Directory.Exists(directory))
            throw new InputException($"{directory}: there is no such directory");
        var json = JsonInput.ReadObject(Path.Combine(directory, "config.json"));
        return new ModelConfig(directory, json);
    }

    /// <summary>Whether it is a MiniCPM-V of this version.</summary>
    public bool IsVision(string version) => !IsOmniModel && IsMiniCpmV && Version == version;

    /// <summary>Whether it is a MiniCPM-o of this version.</summary>
    public bool IsOmni(string version) => IsOmniModel && Version == version;

    /// <summary>The model of these parts, with what all families read alike.</summary>
    /// <exception cref="InputException">Parts or files do not fit together.</exception>
    public ModelSpec Spec(Family family, DecoderSpec decoder, VisionSpec vision)
    {
        if (Json.Find("quantization_config")?.Find("quant_method") is { } method
            && method.Text() is not ("bitsandbytes" or "awq" or "gptq"))
            throw method.Error($"is {Messages.Quote(method.Text())}: quantised weights are read "
                + "where they are of bitsandbytes, awq or gptq; use the bf16 model");
        var resampler = new ResamplerSpec(
            decoder.HiddenSize, vision.HiddenSize, Size(Json, "query_num", 1 << 12, 64),
            CallsOutProj: family.CallsOutProj);
        if (decoder.HiddenSize < 128 || decoder.HiddenSize % resampler.Heads != 0
            || decoder.HiddenSize % 4 != 0)
            throw Json["hidden_size"].Expected(
                "a multiple of 4 that hidden_size / 128 (rounded down) heads can share");
        bool useImageId = Flag("use_image_id", true);
        return new ModelSpec(
            family, Directory, vision, resampler, decoder, Slicing(family, vision), useImageId,
            Flag("slice_mode", true), Processor(vision, resampler, useImageId),
            Generation(), ModelClass());
    }

    internal void RefuseQuantised()
    {
        if (Json.Find("quantization_config") is { } quantised)
            throw quantised.Error(
                "says the weights are quantised, which is not supported; use the bf16 model");
    }

    /// <summary>The decoder of the Llama kind that the configuration describes.</summary>
    public DecoderSpec Decoder(bool qkvBias = false, bool qkNorm = false)
    {
        int hidden = Size(Json, "hidden_size", MaxWidth);
        int heads = Size(Json, "num_attention_heads", 1 << 12);
        int kvHeads = Size(Json, "num_key_value_heads", 1 << 12, heads);
        if (heads % kvHeads != 0)
            throw Json["num_attention_heads"]
                .Expected($"a multiple of num_key_value_heads ({kvHeads})");
        if (Json.Find("head_dim") is null && hidden % heads != 0)
            throw Json["hidden_size"].Expected($"a multiple of num_attention_heads ({heads})");
        int headDim = Size(Json, "head_dim", 1 << 10, Math.Min(hidden / heads, 1 << 10));
        if (headDim % 2 != 0 || (Json.Find("head_dim") is null && headDim != hidden / heads))
            throw Json["hidden_size"].Expected(
                $"an even number up to 1024 for each of the num_attention_heads ({heads})");
        int layers = Size(Json, "num_hidden_layers", MaxLayers);
        RefuseSlidingWindow(layers);
        RequireText(Json, "hidden_act", "silu");
        RequireZero(Json, "attention_dropout");
        int positions = Size(Json, "max_position_embeddings", int.MaxValue, 32768);
        return new DecoderSpec(
            Size(Json, "vocab_size", MaxVocabulary), hidden,
            Size(Json, "intermediate_size", 1 << 20), layers, heads, kvHeads, headDim,
            (float)(Json.Find("rms_norm_eps")?.Number(1e-12, 1) ?? 1e-6), qkvBias,
            Flag("tie_word_embeddings", false), RopeTheta(),
            RopeScaling.Read(this, headDim, positions), positions, qkNorm);
    }

    /// <summary>The vision tower of version 2.5 and later.</summary>
    public VisionSpec Siglip()
    {
        bool drops = Flag("drop_vision_last_layer", true);
        if (Json.Find("vision_config") is not { } vision)
            return new VisionSpec(1152, 4304, drops ? 26 : 27, 16, 3, 14, 70, 1e-6f, drops);
        int hidden = Size(vision, "hidden_size", MaxWidth);
        int heads = Size(vision, "num_attention_heads", 1 << 12);
        if (hidden % heads != 0)
            throw vision["hidden_size"].Expected($"a multiple of num_attention_heads ({heads})");
        int patch = Size(vision, "patch_size", 1 << 8);
        int side = Size(vision, "image_size", MaxSide);
        if (side < patch) throw vision["image_size"].Expected($"at least patch_size ({patch})");
        int layers = Size(vision, "num_hidden_layers", MaxLayers);
        if (drops && layers == 1)
            throw vision["num_hidden_layers"]
                .Expected("at least 2, as drop_vision_last_layer drops one");
        if ((vision.Find("num_channels")?.Int() ?? 3) != 3)
            throw vision["num_channels"].Expected("3");
        RequireText(vision, "hidden_act", "gelu_pytorch_tanh");
        RequireZero(vision, "attention_dropout");
        return new VisionSpec(
            hidden, Size(vision, "intermediate_size", 1 << 20), drops ? layers - 1 : layers, heads,
            3, patch,
            side / patch, (float)(vision.Find("layer_norm_eps")?.Number(1e-12, 1) ?? 1e-6), drops);
    }

    // Newer transformers write rope_parameters in place of rope_theta.
    private double RopeTheta() => (Json.Find("rope_theta")
        ?? Json.Find("rope_parameters")?.Find("rope_theta"))?.Number(1, 1e12) ?? 10000;

    private void RefuseSlidingWindow(int layers)
    {
        if (Json.Find("use_sliding_window") is not { } use || !use.Bool()) return;
        if (Json.Find("sliding_window") is null) return;
        int first = Json.Find("max_window_layers")?.Int(0) ?? 28;
        if (first < layers)
            throw use.Error(
                $"is true for layers {first} to {layers - 1}: sliding window attention is not"
                + " supported");
    }

    // The class cuts nothing without a slice_config; with one its own defaults hold.
    private SlicingSpec Slicing(Family family, VisionSpec vision)
    {
        if ((family.SlicingKey is { } key ? Json.Find(key) : Json) is not { } slice)
            return new SlicingSpec(1, 448, vision.PatchSize);
        SlicingSpec slicing = SlicingOf(slice);
        return slicing.PatchSize == vision.PatchSize
            ? slicing : throw Disagrees(slice, "patch_size", slicing.PatchSize,
                "the vision tower's patch_size", vision.PatchSize);
    }

    private static SlicingSpec SlicingOf(JsonValue json) => new(
        Size(json, "max_slice_nums", 1 << 12, 9), Size(json, "scale_resolution", MaxSide, 448),
        Size(json, "patch_size", 1 << 8, 14));

    private ProcessorSpec Processor(VisionSpec vision, ResamplerSpec resampler, bool useImageId)
    {
        string path = Path.Combine(Directory, "preprocessor_config.json");
        JsonValue json = File.Exists(path) || System.IO.Directory.Exists(path)
            ? JsonInput.ReadObject(path)
            : JsonInput.Parse(path, System.Text.Encoding.UTF8.GetBytes(
                $"{{\"use_image_id\": {(useImageId ? "true" : "false")}, \"patch_size\": "
                + $"{vision.PatchSize}, \"image_feature_size\": {resampler.Queries}}}"));
        SlicingSpec slicing = SlicingOf(json);
        if (slicing.PatchSize != vision.PatchSize)
            throw Disagrees(json, "patch_size", slicing.PatchSize, "the vision tower's patch_size",
                vision.PatchSize);
        int features = Size(json, "image_feature_size", 1 << 12, 64);
        if (features != resampler.Queries)
            throw Disagrees(json, "image_feature_size", features, "config.json's query_num",
                resampler.Queries);
        var tokens = new PlaceholderTokens(
            Text(json, "im_start", "<image>"), Text(json, "im_end", "</image>"),
            Text(json, "slice_start", "<slice>"), Text(json, "slice_end", "</slice>"),
            Text(json, "unk", "<unk>"), Text(json, "im_id_start", "<image_id>"),
            Text(json, "im_id_end", "</image_id>"));
        return new ProcessorSpec(
            slicing, json.Find("slice_mode")?.Bool() ?? true,
            json.Find("use_image_id")?.Bool() ?? false,
            Channels(json, "norm_mean", -1e6), Channels(json, "norm_std", 1e-6), tokens);
    }

    internal static ImmutableArray<double> Channels(JsonValue json, string key, double least)
    {
        if (json.Find(key) is not { } list) return [0.5, 0.5, 0.5];
        ImmutableArray<double> values = [.. list.Items().Take(4).Select(v => v.Number(least, 1e6))];
        return values.Length == 3 ? values : throw list.Expected("three numbers");
    }

    internal GenerationSpec Generation()
    {
        string path = Path.Combine(Directory, "generation_config.json");
        JsonValue json = File.Exists(path) ? JsonInput.ReadObject(path) : Json;
        JsonValue? eos = json.Find("eos_token_id") ?? Json.Find("eos_token_id");
        return new GenerationSpec(
            (json.Find("bos_token_id") ?? Json.Find("bos_token_id"))?.Int(0),
            eos is not { } ids ? [] : ids.IsArray
                ? [.. ids.Items().Select(id => id.Int(0))] : [ids.Int(0)],
            (json.Find("pad_token_id") ?? Json.Find("pad_token_id"))?.Int());
    }

    // "modeling_minicpmv.MiniCPMV", possibly behind "owner/repository--".
    private ModelClass ModelClass()
    {
        string code = Json.Find("auto_map")?.Find("AutoModel")?.Text()
            ?? "modeling_minicpmv.MiniCPMV";
        string local = code[(code.LastIndexOf("--", StringComparison.Ordinal) is var at and >= 0
            ? at + 2 : 0)..];
        int dot = local.LastIndexOf('.');
        return dot < 0 ? new ModelClass(local, "modeling_minicpmv")
            : new ModelClass(local[(dot + 1)..], local[..dot]);
    }

    internal static InputException Disagrees(JsonValue json, string key, int value, string other,
        int expected) =>
        new($"{json.File}: {(json.Path.Length > 0 ? json.Path + "." : "")}{key} is {value}, "
            + $"expected {expected} as {other}");

    internal static int Size(JsonValue json, string key, int most, int? otherwise = null) =>
        otherwise is { } value && json.Find(key) is null ? value : json[key].Int(1, most);

    /// <summary>A switch of config.json.</summary>
    public bool Flag(string key, bool otherwise) => Json.Find(key)?.Bool() ?? otherwise;

    internal static string Text(JsonValue json, string key, string otherwise)
    {
        if (json.Find(key) is not { } value) return otherwise;
        string text = value.Text();
        return text.Length is > 0 and <= 256
            ? text : throw value.Expected("a text of 1 to 256 characters");
    }

    internal static void RequireText(JsonValue json, string key, string expected)
    {
        if (json.Find(key) is { } value && value.Text() != expected)
            throw value.Expected($"{Messages.Quote(expected)}, the only one supported");
    }

    internal static void RequireZero(JsonValue json, string key)
    {
        if (json.Find(key) is { } value && value.Number() != 0)
            throw value.Expected("0: dropout in the base model is not supported");
    }
}
