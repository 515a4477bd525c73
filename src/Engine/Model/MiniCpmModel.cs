using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// MiniCPM-V: vision tower, resampler, decoder, and the merge of picture features into the embedded
/// text. Everything dimensional comes from the model's own files through <see cref="ModelSpec"/>.
/// </summary>
public sealed class MiniCpmModel
{
    private readonly Embedding _embed = new();
    private readonly Embedding _select = new();
    private readonly Splice _splice = new();
    private readonly CrossEntropy _loss = new();
    private readonly Linear _head = new();
    private readonly VisionTower _vision;
    private readonly Resampler _resampler;
    private readonly Decoder _decoder;
    private readonly Tensor _embedding, _vocabulary;

    public MiniCpmModel(ModelSpec spec, ModelWeights weights, bool checkpoint)
    {
        Spec = spec;
        _vision = new VisionTower(spec.Vision, weights, checkpoint);
        _resampler = new Resampler(spec.Resampler, weights);
        _embedding = weights.Table("llm.model.embed_tokens.weight");
        _decoder = new Decoder(spec.Decoder, weights, checkpoint);
        _vocabulary = !spec.Decoder.TiedHead ? weights.Matrix("llm.lm_head.weight")
            : weights.IsCopied("llm.model.embed_tokens.weight")
                ? weights.Frozen("llm.model.embed_tokens.weight")
                : _embedding;
    }

    public ModelSpec Spec { get; }

    /// <summary>
    /// Token and picture input -> h[tokens, width] after the decoder's final norm.
    /// </summary>
    public Tensor Hidden(Graph graph, BatchTensors batch, ITensorProbe? probe = null)
    {
        Tensor features = batch.Pictures > 0 ? Features(graph, batch, probe) : Tensor.None;
        Tensor x = graph.Run(_embed, _embedding, batch.Tokens);
        if (features.Exists && batch.Slots.Shape.Count > 0)
            x = graph.Run(_splice, x, features, batch.Slots);
        probe?.Visit("inputs_embeds", x);
        return _decoder.Forward(graph, x, batch, probe);
    }

    /// <summary>
    /// Sum of the cross-entropies of the labelled rows. perRow takes, when it has room, what the
    /// operation saves: loss and hit (1 when the largest logit is the target) of each labelled row.
    /// </summary>
    public Tensor Loss(Graph graph, Tensor hidden, BatchTensors batch, Span<Tensor> perRow) =>
        perRow.IsEmpty
            ? graph.Run(_loss, hidden, _vocabulary, batch.LabelRows, batch.Targets)
            : graph.Run(_loss, perRow, hidden, _vocabulary, batch.LabelRows, batch.Targets);

    /// <summary>
    /// h[rows, width] -> logits[rows, vocabulary], for inspection: training never has them.
    /// </summary>
    public Tensor Logits(Graph graph, Tensor hidden) => graph.Run(_head, hidden, _vocabulary);

    private Tensor Features(Graph graph, BatchTensors batch, ITensorProbe? probe)
    {
        ArenaMark mark = graph.Device.Step.Mark();
        int before = graph.Length;
        Tensor features = _resampler.Forward(
            graph, _vision.Forward(graph, batch, probe), batch, probe);
        if (graph.Length == before) features = graph.Keep(mark, features);
        // A sample may have pictures without a place in its text;
        // the first features fill the places.
        return batch.FeatureIds.Exists ? graph.Run(_select, features, batch.FeatureIds) : features;
    }
}
