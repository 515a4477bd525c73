using MiniCpmNative.Autograd;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// Qwen3.5's linear attention: queries, keys and values pass a causal convolution, a state per head
/// forgets and corrects itself by them (<see cref="DeltaRule"/>), and what is read from it is
/// normalised and gated per head.
/// </summary>
internal sealed class DeltaMixer : Mixer
{
    private static readonly CausalConv s_conv = new();
    private static readonly Embedding s_order = new();

    private readonly DeltaSpec _delta;
    private readonly Projections _inputs, _gates;
    private readonly Projection _output;
    private readonly Norm _norm;
    private readonly DeltaRule _rule;
    private readonly Tensor _timeBias, _decay, _filter;
    private readonly int _index;

    public DeltaMixer(DecoderSpec spec, DeltaSpec delta, ModuleScope scope, int index)
    {
        (_delta, _index) = (delta, index);
        int width = spec.HiddenSize, heads = delta.ValueHeads, values = heads * delta.ValueDim;
        // In state_dict's order: parameters of the module itself first.
        _timeBias = scope.Vector("dt_bias", heads);
        _decay = scope.Vector("A_log", heads);
        _filter = scope.Rows("conv1d.weight", delta.Channels, 1, delta.Kernel);
        _norm = scope.GatedRmsNorm(
            "norm", delta.ValueDim, new(spec.RmsNormEpsilon, Decays: false));
        scope.Module("act");
        _output = scope.Linear("out_proj", values, width, bias: false);
        scope.Together(width, ("in_proj_qkv", delta.Channels), ("in_proj_z", values));
        Projection qkv = scope.Linear("in_proj_qkv", width, delta.Channels, bias: false);
        Projection z = scope.Linear("in_proj_z", width, values, bias: false);
        Projection b = scope.Linear("in_proj_b", width, heads, bias: false);
        Projection a = scope.Linear("in_proj_a", width, heads, bias: false);
        _inputs = new Projections([qkv, z], [delta.Channels, values]);
        _gates = new Projections([b, a], [heads, heads]);
        if (!_gates.AreOne)
            throw new InputException(
                "the adapters of in_proj_b and in_proj_a have to be of one rank and scale, without "
                + "magnitudes: set rank_pattern and alpha_pattern alike for both, or leave them "
                + "out of lora_target_modules with use_dora");
        _rule = new DeltaRule(delta.KeyHeads, heads, delta.KeyDim, delta.ValueDim);
        Projections = [_output, qkv, z, b, a];
        Trainable = _norm.Trainable || _timeBias.Variable != 0 || _decay.Variable != 0
            || _filter.Variable != 0;
    }

    public override bool ReadsInput => _inputs.ReadsInput || _gates.ReadsInput;

    public override Tensor Run(Graph graph, Tensor a, DecoderContext context)
    {
        int heads = _delta.ValueHeads, tokens = (int)a.Shape.Rows;
        Span<Tensor> y = [Tensor.None, Tensor.None];
        _inputs.Run(graph, a, y);
        Tensor gates = _gates.RunWhole(graph, a).Reshape(2 * tokens, heads);
        graph.Drop(a);
        gates = graph.Run(s_order, gates, context.Pairs).Reshape(tokens, 2 * heads);
        var (before, state) = context.Cache?.State(_index) ?? (Tensor.None, Tensor.None);
        Tensor x = graph.Run(s_conv, y[0], _filter, context.Starts, before);
        x = graph.Run(_rule, x, gates, _decay, _timeBias, context.Starts, state);
        x = _norm.Run(graph, x.Reshape(tokens * heads, _delta.ValueDim),
            y[1].Reshape(tokens * heads, _delta.ValueDim));
        return _output.RunFleeting(graph, x.Reshape(tokens, heads * _delta.ValueDim));
    }
}
