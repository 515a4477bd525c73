using MiniCpmNative.Kernels.Cuda;
using static MiniCpmNative.Kernels.Cuda.CudaCall;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// <see cref="Experts"/> on a GPU: section 17 of kernels.cu. How many rows an expert has only the
/// device knows: grids have room for any choice, and nothing is waited for. The products are
/// kernels of their own and not cuBLAS's, which would have to hear those numbers from the host, and
/// be called for each expert.
/// </summary>
internal readonly ref struct CudaExperts
{
    private const int TileRows = KernelConstants.ExpertTileRows,
        TileCols = KernelConstants.ExpertTileCols, RowsOf256 = 8;

    private readonly CudaCall _call;
    private readonly Routing _routing;
    private readonly Tensor _w, _w1, _begins, _experts, _terms, _places, _tiles;
    private readonly int _width, _inner;

    public CudaExperts(CudaCall call, int chosen)
    {
        _call = call;
        (_w, _w1) = (call.In(2), call.In(3));
        (_width, _inner) = (_w.Shape.Cols, _w1.Shape.Cols);
        int experts = call.Input(1).Shape.Cols;
        _routing = new Routing(experts, call.Input(1).Shape[0], chosen);
        Tensor ints = call.Saved(0);
        _begins = Part(ints, Routing.Begins, experts + 1);
        _experts = Part(ints, _routing.ExpertOf, _routing.Terms);
        _terms = Part(ints, _routing.TermAt, _routing.Terms);
        _places = Part(ints, _routing.PlaceOf, _routing.Terms);
        _tiles = Part(ints, _routing.Tiles, 2 * _routing.MostTiles);
    }

    private Tensor G => _call.Saved(1);

    private Tensor Hidden => _call.Saved(2);

    public void Forward()
    {
        int experts = _routing.Experts, terms = _routing.Terms;
        _call.Launch("route_experts", Grid.Rows(CeilingOf(_routing.Rows, RowsOf256)), _experts, G,
            _call.In(1), _routing.Rows, experts, _routing.Chosen);
        _call.Launch("sort_by_expert", Grid.Rows(experts), _begins, _terms, _places, _experts,
            experts, terms);
        _call.Launch("expert_tiles", Grid.Elements(experts), _tiles, _begins, experts,
            _routing.MostTiles);
        Multiply("expert_product", Hidden, _call.In(0), _w, _terms, _width, _inner, parts: 2,
            grids: 2);
        Tensor gate = Half(Hidden, 0), a = _call.Scratch(_call.Real, terms, _inner);
        _call.Launch("swiglu_forward", Grid.Vectors(a.Shape.Count, _call.Real), a, gate,
            Half(Hidden, 1), a.Shape.Count);
        Tensor y = _call.Scratch(_call.Real, terms, _width);
        Multiply("expert_product", y, a, _w1, Tensor.None, _inner, _width);
        Combine(y, G, new GradientTarget(_call.Output, Accumulate: false));
    }

    // With z = W1^T dy of a term:  dg = z . a;  da = g z;  dW1 = dy (g a)^T.
    public void Backward()
    {
        Tensor dy = _call.OutputGradient;
        GradientTarget dx = _call.Gradient(0), dLogits = _call.Gradient(1),
            dw = _call.FloatGradient(2), dw1 = _call.FloatGradient(3);
        int terms = _routing.Terms;
        Tensor z = _call.Scratch(_call.Real, terms, _inner);
        Multiply("expert_product_back", z, dy, _w1, _terms, _width, _inner);
        Tensor dHidden = _call.Scratch(_call.Real, 2 * terms, _inner),
            dg = _call.Scratch(DType.F32, terms), weighed = dw1.Wanted
                ? _call.Scratch(_call.Real, terms, _inner) : Tensor.None;
        _call.Launch("experts_backward", Grid.Rows(terms, _inner, _call.Real), dHidden, weighed, dg,
            z, Hidden, G, _terms, terms, _inner);
        if (dLogits.Wanted)
            _call.Launch("route_experts_backward",
                Grid.Rows(CeilingOf(_routing.Rows, RowsOf256)), dLogits.Buffer, dg, G, _experts,
                _routing.Rows, _routing.Experts, _routing.Chosen, dLogits.Accumulate);
        Gradient(dw1, dy, _terms, weighed, Tensor.None, _width, _inner);
        if (dw.Wanted)
            Gradient(dw, dHidden, Tensor.None, _call.In(0), _terms, _inner, _width, parts: 2);
        if (!dx.Wanted) return;
        Tensor rows = _call.Scratch(_call.Real, terms, _width);
        Multiply("expert_product_back", rows, dHidden, _w, Tensor.None, _inner, _width, parts: 2);
        Combine(rows, Tensor.None, dx);
    }

    private static Tensor Part(in Tensor ints, int begin, int count) => new(
        ints.Data + (nint)((long)begin * sizeof(int)), new Spec(DType.I32, new Shape(count)));

    private Tensor Half(in Tensor x, int half) => x.Slice(half * _routing.Terms, _routing.Terms);

    // y[place] = x[place, or the row of its term] times its expert's matrix of w.
    private void Multiply(string kernel, in Tensor y, in Tensor x, in Tensor w, in Tensor terms,
        int depth, int cols, int parts = 1, int grids = 1) =>
        _call.Launch(kernel,
            Blocks(CeilingOf(cols, TileCols), _routing.MostTiles, grids), y, x, w, _tiles, _begins,
            terms, _routing.Chosen, _routing.Terms, depth, cols, parts);

    // dw[expert] = sum of dy[place] x[place]^T over its places; of either the row of the term where
    // it has terms.
    private void Gradient(GradientTarget dw, in Tensor dy, in Tensor dyTerms, in Tensor x,
        in Tensor xTerms, int rows, int cols, int parts = 1)
    {
        if (dw.Wanted)
            _call.Launch("expert_gradient",
                Blocks(CeilingOf(cols, TileCols), parts * CeilingOf(rows, TileRows),
                    _routing.Experts), dw.Buffer, dy, x, _begins, dyTerms, xTerms, _routing.Chosen,
                _routing.Terms, rows, cols, parts, dw.Accumulate);
    }

    // y[row] = sum of g x over its terms, in the order of its choice.
    private void Combine(in Tensor x, in Tensor g, GradientTarget y) =>
        _call.Launch("combine_experts", Grid.Rows(_routing.Rows, _width, _call.Real), y.Buffer, x,
            g, _places, _routing.Chosen, _width, y.Accumulate);

    private Grid Blocks(int x, int y, int z) => new(new Dim3(x, y, z),
        KernelConstants.LoraThreads, CudaLoraProducts.SharedBytes(_call.Real));
}
