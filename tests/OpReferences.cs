using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Tests;

/// <summary>
/// Which result an expectation is about: the output, a saved tensor, an input's gradient.
/// </summary>
internal enum Slot
{
    Output,
    Saved,
    Gradient,
}

internal sealed record Expected(
    Slot Slot, int Index, string Name, double[] Values, double F32Error, bool Rounded,
    double Relative = 0);

/// <summary>
/// An operation, its inputs, the gradient of its output, and results that PyTorch computed.
/// </summary>
internal sealed record Problem(
    Op Op, Value[] Inputs, double[] OutputGradient, Expected[] Expected);

/// <summary>
/// The files of results that PyTorch computed, by the name of the operation's case, and how a case
/// of a file becomes a problem; null skips one that another test covers.
/// </summary>
internal static class OpReferences
{
    private static readonly Dictionary<string, (string File, Func<ReferenceCase, Problem?> Of)>
        s_files = new()
        {
            ["rms_norm"] = ("rms_norm",
                c => Keys(c, new RmsNorm(Number(c, "eps")), ["x", "w"], saved: ["rstd"])),
            ["layer_norm"] = ("layer_norm",
                c => Keys(c, new LayerNorm(Number(c, "eps")), ["x", "w", "b"],
                    saved: ["mean", "rstd"])),
            ["gelu_tanh"] = ("gelu_tanh", c => Keys(c, new Gelu(GeluKind.Tanh), ["x"])),
            ["gelu_erf"] = ("gelu_erf", c => Keys(c, new Gelu(GeluKind.Erf), ["x"])),
            ["swiglu"] = ("swiglu", c => Keys(c, new SwiGlu(), ["gate", "up"])),
            ["rope"] = ("rope", FromRope),
            ["embedding"] = ("embedding",
                c => Keys(c, new Embedding(Number(c, "scale")), ["table", "ids"])),
            ["position_gather"] = ("position_gather",
                c => Keys(c, new PositionGather(), ["x", "table", "ids"])),
            ["splice"] = ("splice", c => Keys(c, new Splice(), ["x", "features", "positions"])),
            ["linear"] = ("linear", c => Keys(c, new Linear(), ["x", "w", "b"])),
            ["linear_transposed"] = ("linear", FromLinearTransposed),
            ["patch_embed"] = ("patch_embed", FromPatchEmbed),
            ["lora_linear"] = ("lora_linear", c => Number(c, "dropout") > 0
                ? null
                : Keys(c, new LoraLinear(0, Number(c, "scale"), 0), ["x", "w", "b", "a", "bb"])),
            ["attention"] = ("attention", FromAttention),
            ["cross_entropy"] = ("cross_entropy", FromCrossEntropy),
        };

    public static bool Has(OpCase c) => s_files.ContainsKey(c.Name);

    /// <summary>Every problem of the case's file, with the name of the file's case.</summary>
    public static IEnumerable<(string Name, Problem Problem)> Of(OpCase c)
    {
        var (file, of) = s_files[c.Name];
        foreach (ReferenceCase each in ReferenceFile.Open("ops/" + file).Cases)
            if (of(each) is { } problem) yield return ($"{c.Name} {each}", problem);
    }

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
