using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// The vision transformer of timm (so400m, patches of 14) over packed pictures of any grid:
/// patches[P, channels*p*p] -> features[P, width]. Pre-norm layers, full attention inside each
/// picture, exact GELU; the position table is resampled to each picture's grid, and trained through
/// that. The official code runs one picture at a time, which packing equals.
/// </summary>
public sealed class TimmTower : IVisionTower
{
    private readonly Linear _embed = new();
    private readonly WeightedGather _resample = new();
    private readonly VisionSpec _spec;
    private readonly Tensor _patchWeight, _patchBias, _positions;
    private readonly TimmLayer[] _layers;
    private readonly Norm _norm;
    private readonly PerBatch<VisionContext> _contexts = new();
    private readonly PositionResampling _resampling;
    private readonly Recomputation _recomputation;
    private Tensor _patches, _starts, _ids, _weights;
    private VisionContext _context = new();

    public TimmTower(VisionSpec spec, ModuleScope scope, Recomputation recomputation)
    {
        (_spec, _recomputation) = (spec, recomputation);
        int width = spec.HiddenSize, side = spec.PositionsPerSide;
        _resampling = new PositionResampling(side);
        ModuleScope embed = scope.In("patch_embed");
        _positions = scope.Table("pos_embed", false, 1, side * side, width);
        _patchWeight = embed.Matrix(
            "proj.weight", width, spec.Channels, spec.PatchSize, spec.PatchSize);
        _patchBias = embed.Vector("proj.bias", width);
        embed.Module("norm");
        _layers = new TimmLayer[spec.Layers];
        for (int i = 0; i < _layers.Length; i++)
            _layers[i] = new TimmLayer(spec, scope.In("blocks").In(i));
        _norm = scope.LayerNorm("norm", width, spec.LayerNormEpsilon);
        foreach (string name in (string[])["pos_drop", "patch_drop", "norm_pre", "attn_pool",
            "fc_norm", "head_drop", "head"])
            scope.Module(name);
    }

    /// <summary>None: positions are sums of many rows of the table.</summary>
    public Tensor PositionIds => Tensor.None;

    public Tensor Forward(Graph graph, ITensorProbe? probe)
    {
        Tensor x = graph.Run(_embed, _patches, _patchWeight, _patchBias);
        x = graph.Run(_resample, x, _positions, _starts, _ids, _weights);
        probe?.Visit("vision.embeddings", x);
        for (int i = 0; i < _layers.Length; i++)
        {
            x = graph.Run(_layers[i], x, _context, _recomputation.Vision(i));
            probe?.Visit("vision.layer", i, x);
        }

        x = _norm.Run(graph, x);
        probe?.Visit("vision.norm", x);
        return x;
    }

    public long Count(Batch batch)
    {
        long patches = batch.Patches.Count / _spec.PatchLength;
        long count = batch.Patches.Count + batch.PictureStarts.Count + 1 + patches
            + BatchUpload.TileNumbers(patches, patches, batch.PictureStarts.Count);
        for (int i = 0; i < batch.Grids.Count; i += 2)
            count += 2 * _resampling.MostTerms(batch.Grids[i], batch.Grids[i + 1]);
        return count;
    }

    public void Load(Batch batch, BatchUpload upload)
    {
        _patches = upload.Patches(batch.Patches.Span, _spec.PatchLength);
        ReadOnlySpan<int> starts = batch.PictureStarts.Span;
        _context = _contexts[upload.Number];
        _context.PictureStarts = upload.Ints(starts, "picture starts");
        _context.Tiles = upload.Tiles(starts, starts, causal: false);
        _resampling.Clear();
        for (int i = 0; i < batch.Grids.Count; i += 2)
            _resampling.Add(batch.Grids[i], batch.Grids[i + 1]);
        _starts = upload.Ints(_resampling.Starts, "position starts");
        _ids = upload.Ints(_resampling.Ids, "position ids");
        _weights = upload.Floats(_resampling.Weights, "position weights");
    }
}

/// <summary>
/// One layer: x += attention(norm(x)); x += mlp(norm(x)); queries, keys and values come from one
/// matrix, which PEFT adapts as the one module it is.
/// </summary>
internal sealed class TimmLayer : Layer<VisionContext>
{
    private static readonly Add s_add = new();
    private static readonly Gelu s_gelu = new(GeluKind.Erf);

    private readonly Norm _norm1, _norm2;
    private readonly Projection _qkv, _output, _up, _down;
    private readonly Columns _query, _key, _value;
    private readonly Attention _attention;

    public TimmLayer(VisionSpec spec, ModuleScope scope)
        : base(scope)
    {
        int width = spec.HiddenSize;
        ModuleScope attention = scope.In("attn"), mlp = scope.In("mlp");
        _norm1 = scope.LayerNorm("norm1", width, spec.LayerNormEpsilon);
        _qkv = attention.Linear("qkv", width, 3 * width);
        _output = attention.Linear("proj", width, width);
        _norm2 = scope.LayerNorm("norm2", width, spec.LayerNormEpsilon);
        _up = mlp.Linear("fc1", width, spec.IntermediateSize);
        _down = mlp.Linear("fc2", spec.IntermediateSize, width);
        foreach (string name in (string[])["q_norm", "k_norm", "attn_drop", "proj_drop"])
            attention.Module(name);
        foreach (string name in (string[])["act", "drop1", "norm", "drop2"]) mlp.Module(name);
        foreach (string name in (string[])["ls1", "drop_path1", "ls2", "drop_path2"])
            scope.Module(name);
        (_query, _key, _value) = (new(0, width), new(width, width), new(2 * width, width));
        _attention = new Attention(
            spec.Heads, spec.Heads, spec.HeadDim, Causal: false, 1 / Math.Sqrt(spec.HeadDim));
        Holds([_qkv, _output, _up, _down], _norm1, _norm2);
    }

    public override Tensor Forward(Graph graph, Tensor x, VisionContext context)
    {
        Tensor a = _qkv.Run(graph, _norm1.Run(graph, x));
        Tensor q = graph.Run(_query, a), k = graph.Run(_key, a), v = graph.Run(_value, a);
        a = graph.Run(_attention, q, k, v, context.PictureStarts, context.PictureStarts,
            Tensor.None, context.Tiles.OfQueries, context.Tiles.OfKeys);
        x = graph.Run(s_add, x, _output.Run(graph, a));
        a = _up.Run(graph, _norm2.Run(graph, x));
        return graph.Run(s_add, x, _down.Run(graph, graph.Run(s_gelu, a)));
    }
}
