using System.Text.Json;
using System.Text.Json.Nodes;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;

namespace MiniCpmNative.Tests;

/// <summary>
/// MiniCPM-V 4.7's reference model with a mixture of experts, tests/reference/v47/moe, whose file
/// has the experts one by one, and its batch of two texts, one with a sliced picture. The tokenizer
/// is that of tests/reference/v46.
/// </summary>
internal static class V47Experts
{
    private static readonly Lazy<string> s_folder = new(Unpack);
    private static readonly Lazy<ReferenceFile> s_case = new(() =>
        ReferenceFile.OpenAt(Path.Combine(s_folder.Value, "case")));

    public static string Model => Path.Combine(s_folder.Value, "model");

    /// <summary>The batch, and what came out.</summary>
    public static ReferenceFile Case => s_case.Value;

    /// <summary>Fingerprints of all gradients.</summary>
    public static JsonElement Gradients => ReferenceText.Json("v47/moe/grads.json");

    public static TrainArguments Full => V46.Full with { ModelNameOrPath = Model };

    /// <summary>On attention, delta rule and the shared expert.</summary>
    public static TrainArguments Lora => V46.Lora with
    {
        ModelNameOrPath = Model,
        LoraTargetModules = new TargetModules(
            @".*language_model\.layers\.\d+\.(self_attn\.(q_proj|o_proj)|"
            + @"linear_attn\.(in_proj_qkv|out_proj)|mlp\.shared_expert\.(gate_proj|up_proj|down_proj))"),
    };

    /// <summary>The large model, its small files in a folder: default sizes of the library's text
    /// model, the released vision tower.</summary>
    public static ModelSpec Large(string folder) => V46.Changed(folder, (config, _) =>
    {
        config["model_type"] = "minicpmv4_7";
        config["insert_layer_id"] = 6;
        config["tie_word_embeddings"] = false;
        config["vision_config"] = JsonNode.Parse("""
            {"hidden_size": 1152, "image_size": 980, "intermediate_size": 4304,
             "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14}
            """);
        config["text_config"] = JsonNode.Parse("""
            {"model_type": "qwen3_5_moe_text", "vocab_size": 248094, "hidden_size": 2048,
             "num_hidden_layers": 40, "num_attention_heads": 16, "num_key_value_heads": 2}
            """);
    });

    /// <summary>The texts with their places as the reference has them, and the picture's
    /// patches.</summary>
    public static Batch Batch(RowFormat format, params ReadOnlySpan<int> rows)
    {
        int length = Case.Shape("input_ids")[1], count = Case.Shape("input_ids")[0];
        int[] ids = Ints("input_ids"), mask = Ints("attention_mask"), labels = Ints("labels"),
            places = Ints("position_ids");
        var batch = new Batch();
        batch.Clear();
        foreach (int row in rows.Length > 0 ? rows : [0, 1])
        {
            int begin = row * length, tokens = mask.AsSpan(begin, length).Count(1);
            int[] text = ids[begin..(begin + tokens)];
            int start = batch.Tokens.Count, axis = count * length;
            for (int t = 0; t + 1 < tokens; t++)
            {
                if (labels[begin + t + 1] == -100) continue;
                batch.LabelRows.Add(start + t);
                batch.Targets.Add(labels[begin + t + 1]);
            }

            batch.AddRow(text, format.Placeholders.Bounds(text)!, places: [.. text.Select(
                (_, t) => new CanvasPlace(places[begin + t], places[axis + begin + t],
                    places[(2 * axis) + begin + t]))]);
            if (row == 0) AddPicture(batch);
        }

        return batch;
    }

    public static int[] Ints(string name) => [.. Case.Doubles(name).Select(v => (int)v)];

    // strip[3, 14, 14 n] of bytes -> patches[n, 3 * 14 * 14] in -1 .. 1.
    private static void AddPicture(Batch batch)
    {
        const int Side = 14, Pixels = 3 * Side * Side;
        double[] strip = Case.Doubles("pixel_u8");
        int[] sizes = Ints("target_sizes");
        int width = Case.Shape("pixel_u8")[2];
        for (int view = 0; view < sizes.Length; view += 2)
        {
            batch.Grids.Add(sizes.AsSpan(view, 2));
            batch.PictureStarts.Add(batch.PictureStarts[batch.PictureStarts.Count - 1]
                + (sizes[view] * sizes[view + 1]));
        }

        Span<float> patches = batch.Patches.Extend(strip.Length);
        for (int i = 0; i < strip.Length; i++)
            patches[(i % width / Side * Pixels) + (i / width * Side) + (i % Side)] =
                (float)((strip[i] / 127.5) - 1);
    }

    private static string Unpack()
    {
        string folder = Directory.CreateTempSubdirectory("cpmx-test-v47-").FullName;
        AppDomain.CurrentDomain.ProcessExit += (_, _) => Directory.Delete(folder, recursive: true);
        string model = Path.Combine(folder, "model");
        Directory.CreateDirectory(model);
        foreach (string from in (string[])["v46/model", "v47/moe/model"])
            foreach (string path in Directory.GetFiles(Path.Combine(ReferenceFile.Root, from)))
                if (!path.EndsWith(".gz", StringComparison.Ordinal))
                    File.Copy(path, Path.Combine(model, Path.GetFileName(path)), overwrite: true);
        foreach (string file in (string[])["model/model.safetensors", "case.safetensors"])
            File.WriteAllBytes(Path.Combine(folder, file), ReferenceText.Bytes("v47/moe/" + file));
        return folder;
    }
}
