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
    /// <summary>See <see cref="MostTokens"/>: enough to fill a device.</summary>
    public const int Piece = 512;

    private readonly Embedding _select = new();
    private readonly Splice _splice = new();
    private readonly PerBatch<BatchTensors> _batches = new();
    // Those that the batch has, one of each kind at most.
    private readonly IBatchInput[] _inputs = new IBatchInput[6];
    // Over a cache: what runs at once.
    private readonly Batch _part = new();
    private readonly List<Tensor> _parts = [];
    // Features of pictures and sounds that have been computed already.
    private Tensor _seen, _heard;

    /// <summary>The batch that came to the device last.</summary>
    public BatchTensors Batch { get; private set; } = new();

    /// <inheritdoc cref="Decoder.RunsTogether"/>
    public bool RunsTogether => decoder.RunsTogether;

    public IVisionTower Vision => vision;

    /// <summary>Tokens that run at once over a cache.</summary>
    public int MostTokens { get; set; } = Piece;

    /// <summary>Patches of the pictures that run at once over a cache; one runs in any
    /// case.</summary>
    public int MostPatches { get; set; } = 2 * Piece;

    /// <inheritdoc cref="Decoder.NoiseAlpha"/>
    public double NoiseAlpha
    {
        get => decoder.NoiseAlpha;
        set => decoder.NoiseAlpha = value;
    }

    /// <summary>
    /// Brings a batch of whole rows over, see <see cref="IBatchInput.Load"/>.
    /// </summary>
    public void Load(Batch batch, BatchUpload upload)
    {
        _seen = _heard = Tensor.None;
        decoder.Continue(null);
        int count = 0;
        if (batch.Grids.Count > 0) (_inputs[count++], _inputs[count++]) = (vision, joiner);
        if (batch.Clips > 0) _inputs[count++] = audio!;
        _inputs[count++] = decoder;
        Bring(batch, upload, _inputs.AsSpan(0, count));
    }

    /// <summary>
    /// Token and picture input -> h[tokens, width] after the decoder's final norm.
    /// </summary>
    public Tensor Hidden(Graph graph, ITensorProbe? probe = null) =>
        decoder.Forward(graph, Embedded(graph, probe), probe);

    /// <summary>
    /// Brings over the next tokens of the rows in a cache, with positions that go on, and runs
    /// them: h[tokens, width], of those before the first that is labelled perhaps not. Nothing is
    /// trained over a cache, so little memory will do: pictures run a few at a time, sounds clip by
    /// clip, tokens piece by piece.
    /// </summary>
    public Tensor Hidden(Graph graph, Batch batch, BatchUpload upload, KeyValueCache cache)
    {
        // Before anything runs: whether it fits.
        _ = cache.Count(batch);
        // Of a call that threw.
        _parts.Clear();
        Arena step = graph.Device.Step;
        ArenaMark mark = step.Mark();
        for (int view = 0; view < batch.Grids.Count / 2;)
        {
            view = _part.TakeViews(batch, view, MostPatches);
            Bring(_part, upload, vision, joiner);
            _parts.Add(Features(graph, null));
        }

        _seen = Joined(graph, mark);
        mark = step.Mark();
        for (int clip = 0; clip < batch.Clips; clip++)
        {
            _part.TakeClip(batch, clip);
            Bring(_part, upload, audio!);
            _parts.Add(Heard(graph, null));
        }

        Tensor heard = Joined(graph, mark);
        mark = step.Mark();
        decoder.Continue(cache);
        int first = 0, sounds = 0, tokens = batch.Tokens.Count;
        while (tokens - first > MostTokens
            && batch.LabelRows.Count > 0 && batch.LabelRows[0] - first >= MostTokens)
        {
            _part.TakeTokens(batch, first, MostTokens);
            Run(_part);
            step.Pop(mark);
            first += MostTokens;
        }

        if (first > 0) _part.TakeTokens(batch, first, tokens - first);
        return Run(first > 0 ? _part : batch);

        Tensor Run(Batch piece)
        {
            int count = piece.SoundSlots.Count;
            _heard = count > 0 ? heard.Slice(sounds, count) : Tensor.None;
            sounds += count;
            Bring(piece, upload, decoder, cache);
            return Hidden(graph);
        }
    }

    /// <summary>The decoder's input x[tokens, width]: the text with its pictures and sounds.
    /// </summary>
    public Tensor Embedded(Graph graph, ITensorProbe? probe = null)
    {
        Tensor features = _seen.Exists || Batch.Pictures == 0 ? _seen : Features(graph, probe);
        Tensor heard = _heard.Exists || !Batch.SoundSlots.Exists ? _heard : Heard(graph, probe);
        // A sample may have pictures without a place in its text;
        // the first features fill the places.
        if (Batch.FeatureIds.Exists) features = graph.Run(_select, features, Batch.FeatureIds);
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
        return graph.Length == before ? graph.Keep(mark, features) : features;
    }

    // The parts, one behind the other, in their place.
    private Tensor Joined(Graph graph, ArenaMark mark)
    {
        if (_parts.Count == 0) return Tensor.None;
        Tensor joined = _parts[0];
        if (_parts.Count > 1)
        {
            int rows = 0, at = 0;
            foreach (Tensor part in _parts) rows += part.Shape[0];
            joined = graph.Device.Step.Push(
                new Spec(joined.Type, new Shape(rows, joined.Shape[1])), "features");
            foreach (Tensor part in _parts)
            {
                graph.Device.Copy(part, joined.Slice(at, part.Shape[0]));
                at += part.Shape[0];
            }
        }

        _parts.Clear();
        return graph.Keep(mark, joined);
    }

    private void Bring(Batch batch, BatchUpload upload, params ReadOnlySpan<IBatchInput> parts)
    {
        parts.CopyTo(_inputs);
        _inputs[parts.Length] = Batch = _batches[upload.Number];
        upload.Run(batch, _inputs.AsSpan(0, parts.Length + 1));
    }
}
