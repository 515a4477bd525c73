using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// One layer: x += attention(norm(x)); x += SwiGLU(norm(x)).
/// </summary>
internal sealed class DecoderLayer : Layer<DecoderContext>
{
    private static readonly SwiGlu s_swiGlu = new();

    private readonly Norm _inputNorm, _postNorm;
    private readonly Norm? _queryNorm, _keyNorm;
    private readonly Projection _query, _key, _value, _output, _gate, _up, _down;
    private readonly Add _add;
    private readonly Rope _rope;
    private readonly Attention _attention, _cachedAttention;
    private readonly DecoderSpec _spec;
    private readonly Recomputation _recomputation;
    private readonly int _index;

    public DecoderLayer(
        DecoderSpec spec, ModuleScope scope, int index, Recomputation recomputation)
    {
        (_spec, _index, _recomputation) = (spec, index, recomputation);
        int width = spec.HiddenSize, keys = spec.KvHeads * spec.HeadDim;
        ModuleScope attention = scope.In("self_attn"), mlp = scope.In("mlp");
        _query = attention.Linear("q_proj", width, spec.Heads * spec.HeadDim, spec.QkvBias);
        _key = attention.Linear("k_proj", width, keys, spec.QkvBias);
        _value = attention.Linear("v_proj", width, keys, spec.QkvBias);
        _output = attention.Linear("o_proj", spec.Heads * spec.HeadDim, width, bias: false);
        if (spec.QkNorm)
        {
            _queryNorm = attention.RmsNorm("q_norm", spec.HeadDim, spec.RmsNormEpsilon);
            _keyNorm = attention.RmsNorm("k_norm", spec.HeadDim, spec.RmsNormEpsilon);
        }

        _gate = mlp.Linear("gate_proj", width, spec.IntermediateSize, bias: false);
        _up = mlp.Linear("up_proj", width, spec.IntermediateSize, bias: false);
        _down = mlp.Linear("down_proj", spec.IntermediateSize, width, bias: false);
        mlp.Module("act_fn");
        _inputNorm = scope.RmsNorm("input_layernorm", width, spec.RmsNormEpsilon);
        _postNorm = scope.RmsNorm("post_attention_layernorm", width, spec.RmsNormEpsilon);
        _add = new Add(spec.ResidualScale);
        _rope = new Rope(spec.HeadDim);
        _attention = new Attention(
            spec.Heads, spec.KvHeads, spec.HeadDim, Causal: true, 1 / Math.Sqrt(spec.HeadDim));
        _cachedAttention = _attention with { Cached = true };
        Holds([_query, _key, _value, _output, _gate, _up, _down],
            _inputNorm, _postNorm, _queryNorm, _keyNorm);
    }

    public override Tensor Forward(Graph graph, Tensor x, DecoderContext context)
    {
        Recompute kind = _recomputation.Decoder(_index);
        bool norms = kind >= Recompute.Norms, mlp = kind >= Recompute.Mlp;
        // What no backward reads is dropped whatever is recomputed: frozen projections do not read
        // their inputs, rotations and sums none.
        Tensor a = _inputNorm.Run(
            graph, x, norms || !(_query.ReadsInput || _key.ReadsInput || _value.ReadsInput));
        Tensor q = Turned(graph, _query, a, _queryNorm, context);
        Tensor k = Turned(graph, _key, a, _keyNorm, context);
        Tensor v = _value.Run(graph, a);
        graph.Drop(a);
        a = _output.RunFleeting(graph, Attend(graph, q, k, v, context));
        x = graph.Run(_add, x, a);
        graph.Drop(a);
        a = _postNorm.Run(graph, x, norms || !(_gate.ReadsInput || _up.ReadsInput));
        Tensor gate = _gate.Run(graph, a, mlp), up = _up.Run(graph, a, mlp);
        graph.Drop(a);
        Tensor s = kind >= Recompute.Swiglu || !_down.ReadsInput
            ? graph.RunFleeting(s_swiGlu, gate, up) : graph.Run(s_swiGlu, gate, up);
        graph.Drop(gate);
        graph.Drop(up);
        a = _down.RunFleeting(graph, s);
        graph.Drop(s);
        x = graph.RunLast(_add, x, a);
        graph.Drop(a);
        return x;
    }

    private Tensor Attend(Graph graph, Tensor q, Tensor k, Tensor v, DecoderContext context)
    {
        if (context.Cache is not { } cache)
            return graph.Run(_attention, q, k, v, context.Starts, context.Starts);
        (k, v) = cache.Append(graph, _index, k, v);
        return graph.Run(
            _cachedAttention, q, k, v, context.Starts, cache.KeyStarts, cache.KeyLengths);
    }

    // Queries or keys [tokens, heads * headDim], normalised per head where the model does, turned
    // by their positions.
    private Tensor Turned(
        Graph graph, Projection projection, Tensor x, Norm? norm, DecoderContext context)
    {
        x = projection.Run(graph, x, fleeting: norm is null);
        if (norm is not null)
        {
            int cols = x.Shape.Cols, tokens = (int)x.Shape.Rows;
            x = norm.Run(graph, x.Reshape(tokens * (cols / _spec.HeadDim), _spec.HeadDim),
                fleeting: true).Reshape(tokens, cols);
        }

        Tensor y = graph.Run(_rope, x, context.Positions, context.RopeCos, context.RopeSin);
        graph.Drop(x);
        return y;
    }
}
