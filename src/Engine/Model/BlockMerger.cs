using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// Makes one feature of each square of 2 x 2 neighbours (V-4_6): y = linear_2(gelu(linear_1(norm(
/// [x1 x2 x3 x4])))), with the exact GELU. features[P, vision width] -> [P / 4, decoder width].
/// </summary>
public sealed class BlockMerger : IJoiner
{
    private static readonly Embedding s_order = new();
    private static readonly Gelu s_gelu = new(GeluKind.Erf);

    private readonly Norm _norm;
    private readonly Projection _up, _down;
    private readonly MergerSpec _spec;
    private Tensor _order;

    public BlockMerger(MergerSpec spec, ModuleScope scope)
    {
        _spec = spec;
        int width = Squares.Size * spec.VisionSize;
        ModuleScope mlp = scope.In("mlp").In(0);
        _norm = mlp.LayerNorm("pre_norm", width, spec.LayerNormEpsilon);
        _up = mlp.Linear("linear_1", width, width);
        mlp.Module("act");
        _down = mlp.Linear("linear_2", width, spec.HiddenSize);
    }

    public Tensor Forward(
        Graph graph, Tensor features, Tensor pictureStarts, ITensorProbe? probe)
    {
        Tensor x = graph.Run(s_order, features, _order);
        x = _norm.Run(graph, x.Reshape(x.Shape[0] / Squares.Size, Squares.Size * x.Shape.Cols));
        x = _down.Run(graph, graph.Run(s_gelu, _up.Run(graph, x)));
        probe?.Visit("merger", x);
        return x;
    }

    public long Count(Batch batch) => batch.PictureStarts[batch.PictureStarts.Count - 1];

    public void Load(Batch batch, BatchUpload upload)
    {
        Growing<int> ints = upload.Scratch;
        ints.Clear();
        Squares.Append(batch, _spec.Halved ? 2 : 1, ints);
        _order = upload.Ints(ints.Span, "square order");
    }
}
