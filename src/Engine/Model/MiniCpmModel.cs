using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// Turns the patches of a batch's pictures into features, patches[P, channels*p*p] ->
/// [P, width], pictures in their order.
/// </summary>
public interface IVisionTower : IBatchInput
{
    Tensor Forward(Graph graph, ITensorProbe? probe);

    /// <summary>I32[patches]: what the positions of the batch are read by, to look at.</summary>
    Tensor PositionIds { get; }
}

/// <summary>
/// Turns vision features into rows of the decoder's width that take the pictures' places in the
/// text.
/// </summary>
public interface IJoiner : IBatchInput
{
    Tensor Forward(Graph graph, Tensor features, Tensor pictureStarts, ITensorProbe? probe);
}

/// <summary>
/// A model of the family: vision tower, joiner, decoder, an audio encoder where there is one, and
/// the merge of picture and sound features into the embedded text. Which ones is said where a
/// family composes them.
/// </summary>
public sealed class MiniCpmModel(
    IVisionTower vision, IJoiner joiner, Decoder decoder, AudioEncoder? audio = null)
{
    private readonly Embedding _select = new();
    private readonly Splice _splice = new();
    private readonly PerBatch<BatchTensors> _batches = new();
    // Those that the batch has, one of each kind at most.
    private readonly IBatchInput[] _inputs = new IBatchInput[6];

    /// <summary>The batch that came to the device last.</summary>
    public BatchTensors Batch { get; private set; } = new();

    /// <inheritdoc cref="Decoder.RunsTogether"/>
    public bool RunsTogether => decoder.RunsTogether;

    public IVisionTower Vision => vision;

    /// <inheritdoc cref="Decoder.NoiseAlpha"/>
    public double NoiseAlpha
    {
        get => decoder.NoiseAlpha;
        set => decoder.NoiseAlpha = value;
    }

    /// <summary>
    /// Brings a batch over, see <see cref="IBatchInput.Load"/>: whole rows, or the next tokens of
    /// those in the cache, with positions that go on.
    /// </summary>
    public void Load(Batch batch, BatchUpload upload, KeyValueCache? cache = null)
    {
        int count = 0;
        if (batch.Grids.Count > 0) (_inputs[count++], _inputs[count++]) = (vision, joiner);
        if (batch.Clips > 0) _inputs[count++] = audio!;
        _inputs[count++] = Batch = _batches[upload.Number];
        _inputs[count++] = decoder;
        if (cache is not null) _inputs[count++] = cache;
        decoder.Continue(cache);
        upload.Run(batch, _inputs.AsSpan(0, count));
    }

    /// <summary>
    /// Token and picture input -> h[tokens, width] after the decoder's final norm.
    /// </summary>
    public Tensor Hidden(Graph graph, ITensorProbe? probe = null) =>
        decoder.Forward(graph, Embedded(graph, probe), probe);

    /// <summary>The decoder's input x[tokens, width]: the text with its pictures and sounds.
    /// </summary>
    public Tensor Embedded(Graph graph, ITensorProbe? probe = null)
    {
        Tensor features = Batch.Pictures > 0 ? Features(graph, probe) : Tensor.None;
        Tensor heard = Batch.SoundSlots.Exists ? Heard(graph, probe) : Tensor.None;
        Tensor x = decoder.Embed(graph, Batch.Tokens);
        if (features.Exists && Batch.Slots.Shape.Count > 0)
            x = graph.Run(_splice, x, features, Batch.Slots);
        if (heard.Exists) x = graph.Run(_splice, x, heard, Batch.SoundSlots);
        probe?.Visit("inputs_embeds", x);
        return x;
    }

    /// <summary>
    /// The losses of all batches on the device, of x each, in its stead; see
    /// <see cref="Decoder.Forward(Graph, Span{Tensor})"/>.
    /// </summary>
    public void Losses(Graph graph, Span<Tensor> x)
    {
        decoder.Forward(graph, x);
        for (int i = x.Length - 1; i >= 0; i--)
            x[i] = decoder.Loss(graph, x[i], _batches[i].LabelRows, _batches[i].Targets, []);
    }

    /// <summary>See <see cref="Decoder.Loss"/>.</summary>
    public Tensor Loss(Graph graph, Tensor hidden, Span<Tensor> perRow) =>
        decoder.Loss(graph, hidden, Batch.LabelRows, Batch.Targets, perRow);

    /// <inheritdoc cref="Decoder.Logits"/>
    public Tensor Logits(Graph graph, Tensor hidden) => decoder.Logits(graph, hidden);

    /// <summary>
    /// h[tokens, width] -> logits[rows, vocabulary] of the tokens that the batch's LabelRows name.
    /// </summary>
    public Tensor LabelLogits(Graph graph, Tensor hidden) =>
        decoder.Logits(graph, graph.Run(_select, hidden, Batch.LabelRows));

    private Tensor Heard(Graph graph, ITensorProbe? probe)
    {
        ArenaMark mark = graph.Device.Step.Mark();
        int before = graph.Length;
        Tensor heard = audio!.Forward(graph, probe);
        return graph.Length == before ? graph.Keep(mark, heard) : heard;
    }

    private Tensor Features(Graph graph, ITensorProbe? probe)
    {
        ArenaMark mark = graph.Device.Step.Mark();
        int before = graph.Length;
        Tensor features = joiner.Forward(
            graph, vision.Forward(graph, probe), Batch.PictureStarts, probe);
        if (graph.Length == before) features = graph.Keep(mark, features);
        // A sample may have pictures without a place in its text;
        // the first features fill the places.
        return Batch.FeatureIds.Exists ? graph.Run(_select, features, Batch.FeatureIds) : features;
    }
}
