using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// SigLIP/NaViT vision transformer over pictures of any grid: patches[P, channels*p*p] ->
/// features[P, width]. Pre-norm layers, full attention inside each picture, tanh GELU. Where
/// pictures lie and how the position table is read says their <see cref="PatchLayout"/>; rows that
/// it adds are computed with and left out of the features.
/// </summary>
public sealed class SiglipTower : IVisionTower
{
    private readonly Linear _embed = new();
    private readonly PositionGather _gather = new();
    private readonly Embedding _select = new();
    private readonly Growing<float> _padded = new();
    private readonly VisionSpec _spec;
    private readonly Tensor _patchWeight, _patchBias, _positions;
    private readonly VisionLayer[] _layers;
    private readonly Norm _post;
    private readonly WindowMerger? _merger;
    private readonly PerBatch<VisionContext> _contexts = new();
    private readonly Recomputation _recomputation;
    private Tensor _patches, _filled;
    private VisionContext _context = new();

    public SiglipTower(VisionSpec spec, ModuleScope scope, Recomputation recomputation)
    {
        (_spec, _recomputation) = (spec, recomputation);
        ModuleScope embeddings = scope.In("embeddings"), layers = scope.In("encoder").In("layers");
        int width = spec.HiddenSize, side = spec.PositionsPerSide;
        _patchWeight = embeddings.Matrix("patch_embedding.weight",
            width, spec.Channels, spec.PatchSize, spec.PatchSize);
        _patchBias = embeddings.Vector("patch_embedding.bias", width);
        _positions = embeddings.Table("position_embedding.weight", false, side * side, width);
        _layers = new VisionLayer[spec.Layers];
        for (int i = 0; i < _layers.Length; i++) _layers[i] = new VisionLayer(spec, layers.In(i));
        _post = scope.LayerNorm("post_layernorm", width, spec.LayerNormEpsilon);
        if (!spec.HasMerger) return;
        bool runs = spec.MergesAfter is not null;
        ModuleScope merger = scope.In("vit_merger");
        var made = new WindowMerger(spec, runs ? merger : merger.Unused());
        if (runs) _merger = made;
    }

    public Tensor PositionIds { get; private set; }

    public Tensor Forward(Graph graph, ITensorProbe? probe)
    {
        Tensor x = graph.Run(_embed, _patches, _patchWeight, _patchBias);
        x = graph.Run(_gather, x, _positions, PositionIds);
        probe?.Visit("vision.embeddings", x);
        VisionContext context = _context;
        for (int i = 0; i < _layers.Length; i++)
        {
            x = graph.Run(_layers[i], x, context, _recomputation.Vision(i));
            probe?.Visit("vision.layer", i, x);
            if (i != _spec.MergesAfter) continue;
            x = graph.Run(_merger!, x, context, checkpoint: false);
            context = _merger!.Merged;
            probe?.Visit("vision.vit_merger", x);
        }

        x = _post.Run(graph, x);
        probe?.Visit("vision.post_layernorm", x);
        return _filled.Exists ? graph.Run(_select, x, _filled) : x;
    }

    public long Count(Batch batch)
    {
        int pictures = batch.Grids.Count / 2, longest = batch.LongestView;
        long rows = 0;
        for (int i = 0; i < pictures; i++) rows += Rows(batch, i, longest);
        return (rows * (_spec.PatchLength + 1)) + pictures + 1 + batch.PictureStarts[pictures]
            + BatchUpload.TileNumbers(rows, rows, pictures) + (_merger?.Count(batch) ?? 0);
    }

