using System.Text.Json.Nodes;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Tests;

/// <summary>
/// MiniCPM-V-2_6 as its configuration has it, without weights, on a device that only counts.
/// </summary>
internal static class RealModel
{
    public static CardFigures Card { get; } = new("a card", 132, 90, 80L << 30);

    public static TrainArguments Lora => V26.Lora with
    {
        Bf16 = true,
        LoraR = 64,
        LoraDropout = 0.05,
        LoraTargetModules = new TargetModules(
            @"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj)"),
    };

    public static DryRun Dry(string folder, TrainArguments arguments) =>
        new(arguments, Planned(folder, arguments), Card);

    /// <summary>What a dry run needs to know; its small files are left in the folder.</summary>
    public static PlannedModel Planned(string folder, TrainArguments arguments)
    {
        foreach (string file in Directory.EnumerateFiles(V26.Model, "*.json"))
            File.Copy(file, Path.Combine(folder, Path.GetFileName(file)), overwrite: true);
        string path = Path.Combine(folder, "config.json");
        JsonNode config = JsonNode.Parse(File.ReadAllText(path))!;
        config["hidden_size"] = 3584;
        config["num_hidden_layers"] = 28;
        config["intermediate_size"] = 18944;
        config["num_attention_heads"] = 28;
        config["num_key_value_heads"] = 4;
        config["vocab_size"] = 151666;
        JsonNode vision = config["vision_config"]!;
        vision["hidden_size"] = 1152;
        vision["intermediate_size"] = 4304;
        vision["num_hidden_layers"] = 27;
        vision["num_attention_heads"] = 16;
        File.WriteAllText(path, config.ToJsonString());
        ModelSpec spec = ModelSpec.Read(folder);
        TunedParts parts = TunedParts.Choose(
            spec, arguments, TunedParts.AdapterOf(arguments, spec), DType.BF16);
        var kind = new QuantisedKind(
            spec.Parameters, DType.BF16, Quantisation.Of(arguments), null);
        return new PlannedModel(spec, parts, _ => DType.BF16, kind);
    }

    /// <summary>One row of so many tokens, all supervised.</summary>
    /// <param name="tokens">Its tokens, those of pictures among them.</param>
    /// <param name="views">Views of 1,024 patches each, 64 tokens.</param>
    public static Batch Row(int tokens, int views = 0)
    {
        const int Features = 64, Side = 32, Patches = Side * Side, Length = 588;
        var batch = new Batch();
        batch.Clear();
        batch.AddRow([.. Enumerable.Range(0, tokens)],
            [.. Enumerable.Range(0, views).Select(
                i => new ImageBound(i * Features, (i + 1) * Features))]);
        for (int i = 0; i < tokens; i++)
        {
            batch.LabelRows.Add(i);
            batch.Targets.Add(i);
        }

        for (int i = 0; i < views; i++)
        {
            batch.Grids.Add([Side, Side]);
            batch.PictureStarts.Add((i + 1) * Patches);
            batch.Patches.Extend(Patches * Length).Clear();
        }

        return batch;
    }
}
