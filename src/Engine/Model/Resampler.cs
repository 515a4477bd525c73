using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// One layer of cross-attention that turns the patches of each picture into a fixed number of
/// features of the decoder's width (Qwen-VL's resampler, as in MiniCPM-V 2.5 and later): kv =
/// LN(kv_proj(x)), keys get the 2-D sine-cosine position and values do not, the learned queries get
/// none; y = LN(out_proj(attention)) proj, with proj multiplied from the right.
/// </summary>
public sealed class Resampler
{
    private readonly Linear _project = new(Transposed: true);
    private readonly PositionGather _gather = new();
    private readonly Embedding _repeat = new();
    private readonly Attention _attention;
    private readonly Projection _keysAndValues, _query, _key, _value, _output;
    private readonly Norm _queryNorm, _keyNorm, _postNorm;
    private readonly Tensor _queries, _projection;
    private readonly int _width, _queryCount;

    public Resampler(ResamplerSpec spec, ModelWeights weights)
    {
        (_width, _queryCount) = (spec.HiddenSize, spec.Queries);
        _attention = new Attention(
            spec.Heads, spec.Heads, spec.HeadDim, Causal: false, 1 / Math.Sqrt(spec.HeadDim));
        _queries = weights.Table("resampler.query");
        _projection = weights.Matrix("resampler.proj");
        _keysAndValues = weights.Projection("resampler.kv_proj");
        _query = weights.Projection("resampler.attn.in_proj", 0, _width);
        _key = weights.Projection("resampler.attn.in_proj", _width, _width);
        _value = weights.Projection("resampler.attn.in_proj", 2 * _width, _width);
        _output = weights.Projection("resampler.attn.out_proj");
        _queryNorm = weights.LayerNorm("resampler.ln_q", spec.LayerNormEpsilon);
        _keyNorm = weights.LayerNorm("resampler.ln_kv", spec.LayerNormEpsilon);
        _postNorm = weights.LayerNorm("resampler.ln_post", spec.LayerNormEpsilon);
    }

    /// <summary>features[patches, vision width] -> [pictures * queries, decoder width].</summary>
    public Tensor Forward(Graph graph, Tensor features, BatchTensors batch, ITensorProbe? probe)
    {
        Tensor values = _keyNorm.Run(graph, _keysAndValues.Run(graph, features));
        // The position of a patch is its column's sines and cosines, then its row's: two rows of
        // half the width from one table.
        int patches = values.Shape[0];
        Tensor keys = graph.Run(
            _gather, values.Reshape(2 * patches, _width / 2), batch.Coordinates,
            batch.CoordinateIds);
        Tensor k = _key.Run(graph, keys.Reshape(patches, _width));
        Tensor v = _value.Run(graph, values);
        // The queries are the same for all pictures: computed once, then repeated.
        // Looking them up first brings them from their storage type to that of activations.
        Tensor q = graph.Run(_repeat, _queries, batch.QueryIds.Slice(0, _queryCount));
        q = _query.Run(graph, _queryNorm.Run(graph, q));
        q = graph.Run(_repeat, q, batch.QueryIds);
        Tensor y = graph.Run(_attention, q, k, v, batch.QueryStarts, batch.PictureStarts);
        y = _postNorm.Run(graph, _output.Run(graph, y));
        y = graph.Run(_project, y, _projection);
        probe?.Visit("resampler", y);
        return y;
    }
}
