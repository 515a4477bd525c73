using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// One layer: x += mixer(norm(x)), attention mostly; x += SwiGLU(norm(x)).
/// </summary>
internal sealed class DecoderLayer : Layer<DecoderContext>
{
    private static readonly SwiGlu s_swiGlu = new();

    private readonly Mixer _mixer;
    private readonly Norm _inputNorm, _postNorm;
    private readonly Projections _gateAndUp;
    private readonly Projection _down;
    private readonly Add _add;
    private readonly Recomputation _recomputation;
    private readonly int _index;

    public DecoderLayer(
        DecoderSpec spec, ModuleScope scope, int index, Recomputation recomputation)
        : base(scope)
    {
        (_index, _recomputation) = (index, recomputation);
        int width = spec.HiddenSize;
        ModuleScope mlp = scope.In("mlp");
        _mixer = spec.Delta is { } delta && delta.Layers[index]
            ? new DeltaMixer(spec, delta, scope.In("linear_attn"), index)
            : new AttentionMixer(spec, scope.In("self_attn"), index);
        Projection gate = mlp.Linear("gate_proj", width, spec.IntermediateSize, bias: false);
        Projection up = mlp.Linear("up_proj", width, spec.IntermediateSize, bias: false);
        _gateAndUp = new Projections([gate, up], [spec.IntermediateSize, spec.IntermediateSize]);
        _down = mlp.Linear("down_proj", spec.IntermediateSize, width, bias: false);
        mlp.Module("act_fn");
        _inputNorm = scope.RmsNorm("input_layernorm", width, spec.Norm);
        _postNorm = scope.RmsNorm("post_attention_layernorm", width, spec.Norm);
        _add = new Add(spec.ResidualScale);
        Holds([.. _mixer.Projections, gate, up, _down], _mixer.Trainable, _inputNorm, _postNorm);
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
        Span<Tensor> y = [Tensor.None, Tensor.None];
        a = _postNorm.Run(graph, x, norms || !_gateAndUp.ReadsInput);
        _gateAndUp.Run(graph, a, y, fleeting: kind >= Recompute.Mlp);
        graph.Drop(a);
        a = graph.RunFleeting(s_swiGlu, y[0], y[1]);
        graph.Drop(y[0]);
        Tensor down = _down.RunFleeting(graph, a);
        graph.Drop(a);
        x = graph.RunLast(_add, x, down);
        graph.Drop(down);
        return x;
    }
}
