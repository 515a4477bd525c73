using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Tests;

/// <summary>
/// Every operation once: inputs at size n, inputs in production, and the tensors of its reference
/// file. OpTests runs each through all its checks, and `bench ops` times the production shapes.
/// </summary>
internal static class OpCases
{
    private const int Rows = 512, Width = 3584, Inner = 4736;

    // The last two are more than a kernel keeps in registers:
    // in whole vectors of 16 bytes, and not.
    private static readonly int[] s_longRows = [0, 1, 7, 1023, 8200, 9001];

    public static IEnumerable<OpCase> All { get; } =
    [
        new("rms_norm", new RmsNorm(1e-6),
            n => [X("x", 3, n), X("w", n)],
            () => [X("x", Rows, Width), X("w", Width)])
        {
            Reference = "rms_norm",
            Problem = c => Keys(c, new RmsNorm(Number(c, "eps")), ["x", "w"], saved: ["rstd"]),
            Sizes = s_longRows,
        },
        new("layer_norm", new LayerNorm(1e-6),
            n => [X("x", n, 7), X("w", 7), X("b", 7)],
            () => [X("x", 1024, 1152), X("w", 1152), X("b", 1152)])
        {
            Reference = "layer_norm",
            Problem = c => Keys(
                c, new LayerNorm(Number(c, "eps")), ["x", "w", "b"], saved: ["mean", "rstd"]),
        },
        new("layer_norm_few_rows", new LayerNorm(1e-6),
            n => [X("x", 3, n), X("w", n), X("b", n)],
            () => [X("x", 64, Width), X("w", Width), X("b", Width)])
        {
            Sizes = s_longRows,
        },
        new("gelu_tanh", new Gelu(GeluKind.Tanh), n => [X("x", n)], () => [X("x", 1024, 4304)])
        {
            Reference = "gelu_tanh",
            Problem = c => Keys(c, new Gelu(GeluKind.Tanh), ["x"]),
            FreeColumns = ["x"],
        },
        new("gelu_erf", new Gelu(GeluKind.Erf), n => [X("x", n)], () => [X("x", 1024, 4304)])
        {
            Reference = "gelu_erf",
            Problem = c => Keys(c, new Gelu(GeluKind.Erf), ["x"]),
            FreeColumns = ["x"],
        },
        new("swiglu", new SwiGlu(),
            n => [X("gate", 2, n), X("up", 2, n)],
            () => [X("gate", Rows, Inner), X("up", Rows, Inner)])
        {
            Reference = "swiglu",
            Problem = c => Keys(c, new SwiGlu(), ["gate", "up"]),
        },
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
        new("columns_whole", new Columns(16, 8), n => [X("x", n, 40)],
            () => [X("x", 1024, 3 * 1152)])
        {
            ProductionOp = new Columns(0, 1152),
            FreeColumns = ["x"],
        },
        new("rope", new Rope(6),
            n => [X("x", n, 12), Value.Int("positions", Fill.Below(5, n, 9)), X("cos", 9, 3),
                X("sin", 9, 3)],
            () => [X("x", Rows, 28 * 128), Value.Int("positions", Fill.Below(5, Rows, Rows)),
                X("cos", Rows, 64), X("sin", Rows, 64)])
        {
            ProductionOp = new Rope(128),
            Reference = "rope",
            Problem = FromRope,
        },
        new("rope_keys", new Rope(16),
            n => [X("x", n, 32), Value.Int("positions", Fill.Below(5, n, 9)), X("cos", 9, 8),
                X("sin", 9, 8)],
            () => [X("x", Rows, 4 * 128), Value.Int("positions", Fill.Below(5, Rows, Rows)),
                X("cos", Rows, 64), X("sin", Rows, 64)])
        {
            ProductionOp = new Rope(128),
        },
        new("embedding", new Embedding(3),
            n => [X("table", 40, 5), Value.Int("ids", Fill.Below(2, n, 40))],
            () => [X("table", 32000, Width), Value.Int("ids", Fill.Below(2, Rows, 32000))])
        {
            Reference = "embedding",
            Problem = c => Keys(c, new Embedding(Number(c, "scale")), ["table", "ids"]),
            FreeColumns = ["table", "ids"],
        },
        new("position_gather", new PositionGather(),
            n => [X("x", n, 5), X("table", 40, 5), Value.Int("ids", Fill.Below(2, n, 40))],
            () => [X("x", 1024, 1152), X("table", 4900, 1152),
                Value.Int("ids", Fill.Below(2, 1024, 4900))])
        {
            Reference = "position_gather",
            Problem = c => Keys(c, new PositionGather(), ["x", "table", "ids"]),
        },
        new("weighted_gather", new WeightedGather(),
            n => Terms(n, 5, 40, 4), () => Terms(1024, 1152, 729, 33))
        {
            Sizes = [0, 1, 7, 300],
        },
        new("weighted_gather_whole", new WeightedGather(),
            n => Terms(n, 24, 9, 3), () => Terms(1024, 1152, 729, 33))
        {
            Sizes = [0, 1, 7, 65],
        },
        new("cache_append", new CacheAppend(),
            n => Cache(2 * n, n, 5), () => Cache(4096, Rows, 4 * 128)),
        new("splice", new Splice(),
            n => [X("x", n + 3, 5), X("features", n + 1, 5),
                Value.Int("positions", Fill.Distinct(2, n, n + 3))],
            () => [X("x", 1024, Width), X("features", 640, Width),
                Value.Int("positions", Fill.Distinct(2, 640, 1024))])
        {
            Reference = "splice",
            Problem = c => Keys(c, new Splice(), ["x", "features", "positions"]),
            FreeColumns = ["positions"],
        },
        new("linear", new Linear(),
            n => [X("x", 5, n), X("w", 9, n), X("b", 9)],
            () => [X("x", Rows, Width), X("w", Width, Width), X("b", Width)])
        {
            Reference = "linear",
            Problem = c => Keys(c, new Linear(), ["x", "w", "b"]),
        },
        new("linear_transposed", new Linear(Transposed: true),
            n => [X("x", n, 6), X("w", 6, 9)],
            () => [X("x", Rows, Width), X("w", Width, Width)])
        {
            Reference = "linear",
            Problem = FromLinearTransposed,
            FreeColumns = ["w"],
        },
        new("patch_embed", new Linear(),
            n => [X("x", n, 12), X("w", 7, 12), X("b", 7)],
            () => [X("x", 1024, 588), X("w", 1152, 588), X("b", 1152)])
        {
            Reference = "patch_embed",
            Problem = FromPatchEmbed,
        },
        new("lora_linear", new LoraLinear(3, 2, 0),
            n => [X("x", n, 10), X("w", 9, 10), X("b", 9), X("a", 4, 10), X("bb", 9, 4)],
            Lora)
        {
            Reference = "lora_linear",
            Problem = c => Number(c, "dropout") > 0
                ? null
                : Keys(c, new LoraLinear(0, Number(c, "scale"), 0), ["x", "w", "b", "a", "bb"]),
        },
        new("lora_linear_dropout", new LoraLinear(3, 2, 0.3),
            n => [X("x", 3, n), X("w", 9, n), Value.Absent("b"), X("a", 4, n), X("bb", 9, 4)],
            Lora)
        {
            ProductionOp = new LoraLinear(3, 2, 0.05),
            Dropout = true,
        },
        new("attention", new Attention(4, 2, 8, Causal: true, 0.3),
            n => Heads(n, 32, 16, [n / 3, n - (n / 3)]),
            () => Heads(Rows, 28 * 128, 4 * 128, [Rows]))
        {
            ProductionOp = new Attention(28, 4, 128, Causal: true, 1 / Math.Sqrt(128)),
            Reference = "attention",
            Problem = FromAttention,
        },
        new("attention_cached", new Attention(3, 1, 8, Causal: true, 0.3, Cached: true),
            n => Cached(24, 8, [n / 3, 1, n - (n / 3)], [2, n, 0], room: 5),
            () => Cached(28 * 128, 4 * 128, [1], [2047], room: 2048))
        {
            ProductionOp =
                new Attention(28, 4, 128, Causal: true, 1 / Math.Sqrt(128), Cached: true),
            Sizes = [0, 1, 7, 300],
        },
        new("cross_entropy", new CrossEntropy(),
            n => Head(n, 5, n / 2, Math.Min(n + 2, 300)),
            () => Head(Rows, 1024, Rows, 32000))
        {
            Reference = "cross_entropy",
            Problem = FromCrossEntropy,
            FreeColumns = ["rows", "targets"],
        },
    ];

