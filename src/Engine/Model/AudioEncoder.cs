using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// Whisper's encoder with a projection to the decoder's width: log-mel features of clips ->
/// rows[sounds, width] that take the places of sound in the text. Two convolutions halve the
/// frames, pre-norm layers follow, linear2(relu(linear1(x))), and the mean of every PoolStep
/// frames.
///
/// A frame sees the chunks of ChunkFrames up to its own. As in the official code the clips of a
/// batch are filled up with zeros to the longest, and a frame behind a clip's end is seen where its
/// number is below the clip's length before it was halved, so that what is behind the end counts:
/// such rows are computed as far as a row of the clip sees them, and no further. Each chunk is a
/// sequence of attention whose keys are gathered, which takes a tenth of the keys' product with the
/// queries and no mask.
/// </summary>
public sealed class AudioEncoder : IBatchInput
{
    private const int Tensors = 12;

    private static readonly Linear s_linear = new();
    private static readonly Gelu s_gelu = new(GeluKind.Erf);
    private static readonly Relu s_relu = new();
    private static readonly Embedding s_select = new();
    private static readonly PositionGather s_place = new();
    private static readonly WeightedGather s_sum = new();

    private readonly AudioSpec _spec;
    private readonly Recomputation _recomputation;
    private readonly Unfold _first, _second;
    private readonly Embedding _share;
    private readonly Tensor _weight1, _bias1, _weight2, _bias2, _positions;
    private readonly AudioLayer[] _layers;
    private readonly Norm _norm;
    private readonly Projection _up, _down;
    private readonly PerBatch<AudioContext> _contexts = new();
    private readonly Growing<float> _padded = new();
    private readonly Growing<int> _starts = new(), _keyStarts = new(), _others = new();
    private AudioContext _context = new();
    private Tensor _mel, _rows, _places, _poolFirst, _poolStarts, _poolOthers, _shares;

    /// <param name="spec">Its sizes.</param>
    /// <param name="root">The root of the module tree.</param>
    /// <param name="recomputation">What its layers compute again in backward.</param>
    public AudioEncoder(AudioSpec spec, ModuleScope root, Recomputation recomputation)
    {
        (_spec, _recomputation) = (spec, recomputation);
        int width = spec.Width;
        root = root.As(ModelPart.Audio);
        ModuleScope scope = root.In("apm"), layers = scope.In("layers");
        _weight1 = scope.Matrix("conv1.weight", width, spec.Bands, Unfold.Taps);
        _bias1 = scope.Vector("conv1.bias", width);
        _weight2 = scope.Matrix("conv2.weight", width, width, Unfold.Taps);
        _bias2 = scope.Vector("conv2.bias", width);
        _positions = scope.Table("embed_positions.weight", true, spec.Positions, width);
        _layers = new AudioLayer[spec.Layers];
        for (int i = 0; i < _layers.Length; i++) _layers[i] = new AudioLayer(spec, layers.In(i));
        _norm = scope.LayerNorm("layer_norm", width, AudioSpec.LayerNormEpsilon);
        ModuleScope projection = root.In("audio_projection_layer");
        _up = projection.Linear("linear1", width, spec.OutputWidth);
        projection.Module("relu");
        _down = projection.Linear("linear2", spec.OutputWidth, spec.OutputWidth);
        (_first, _second) = (new Unfold(spec.Bands, 1), new Unfold(width, 2));
        _share = new Embedding(1.0 / spec.PoolStep);
    }

    /// <summary>The features of all clips, in their order.</summary>
    public Tensor Forward(Graph graph, ITensorProbe? probe)
    {
        int clips = _mel.Shape[0];
        Tensor x = graph.Run(_first, _mel);
        x = graph.Run(s_gelu, graph.Run(s_linear, x, _weight1, _bias1));
        x = graph.Run(_second, x.Reshape(clips, x.Shape[0] / clips * _spec.Width));
        x = graph.Run(s_linear, x, _weight2, _bias2);
        probe?.Visit("audio.conv2", x);
        x = graph.Run(s_select, graph.Run(s_gelu, x), _rows);
        x = graph.Run(s_place, x, _positions, _places);
        for (int i = 0; i < _layers.Length; i++)
        {
            x = graph.Run(_layers[i], x, _context, _recomputation.Vision(i));
            probe?.Visit("audio.layer", i, x);
        }

        x = _norm.Run(graph, x);
        probe?.Visit("audio.layer_norm", x);
        x = graph.Run(s_relu, _up.Run(graph, x));
        // The mean goes before the second layer, which it does not change: fewer rows to multiply.
        x = graph.Run(
            s_sum, graph.Run(_share, x, _poolFirst), x, _poolStarts, _poolOthers, _shares);
        x = _down.Run(graph, x);
        probe?.Visit("audio.features", x);
        return x;
    }

