using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// One layer of cross-attention that turns the patches of each picture into a fixed number of
/// features of the decoder's width (Qwen-VL's resampler, as MiniCPM-V has it): kv =
/// LN(kv_proj(x)), keys get the 2-D sine-cosine position and values do not, the learned queries get
/// none, or a stored one in version 2.0; y = LN(out_proj(attention)) proj, with proj multiplied
/// from the right. Frames of a video that are joined (V-4_5) are one picture to the queries, whose
/// keys also get the position of their frame's time.
/// </summary>
public sealed class Resampler : IJoiner
{
    // PEFT wraps the layer, but plain nn.MultiheadAttention reads its weight directly.
    private const string ReadDirectly =
        "its attention reads the weight directly: an adapter there would do nothing";

    private readonly Linear _project = new(Transposed: true);
    private readonly PositionGather _gather = new();
    private readonly Embedding _repeat = new();
    private readonly Attention _attention;
    private readonly Projection _keysAndValues, _query, _key, _value, _output;
    private readonly Norm _queryNorm, _keyNorm, _postNorm;
    private readonly Tensor _queryPositions, _queries, _projection;
    private readonly int _width, _queryCount;
    private Tensor _queryStarts, _queryIds, _coordinateIds, _coordinates;
    // Of frames: where each group of them starts; the positions of the times that occur.
    private Tensor _groupStarts, _times, _timeIds;
    private (Tensor OfQueries, Tensor OfKeys) _tiles;

    public Resampler(ResamplerSpec spec, ModuleScope scope)
    {
        (_width, _queryCount) = (spec.HiddenSize, spec.Queries);
        _attention = new Attention(
            spec.Heads, spec.Heads, spec.HeadDim, Causal: false, 1 / Math.Sqrt(spec.HeadDim));
        // A constant of the official class, and yet trained with the module in modules_to_save.
        if (spec.QueryPositions)
            _queryPositions = scope.Table("pos_embed", isFixed: true, spec.Queries, _width);
        _queries = scope.Table("query", false, spec.Queries, _width);
        _projection = scope.Matrix("proj", _width, _width);
        _keysAndValues = scope.Linear("kv_proj", spec.VisionSize, _width, bias: false);
        ModuleScope attention = scope.In("attn");
        Projection[] inputs = attention.Fused("in_proj", _width, _width, _width, _width);
        (_query, _key, _value) = (inputs[0], inputs[1], inputs[2]);
        _output = attention.Linear(
            "out_proj", _width, _width, noAdapter: spec.CallsOutProj ? null : ReadDirectly);
        _queryNorm = scope.LayerNorm("ln_q", _width, spec.LayerNormEpsilon);
        _keyNorm = scope.LayerNorm("ln_kv", _width, spec.LayerNormEpsilon);
        _postNorm = scope.LayerNorm("ln_post", _width, spec.LayerNormEpsilon);
    }

    /// <summary>features[patches, vision width] -> [pictures * queries, decoder width].</summary>
    public Tensor Forward(
        Graph graph, Tensor features, Tensor pictureStarts, ITensorProbe? probe)
    {
        Tensor values = _keyNorm.Run(graph, _keysAndValues.Run(graph, features));
        // The position of a patch is its column's sines and cosines, then its row's: two rows of
        // half the width from one table.
        int patches = values.Shape[0];
        Tensor keys = graph.Run(
            _gather, values.Reshape(2 * patches, _width / 2), _coordinates, _coordinateIds);
        keys = keys.Reshape(patches, _width);
        if (_times.Exists) keys = graph.Run(_gather, keys, _times, _timeIds);
        Tensor k = _key.Run(graph, keys);
        Tensor v = _value.Run(graph, values);
        // The queries are the same for all pictures: computed once, then repeated.
        // Looking them up first brings them from their storage type to that of activations.
        Tensor ids = _queryIds.Slice(0, _queryCount);
        Tensor q = _queryNorm.Run(graph, graph.Run(_repeat, _queries, ids));
        if (_queryPositions.Exists) q = graph.Run(_gather, q, _queryPositions, ids);
        q = _query.Run(graph, q);
        q = graph.Run(_repeat, q, _queryIds);
        Tensor y = graph.Run(_attention, q, k, v, _queryStarts,
            _groupStarts.Exists ? _groupStarts : pictureStarts, Tensor.None,
            _tiles.OfQueries, _tiles.OfKeys);
        y = _postNorm.Run(graph, _output.Run(graph, y));
        y = graph.Run(_project, y, _projection);
        probe?.Visit("resampler",
            y.Reshape(y.Shape[0] / _queryCount, _queryCount, y.Shape.Cols));
        return y;
    }