    private static Value X(string name, params int[] shape) => Value.Float(
        name, shape, Fill.Normal(name.Sum(c => c) + shape.Length, new Shape(shape).Count));

    private static Value[] Lora() =>
    [
        X("x", Rows, Width), X("w", Width, Width), Value.Absent("b"), X("a", 16, Width),
        X("bb", Width, 16),
    ];

    private static Value[] Heads(int tokens, int queryCols, int keyCols, int[] lengths)
    {
        int[] starts = Starts(lengths);
        return
        [
            X("q", tokens, queryCols), X("k", tokens, keyCols), X("v", tokens, keyCols),
            Value.Int("cu_seqlens_q", starts), Value.Int("cu_seqlens_k", starts),
            Value.Absent("key_lengths"),
        ];
    }

    // Queries behind keys that are there before, in a cache with room for more.
    private static Value[] Cached(
        int queryCols, int keyCols, int[] queries, int[] before, int room)
    {
        int[] lengths = [.. queries.Zip(before, (q, b) => q + b)];
        int[] starts = Starts(queries), keyStarts = Starts([.. lengths.Select(k => k + room)]);
        return
        [
            X("q", starts[^1], queryCols), X("k", keyStarts[^1], keyCols),
            X("v", keyStarts[^1], keyCols), Value.Int("cu_seqlens_q", starts),
            Value.Int("cu_seqlens_k", keyStarts), Value.Int("key_lengths", lengths),
        ];
    }

