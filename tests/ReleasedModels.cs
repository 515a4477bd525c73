using MiniCpmNative.Engine.Model;

namespace MiniCpmNative.Tests;

/// <summary>The sizes of every member of the family as it was released.</summary>
internal static class ReleasedModels
{
    /// <summary>V-4_6's published sizes, which the announced ones of its successors follow from.
    /// </summary>
    public const string Native = """
        "vision_config":
          {"hidden_size": 1152, "image_size": 980, "intermediate_size": 4304,
          "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14},
        "text_config": {"vocab_size": 248094, "hidden_size": 1024, "intermediate_size": 3584,
          "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 2,
          "linear_num_value_heads": 16}
        """;

    private const string Vision = """
        "vision_config": {"model_type": "siglip", "hidden_size": 1152, "image_size": 980,
          "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27,
          "patch_size": 14}, "drop_vision_last_layer": false,
          "slice_config": {"max_slice_nums": 9, "patch_size": 14}
        """;

    /// <summary>
    /// Of the released config.json files, what decides the sizes (V-4's rotary factors do not),
    /// with the number of parameters without audio and speech.
    /// </summary>
    public static IReadOnlyDictionary<string, (long Parameters, string Config)> All { get; } =
        new Dictionary<string, (long, string)>
        {
            ["MiniCPM-V-2"] = (3_434_965_792, """
            "model_type": "minicpmv", "vision_encoder": "vit_so400m_patch14_siglip_384.webli",
            "vocab_size": 122753, "hidden_size": 2304, "intermediate_size": 5760,
            "num_hidden_layers": 40, "num_attention_heads": 36, "num_key_value_heads": 36,
            "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256, "query_num": 64,
            "drop_vision_last_layer": true, "max_slice_nums": 9, "scale_resolution": 448,
            "patch_size": 14
            """),
            ["MiniCPM-Llama3-V-2_5"] = (8_537_092_336, $$"""
            {{Vision}}, "version": "2.5", "query_num": 96,
            "model_type": "minicpmv", "vocab_size": 128256, "hidden_size": 4096,
            "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8
            """),
            ["MiniCPM-V-2_6"] = (8_099_175_152, $$"""
            {{Vision}}, "version": 2.6, "model_type": "minicpmv", "vocab_size": 151666,
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4
            """),
            ["MiniCPM-o-2_6"] = (8_099_418_864, $$"""
            {{Vision}}, "version": "2.6", "model_type": "minicpmo", "vocab_size": 151700,
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4
            """),
            ["MiniCPM-V-4"] = (4_059_533_040, $$"""
            {{Vision}}, "version": 4.0, "model_type": "minicpmv", "vocab_size": 73448,
            "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128
            """),
            ["MiniCPM-V-4_5"] = (8_695_895_280, $$"""
            {{Vision}}, "version": 4.5, "model_type": "minicpmv", "vocab_size": 151748,
            "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128
            """),
            ["MiniCPM-o-4_5"] = (8_695_895_280, $$"""
            {{Vision}}, "version": 4.5, "model_type": "minicpmo", "vocab_size": 151748,
            "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128
            """),
            ["MiniCPM-V-4_6"] = (1_300_428_016, $$"""
            "model_type": "minicpmv4_6", "tie_word_embeddings": true, {{Native}}
            """),
            ["MiniCPM-V-4_7"] = (1_554_476_272, $$"""
            "model_type": "minicpmv4_7", "tie_word_embeddings": false, {{Native}}
            """),
            ["MiniCPM-OCR"] = (1_300_428_016, $$"""
            "model_type": "minicpm_ocr", {{Native}}
            """),
        };

    /// <summary>What of a model is there without weights; its config.json is left in the folder.
    /// </summary>
    public static ModelSpec Read(string folder, string name, string more = "")
    {
        File.WriteAllText(
            Path.Combine(folder, "config.json"), $"{{{All[name].Config}{more}}}");
        return ModelSpec.Read(folder);
    }
}
