using MiniCpmNative.Autograd;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// Causal attention with rotary positions and grouped queries. Norms of queries and keys per head
/// (Qwen3) and gates of what it gives (Qwen3.5) are switches of <see cref="DecoderSpec"/>.
/// </summary>
internal sealed class AttentionMixer : Mixer
{
    private readonly Norm? _queryNorm, _keyNorm;
    private readonly Projections _heads;
    private readonly Projection _output;
    private readonly Rope _rope;
    private readonly Columns? _query;
    private readonly SigmoidGate? _gate;
    private readonly Attention _attention, _cachedAttention;
    private readonly DecoderSpec _spec;
    private readonly int _index;

    public AttentionMixer(DecoderSpec spec, ModuleScope attention, int index)
    {
        (_spec, _index) = (spec, index);
        int width = spec.HiddenSize, keys = spec.KvHeads * spec.HeadDim;
        int outputs = spec.Heads * spec.HeadDim;
        // With gates each head's query stands before its gate.
        int queries = spec.OutputGate ? 2 * outputs : outputs;
        attention.Together(width, ("q_proj", queries), ("k_proj", keys), ("v_proj", keys));
        Projection query = attention.Linear("q_proj", width, queries, spec.QkvBias);
        Projection key = attention.Linear("k_proj", width, keys, spec.QkvBias);
        Projection value = attention.Linear("v_proj", width, keys, spec.QkvBias);
        _heads = new Projections([query, key, value], [queries, keys, keys], spec.HeadDim,
            rotated: spec.QkNorm ? 0 : 2);
        _output = attention.Linear("o_proj", outputs, width, bias: false);
        if (spec.QkNorm)
        {
            _queryNorm = attention.RmsNorm("q_norm", spec.HeadDim, spec.Norm);
            _keyNorm = attention.RmsNorm("k_norm", spec.HeadDim, spec.Norm);
        }

        _rope = new Rope(spec.HeadDim, spec.RotatedColumns);
        if (spec.OutputGate)
            (_query, _gate) = (new Columns(0, spec.HeadDim), new SigmoidGate(spec.HeadDim));
        _attention = new Attention(
            spec.Heads, spec.KvHeads, spec.HeadDim, Causal: true, 1 / Math.Sqrt(spec.HeadDim));
        _cachedAttention = _attention with { Cached = true };
        Projections = [query, key, value, _output];
        Trainable = _queryNorm is { Trainable: true } || _keyNorm is { Trainable: true };
    }

    public override bool ReadsInput => _heads.ReadsInput;

    public override Tensor Run(Graph graph, Tensor a, DecoderContext context)
    {
        Span<Tensor> y = [Tensor.None, Tensor.None, Tensor.None];
        _heads.Run(graph, a, context.Positions, context.RopeCos, context.RopeSin, y);
        graph.Drop(a);
        Tensor q = Turned(graph, Query(graph, y[0]), _queryNorm, context);
        Tensor k = Turned(graph, y[1], _keyNorm, context);
        a = Attend(graph, q, k, y[2], context);
        if (_gate is not null) a = graph.Run(_gate, a, y[0]);
        return _output.RunFleeting(graph, a);
    }

    private Tensor Query(Graph graph, Tensor queries)
    {
        if (_query is null) return queries;
        int tokens = (int)queries.Shape.Rows;
        Tensor heads = queries.Reshape(tokens * _spec.Heads, 2 * _spec.HeadDim);
        return graph.Run(_query, heads).Reshape(tokens, _spec.Heads * _spec.HeadDim);
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
