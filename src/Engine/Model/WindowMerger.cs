using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// Merges windows of 2 x 2 patches on their way through the vision tower: attention inside each
/// window, y = x + attention(norm(x)), then one row of the window's four, linear_2(gelu(linear_1(
/// norm([y1 y2 y3 y4])))) + mean of the four. x[P, width] -> [P / 4, width], windows row by row.
/// </summary>
internal sealed class WindowMerger : Layer<VisionContext>
{
    private const int Window = Squares.Size;

    // Its inputs besides those of the tower.
    private const int Tensors = 9;

    private static readonly Embedding s_order = new();
    private static readonly Add s_add = new();
    private static readonly WeightedGather s_mean = new();
    private static readonly Gelu s_gelu = new(GeluKind.Tanh);

    private readonly Norm _norm, _preNorm;
    private readonly Projection _query, _key, _value, _output, _up, _down;
    private readonly PerBatch<VisionContext> _merged = new();
    private readonly Attention _attention;
    private readonly int _width;
    private Tensor _order, _starts, _rows, _shares;
    private (Tensor OfQueries, Tensor OfKeys) _tiles;

    public WindowMerger(VisionSpec spec, ModuleScope scope)
    {
        int width = _width = spec.HiddenSize, inner = Window * spec.IntermediateSize;
        ModuleScope attention = scope.In("self_attn");
        _key = attention.Linear("k_proj", width, width);
        _value = attention.Linear("v_proj", width, width);
        _query = attention.Linear("q_proj", width, width);
        _output = attention.Linear("out_proj", width, width);
        _norm = scope.LayerNorm("layer_norm1", width, spec.LayerNormEpsilon);
        _preNorm = scope.LayerNorm("pre_norm", Window * width, spec.LayerNormEpsilon);
        _up = scope.Linear("linear_1", Window * width, inner);
        scope.Module("act");
        _down = scope.Linear("linear_2", inner, width);
        _attention = new Attention(
            spec.Heads, spec.Heads, spec.HeadDim, Causal: false, 1 / Math.Sqrt(spec.HeadDim));
        Holds([_query, _key, _value, _output, _up, _down], _norm, _preNorm);
    }

    /// <summary>Where the pictures lie behind it.</summary>
    public VisionContext Merged { get; private set; } = new();

    public override Tensor Forward(Graph graph, Tensor x, VisionContext context)
    {
        // The norm is each row's own, so it may come before or behind the change of order.
        x = graph.Run(s_order, x, _order);
        Tensor a = _norm.Run(graph, x);
        Tensor q = _query.Run(graph, a), k = _key.Run(graph, a), v = _value.Run(graph, a);
        a = graph.Run(_attention, q, k, v, _starts, _starts, Tensor.None, _tiles.OfQueries,
            _tiles.OfKeys);
        x = graph.Run(s_add, x, _output.Run(graph, a));
        a = _preNorm.Run(graph, x.Reshape(x.Shape[0] / Window, Window * _width));
        a = _down.Run(graph, graph.Run(s_gelu, _up.Run(graph, a)));
        return graph.Run(s_mean, a, x, _starts, _rows, _shares);
    }

    public long Count(Batch batch)
    {
        int pictures = batch.PictureStarts.Count - 1, patches = batch.PictureStarts[pictures];
        int windows = patches / Window;
        return (3L * patches) + windows + 1 + pictures + 1
            + BatchUpload.TileNumbers(patches, patches, windows)
            + BatchUpload.TileNumbers(windows, windows, pictures)
            + (Tensors * InputMemory.Alignment / sizeof(int));
    }

    public void Load(Batch batch, BatchUpload upload)
    {
        Growing<int> ints = upload.Scratch;
        int patches = batch.PictureStarts[batch.PictureStarts.Count - 1];
        int windows = patches / Window;
        ints.Clear();
        Squares.Append(batch, 1, ints);
        _order = upload.Ints(ints.Span, "window order");
        ints.Clear();
        for (int i = 0; i <= windows; i++) ints.Add(i * Window);
        _starts = upload.Ints(ints.Span, "window starts");
        _tiles = upload.Tiles(ints.Span, ints.Span, causal: false);
        ints.Clear();
        for (int i = 0; i < patches; i++) ints.Add(i);
        _rows = upload.Ints(ints.Span, "window rows");
        _shares = upload.Constant(1f / Window, patches, "window shares");
        ints.Clear();
        foreach (int start in batch.PictureStarts.Span) ints.Add(start / Window);
        Merged = _merged[upload.Number];
        Merged.PictureStarts = upload.Ints(ints.Span, "merged starts");
        Merged.Tiles = upload.Tiles(ints.Span, ints.Span, causal: false);
    }
}

/// <summary>Squares of 2 x 2 neighbours in the grids of pictures.</summary>
internal static class Squares
{
    /// <summary>Neighbours in a square.</summary>
    public const int Size = 4;

    /// <summary>
    /// Appends the rows of all pictures square by square: squares row by row, in each the upper
    /// two, then the lower two. The grids are the batch's, divided.
    /// </summary>
    public static void Append(Batch batch, int divisor, Growing<int> to)
    {
        for (int i = 0, start = 0; i < batch.Grids.Count; i += 2)
        {
            int rows = batch.Grids[i] / divisor, cols = batch.Grids[i + 1] / divisor;
            for (int r = 0; r < rows; r += 2)
                for (int c = 0; c < cols; c += 2)
                    foreach (int at in (ReadOnlySpan<int>)[0, 1, cols, cols + 1])
                        to.Add(start + (r * cols) + c + at);
            start += rows * cols;
        }
    }
}
