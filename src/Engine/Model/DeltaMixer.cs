using MiniCpmNative.Autograd;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// Qwen3.5's linear attention: queries, keys and values pass a causal convolution, a state per head
/// forgets and corrects itself by them (gated delta rule), and what is read from it is normalised
/// and gated per head.
/// </summary>
internal sealed class DeltaMixer : Mixer
{
    public DeltaMixer(DecoderSpec spec, DeltaSpec delta, ModuleScope scope, int index)
    {
        int width = spec.HiddenSize, values = delta.ValueHeads * delta.ValueDim;
        // In state_dict's order: parameters of the module first.
        _ = scope.Vector("dt_bias", delta.ValueHeads);
        _ = scope.Vector("A_log", delta.ValueHeads);
        _ = scope.Table("conv1d.weight", false, delta.Channels, 1, delta.Kernel);
        _ = scope.RmsNorm("norm", delta.ValueDim, new(spec.RmsNormEpsilon, Decays: false));
        scope.Module("act");
        Projection output = scope.Linear("out_proj", values, width, bias: false);
        Projection qkv = scope.Linear("in_proj_qkv", width, delta.Channels, bias: false);
        Projection z = scope.Linear("in_proj_z", width, values, bias: false);
        Projection b = scope.Linear("in_proj_b", width, delta.ValueHeads, bias: false);
        Projection a = scope.Linear("in_proj_a", width, delta.ValueHeads, bias: false);
        Projections = [output, qkv, z, b, a];
        Trainable = Array.Exists(Projections, p => p.Trainable);
    }

    public override bool ReadsInput => true;

    public override Tensor Run(Graph graph, Tensor a, DecoderContext context) =>
        throw new InputException("the gated delta rule is not there yet");
}
