using MiniCpmNative.Engine.Config;

namespace MiniCpmNative.Bench.Real;

/// <summary>
/// One line of the table: adapters of a rank on some projections, rows of a forward pass, tokens of
/// a row.
/// </summary>
/// <param name="Peers">Lines of the peers that do the same, by their names, and cases of this table
/// that it is to be compared with.</param>
internal sealed record RealCase(
    string Name, string What, bool IsSmall, bool All, int Rank, int Batch, bool Checkpointing,
    int Tokens, bool Pictures, string[] Peers)
{
    /// <summary>Micro-batches of a step.</summary>
    public int Passes { get; init; } = 1;

    /// <summary>What else the case sets.</summary>
    public Func<TrainArguments, TrainArguments> Over { get; init; } = a => a;

    /// <summary>The share of the first peer's speed that is wanted; 0 for none.</summary>
    public double Goal { get; init; }

    /// <summary>The most GPU memory that is wanted, in GiB; 0 for any.</summary>
    public double MostGib { get; init; }

    private const string Attention = @"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj)";
    private const string Seven =
        @"llm\..*layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)";

    public static RealCase[] Table { get; } =
    [
        new("qkv", "r64 on q, k, v", false, false, 64, 1, false, 2048, false,
            ["base qkv", "lean qkv", "compiled qkv"]) { Over = LookUps, MostGib = 22 },
        new("qkv-ckpt", "r64 on q, k, v, gradient_checkpointing", false, false, 64, 1, true, 2048,
            false, ["base qkv-ckpt"]) { Over = LookUps, MostGib = 16.2 },
        new("all", "r64 on all seven", false, true, 64, 1, false, 2048, false,
            ["base all", "lean all", "compiled all"]) { Over = LookUps, MostGib = 24 },
        new("all-b4-ckpt", "r64 on all seven, batch 4, gradient_checkpointing", false, true, 64, 4,
            true, 2048, false, ["base all-b4-ckpt", "lean all-b4-ckpt"]),
        new("long", "r64 on q, k, v, one row of 16,384 tokens, gradient_checkpointing", false,
            false, 64, 1, true, 16384, false, []),
        new("pictures", "r64 on q, k, v, a picture of 1344 x 1344 in each row", false, false, 64, 1,
            false, 2048, true, []),
        new("small", "24 layers of 1024, r16 on all seven", true, true, 16, 1, false, 2048, false,
            ["base small", "lean small"]),
        Long("qkv-8k", ""),
        New("qlora", "r64 on q, k, v, NF4 with the vision tower's, gradient_checkpointing",
            "qkv-ckpt", 0, 0, Nf4),
        New("qlora-7g", "the same, memory_limit 7GiB, embeddings in the machine", "qkv-ckpt", 0, 7,
            a => LookUps(Nf4(a)) with { MemoryLimit = MemoryLimit.Parse("7GiB") }),
        New("qlora-10g", "the same, memory_limit 10GiB", "qkv-ckpt", 0.93, 10,
            a => Nf4(a) with { MemoryLimit = MemoryLimit.Parse("10GiB") }),
        New("qlora-20g", "the same, memory_limit 20GiB", "qkv-ckpt", 0.98, 20,
            a => Nf4(a) with { MemoryLimit = MemoryLimit.Parse("20GiB") }),
        Long("qlora-8k", ", NF4", "qkv-8k") with { Over = Nf4, Goal = 0.97 },
        New("acc4", "4 micro-batches a step, gradient_checkpointing", "", 0, 0, a => a, 4),
        New("acc4-streamed", "the same, frozen layers streamed", "acc4", 0.85, 6,
            a => a with { StreamWeights = StreamedWeights.True }, 4),
        New("streamed", "frozen layers streamed, one micro-batch a step", "qkv-ckpt", 0, 5,
            a => a with { StreamWeights = StreamedWeights.True }),
        New("qlora-streamed", "NF4, frozen layers streamed", "qlora", 0, 4,
            a => Nf4(a) with { StreamWeights = StreamedWeights.True }),
        New("official", "and embed_tokens, resampler, vpm trained, pictures, everything offloaded",
            "", 0, 8, a => a with
            {
                ModulesToSave = ["embed_tokens", "resampler", "vpm"],
                OffloadOptimizer = true,
                OffloadParam = true,
            }) with { Pictures = true },
        New("full", "everything trained, adamw_bf16, offload_optimizer", "", 0, 70,
            a => Full(a) with { OffloadOptimizer = true }, 4),
        New("full-offload", "everything trained, everything offloaded", "full", 0, 24,
            a => Full(a) with { OffloadOptimizer = true, OffloadParam = true }, 4),
    ];

    private static RealCase New(string name, string what, string against, double goal, double gib,
        Func<TrainArguments, TrainArguments> over, int passes = 1) =>
        new(name, what, false, false, 64, 1, true, 2048, false, against == "" ? [] : [against])
        {
            Over = over,
            Goal = goal,
            MostGib = gib,
            Passes = passes,
        };

    private static RealCase Long(string name, string what, params string[] against) =>
        new(name, "r64 on q, k, v, one row of 8,192 tokens, gradient_checkpointing" + what, false,
            false, 64, 1, true, 8192, false, against);

    // Embeddings in the machine's memory.
    private static TrainArguments LookUps(TrainArguments a) => a with
    {
        StreamWeights = StreamedWeights.Embeddings,
    };

    private static TrainArguments Nf4(TrainArguments a) => a with
    {
        QLora = true,
        LlmInt8SkipModules = ["resampler", "lm_head"],
    };

    private static TrainArguments Full(TrainArguments a) => a with
    {
        UseLora = false,
        TuneLlm = true,
        TuneVision = true,
        Optim = OptimizerKind.AdamwBf16,
    };

    public TrainArguments Arguments(
        string model, string rows, string output, DeviceChoice device, bool bf16) => Over(new()
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
            GradientAccumulationSteps = Passes,
            ReportTo = ReportTo.None,
        });
}