    private static Value[] Cache(int room, int tokens, int cols) =>
    [
        X("cache", room, cols), X("x", tokens, cols),
        Value.Int("slots", Fill.Distinct(3, tokens, room, rising: true)),
    ];

    // Rows of 0 to most terms.
    private static Value[] Terms(int rows, int cols, int positions, int most)
    {
        int[] starts = Starts(Fill.Below(8, rows, most + 1));
        return
        [
            X("x", rows, cols), X("table", positions, cols), Value.Int("starts", starts),
            Value.Int("ids", Fill.Below(9, starts[^1], positions)), X("weights", starts[^1]),
        ];
    }

    private static int[] Starts(int[] lengths) =>
        [0, .. lengths.Select((_, i) => lengths[..(i + 1)].Sum())];

    private static Value[] Head(int tokens, int cols, int labels, int vocabulary) =>
    [
        X("h", tokens, cols), X("w", vocabulary, cols),
        Value.Int("rows", Fill.Distinct(3, labels, tokens, rising: true)),
        Value.Int("targets", Fill.Below(4, labels, vocabulary)),
    ];

    private static double Number(ReferenceCase c, string name) =>
        c.Params.GetProperty(name).GetDouble();

    /// <summary>
    /// The usual mapping: y and dy, the gradient of x is dx, absent tensors are absent inputs.
    /// </summary>
    private static Problem Keys(ReferenceCase c, Op op, string[] inputs, string[]? saved = null)
    {
        var expected = new List<Expected> { Expect(c, Slot.Output, 0, "y") };
        string[] statistics = saved ?? [];
        for (int i = 0; i < statistics.Length; i++)
            expected.Add(Expect(c, Slot.Saved, i, statistics[i]));
        for (int i = 0; i < inputs.Length; i++)
            if (c.Has("d" + inputs[i])) expected.Add(Expect(c, Slot.Gradient, i, "d" + inputs[i]));
        Value[] values = Array.ConvertAll(inputs, key => !c.Has(key) ? Value.Absent(key)
            : c.Type(key) == "I32" ? Value.Int(key, c.Ints(key))
            : Value.Float(key, c.Shape(key), c.Doubles(key)));
        return new(op, values, c.Doubles("dy"), [.. expected]);
    }

    private static Expected Expect(
        ReferenceCase c, Slot slot, int index, string key, double factor = 1,
        double relative = 0) =>
        new(slot, index, key, Array.ConvertAll(c.Doubles(key), v => v * factor),
            c.F32Error(key) * factor, c.Small, relative);

    private static Problem FromLinearTransposed(ReferenceCase c)
    {
        Problem problem = Keys(c, new Linear(Transposed: true), ["x", "w", "b"]);
        Value w = problem.Inputs[1];
        problem.Inputs[1] = Value.Float(
            "w", [w.Shape[1], w.Shape[0]], Transpose(w.Data, w.Shape[0], w.Shape[1]));
        return problem with
        {
            Expected = Array.ConvertAll(problem.Expected, e => e.Name != "dw" ? e
                : e with { Values = Transpose(e.Values, w.Shape[0], w.Shape[1]) }),
        };
    }

