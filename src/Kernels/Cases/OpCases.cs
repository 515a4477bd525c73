using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Kernels.Cases;

/// <summary>
/// Every operation once: inputs at size n, and inputs in production. Tests run each through all
/// their checks on every device, `doctor` runs each on the user's, and `bench ops` and `bench
/// kernels` measure the production shapes.
/// </summary>
public static partial class OpCases
{
    private const int Rows = 512, Width = 3584, Inner = 4736;

    // The last two are more than a kernel keeps in registers:
    // in whole vectors of 16 bytes, and not.
    private static readonly int[] s_longRows = [0, 1, 7, 1023, 8200, 9001];

    // The last two are rows that take a block several turns: in whole vectors, and not.
    private static readonly int[] s_turns = [0, 1, 7, 1023, 2056, 2057];

    public static IEnumerable<OpCase> All { get; } =
    [
        new("rms_norm", new RmsNorm(1e-6),
            n => [X("x", 3, n), X("w", n)],
            () => [X("x", Rows, Width), X("w", Width)])
        {
            Sizes = s_longRows,
        },
        new("rms_norm_zero_centred", new RmsNorm(1e-6, ZeroCentred: true),
            n => [X("x", 3, n), X("w", n)], () => [X("x", 8 * Rows, 256), X("w", 256)])
        {
            Sizes = [0, 1, 7, 1025, 4104],
        },
        new("gated_rms_norm", new GatedRmsNorm(1e-6),
            n => [X("x", 3, n), X("w", n), X("gate", 3, n)],
            () => [X("x", 16 * Rows, 128), X("w", 128), X("gate", 16 * Rows, 128)])
        {
            Sizes = s_longRows,
        },
        new("gated_rms_norm_heads", new GatedRmsNorm(1e-6),
            n => [X("x", n, 24), X("w", 24), X("gate", n, 24)],
            () => [X("x", 16 * Rows, 128), X("w", 128), X("gate", 16 * Rows, 128)]),
        new("sigmoid_gate", new SigmoidGate(6), n => [X("x", n, 12), X("queries", n, 24)],
            () => [X("x", Rows, 8 * 256), X("queries", Rows, 16 * 256)])
        {
            ProductionOp = new SigmoidGate(256),
        },
        new("sigmoid_gate_whole", new SigmoidGate(8),
            n => [X("x", n, 16), X("queries", n, 32)],
            () => [X("x", Rows, 8 * 256), X("queries", Rows, 16 * 256)])
        {
            ProductionOp = new SigmoidGate(256),
            Sizes = [0, 1, 7, 65],
        },
        new("causal_conv", new CausalConv(),
            n => [X("x", n, 5), X("w", 5, 4), Packed(n / 3, 0, n - (n / 3))],
            () => [X("x", Rows, 6144), X("w", 6144, 4), Packed(Rows)])
        {
            // A sequence that begins a token before a block of tokens does.
            Sizes = [0, 1, 7, 1053],
            FreeColumns = ["cu_seqlens"],
        },
        new("causal_conv_whole", new CausalConv(),
            n => [X("x", n, 24), X("w", 24, 4), Packed(n - (n / 3), n / 3)],
            () => [X("x", Rows, 6144), X("w", 6144, 4), Packed(Rows)])
        {
            Sizes = [0, 1, 7, 141],
            FreeColumns = ["cu_seqlens"],
        },
        new("causal_conv_step", new CausalConv(),
            n => [X("x", n, 24), X("w", 24, 4), Packed(n - (n / 3), n / 3), X("state", 6, 24)],
            () => [X("x", 1, 6144), X("w", 6144, 4), Packed(1), X("state", 3, 6144)])
        {
            Sizes = [0, 1, 2, 7, 46],
            FreeColumns = ["cu_seqlens"],
        },
        new("delta_rule", new DeltaRule(2, 4, 8, 6),
            n => Delta([n / 3, 0, n - (n / 3)], 2, 4, 8, 6),
            () => Delta([2048], 16, 16, 128, 128))
        {
            ProductionOp = new DeltaRule(16, 16, 128, 128),
            // Three chunks, all of them full.
            Sizes = [0, 1, 7, 288],
            SelfTestSizes = [15, 130],
            FreeColumns = ["cu_seqlens"],
        },
        new("delta_rule_128", new DeltaRule(2, 2, 128, 128),
            n => Delta([n / 4, n - (n / 4)], 2, 2, 128, 128),
            () => Delta([1024, 1024], 16, 32, 128, 128))
        {
            ProductionOp = new DeltaRule(16, 32, 128, 128),
            Sizes = [0, 1, 7, 100],
            SelfTestSizes = [130],
            FreeColumns = ["cu_seqlens"],
        },
        new("layer_norm", new LayerNorm(1e-6),
            n => [X("x", n, Whole(n, 7)), X("w", Whole(n, 7)), X("b", Whole(n, 7))],
            () => [X("x", 1024, 1152), X("w", 1152), X("b", 1152)]),
        new("layer_norm_few_rows", new LayerNorm(1e-6),
            n => [X("x", 3, n), X("w", n), X("b", n)],
            () => [X("x", 64, Width), X("w", Width), X("b", Width)])
        {
            Sizes = s_longRows,
        },
        new("gelu_tanh", new Gelu(GeluKind.Tanh), n => [X("x", n)], () => [X("x", 1024, 4304)])
        {
            FreeColumns = ["x"],
        },
        new("gelu_erf", new Gelu(GeluKind.Erf), n => [X("x", n)], () => [X("x", 1024, 4304)])
        {
            FreeColumns = ["x"],
        },
        new("relu", new Relu(), n => [X("x", n)], () => [X("x", 1500, 1024)])
        {
            FreeColumns = ["x"],
        },
        new("swiglu", new SwiGlu(),
            n => [X("gate", 2, n), X("up", 2, n)],
            () => [X("gate", Rows, Inner), X("up", Rows, Inner)]),
        new("add", new Add(0.25),
            n => [X("a", 2, n), X("b", 2, n)],
            () => [X("a", Rows, Width), X("b", Rows, Width)]),
        new("scale", new Scale(0.25), n => [X("x", 2, n)], () => [X("x", Rows, Width)])
        {
            FreeColumns = ["x"],
        },
        new("columns", new Columns(2, 5), n => [X("x", n, 9)], () => [X("x", 1024, 3 * 1152)])
        {
            ProductionOp = new Columns(1152, 1152),
            FreeColumns = ["x"],
        },
        new("columns_whole", new Columns(16, 24), n => [X("x", n, 40)],
            () => [X("x", 1024, 3 * 1152)])
        {
            ProductionOp = new Columns(0, 1152),
            FreeColumns = ["x"],
        },
        new("unfold", new Unfold(5, 1), n => [X("x", n, 4 * 5)], () => [X("x", 1, 3000 * 80)])
        {
            ProductionOp = new Unfold(80, 1),
        },
        new("unfold_stride", new Unfold(257, 2), n => [X("x", 2, (n + 1) * 257)],
            () => [X("x", 1, 3000 * 1024)])
        {
            ProductionOp = new Unfold(1024, 2),
            Sizes = [0, 1, 2, 7, 65],
        },
        new("rope", new Rope(6),
            n => [X("x", n, 12), Value.Int("positions", Fill.Below(5, n, 9)), X("cos", 9, 3),
                X("sin", 9, 3)],
            () => [X("x", Rows, 28 * 128), Value.Int("positions", Fill.Below(5, Rows, Rows)),
                X("cos", Rows, 64), X("sin", Rows, 64)])
        {
            ProductionOp = new Rope(128),
        },
        new("rope_keys", new Rope(16),
            n => [X("x", n, 32), Value.Int("positions", Fill.Below(5, n, 9)), X("cos", 9, 8),
                X("sin", 9, 8)],
            () => [X("x", Rows, 4 * 128), Value.Int("positions", Fill.Below(5, Rows, Rows)),
                X("cos", Rows, 64), X("sin", Rows, 64)])
        {
            ProductionOp = new Rope(128),
        },
        new("rope_part", new Rope(24, 16),
            n =>
            [
                X("x", Few(n), 3 * Long(n, 16)), Value.Int("positions", Fill.Below(5, Few(n), 9)),
                X("cos", 9, 8), X("sin", 9, 8),
            ],
            () => [X("x", Rows, 8 * 256), Value.Int("positions", Fill.Below(5, Rows, Rows)),
                X("cos", Rows, 32), X("sin", Rows, 32)])
        {
            ProductionOp = new Rope(256, 64),
            Sizes = [0, 1, 7, 129, 2056],
        },
        new("rope_odd_heads", new Rope(18, 16),
            n =>
            [
                X("x", Few(n), Long(n, 36)), Value.Int("positions", Fill.Below(5, Few(n), 9)),
                X("cos", 9, 8), X("sin", 9, 8),
            ],
            () => [X("x", Rows, 8 * 90), Value.Int("positions", Fill.Below(5, Rows, Rows)),
                X("cos", Rows, 40), X("sin", Rows, 40)])
        {
            ProductionOp = new Rope(90, 80),
            Sizes = [0, 1, 7, 65, 18 * 129],
        },
        new("embedding", new Embedding(3),
            n => [X("table", 40, Long(n, 5)), Value.Int("ids", Fill.Below(2, Few(n), 40))],
            () => [X("table", 32000, Width), Value.Int("ids", Fill.Below(2, Rows, 32000))])
        {
            Sizes = s_turns,
            FreeColumns = ["table", "ids"],
        },
        new("embedding_whole", new Embedding(3),
            n => [X("table", 40, 24), Value.Int("ids", Fill.Below(2, n, 40))],
            () => [X("table", 32000, Width), Value.Int("ids", Fill.Below(2, Rows, 32000))])
        {
            FreeColumns = ["table", "ids"],
            Sizes = [0, 1, 7, 65],
        },
        new("position_gather", new PositionGather(),
            n =>
            [
                X("x", n, Whole(n, 5)), X("table", 40, Whole(n, 5)),
                Value.Int("ids", Fill.Below(2, n, 40)),
            ],
            () => [X("x", 1024, 1152), X("table", 4900, 1152),
                Value.Int("ids", Fill.Below(2, 1024, 4900))]),
        new("weighted_gather", new WeightedGather(),
            n => Terms(Few(n), Long(n, 5), 40, 4), () => Terms(1024, 1152, 729, 33))
        {
            Sizes = s_turns,
        },
        new("weighted_gather_whole", new WeightedGather(),
            n => Terms(n, 24, 9, 3), () => Terms(1024, 1152, 729, 33))
        {
            Sizes = [0, 1, 7, 65],
        },
        new("cache_append", new CacheAppend(),
            n => Cache(2 * n, n, Whole(n, 5)), () => Cache(4096, Rows, 4 * 128)),
        new("splice", new Splice(),
            n =>
            [
                X("x", Few(n) + 3, Long(n, Whole(n, 5))),
                X("features", Few(n) + 1, Long(n, Whole(n, 5))),
                Value.Int("positions", Fill.Distinct(2, Few(n), Few(n) + 3)),
            ],
            () => [X("x", 1024, Width), X("features", 640, Width),
                Value.Int("positions", Fill.Distinct(2, 640, 1024))])
        {
            Sizes = s_turns,
            FreeColumns = ["positions"],
        },
        new("linear", new Linear(),
            n => [X("x", 5, n), X("w", Whole(n, 9), n), X("b", Whole(n, 9))],
            () => [X("x", Rows, Width), X("w", Width, Width), X("b", Width)]),
        new("linear_transposed", new Linear(Transposed: true),
            n => [X("x", n, Whole(n, 6)), X("w", Whole(n, 6), Whole(n, 9))],
            () => [X("x", Rows, Width), X("w", Width, Width)])
        {
            FreeColumns = ["w"],
        },
        new("patch_embed", new Linear(),
            n => [X("x", n, 12), X("w", Whole(n, 7), 12), X("b", Whole(n, 7))],
            () => [X("x", 1024, 588), X("w", 1152, 588), X("b", 1152)]),
        new("lora_linear", new LoraLinear(3, 2, 0),
            n => Adapted(n, Whole(n, 9), Whole(n, 10), X("b", Whole(n, 9))), Lora),
        new("lora_linear_dropout", new LoraLinear(3, 2, 0.3),
            n => Adapted(3, Whole(n, 9), n, Value.Absent("b")), Lora)
        {
            ProductionOp = new LoraLinear(3, 2, 0.05),
            Dropout = true,
        },
        new("adapted_norm", new AdaptedNorm(2),
            n => Norm(9, n, 4, scale: 2),
            () =>
            [
                X("w", Width, Width), X("a", 16, Width), X("bb", Width, 16),
                Squares(X("w", Width, Width), 100),
            ]),
        new("dora_linear", new DoraLinear(3, 2, 0),
            n =>
            [
                .. Adapted(n, Whole(n, 9), Whole(n, 10), X("b", Whole(n, 9))),
                X("m", Whole(n, 9)), Squares(X("n", Whole(n, 9), 1), 1),
            ],
            Dora),
        // With the tests' seed one of 1,023 columns draws the threshold itself.
        new("dora_linear_dropout", new DoraLinear(3, 2, 19913 / 65536.0),
            n =>
            [
                .. Adapted(3, Whole(n, 9), n, Value.Absent("b")),
                X("m", Whole(n, 9)), Squares(X("n", Whole(n, 9), 1), 1),
            ],
            Dora)
        {
            ProductionOp = new DoraLinear(3, 2, 0.05),
            Dropout = true,
        },
        new("linears", new Linears([new(12, 3), new(8), new(8, 5)], 2, 0, headDim: 4, rotated: 2),
            n =>
            [
                X("x", n, 10), X("w", 12, 10), X("b", 12), X("a", 3, 10), X("bb", 12, 3),
                X("w1", 8, 10), X("b1", 8), Value.Absent("a1"), Value.Absent("bb1"),
                X("w2", 8, 10), Value.Absent("b2"), X("a2", 3, 10), X("bb2", 8, 3), .. Turns(n, 2),
            ],
            () =>
            [
                X("x", Rows, Width), .. Lora(3584, ""), .. Lora(512, "1"), .. Lora(512, "2"),
                .. Turns(Rows, 64),
            ])
        {
            ProductionOp = new Linears([new(3584, 0), new(512, 1), new(512, 2)], 2, 0.05, 128, 2),
        },
        new("linears_whole", new Linears([new(32, 3), new(16), new(16, 5)], 2, 0, 16, 2),
            n =>
            [
                X("x", n, 16), X("w", 32, 16), X("b", 32), X("a", 3, 16), X("bb", 32, 3),
                X("w1", 16, 16), X("b1", 16), Value.Absent("a1"), Value.Absent("bb1"),
                X("w2", 16, 16), X("b2", 16), X("a2", 3, 16), X("bb2", 16, 3), .. Turns(n, 8),
            ],
            () =>
            [
                X("x", Rows, Width), .. Lora(3584, ""), .. Lora(512, "1"), .. Lora(512, "2"),
                .. Turns(Rows, 64),
            ])
        {
            ProductionOp = new Linears([new(3584, 0), new(512, 1), new(512, 2)], 2, 0, 128, 2),
            Sizes = [0, 1, 7, 65],
        },
        new("linears_dropout", new Linears([new(9, 3), new(7, 4)], 2, 0.3),
            n =>
            [
                X("x", 3, n), X("w", 9, n), X("b", 9), X("a", 4, n), X("bb", 9, 4), X("w1", 7, n),
                Value.Absent("b1"), X("a1", 4, n), X("bb1", 7, 4),
            ],
            () => [X("x", Rows, Width), .. Lora(18944, ""), .. Lora(18944, "1")])
        {
            ProductionOp = new Linears([new(18944, 0), new(18944, 1)], 2, 0.05),
            Dropout = true,
        },
        new("attention", new Attention(4, 2, 8, Causal: true, 0.3),
            n => Heads(n, 32, 16, [n / 3, n - (n / 3)]),
            () => Heads(Rows, 28 * 128, 4 * 128, [Rows]))
        {
            ProductionOp = new Attention(28, 4, 128, Causal: true, 1 / Math.Sqrt(128)),
            SelfTestSizes = [15, 64],
        },
        .. new[] { 64, 72, 80, 96, 128, 256 }.Select(headDim => new OpCase($"attention_{headDim}",
            new Attention(4, 2, headDim, Causal: headDim != 72, 1 / Math.Sqrt(headDim)),
            n => Heads(n, 4 * headDim, 2 * headDim, [n / 4, n - (n / 4)]),
            () => Heads(Rows, 16 * headDim, 16 * headDim, [Rows]))
        {
            ProductionOp = new Attention(16, 16, headDim, Causal: true, 1 / Math.Sqrt(headDim)),
            Sizes = [0, 1, 7, 130],
            SelfTestSizes = [130],
        }),
        new("attention_cached", new Attention(3, 1, 8, Causal: true, 0.3, Cached: true),
            n => Cached(24, 8, [n / 3, 1, n - (n / 3)], [2, n, 0], room: 5),
            () => Cached(28 * 128, 4 * 128, [1], [2047], room: 2048))
        {
            ProductionOp =
                new Attention(28, 4, 128, Causal: true, 1 / Math.Sqrt(128), Cached: true),
            Sizes = [0, 1, 7, 300],
            SelfTestSizes = [64],
        },
        new("attention_step", new Attention(9, 1, 16, Causal: true, 0.3, Cached: true),
            n => Cached(9 * 16, 16, [1, 1], [n, 0], room: 520),
            () => Cached(28 * 128, 4 * 128, [1, 1], [2047, 1500], room: 1))
        {
            ProductionOp =
                new Attention(28, 4, 128, Causal: true, 1 / Math.Sqrt(128), Cached: true),
            Sizes = [0, 1, 7, 600],
            SelfTestSizes = [600],
        },
        new("experts", new Experts(2), n => Mixture(n, 7, 35, 17, 3, 2),
            () => Mixture(256, 2048, 32, 31, 512, 8))
        {
            ProductionOp = new Experts(8),
            Sizes = [0, 1, 7, 130],
            SelfTestSizes = [15, 130],
        },
        new("experts_whole", new Experts(3), n => Mixture(n, 24, 4, 3, 16, 3),
            () => Mixture(256, 2048, 32, 31, 512, 8))
        {
            ProductionOp = new Experts(8),
            Sizes = [0, 1, 7, 130],
            SelfTestSizes = [130],
        },
        new("gated_add", new GatedAdd(), n => [X("x", 3, n), X("up", 3, n), X("gate", 3, 1)],
            () => [X("x", Rows, 2048), X("up", Rows, 2048), X("gate", Rows, 1)])
        {
            Sizes = s_longRows,
        },
        new("cross_entropy", new CrossEntropy(),
            n => Chosen(Head(n, Whole(n, 5), n / 2, Math.Min(n + 2, 300))),
            () => Head(Rows, 1024, Rows, 32000))
        {
            FreeColumns = ["rows", "targets"],
        },
        new("cross_entropy_adapted", new CrossEntropy(2),
            n => Chosen([.. Head(n, 5, n / 2, Math.Min(n + 2, 300)), X("u", n, 3),
                X("bb", Math.Min(n + 2, 300), 3)], scale: 2),
            () => [.. Head(Rows, 1024, Rows, 32000), X("u", Rows, 16), X("bb", 32000, 16)])
        {
            FreeColumns = ["rows", "targets", "u"],
        },
        new("adapted_matrices", new AdaptedMatrices(3, 2),
            n => [X("w", 15, n), X("a", 6, n), X("bb", 15, 2)],
            () => [X("w", 8 * 1024, 2048), X("a", 8 * 16, 2048), X("bb", 8 * 1024, 16)])
        {
            ProductionOp = new AdaptedMatrices(8, 2),
        },
        new("lora_down", new LoraDown(3, 0), n => [X("x", n, 10), X("a", 4, 10)],
            () => [X("x", Rows, Width), X("a", 16, Width)]),
        new("lora_down_dropout", new LoraDown(3, 0.3), n => [X("x", n, 10), X("a", 4, 10)],
            () => [X("x", Rows, Width), X("a", 16, Width)])
        {
            Dropout = true,
        },
    ];
}
