using MiniCpmNative.Engine.Model;

namespace MiniCpmNative.Engine.Export;

/// <summary>
/// Qwen3.5's layers of gated delta rule as llama.cpp reads them ("qwen35"). It takes decays as
/// -exp(A_log), and the heads of values in another order: the model has those of a head of keys
/// side by side, llama.cpp the first of each, then the second of each.
/// </summary>
internal static class GgufDelta
{
    /// <summary>Why it cannot read a decoder; null where it can.</summary>
    public static string? WhyNot(DecoderSpec decoder) =>
        decoder.Experts is not null ? "experts are not written"
        : decoder.Delta is not { } delta ? !decoder.OutputGate ? null
            : "llama.cpp reads this decoder with layers of gated delta rule alone (layer_types)"
        : delta.KeyDim != delta.ValueDim
            ? "llama.cpp reads heads of as many columns for keys as for values "
                + $"(linear_key_head_dim {delta.KeyDim}, linear_value_head_dim {delta.ValueDim})"
        : Interval(delta) is null
            ? "llama.cpp reads layers of attention at regular distances (layer_types)" : null;

    public static void AddKeys(GgufFile file, string arch, ModelSpec spec, DeltaSpec delta)
    {
        file.Add($"{arch}.ssm.conv_kernel", (uint)delta.Kernel);
        file.Add($"{arch}.ssm.state_size", (uint)delta.KeyDim);
        file.Add($"{arch}.ssm.group_count", (uint)delta.KeyHeads);
        file.Add($"{arch}.ssm.time_step_rank", (uint)delta.ValueHeads);
        file.Add($"{arch}.ssm.inner_size", (uint)(delta.ValueHeads * delta.ValueDim));
        file.Add($"{arch}.full_attention_interval", (uint)Interval(delta)!.Value);
        // Of positions in three rows, which are one and the same here.
        file.Add($"{arch}.rope.dimension_sections",
            (int[])[.. NativeConfig.RopeSections(ModelConfig.Open(spec.Directory)), 0]);
    }

    public static void AddLayer(
        GgufTensors tensors, DeltaSpec delta, string to, string from, GgufType type)
    {
        int keys = 2 * delta.KeyHeads * delta.KeyDim;
        int[] heads = Heads(delta, 1), values = Heads(delta, delta.ValueDim);
        int[] channels = [.. Enumerable.Range(0, keys), .. values.Select(row => keys + row)];
        tensors.Add(to + "attn_qkv.weight", from + "in_proj_qkv.weight", type, new(channels));
        tensors.Add(to + "attn_gate.weight", from + "in_proj_z.weight", type, new(values));
        tensors.Add(to + "ssm_beta.weight", from + "in_proj_b.weight", type, new(heads));
        tensors.Add(to + "ssm_alpha.weight", from + "in_proj_a.weight", type, new(heads));
        tensors.Add(to + "ssm_conv1d.weight", from + "conv1d.weight", GgufType.F32, new(channels));
        tensors.Add(to + "ssm_dt.bias", from + "dt_bias", type, new(heads));
        tensors.Add(to + "ssm_a", from + "A_log", type,
            new(heads, Value: value => -MathF.Exp(value)));
        tensors.Add(to + "ssm_norm.weight", from + "norm.weight", type);
        tensors.Add(to + "ssm_out.weight", from + "out_proj.weight", type, new(Columns: values));
    }

    // Every so many layers one is attention, the last of them.
    private static int? Interval(DeltaSpec delta)
    {
        int first = delta.Layers.IndexOf(false), every = first < 0 ? delta.Layers.Length + 1
            : first + 1;
        return delta.Layers.Select((linear, i) => linear == ((i + 1) % every != 0))
            .All(fits => fits)
            ? every : null;
    }

    // The rows of all heads of values, each of so many, in llama.cpp's order.
    private static int[] Heads(DeltaSpec delta, int rows)
    {
        int each = delta.ValueHeads / delta.KeyHeads;
        return [.. Enumerable.Range(0, delta.ValueHeads * rows).Select(row =>
        {
            int head = row / rows;
            return (((head % delta.KeyHeads * each) + (head / delta.KeyHeads)) * rows)
                + (row % rows);
        })];
    }
}
