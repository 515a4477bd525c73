using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// One layer: x += mixer(norm(x)), attention mostly; x += feed-forward(norm(x)).
/// </summary>
internal sealed class DecoderLayer : Layer<DecoderContext>
{
    private readonly Mixer _mixer;
    private readonly Norm _inputNorm, _postNorm;
    private readonly FeedForward _mlp;
    private readonly Add _add;
    private readonly Recomputation _recomputation;
    private readonly int _index;

    public DecoderLayer(
        DecoderSpec spec, ModuleScope scope, int index, Recomputation recomputation)
        : base(scope)
    {
        (_index, _recomputation) = (index, recomputation);
        int width = spec.HiddenSize;
        _mixer = spec.Delta is { } delta && delta.Layers[index]
            ? new DeltaMixer(spec, delta, scope.In("linear_attn"), index)
            : new AttentionMixer(spec, scope.In("self_attn"), index);
        _mlp = FeedForward.Of(spec, scope.In("mlp"));
        _inputNorm = scope.RmsNorm("input_layernorm", width, spec.Norm);
        _postNorm = scope.RmsNorm("post_attention_layernorm", width, spec.Norm);
        _add = new Add(spec.ResidualScale);
        Holds([.. _mixer.Projections, .. _mlp.Projections], _mixer.Trainable || _mlp.Trainable,
            _inputNorm, _postNorm);
    }

    public override Tensor Forward(Graph graph, Tensor x, DecoderContext context)
    {
        Recompute kind = _recomputation.Decoder(_index);
        // A block that is made again as a whole keeps all of it.
        if (kind == Recompute.Block) kind = Recompute.Nothing;
        bool norms = kind >= Recompute.Norms;
        // What no backward reads is dropped whatever is recomputed: frozen projections do not read
        // their inputs, rotations none.
        Tensor a = _inputNorm.Run(graph, x, norms || !_mixer.ReadsInput);
        a = _mixer.Run(graph, a, context);
        x = graph.Run(_add, x, a);
        graph.Drop(a);
        a = _postNorm.Run(graph, x, norms || !_mlp.ReadsInput);
        a = _mlp.Run(graph, a, again: kind >= Recompute.Mlp);
        x = graph.RunLast(_add, x, a);
        graph.Drop(a);
        return x;
    }
}