    public long Count(Batch batch)
    {
        int pictures = batch.PictureStarts.Count - 1;
        long queries = (long)pictures * _queryCount, keys = batch.PictureStarts[pictures];
        // With times: where groups start, each patch's time, and a row for each that occurs.
        long times = batch.Times.Count == 0 ? 0
            : pictures + 1 + keys + ((Distinct(batch).Count + 1L) * _width);
        return pictures + 1 + queries + (2 * keys) + times
            + BatchUpload.TileNumbers(queries, keys, pictures);
    }

    private static List<int> Distinct(Batch batch)
    {
        var ids = new SortedSet<int>();
        foreach (ViewTime time in batch.Times.Span)
            if (time.Id >= 0) ids.Add(time.Id);
        return [.. ids];
    }

    public void Load(Batch batch, BatchUpload upload)
    {
        Growing<int> ints = upload.Scratch;
        int pictures = batch.Grids.Count / 2, largest = 1;
        int[]? starts = batch.Times.Count > 0 ? GroupStarts(batch) : null;
        int groups = starts is null ? pictures : starts.Length - 1;
        ints.Clear();
        for (int i = 0; i <= groups; i++) ints.Add(i * _queryCount);
        _queryStarts = upload.Ints(ints.Span, "query starts");
        _tiles = upload.Tiles(ints.Span, starts ?? batch.PictureStarts.Span, causal: false);
        ints.Clear();
        for (int i = 0; i < groups * _queryCount; i++) ints.Add(i % _queryCount);
        _queryIds = upload.Ints(ints.Span, "query ids");
        ints.Clear();
        for (int i = 0; i < pictures; i++)
        {
            int rows = batch.Grids[2 * i], cols = batch.Grids[(2 * i) + 1];
            largest = Math.Max(largest, Math.Max(rows, cols));
            for (int r = 0; r < rows; r++)
                for (int c = 0; c < cols; c++)
                {
                    ints.Add(c);
                    ints.Add(r);
                }
        }

        _coordinateIds = upload.Ints(ints.Span, "coordinates");
        _groupStarts = _times = _timeIds = Tensor.None;
        if (starts is not null)
        {
            _groupStarts = upload.Ints(starts, "group starts");
            LoadTimes(batch, upload);
        }

        if (_coordinates.Exists && _coordinates.Shape[0] >= largest) return;
        int count = Math.Max(largest, _coordinates.Exists ? 2 * _coordinates.Shape[0] : 70);
        _coordinates =
            upload.Table(SinCos2D.Coordinates(count, _width), count, "coordinates");
    }

    // In patches, and the end.
    private static int[] GroupStarts(Batch batch)
    {
        var starts = new List<int>();
        int pictures = batch.Grids.Count / 2;
        for (int i = 0; i < pictures; i++)
            if (i >= batch.Times.Count || !batch.Times[i].Joined)
                starts.Add(batch.PictureStarts[i]);
        return [.. starts, batch.PictureStarts[pictures]];
    }

    // Times are rare and large numbers: a row for each that occurs, and before them one of zeros
    // for what has none.
    private void LoadTimes(Batch batch, BatchUpload upload)
    {
        List<int> distinct = Distinct(batch);
        if (distinct.Count == 0) return;
        var rows = new float[(distinct.Count + 1) * _width];
        for (int i = 0; i < distinct.Count; i++)
            SinCos1D.Write(distinct[i], rows.AsSpan((i + 1) * _width, _width));
        _times = upload.Floats(rows, "times").Reshape(distinct.Count + 1, _width);
        Growing<int> ints = upload.Scratch;
        ints.Clear();
        for (int i = 0; i + 1 < batch.PictureStarts.Count; i++)
        {
            int id = i < batch.Times.Count ? batch.Times[i].Id : -1;
            ints.Extend(batch.PictureStarts[i + 1] - batch.PictureStarts[i])
                .Fill(id < 0 ? 0 : distinct.BinarySearch(id) + 1);
        }

        _timeIds = upload.Ints(ints.Span, "time ids");
    }
}
