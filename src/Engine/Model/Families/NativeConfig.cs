using System.Collections.Immutable;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;

namespace MiniCpmNative.Engine.Model;

/// <summary>What a class of transformers takes for keys that are not there.</summary>
/// <param name="ChoosesSmall">Whether small_image_upsize is a key of its processor.</param>
internal sealed record NativeDefaults(
    string DownsampleMode = "16x", bool TiesHead = false, bool ChoosesSmall = false);

/// <summary>
/// How the members are configured that are classes of transformers itself: text_config,
/// vision_config, and a processor's file with the rules of pictures in it.
/// </summary>
internal static class NativeConfig
{
    private const string Full = "full_attention", Linear = "linear_attention";
    private const int MaxHeads = 1 << 12, MaxHeadDim = 1 << 10, MaxInner = 1 << 20,
        MaxExperts = 1 << 12;

    /// <summary>
    /// The processor's file of this model: its "image_processor", else the older one.
    /// </summary>
    public static (string Name, string? Key) ProcessorFile(string directory)
    {
        const string Name = "processor_config.json", Key = "image_processor";
        string path = Path.Combine(directory, Name);
        return File.Exists(path) && JsonInput.ReadObject(path).Find(Key) is not null
            ? (Name, Key) : ("preprocessor_config.json", null);
    }

    /// <summary>How videos are shown, by the video processor's file where the model has
    /// one.</summary>
    public static VideoRules Video(string directory, VideoRules rules)
    {
        if ((Read("processor_config.json")?.Find("video_processor")
            ?? Read("video_preprocessor_config.json")) is not { } json) return rules;
        return rules with
        {
            MaxFrames = ModelConfig.Size(json, "max_num_frames", 1 << 16, rules.MaxFrames),
            MaxSlices = json.Find("slice_mode")?.Bool() == false ? 1
                : ModelConfig.Size(json, "max_slice_nums", 1 << 12, rules.MaxSlices),
            ScaleResolution = json.Find("scale_resolution") is null ? null
                : ModelConfig.Size(json, "scale_resolution", ModelConfig.MaxSide, 448),
            Stacked = ModelConfig.Size(json, "stack_frames", TrainArguments.MostStacked, 1),
        };

        JsonValue? Read(string name)
        {
            string path = Path.Combine(directory, name);
            return File.Exists(path) ? JsonInput.ReadObject(path) : null;
        }
    }

    /// <summary>Whether the vision tower merges patches: downsample_mode, 16x or 4x.</summary>
    public static bool Merges(JsonValue json, NativeDefaults defaults)
    {
        string mode = ModelConfig.Text(json, "downsample_mode", defaults.DownsampleMode);
        return mode is "16x" or "4x"
            ? mode == "16x" : throw json["downsample_mode"].Expected("\"16x\" or \"4x\"");
    }

    /// <summary>Qwen3.5's decoder: layers of gated delta rule between those of attention.</summary>
    public static DecoderSpec Decoder(ModelConfig config, NativeDefaults defaults)
    {
        JsonValue text = config.Json["text_config"];
        int heads = Size("num_attention_heads", MaxHeads);
        int kvHeads = Size("num_key_value_heads", MaxHeads);
        if (heads % kvHeads != 0)
            throw text["num_attention_heads"]
                .Expected($"a multiple of num_key_value_heads ({kvHeads})");
        int headDim = Size("head_dim", MaxHeadDim, 256);
        int layers = Size("num_hidden_layers", ModelConfig.MaxLayers);
        ModelConfig.RequireText(text, "hidden_act", "silu");
        ModelConfig.RequireZero(text, "attention_dropout");
        if (text.Find("attention_bias") is { } bias && bias.Bool())
            throw bias.Expected("false: biases of this decoder's attention are not supported");
        ExpertsSpec? experts = Experts(text);
        var (theta, rotary) = Rope(text, headDim);
        return new DecoderSpec(
            Size("vocab_size", ModelConfig.MaxVocabulary),
            Size("hidden_size", ModelConfig.MaxWidth),
            experts is null ? Size("intermediate_size", MaxInner)
                : Size("shared_expert_intermediate_size", MaxInner, 512), layers, heads, kvHeads,
                    headDim,
            (float)(text.Find("rms_norm_eps")?.Number(1e-12, 1) ?? 1e-6), QkvBias: false,
            config.Flag("tie_word_embeddings", defaults.TiesHead), theta, RopeScaling.None,
            Size("max_position_embeddings", int.MaxValue, 32768), QkNorm: true,
            FinalNormDecays: false)
        {
            RotatedColumns = rotary,
            ZeroCentredNorms = true,
            OutputGate = true,
            Delta = Delta(text, layers),
            Experts = experts,
        };

        int Size(string key, int most, int? otherwise = null) =>
            ModelConfig.Size(text, key, most, otherwise);
    }