    public long Count(Batch batch)
    {
        int clips = batch.Clips, longest = Halved(batch.LongestClip);
        long rows = 0, keys = 0, chunks = 0;
        for (int i = 0; i < clips; i++)
        {
            int seen = Rows(batch.ClipFrames(i), longest), chunk = Chunk(seen);
            rows += seen;
            for (int first = 0; first < seen; first += chunk, chunks++)
                keys += Math.Min(first + chunk, seen);
        }

        return ((long)clips * batch.LongestClip * _spec.Bands) + (5 * rows) + keys
            + (2 * (chunks + 1)) + BatchUpload.TileNumbers(rows, keys, (int)chunks)
            + (Tensors * InputMemory.Alignment / sizeof(int)) + 1;
    }

    public void Load(Batch batch, BatchUpload upload)
    {
        int clips = batch.Clips, frames = batch.LongestClip, longest = Halved(frames);
        Growing<int> ints = upload.Scratch;
        _padded.Clear();
        for (int i = 0; i < clips; i++)
        {
            _padded.Add(batch.Clip(i));
            _padded.Extend((frames - batch.ClipFrames(i)) * _spec.Bands).Clear();
        }

        _mel = upload.Patches(_padded.Span, frames * _spec.Bands);
        ints.Clear();
        for (int i = 0; i < clips; i++)
            for (int k = 0; k < Rows(batch.ClipFrames(i), longest); k++)
                ints.Add((i * longest) + k);
        _rows = upload.Ints(ints.Span, "sound rows");
        ints.Clear();
        for (int i = 0; i < clips; i++)
            for (int k = 0; k < Rows(batch.ClipFrames(i), longest); k++) ints.Add(k);
        _places = upload.Ints(ints.Span, "sound positions");
        LoadChunks(batch, upload, longest);
        LoadMeans(batch, upload, longest);
    }

    // Each chunk's queries, and the keys up to its end.
    private void LoadChunks(Batch batch, BatchUpload upload, int longest)
    {
        Growing<int> keys = upload.Scratch;
        _starts.Clear();
        _keyStarts.Clear();
        keys.Clear();
        _starts.Add(0);
        _keyStarts.Add(0);
        int start = 0;
        for (int i = 0; i < batch.Clips; i++)
        {
            int rows = Rows(batch.ClipFrames(i), longest), chunk = Chunk(rows);
            for (int first = 0; first < rows; first += chunk)
            {
                int end = Math.Min(first + chunk, rows);
                for (int k = 0; k < end; k++) keys.Add(start + k);
                _starts.Add(start + end);
                _keyStarts.Add(keys.Count);
            }

            start += rows;
        }

        _context = _contexts[upload.Number];
        _context.Starts = upload.Ints(_starts.Span, "chunk starts");
        _context.KeyStarts = upload.Ints(_keyStarts.Span, "chunk key starts");
        // As many as there are rows: every clip is one chunk.
        _context.Keys = keys.Count == start ? Tensor.None : upload.Ints(keys.Span, "chunk keys");
        _context.Tiles = upload.Tiles(_starts.Span, _keyStarts.Span, causal: false);
    }

    private void LoadMeans(Batch batch, BatchUpload upload, int longest)
    {
        Growing<int> first = upload.Scratch;
        first.Clear();
        _others.Clear();
        _starts.Clear();
        _starts.Add(0);
        int start = 0;
        for (int i = 0; i < batch.Clips; i++)
        {
            for (int n = 0; n < _spec.Tokens(batch.ClipFrames(i)); n++)
            {
                int from = start + (n * _spec.PoolStep);
                first.Add(from);
                for (int k = 1; k < _spec.PoolStep; k++) _others.Add(from + k);
                _starts.Add(_others.Count);
            }

            start += Rows(batch.ClipFrames(i), longest);
        }

        _poolFirst = upload.Ints(first.Span, "pooled frames");
        _poolStarts = upload.Ints(_starts.Span, "pooled starts");
        _poolOthers = upload.Ints(_others.Span, "other pooled frames");
        _shares = upload.Constant(1f / _spec.PoolStep, _others.Count, "pooled shares");
    }

