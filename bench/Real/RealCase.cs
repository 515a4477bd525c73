using MiniCpmNative.Engine.Config;

namespace MiniCpmNative.Bench.Real;

/// <summary>
/// One line of the table: adapters of a rank on some projections, rows of a forward pass, tokens of
/// a row.
/// </summary>
/// <param name="Peers">Lines of the peers that do the same, by their names.</param>
internal sealed record RealCase(
    string Name, string What, bool IsSmall, bool All, int Rank, int Batch, bool Checkpointing,
    int Tokens, bool Pictures, string[] Peers)
{
    private const string Attention = @"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj)";
    private const string Seven =
        @"llm\..*layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)";

    public static RealCase[] Table { get; } =
    [
        new("qkv", "r64 on q, k, v", false, false, 64, 1, false, 2048, false,
            ["base qkv", "lean qkv", "compiled qkv"]),
        new("qkv-ckpt", "r64 on q, k, v, gradient_checkpointing", false, false, 64, 1, true, 2048,
            false, ["base qkv-ckpt"]),
        new("all", "r64 on all seven", false, true, 64, 1, false, 2048, false,
            ["base all", "lean all", "compiled all"]),
        new("all-b4-ckpt", "r64 on all seven, batch 4, gradient_checkpointing", false, true, 64, 4,
            true, 2048, false, ["base all-b4-ckpt", "lean all-b4-ckpt"]),
        new("long", "r64 on q, k, v, one row of 16,384 tokens, gradient_checkpointing", false,
            false, 64, 1, true, 16384, false, []),
        new("pictures", "r64 on q, k, v, a picture of 1344 x 1344 in each row", false, false, 64, 1,
            false, 2048, true, []),
        new("small", "24 layers of 1024, r16 on all seven", true, true, 16, 1, false, 2048, false,
            ["base small", "lean small"]),
    ];

    public TrainArguments Arguments(
        string model, string rows, string output, DeviceChoice device, bool bf16) => new()
        {
            ModelNameOrPath = model,
            DataPath = rows,
            OutputDir = output,
            Device = device,
            Bf16 = bf16,
            ModelMaxLength = Tokens,
            UseLora = true,
            TuneLlm = false,
            TuneVision = false,
            LoraR = Rank,
            LoraAlpha = Rank,
            LoraTargetModules = new TargetModules(All ? Seven : Attention),
            ModulesToSave = [],
            LearningRate = 1e-4,
            PerDeviceTrainBatchSize = Batch,
            GradientCheckpointing = Checkpointing,
            ReportTo = ReportTo.None,
        };
}