    /// <summary>
    /// How many rotary frequencies are the text's, the rows' and the columns' (mrope_section).
    /// </summary>
    public static ImmutableArray<int> RopeSections(ModelConfig config)
    {
        if (config.Json["text_config"].Find("rope_parameters")?.Find("mrope_section")
            is not { } sections) return [11, 11, 10];
        ImmutableArray<int> found = [.. sections.Items().Take(4).Select(v => v.Int(0, MaxHeadDim))];
        return found.Length == 3 ? found : throw sections.Expected("three numbers");
    }

    /// <summary>SigLIP with a merger of patches behind one of its layers.</summary>
    public static VisionSpec Vision(ModelConfig config, NativeDefaults defaults)
    {
        JsonValue vision = config.Json["vision_config"];
        int hidden = Size("hidden_size", ModelConfig.MaxWidth);
        int heads = Size("num_attention_heads", MaxHeads);
        if (hidden % heads != 0)
            throw vision["hidden_size"].Expected($"a multiple of num_attention_heads ({heads})");
        int patch = Size("patch_size", 1 << 8), side = Size("image_size", ModelConfig.MaxSide);
        if (side < patch) throw vision["image_size"].Expected($"at least patch_size ({patch})");
        if ((vision.Find("num_channels")?.Int() ?? 3) != 3)
            throw vision["num_channels"].Expected("3");
        ModelConfig.RequireText(vision, "hidden_act", "gelu_pytorch_tanh");
        ModelConfig.RequireZero(vision, "attention_dropout");
        RequireSquares(vision, "window_kernel_size");
        RequireSquares(config.Json, "merge_kernel_size");
        if (config.Json.Find("merger_times") is { } times && times.Int() != 1)
            throw times.Expected("1: the processor's tokens are those of one merger");
        int layers = Size("num_hidden_layers", ModelConfig.MaxLayers);
        // The top one wins: the class copies it over vision_config's.
        bool merges = Merges(config.Json, defaults);
        int after = (config.Json.Find("insert_layer_id") ?? vision.Find("insert_layer_id"))
            ?.Int(merges ? 0 : int.MinValue, merges ? layers - 1 : int.MaxValue) ?? 6;
        if (merges && after >= layers)
            throw vision["num_hidden_layers"].Expected($"more than insert_layer_id ({after})");
        return new VisionSpec(
            hidden, Size("intermediate_size", 1 << 20), layers, heads, 3, patch, side / patch,
            (float)(vision.Find("layer_norm_eps")?.Number(1e-12, 1) ?? 1e-6),
            DropsLastLayer: false)
        {
            Layout = new QuotientLayout(),
            HasMerger = true,
            MergesAfter = merges ? after : null,
        };

        int Size(string key, int most) => ModelConfig.Size(vision, key, most);
    }

    /// <summary>The processor, which alone says how pictures are cut.</summary>
    public static ProcessorSpec Processor(
        ModelConfig config, VisionSpec vision, int merges, NativeDefaults defaults)
    {
        var (name, key) = ProcessorFile(config.Directory);
        string path = Path.Combine(config.Directory, name);
        JsonValue json = File.Exists(path)
            ? JsonInput.ReadObject(path) : JsonInput.Parse(path, "{}"u8.ToArray());
        if (key is not null) json = json[key];
        int patch = ModelConfig.Size(json, "patch_size", 1 << 8, 14);
        if (patch != vision.PatchSize)
            throw ModelConfig.Disagrees(
                json, "patch_size", patch, "the vision tower's patch_size", vision.PatchSize);
        if (Merges(json, defaults) != Merges(config.Json, defaults))
            throw json.Error("has another downsample_mode than config.json: pictures would have "
                + "another number of features than places; set both to \"16x\" or both to \"4x\"");
        foreach (string needed in (string[])["do_resize", "do_rescale", "do_normalize"])
            if (json.Find(needed) is { } flag && !flag.Bool()) throw flag.Expected("true");
        if (json.Find("resample") is { } filter && filter.Int() != 3)
            throw filter.Expected("3, bicubic, the only one supported");
        if (json.Find("rescale_factor") is { } factor
            && Math.Abs((255 * factor.Number()) - 1) > 1e-6)
            throw factor.Expected("1 / 255");
        var slicing = new SlicingSpec(
            ModelConfig.Size(json, "max_slice_nums", 1 << 12, 9),
            ModelConfig.Size(json, "scale_resolution", ModelConfig.MaxSide, 448), patch)
        {
            Merges = merges,
            Small = defaults.ChoosesSmall ? Small(json) : SmallPictures.Always,
        };
        return new ProcessorSpec(
            slicing, json.Find("slice_mode")?.Bool() ?? true,
            json.Find("use_image_id")?.Bool() ?? true,
            ModelConfig.Channels(json, "image_mean", -1e6),
            ModelConfig.Channels(json, "image_std", 1e-6), Tokens(config.Directory));
    }

    private static SmallPictures Small(JsonValue json) => ModelConfig.Text(
        json, "small_image_upsize", "always") switch
    {
        "always" => SmallPictures.Always,
        "never" => SmallPictures.Never,
        "adaptive" => SmallPictures.Adaptive,
        _ => throw json["small_image_upsize"].Expected("\"always\", \"never\" or \"adaptive\""),
    };

