using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// Llama-style language model over packed sequences: token embedding, pre-norm layers with rotary
/// positions, grouped queries, causal attention inside each sequence and SwiGLU, a final norm, and
/// the head. Qwen2's biases, Qwen3's norms of queries and keys and MiniCPM's scalings are switches
/// of <see cref="DecoderSpec"/>.
/// </summary>
public sealed class Decoder : IBatchInput
{
    private readonly Add _sum = new();
    private readonly Scale? _outputScale;
    private readonly DecoderSpec _spec;
    private readonly PerBatch<DecoderContext> _contexts = new();
    private readonly CanvasRope? _canvas;
    private readonly TokenTable _embedding;
    private readonly OutputHead _head;
    private readonly DecoderLayer[] _layers;
    private readonly Norm _norm;
    private readonly Recomputation _recomputation;
    private DecoderContext _context;
    private KeyValueCache? _cache;

    /// <param name="spec">The decoder.</param>
    /// <param name="scope">Holds it and its head.</param>
    /// <param name="recomputation">What layers compute again in backward.</param>
    /// <param name="name">The decoder's name in there.</param>
    public Decoder(
        DecoderSpec spec, ModuleScope scope, Recomputation recomputation, string name = "model")
    {
        (_spec, _recomputation, _context) = (spec, recomputation, _contexts[0]);
        if (!spec.RopeSections.IsEmpty) _canvas = new CanvasRope(spec);
        if (spec.OutputScale != 1) _outputScale = new Scale(spec.OutputScale);
        ModuleScope model = scope.In(name);
        _embedding = model.Tokens("embed_tokens", spec.VocabSize, spec.HiddenSize,
            spec.EmbeddingScale, spec.TiedHead);
        _layers = new DecoderLayer[spec.Layers];
        for (int i = 0; i < _layers.Length; i++)
            _layers[i] = new DecoderLayer(spec, model.In("layers").In(i), i, recomputation);
        _norm = model.RmsNorm(
            "norm", spec.HiddenSize, spec.Norm with { Decays = spec.FinalNormDecays });
        model.Module("rotary_emb");
        _head = spec.TiedHead
            ? scope.TiedHead(
                "lm_head", name + ".embed_tokens", _embedding, spec.HiddenSize, spec.VocabSize)
            : scope.Head("lm_head", spec.HiddenSize, spec.VocabSize);
    }

    /// <summary>ids I32[tokens] -> [tokens, width].</summary>
    public Tensor Embed(Graph graph, Tensor ids)
    {
        Tensor x = _embedding.Run(graph, ids);
        return _context.Noise.Exists ? graph.Run(_sum, x, _context.Noise) : x;
    }

    /// <summary>
    /// Of the batches loaded from now on, NEFTune's alpha (Jain et al. 2023): noise on the embedded
    /// tokens, uniform in +-alpha / sqrt(tokens of the row * width). As in the Hugging Face Trainer
    /// it comes before what scales embeddings, and before pictures take their places.
    /// </summary>
    public double NoiseAlpha { get; set; }

    /// <summary>x[tokens, width] -> h[tokens, width] after the final norm, of the batch.</summary>
    public Tensor Forward(Graph graph, Tensor x, ITensorProbe? probe) =>
        Forward(graph, x, _context, probe);

    /// <summary>The same of rows that the context describes.</summary>
    public Tensor Forward(Graph graph, Tensor x, DecoderContext context, ITensorProbe? probe)
    {
        for (int i = 0; i < _layers.Length; i++)
        {
            x = graph.Run(_layers[i], x, context,
                checkpoint: _recomputation.Decoder(i) == Recompute.Block);
            probe?.Visit("llm.layer", i, x);
        }

        x = _norm.Run(graph, x);
        probe?.Visit("llm.norm", x);
        return _outputScale is null ? x : graph.Run(_outputScale, x);
    }

    /// <summary>
    /// The same of all batches that are on the device, layer by layer, so that weights that are
    /// streamed come once for all of them. The last batch is first: backward, which goes the other
    /// way, adds up their gradients in the order of the batches.
    /// </summary>
    public void Forward(Graph graph, Span<Tensor> x)
    {
        for (int layer = 0; layer < _layers.Length; layer++)
        {
            bool again = _recomputation.Decoder(layer) == Recompute.Block;
            for (int i = x.Length - 1; i >= 0; i--)
            {
                DecoderContext context = _contexts[i];
                graph.Device.Random = context.Random;
                x[i] = graph.Run(_layers[layer], x[i], context, again);
            }
        }

        for (int i = x.Length - 1; i >= 0; i--)
        {
            x[i] = _norm.Run(graph, x[i]);
            if (_outputScale is not null) x[i] = graph.Run(_outputScale, x[i]);
        }
    }

    /// <summary>
    /// Whether gradients of several batches add up in one order, whether they are run apart or
    /// together: not where one trained matrix is both embedding and head.
    /// </summary>
    public bool RunsTogether => !_head.IsTrainedWith(_embedding.Table, _embedding.Rows);

    /// <summary>
    /// Sum of the cross-entropies of the labelled rows. perRow takes, when it has room, what the
    /// operation saves: loss and hit (1 when the largest logit is the target) of each labelled row.
    /// </summary>
    public Tensor Loss(
        Graph graph, Tensor hidden, Tensor labelRows, Tensor targets, Span<Tensor> perRow) =>
        _head.Loss(graph, hidden, labelRows, targets, perRow);

