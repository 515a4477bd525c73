using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Tests;

/// <summary>Mistakes in the kernels of linear attention.</summary>
internal static partial class Plants
{
    private static Plant[] LinearAttention { get; } =
    [
        // Norms, gates and rotations.
        new("the weight's centre is left out", "norm_backward_row",
            "g[i] *= other[i] + weight_centre;\n            sum",
            "g[i] *= other[i];\n            sum",
            "rms_norm_zero_centred"),
        new("what is not rotated is left as it was", "rope", "int rest = head - 2 * half",
            "int rest = 0", "rope_part"),
        Gated("the gate's slope is the gate", "gated_norm_backward_row", "s + z[i] * s * (1 - s)",
            "s * z[i]", "gated_rms_norm"),
        Gated("every warp's rows but the first's are left out", "gated_norm_weight_parts",
            "sum += sums[w][lane];", "", "gated_rms_norm"),
        Plant.Fault(Check.Uninitialised, "no barrier before the warps' sums are added",
            "gated_norm_weight_parts", "= sum;\n    __syncthreads();", "= sum;", "gated_rms_norm")
            with { With = [5, 6] },
        Gated("the query for the gate", "sigmoid_gate", "- i % head_dim + head_dim",
            "- i % head_dim", "sigmoid_gate"),
        Gated("gradients of the query half keep what was there", "sigmoid_gate_backward",
            "if (!accumulate) store_run(dqueries, none,", "if (0) store_run(dqueries, none,",
            "sigmoid_gate"),

        // The convolution.
        Gated("the sequence before leaks", "conv_forward_part",
            "window.begin(x + c, state, cols, t, t, s);", "", "causal_conv"),
        Gated("a state reaches no other block", "conv_forward_part",
            "window.begin(x + c, state, cols, first, start, s);",
            "window.begin(x + c, first > 0 ? 0 : state, cols, first, start, s);",
            "causal_conv_step") with { Size = 46 },
        Gated("the next sequence's gradients leak", "conv_backward_part", "start = t;", "",
            "causal_conv"),
        Gated("tokens of the next block count twice for w", "conv_backward_part",
            "if (t < last) sums", "if (t >= 0) sums", "causal_conv_whole") with { Size = 64 },

        // The delta rule: 100 tokens have a sequence of two chunks, 200 one of three.
        Delta("L does not decay", "delta_chunks", "beta[r] * expf(sum[r] - sum[c]) * v : 0",
            "beta[r] * v : 0"),
        Delta("blocks of the inverse beside each other are left out", "invert_lower",
            "sums[j] -= x[r", "sums[j] -= 0 * x[r"),
        Delta("the state does not decay", "delta_states", "v *= decay;", "v *= 1;") with
        {
            Size = 200,
        },
        Delta("what was read is not taken from the value", "delta_states",
            "(value - gates.decay[r] * y)", "(value)"),
        Delta("gradients end at their chunk", "delta_state_gradients", "v *= decay;", "v = 0;")
            with { Size = 200 },
        Delta("columns of L and P are not taken from b", "delta_gradients",
            "- sum_column(column_parts, 4, i);", ";"),
        Delta("a row's own length changes", "delta_unit_gradients",
            "pull = warp_sum(pull) * scale * scale;", "pull = 0;"),
        Plant.Fault(Check.SharedRaceWithinWarp, "no barrier before keys take the queries' place",
            "delta_gradients", "rows, pitch, padded);\n    __syncthreads();\n    load_units",
            "rows, pitch, padded);\n    load_units", "delta_rule")
            with { With = [6], Size = 100 },
    ];

    private static Plant Gated(
        string name, string function, string from, string to, string @case) =>
        new(name, function, from, to, @case) { With = [5, 6], Size = 65 };

    private static Plant Delta(string name, string function, string from, string to) =>
        new(name, function, from, to, "delta_rule")
        {
            With = [6],
            Size = 100,
        };
}
