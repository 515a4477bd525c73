using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// SigLIP/NaViT vision transformer over packed pictures of any grid: patches[P, channels*p*p] ->
/// features[P, width]. Pre-norm layers, full attention inside each picture, tanh GELU; the position
/// table is read at the buckets of <see cref="PositionBuckets"/>. The official code pads pictures
/// to a batch and masks; packing gives the same numbers without the padding.
/// </summary>
public sealed class VisionTower
{
    private readonly Linear _embed = new();
    private readonly PositionGather _gather = new();
    private readonly Tensor _patchWeight, _patchBias, _positions;
    private readonly Layer[] _layers;
    private readonly Norm _post;
    private readonly bool _checkpoint;

    public VisionTower(VisionSpec spec, ModelWeights weights, bool checkpoint)
    {
        _checkpoint = checkpoint;
        int patch = spec.Channels * spec.PatchSize * spec.PatchSize;
        _patchWeight =
            weights.Matrix("vpm.embeddings.patch_embedding.weight", spec.HiddenSize, patch);
        _patchBias = weights.Vector("vpm.embeddings.patch_embedding.bias");
        _positions = weights.Table("vpm.embeddings.position_embedding.weight");
        _layers = new Layer[spec.Layers];
        for (int i = 0; i < _layers.Length; i++)
            _layers[i] = new Layer(spec, weights, $"vpm.encoder.layers.{i}.");
        _post = weights.LayerNorm("vpm.post_layernorm", spec.LayerNormEpsilon);
    }

    /// <summary>All pictures of the batch -> features[patches, width], in the same order.</summary>
    public Tensor Forward(Graph graph, BatchTensors batch, ITensorProbe? probe)
    {
        Tensor x = graph.Run(_embed, batch.Patches, _patchWeight, _patchBias);
        x = graph.Run(_gather, x, _positions, batch.PatchPositions);
        probe?.Visit("vision.embeddings", x);
        for (int i = 0; i < _layers.Length; i++)
        {
            _layers[i].PictureStarts = batch.PictureStarts;
            x = graph.Run(_layers[i], x, _checkpoint);
            probe?.Visit("vision.layer", i, x);
        }

        x = _post.Run(graph, x);
        probe?.Visit("vision.post_layernorm", x);
        return x;
    }

    private sealed class Layer : IBlock
    {
        private static readonly Add s_add = new();
        private static readonly Gelu s_gelu = new(GeluKind.Tanh);

        private readonly Norm _norm1, _norm2;
        private readonly Projection _query, _key, _value, _output, _up, _down;
        private readonly Attention _attention;

        public Layer(VisionSpec spec, ModelWeights weights, string prefix)
        {
            _norm1 = weights.LayerNorm(prefix + "layer_norm1", spec.LayerNormEpsilon);
            _norm2 = weights.LayerNorm(prefix + "layer_norm2", spec.LayerNormEpsilon);
            _query = weights.Projection(prefix + "self_attn.q_proj");
            _key = weights.Projection(prefix + "self_attn.k_proj");
            _value = weights.Projection(prefix + "self_attn.v_proj");
            _output = weights.Projection(prefix + "self_attn.out_proj");
            _up = weights.Projection(prefix + "mlp.fc1");
            _down = weights.Projection(prefix + "mlp.fc2");
            _attention = new Attention(
                spec.Heads, spec.Heads, spec.HeadDim, Causal: false, 1 / Math.Sqrt(spec.HeadDim));
            Trainable = _norm1.Trainable || _norm2.Trainable || _query.Trainable || _key.Trainable
                || _value.Trainable || _output.Trainable || _up.Trainable || _down.Trainable;
        }

        public bool Trainable { get; }

        /// <summary>I32[pictures + 1]; set before each run.</summary>
        public Tensor PictureStarts { get; set; }

        public Tensor Forward(Graph graph, Tensor x)
        {
            Tensor a = _norm1.Run(graph, x);
            Tensor q = _query.Run(graph, a), k = _key.Run(graph, a), v = _value.Run(graph, a);
            a = graph.Run(_attention, q, k, v, PictureStarts, PictureStarts);
            x = graph.Run(s_add, x, _output.Run(graph, a));
            a = _up.Run(graph, _norm2.Run(graph, x));
            return graph.Run(s_add, x, _down.Run(graph, graph.Run(s_gelu, a)));
        }
    }
}
