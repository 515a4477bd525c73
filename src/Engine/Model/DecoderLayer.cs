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
    private readonly Projections _heads, _gateAndUp;
    private readonly Projection _output, _down;
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
        int queries = spec.Heads * spec.HeadDim;
        attention.Together(width, ("q_proj", queries), ("k_proj", keys), ("v_proj", keys));
        Projection query = attention.Linear("q_proj", width, queries, spec.QkvBias);
        Projection key = attention.Linear("k_proj", width, keys, spec.QkvBias);
        Projection value = attention.Linear("v_proj", width, keys, spec.QkvBias);
        _heads = new Projections([query, key, value], [queries, keys, keys], spec.HeadDim,
            rotated: spec.QkNorm ? 0 : 2);
        _output = attention.Linear("o_proj", queries, width, bias: false);
        if (spec.QkNorm)
        {
            _queryNorm = attention.RmsNorm("q_norm", spec.HeadDim, spec.RmsNormEpsilon);
            _keyNorm = attention.RmsNorm("k_norm", spec.HeadDim, spec.RmsNormEpsilon);
        }

        Projection gate = mlp.Linear("gate_proj", width, spec.IntermediateSize, bias: false);
        Projection up = mlp.Linear("up_proj", width, spec.IntermediateSize, bias: false);
        _gateAndUp = new Projections([gate, up], [spec.IntermediateSize, spec.IntermediateSize]);
        _down = mlp.Linear("down_proj", spec.IntermediateSize, width, bias: false);
        mlp.Module("act_fn");
        _inputNorm = scope.RmsNorm("input_layernorm", width, spec.RmsNormEpsilon);
        _postNorm = scope.RmsNorm("post_attention_layernorm", width, spec.RmsNormEpsilon);
        _add = new Add(spec.ResidualScale);
        _rope = new Rope(spec.HeadDim);
        _attention = new Attention(
            spec.Heads, spec.KvHeads, spec.HeadDim, Causal: true, 1 / Math.Sqrt(spec.HeadDim));
        _cachedAttention = _attention with { Cached = true };
        Holds([query, key, value, _output, gate, up, _down],
            _inputNorm, _postNorm, _queryNorm, _keyNorm);
    }

    public override Tensor Forward(Graph graph, Tensor x, DecoderContext context)
    {
        Span<Tensor> y = [Tensor.None, Tensor.None, Tensor.None];
        Recompute kind = _recomputation.Decoder(_index);
        // A block that is made again as a whole keeps all of it.
        if (kind == Recompute.Block) kind = Recompute.Nothing;
        bool norms = kind >= Recompute.Norms;
        // What no backward reads is dropped whatever is recomputed: frozen projections do not read
        // their inputs, rotations none.
        Tensor a = _inputNorm.Run(graph, x, norms || !_heads.ReadsInput);
        _heads.Run(graph, a, context.Positions, context.RopeCos, context.RopeSin, y);
        graph.Drop(a);
        Tensor q = Turned(graph, y[0], _queryNorm, context);
        Tensor k = Turned(graph, y[1], _keyNorm, context);
        a = _output.RunFleeting(graph, Attend(graph, q, k, y[2], context));
        x = graph.Run(_add, x, a);
        graph.Drop(a);
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

    private Tensor Attend(Graph graph, Tensor q, Tensor k, Tensor v, DecoderContext context)
    {
        if (context.Cache is not { } cache)
            return graph.Run(_attention, q, k, v, context.Starts, context.Starts, Tensor.None,
                context.Tiles.OfQueries, context.Tiles.OfKeys);
        (k, v) = cache.Append(graph, _index, k, v);
        return graph.Run(
            _cachedAttention, q, k, v, context.Starts, cache.KeyStarts, cache.KeyLengths);
    }

    // Queries or keys [tokens, heads * headDim] of a model that normalises them per head: only then
    // are they turned by their positions; others are already.
    private Tensor Turned(Graph graph, Tensor x, Norm? norm, DecoderContext context)
    {
        if (norm is null) return x;
        int cols = x.Shape.Cols, tokens = (int)x.Shape.Rows;
        x = norm.Run(graph, x.Reshape(tokens * (cols / _spec.HeadDim), _spec.HeadDim),
            fleeting: true).Reshape(tokens, cols);
        Tensor y = graph.Run(_rope, x, context.Positions, context.RopeCos, context.RopeSin);
        graph.Drop(x);
        return y;
    }
}
