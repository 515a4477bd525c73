using MiniCpmNative.Autograd;
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
    private readonly int _index;

    public DecoderLayer(DecoderSpec spec, ModuleScope scope, int index)
    {
        (_spec, _index) = (spec, index);
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
        Tensor a = _inputNorm.Run(graph, x);
        Tensor q = Turned(graph, _query.Run(graph, a), _queryNorm, context);
        Tensor k = Turned(graph, _key.Run(graph, a), _keyNorm, context);
        Tensor v = _value.Run(graph, a);
        a = Attend(graph, q, k, v, context);
        x = graph.Run(_add, x, _output.Run(graph, a));
        a = _postNorm.Run(graph, x);
        a = graph.Run(s_swiGlu, _gate.Run(graph, a), _up.Run(graph, a));
        return graph.Run(_add, x, _down.Run(graph, a));
    }

    private Tensor Attend(Graph graph, Tensor q, Tensor k, Tensor v, DecoderContext context)
    {
        if (context.Cache is not { } cache)
            return graph.Run(_attention, q, k, v, context.Starts, context.Starts, Tensor.None,
                context.Tiles.OfQueries, context.Tiles.OfKeys);
        (k, v) = cache.Append(graph, _index, k, v);
        return graph.Run(
            _cachedAttention, q, k, v, context.Starts, cache.KeyStarts, cache.KeyLengths);
    }

    // Queries or keys [tokens, heads * headDim], normalised per head where the model does, turned
    // by their positions.
    private Tensor Turned(Graph graph, Tensor x, Norm? norm, DecoderContext context)
    {
        if (norm is not null)
        {
            int cols = x.Shape.Cols, tokens = (int)x.Shape.Rows;
            x = norm.Run(graph, x.Reshape(tokens * (cols / _spec.HeadDim), _spec.HeadDim))
                .Reshape(tokens, cols);
        }

        return graph.Run(_rope, x, context.Positions, context.RopeCos, context.RopeSin);
    }
}