    /// <summary>h[rows, width] -> logits[rows, vocabulary]: training never has them.</summary>
    public Tensor Logits(Graph graph, Tensor hidden) => _head.Logits(graph, hidden);

    /// <summary>
    /// What the batches loaded from now on continue; null when their rows are whole.
    /// </summary>
    public void Continue(KeyValueCache? cache) => _cache = cache;

    public long Count(Batch batch) => _embedding.Count(batch)
        + (NoiseAlpha > 0 ? (long)batch.Tokens.Count * _spec.HiddenSize : 0)
        + ((_spec.Delta is null ? 1L : 3) * batch.Positions.Count)
        + batch.SequenceStarts.Count + (_canvas?.Count(batch) ?? 0)
        + BatchUpload.TileNumbers(
            batch.Tokens.Count, batch.Tokens.Count, batch.SequenceStarts.Count);

    public void Load(Batch batch, BatchUpload upload)
    {
        _embedding.Load(batch, upload);
        _context = _contexts[upload.Number];
        (_context.Cache, _context.Random) = (_cache, upload.Random);
        ReadOnlySpan<int> starts = batch.SequenceStarts.Span;
        _context.Starts = upload.Ints(starts, "sequence starts");
        _context.Noise = NoiseAlpha > 0
            ? upload.Noise(starts, _spec.HiddenSize, NoiseAlpha * _spec.EmbeddingScale)
            : Tensor.None;
        _context.Tiles = _context.Cache is null
            ? upload.Tiles(starts, starts, causal: true) : default;
        if (_spec.Delta is not null) LoadPairs(batch.Tokens.Count, upload);
        if (_canvas is not null && batch.Places.Count > 0)
        {
            _context.Turn(_canvas.Load(batch, upload));
            return;
        }

        _context.Positions = upload.Ints(batch.Positions.Span, "positions");
        int last = 0;
        foreach (int position in batch.Positions.Span) last = Math.Max(last, position);
        _context.Reach(_spec, last + 1, upload);
    }

    private void LoadPairs(int tokens, BatchUpload upload)
    {
        Growing<int> pairs = upload.Scratch;
        pairs.Clear();
        for (int t = 0; t < tokens; t++)
        {
            pairs.Add(t);
            pairs.Add(tokens + t);
        }

        _context.Pairs = upload.Ints(pairs.Span, "pairs of rows");
    }
}

/// <summary>
/// What the layers of a decoder need to know of the rows they run on: an argument of every block,
/// so that training, evaluation and generation are the same layers.
/// </summary>
public sealed class DecoderContext
{
    private readonly (Tensor Cos, Tensor Sin)[] _ropeTables = new (Tensor, Tensor)[2];

    /// <summary>Key of the batch's random numbers.</summary>
    public Randomness Random { get; set; }

    /// <summary>[tokens, width]: what is added to the embedded tokens; mostly none.</summary>
    public Tensor Noise { get; set; }

    /// <summary>I32[tokens]: the row of the rotary tables that turns each token.</summary>
    public Tensor Positions { get; set; }

    /// <summary>I32[sequences + 1]: where each sequence's tokens start, and the end.</summary>
    public Tensor Starts { get; set; }

    /// <summary>
    /// Attention's tiles of queries and of keys where sequences are whole; may be absent.
    /// </summary>
    public (Tensor OfQueries, Tensor OfKeys) Tiles { get; set; }

    /// <summary>
    /// I32[2 tokens]: brings two matrices that lie behind each other side by side.
    /// </summary>
    public Tensor Pairs { get; set; }

    /// <summary>
    /// Has the keys and values of the tokens before these and takes theirs; null where sequences
    /// are whole.
    /// </summary>
    public KeyValueCache? Cache { get; set; }

    /// <summary>F32[positions, columns / 2], of the batch's longest sequence or of its
    /// tokens.</summary>
    public Tensor RopeCos { get; private set; }

    /// <summary>The same.</summary>
    public Tensor RopeSin { get; private set; }

    /// <summary>Takes the tables of a batch whose tokens have places on canvases.</summary>
    public void Turn((Tensor Rows, Tensor Cos, Tensor Sin) tables) =>
        (Positions, RopeCos, RopeSin) = tables;

    /// <summary>
    /// Makes the rotary tables reach at least so many positions, the batch's longest sequence:
    /// which divisors of the frequencies they have depends on it.
    /// </summary>
    public void Reach(DecoderSpec spec, int positions, BatchUpload upload)
    {
        bool isLong = spec.RopeScaling.IsLong(positions);
        ref (Tensor Cos, Tensor Sin) tables = ref _ropeTables[isLong ? 1 : 0];
        if (!tables.Cos.Exists || tables.Cos.Shape[0] < positions)
        {
            int count = Math.Max(positions, tables.Cos.Exists ? 2 * tables.Cos.Shape[0] : 2048);
            var (cos, sin) = spec.RopeTable(count, isLong);
            tables = (upload.Table(cos, count, "rope cos"), upload.Table(sin, count, "rope sin"));
        }

        (RopeCos, RopeSin) = tables;
    }
}