    private static double[] Transpose(double[] data, int rows, int cols)
    {
        var turned = new double[data.Length];
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < cols; c++) turned[(c * rows) + r] = data[(r * cols) + c];
        return turned;
    }

    // strip[(batch,) 3, 14, 14 n] -> patches[batch * n, 3 * 14 * 14].
    private static Problem FromPatchEmbed(ReferenceCase c)
    {
        const int Side = 14, Pixels = 3 * Side * Side;
        int[] shape = c.Shape("strip");
        int width = shape[^1], perPicture = width / Side, batch = shape.Length == 4 ? shape[0] : 1;
        double[] strip = c.Doubles("strip");
        var patches = new double[strip.Length];
        for (int i = 0; i < strip.Length; i++)
        {
            int x = i % width, line = i / width, picture = line / (3 * Side);
            int patch = (picture * perPicture) + (x / Side);
            patches[(patch * Pixels) + (line % (3 * Side) * Side) + (x % Side)] = strip[i];
        }

        int outputs = c.Shape("w")[0];
        Value[] inputs =
        [
            Value.Float("x", [batch * perPicture, Pixels], patches),
            Value.Float("w", [outputs, Pixels], c.Doubles("w")),
            Value.Float("b", [outputs], c.Doubles("b")),
        ];
        return new(new Linear(), inputs, c.Doubles("dy"),
        [
            Expect(c, Slot.Output, 0, "y"), Expect(c, Slot.Gradient, 1, "dw"),
            Expect(c, Slot.Gradient, 2, "db"),
        ]);
    }

    // The file's tables hold one row per token.
    private static Problem FromRope(ReferenceCase c)
    {
        int[] shape = c.Shape("x");
        Value[] inputs =
        [
            Value.Float("x", [shape[0], shape[1] * shape[2]], c.Doubles("x")),
            Value.Int("positions", [.. Enumerable.Range(0, shape[0])]),
            Value.Float("cos", c.Shape("cos"), c.Doubles("cos")),
            Value.Float("sin", c.Shape("sin"), c.Doubles("sin")),
        ];
        return new(new Rope(shape[2]), inputs, c.Doubles("dy"),
            [Expect(c, Slot.Output, 0, "y"), Expect(c, Slot.Gradient, 0, "dx")]);
    }

    private static Problem FromAttention(ReferenceCase c)
    {
        bool padded = c.Has("key_lengths");
        int[] q = c.Shape("q"), k = c.Shape("k");
        Value Rows(string key, int[] shape) => Value.Float(
            key, [padded ? shape[0] * shape[1] : shape[0], shape[^2] * shape[^1]], c.Doubles(key));
        Value Starts(string key, int[] shape) => Value.Int(key, padded
            ? [.. Enumerable.Range(0, shape[0] + 1).Select(b => b * shape[1])]
            : c.Ints(key));
        Value[] inputs =
        [
            Rows("q", q), Rows("k", k), Rows("v", k), Starts("cu_seqlens_q", q),
            Starts("cu_seqlens_k", k),
            padded ? Value.Int("key_lengths", c.Ints("key_lengths")) : Value.Absent("key_lengths"),
        ];
        // The rounding of logits near 1000 is amplified by exp: the reference's own advice.
        double relative = c.Doubles("lse").Max(Math.Abs) > 400 ? 1e-4 : 0;
        return new(
            new Attention(q[^2], k[^2], q[^1], c.Params.GetProperty("causal").GetBoolean(),
                Number(c, "scale")),
            inputs, c.Doubles("do"),
            [
                Expect(c, Slot.Output, 0, "o", 1, relative),
                Expect(c, Slot.Saved, 0, "lse", 1, relative),
                Expect(c, Slot.Gradient, 0, "dq", 1, relative),
                Expect(c, Slot.Gradient, 1, "dk", 1, relative),
                Expect(c, Slot.Gradient, 2, "dv", 1, relative),
            ]);
    }

    // The file's gradients are those of the mean over labelled rows.
    private static Problem FromCrossEntropy(ReferenceCase c)
    {
        int[] all = c.Ints("targets");
        int[] rows = [.. Enumerable.Range(0, all.Length).Where(r => all[r] >= 0)];
        string dh = c.Has("dh") ? "dh" : "dh_sum", dw = c.Has("dw") ? "dw" : "dw_sum";
        double factor = Math.Max(1, rows.Length),
            relative = Number(c, "max_abs_logit") > 400 ? 1e-4 : 0;
        Value[] inputs =
        [
            Value.Float("h", c.Shape("h"), c.Doubles("h")),
            Value.Float("w", c.Shape("w"), c.Doubles("w")),
            Value.Int("rows", rows), Value.Int("targets", [.. rows.Select(r => all[r])]),
        ];
        return new(new CrossEntropy(), inputs, [1],
        [
            Expect(c, Slot.Output, 0, "loss_sum", 1, relative),
            Expect(c, Slot.Gradient, 0, dh, factor, relative),
            Expect(c, Slot.Gradient, 1, dw, factor, relative),
        ]);
    }
}