    // Named in tokenizer_config.json, among its extra tokens or beside them.
    private static PlaceholderTokens Tokens(string directory)
    {
        string path = Path.Combine(directory, "tokenizer_config.json");
        JsonValue? json = File.Exists(path) ? JsonInput.ReadObject(path) : null;
        JsonValue? extra = json?.Find("extra_special_tokens");
        return new PlaceholderTokens(
            Named("image_start_token", "<image>"), Named("image_end_token", "</image>"),
            Named("slice_start_token", "<slice>"), Named("slice_end_token", "</slice>"),
            Named("image_token", "<|image_pad|>"), Named("image_id_start_token", "<image_id>"),
            Named("image_id_end_token", "</image_id>"))
        {
            Video = Named("video_token", "<|video_pad|>"),
        };

        string Named(string key, string otherwise) =>
            extra is { IsObject: true } tokens && tokens.Find(key) is not null
                ? ModelConfig.Text(tokens, key, otherwise)
            : json is { } all && all.Find(key) is { IsText: true }
                ? ModelConfig.Text(all, key, otherwise) : otherwise;
    }

    private static (double Theta, int Rotary) Rope(JsonValue text, int headDim)
    {
        JsonValue? rope = text.Find("rope_parameters");
        if (rope?.Find("rope_type") is { } type && type.Text() != "default")
            throw type.Expected("\"default\", the only one supported for this decoder");
        JsonValue? share =
            rope?.Find("partial_rotary_factor") ?? text.Find("partial_rotary_factor");
        int rotary = (int)(headDim * (share?.Number(0, 1) ?? 0.25));
        if (rotary < 2 || rotary % 2 != 0)
            throw (share ?? text["head_dim"]).Expected(
                $"a share of head_dim ({headDim}) that is an even number of columns, got {rotary}");
        return ((rope?.Find("rope_theta") ?? text.Find("rope_theta"))?.Number(1, 1e12) ?? 10000,
            rotary);
    }

    private static ExpertsSpec? Experts(JsonValue text)
    {
        const string Dense = "qwen3_5_text", Sparse = "qwen3_5_moe_text";
        string type = ModelConfig.Text(text, "model_type", Dense);
        if (type == Dense) return null;
        if (type != Sparse)
            throw text["model_type"].Expected($"\"{Dense}\" or \"{Sparse}\"");
        int count = ModelConfig.Size(text, "num_experts", MaxExperts, 256);
        int chosen = ModelConfig.Size(text, "num_experts_per_tok", MaxExperts, 8);
        return chosen <= count
            ? new ExpertsSpec(count, chosen,
                ModelConfig.Size(text, "moe_intermediate_size", MaxInner, 512))
            : throw (text.Find("num_experts_per_tok") ?? text["num_experts"])
                .Expected($"no more experts of a token than num_experts ({count})");
    }

    private static DeltaSpec? Delta(JsonValue text, int layers)
    {
        ImmutableArray<bool> linear = Layers(text, layers);
        if (!linear.Contains(true)) return null;
        int keys = ModelConfig.Size(text, "linear_num_key_heads", MaxHeads, 16);
        int values = ModelConfig.Size(text, "linear_num_value_heads", MaxHeads, 32);
        if (values % keys != 0)
            throw text["linear_num_value_heads"]
                .Expected($"a multiple of linear_num_key_heads ({keys})");
        int kernel = ModelConfig.Size(text, "linear_conv_kernel_dim", 1 << 4, 4);
        return kernel == 4
            ? new DeltaSpec(keys, values,
                ModelConfig.Size(text, "linear_key_head_dim", MaxHeadDim, 128),
                ModelConfig.Size(text, "linear_value_head_dim", MaxHeadDim, 128), kernel, linear)
            : throw text["linear_conv_kernel_dim"].Expected("4, the only one supported");
    }

    private static ImmutableArray<bool> Layers(JsonValue text, int layers)
    {
        if (text.Find("layer_types") is not { } types)
        {
            int interval = ModelConfig.Size(
                text, "full_attention_interval", ModelConfig.MaxLayers, 4);
            return [.. Enumerable.Range(1, layers).Select(i => i % interval != 0)];
        }

        ImmutableArray<bool> found = [.. types.Items().Take(layers + 1).Select(type =>
            type.Text() is Full or Linear ? type.Text() == Linear
                : throw type.Expected($"\"{Full}\" or \"{Linear}\""))];
        return found.Length == layers ? found
            : throw types.Expected($"one for each of the {layers} layers (num_hidden_layers)");
    }

    private static void RequireSquares(JsonValue json, string key)
    {
        if (json.Find(key) is { } sizes
            && !sizes.Items().Take(3).Select(v => v.Int()).SequenceEqual([2, 2]))
            throw sizes.Expected("[2, 2], the only one supported");
    }
}