    // Rows of a clip that are computed: those that its own see.
    private int Rows(int frames, int longest)
    {
        int own = Halved(frames), seen = _spec.ChunkFrames == 0 ? longest
            : Math.Min((own + _spec.ChunkFrames - 1) / _spec.ChunkFrames * _spec.ChunkFrames,
                longest);
        return Math.Min(seen, frames);
    }

    private int Chunk(int rows) => _spec.ChunkFrames == 0 ? rows : _spec.ChunkFrames;

    private static int Halved(int frames) => AudioSpec.Halved(frames);
}

/// <summary>What the layers of an audio encoder need to know of the clips.</summary>
public sealed class AudioContext
{
    /// <summary>I32[chunks + 1]: where each chunk's rows start, and the end.</summary>
    public Tensor Starts { get; set; }

    /// <summary>I32[chunks + 1]: where the keys start that it sees.</summary>
    public Tensor KeyStarts { get; set; }

    /// <summary>I32[keys]: their rows; none where they are the rows themselves.</summary>
    public Tensor Keys { get; set; }

    /// <summary>Attention's tiles of queries and of keys.</summary>
    public (Tensor OfQueries, Tensor OfKeys) Tiles { get; set; }
}

/// <summary>One layer: x += attention(norm(x)); x += mlp(norm(x)).</summary>
internal sealed class AudioLayer : Layer<AudioContext>
{
    private static readonly Add s_add = new();
    private static readonly Gelu s_gelu = new(GeluKind.Erf);
    private static readonly Embedding s_gather = new();

    private readonly Norm _norm1, _norm2;
    private readonly Projection _query, _key, _value, _output, _up, _down;
    private readonly Attention _attention;

    public AudioLayer(AudioSpec spec, ModuleScope scope)
        : base(scope)
    {
        int width = spec.Width;
        ModuleScope attention = scope.In("self_attn");
        _key = attention.Linear("k_proj", width, width, bias: false);
        _value = attention.Linear("v_proj", width, width);
        _query = attention.Linear("q_proj", width, width);
        _output = attention.Linear("out_proj", width, width);
        _norm1 = scope.LayerNorm("self_attn_layer_norm", width, AudioSpec.LayerNormEpsilon);
        scope.Module("activation_fn");
        _up = scope.Linear("fc1", width, spec.Inner);
        _down = scope.Linear("fc2", spec.Inner, width);
        _norm2 = scope.LayerNorm("final_layer_norm", width, AudioSpec.LayerNormEpsilon);
        int headDim = width / spec.Heads;
        _attention = new Attention(
            spec.Heads, spec.Heads, headDim, Causal: false, 1 / Math.Sqrt(headDim));
        Holds([_query, _key, _value, _output, _up, _down], _norm1, _norm2);
    }

    public override Tensor Forward(Graph graph, Tensor x, AudioContext context)
    {
        Tensor a = _norm1.Run(graph, x);
        Tensor q = _query.Run(graph, a), k = _key.Run(graph, a), v = _value.Run(graph, a);
        if (context.Keys.Exists)
        {
            k = graph.Run(s_gather, k, context.Keys);
            v = graph.Run(s_gather, v, context.Keys);
        }

        a = graph.Run(_attention, q, k, v, context.Starts, context.KeyStarts, Tensor.None,
            context.Tiles.OfQueries, context.Tiles.OfKeys);
        a = _output.RunFleeting(graph, a);
        x = graph.Run(s_add, x, a);
        graph.Drop(a);
        a = _up.Run(graph, _norm2.Run(graph, x));
        a = _down.RunFleeting(graph, graph.Run(s_gelu, a));
        x = graph.RunLast(s_add, x, a);
        graph.Drop(a);
        return x;
    }
}
