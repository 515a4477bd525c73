using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// Llama-style decoder over packed sequences, as Qwen2 has it: RMS norms, rotary positions, grouped
/// queries, causal attention inside each sequence, SwiGLU. x[tokens, width] -> h[tokens, width],
/// after the final norm; the vocabulary projection belongs to the loss.
/// </summary>
public sealed class Decoder
{
    private readonly Layer[] _layers;
    private readonly Norm _norm;
    private readonly bool _checkpoint;

    public Decoder(DecoderSpec spec, ModelWeights weights, bool checkpoint)
    {
        _checkpoint = checkpoint;
        _layers = new Layer[spec.Layers];
        for (int i = 0; i < _layers.Length; i++)
            _layers[i] = new Layer(spec, weights, $"llm.model.layers.{i}.");
        _norm = weights.RmsNorm("llm.model.norm", spec.RmsNormEpsilon);
    }

    public Tensor Forward(Graph graph, Tensor x, BatchTensors batch, ITensorProbe? probe)
    {
        for (int i = 0; i < _layers.Length; i++)
        {
            _layers[i].Batch = batch;
            x = graph.Run(_layers[i], x, _checkpoint);
            probe?.Visit("llm.layer", i, x);
        }

        x = _norm.Run(graph, x);
        probe?.Visit("llm.norm", x);
        return x;
    }

    private sealed class Layer : IBlock
    {
        private static readonly Add s_add = new();
        private static readonly SwiGlu s_swiGlu = new();

        private readonly Norm _inputNorm, _postNorm;
        private readonly Projection _query, _key, _value, _output, _gate, _up, _down;
        private readonly Rope _rope;
        private readonly Attention _attention;

        public Layer(DecoderSpec spec, ModelWeights weights, string prefix)
        {
            _inputNorm = weights.RmsNorm(prefix + "input_layernorm", spec.RmsNormEpsilon);
            _postNorm = weights.RmsNorm(prefix + "post_attention_layernorm", spec.RmsNormEpsilon);
            _query = weights.Projection(prefix + "self_attn.q_proj");
            _key = weights.Projection(prefix + "self_attn.k_proj");
            _value = weights.Projection(prefix + "self_attn.v_proj");
            _output = weights.Projection(prefix + "self_attn.o_proj");
            _gate = weights.Projection(prefix + "mlp.gate_proj");
            _up = weights.Projection(prefix + "mlp.up_proj");
            _down = weights.Projection(prefix + "mlp.down_proj");
            _rope = new Rope(spec.HeadDim);
            _attention = new Attention(
                spec.Heads, spec.KvHeads, spec.HeadDim, Causal: true, 1 / Math.Sqrt(spec.HeadDim));
            Trainable = _inputNorm.Trainable || _postNorm.Trainable || _query.Trainable
                || _key.Trainable || _value.Trainable || _output.Trainable || _gate.Trainable
                || _up.Trainable || _down.Trainable;
        }

        public bool Trainable { get; }

        /// <summary>Set before each run; outlives the backward.</summary>
        public BatchTensors? Batch { get; set; }

        public Tensor Forward(Graph graph, Tensor x)
        {
            BatchTensors b = Batch!;
            Tensor a = _inputNorm.Run(graph, x);
            Tensor q = graph.Run(_rope, _query.Run(graph, a), b.Positions, b.RopeCos, b.RopeSin);
            Tensor k = graph.Run(_rope, _key.Run(graph, a), b.Positions, b.RopeCos, b.RopeSin);
            Tensor v = _value.Run(graph, a);
            a = graph.Run(_attention, q, k, v, b.SequenceStarts, b.SequenceStarts);
            x = graph.Run(s_add, x, _output.Run(graph, a));
            a = _postNorm.Run(graph, x);
            a = graph.Run(s_swiGlu, _gate.Run(graph, a), _up.Run(graph, a));
            return graph.Run(s_add, x, _down.Run(graph, a));
        }
    }
}