    public void Load(Batch batch, BatchUpload upload)
    {
        int pictures = batch.Grids.Count / 2, longest = batch.LongestView;
        Growing<int> ints = upload.Scratch;
        ints.Clear();
        ints.Add(0);
        for (int i = 0; i < pictures; i++) ints.Add(ints[i] + Rows(batch, i, longest));
        _context = _contexts[upload.Number];
        bool packed = ints[pictures] == batch.PictureStarts[pictures];
        _context.PictureStarts = upload.Ints(ints.Span, "picture starts");
        _context.Tiles = upload.Tiles(ints.Span, ints.Span, causal: false);
        ints.Clear();
        for (int i = 0; i < pictures; i++)
            _spec.Layout.Positions(batch.Grids[2 * i], batch.Grids[(2 * i) + 1],
                _spec.PositionsPerSide, ints.Extend(Rows(batch, i, longest)));
        PositionIds = upload.Ints(ints.Span, "patch positions");
        _filled = Tensor.None;
        _merger?.Load(batch, upload);
        if (packed) _patches = upload.Patches(batch.Patches.Span, _spec.PatchLength);
        else Pad(batch, longest, upload);
    }

    // Zeros behind the patches of each picture, and which rows are patches.
    private void Pad(Batch batch, int longest, BatchUpload upload)
    {
        Growing<int> filled = upload.Scratch;
        filled.Clear();
        _padded.Clear();
        for (int i = 0, row = 0; i < batch.Grids.Count / 2; i++)
        {
            int begin = batch.PictureStarts[i], count = batch.PictureStarts[i + 1] - begin;
            int rows = Rows(batch, i, longest), length = _spec.PatchLength;
            _padded.Add(batch.Patches.Span.Slice(begin * length, count * length));
            _padded.Extend((rows - count) * length).Clear();
            foreach (ref int id in filled.Extend(count)) id = row++;
            row += rows - count;
        }

        _patches = upload.Patches(_padded.Span, _spec.PatchLength);
        _filled = upload.Ints(filled.Span, "patch rows");
    }

    private int Rows(Batch batch, int picture, int longest) => _spec.Layout.Rows(
        batch.PictureStarts[picture + 1] - batch.PictureStarts[picture], longest);
}

/// <summary>What the layers of a vision tower need to know of the pictures.</summary>
public sealed class VisionContext
{
    /// <summary>I32[pictures + 1]: where each picture's patches start, and the end.</summary>
    public Tensor PictureStarts { get; set; }

    /// <summary>Attention's tiles of queries and of keys.</summary>
    public (Tensor OfQueries, Tensor OfKeys) Tiles { get; set; }
}

/// <summary>
/// One layer: x += attention(norm(x)); x += mlp(norm(x)).
/// </summary>
internal sealed class VisionLayer : Layer<VisionContext>
{
    private static readonly Add s_add = new();
    private static readonly Gelu s_gelu = new(GeluKind.Tanh);

    private readonly Norm _norm1, _norm2;
    private readonly Projection _query, _key, _value, _output, _up, _down;
    private readonly Attention _attention;

    public VisionLayer(VisionSpec spec, ModuleScope scope)
        : base(scope)
    {
        int width = spec.HiddenSize;
        ModuleScope attention = scope.In("self_attn"), mlp = scope.In("mlp");
        _key = attention.Linear("k_proj", width, width);
        _value = attention.Linear("v_proj", width, width);
        _query = attention.Linear("q_proj", width, width);
        _output = attention.Linear("out_proj", width, width);
        _norm1 = scope.LayerNorm("layer_norm1", width, spec.LayerNormEpsilon);
        mlp.Module("activation_fn");
        _up = mlp.Linear("fc1", width, spec.IntermediateSize);
        _down = mlp.Linear("fc2", spec.IntermediateSize, width);
        _norm2 = scope.LayerNorm("layer_norm2", width, spec.LayerNormEpsilon);
        _attention = new Attention(
            spec.Heads, spec.Heads, spec.HeadDim, Causal: false, 1 / Math.Sqrt(spec.HeadDim));
        Holds([_query, _key, _value, _output, _up, _down], _norm1, _norm2);
    }

    public override Tensor Forward(Graph graph, Tensor x, VisionContext context)
    {
        Tensor a = _norm1.Run(graph, x);
        Tensor q = _query.Run(graph, a), k = _key.Run(graph, a), v = _value.Run(graph, a);
        a = graph.Run(_attention, q, k, v, context.PictureStarts, context.PictureStarts,
            Tensor.None, context.Tiles.OfQueries, context.Tiles.OfKeys);
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
