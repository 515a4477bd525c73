using System.Numerics;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// A linear layer, with a low-rank adapter where it has one, in one run of an operation, whose
/// inputs from `first` on are w, b, a and bb.
/// </summary>
/// <param name="call">The run.</param>
/// <param name="first">Number of the input w.</param>
/// <param name="weight">What stands for w where it is not dense.</param>
/// <param name="layer">Keys the adapter's mask.</param>
/// <param name="scale">alpha / rank.</param>
/// <param name="p">Probability of a zero.</param>
internal readonly unsafe ref struct CpuAdapter<T>(
    CpuCall<T> call, int first, Weight? weight, int layer, double scale, double p)
    where T : unmanaged, IBinaryFloatingPointIeee754<T>
{
    // Elements of the dropped copy of x that exist at a time: it stays in the second-level cache.
    private const int TileElements = 1 << 18;

    private readonly CpuCall<T> _call = call;

    /// <summary>y = x w^T + b + scale * h bb^T, h = drop(x) a^T; y may be none.</summary>
    public void Forward(Matrix<T> x, Matrix<T> y, Matrix<T> h)
    {
        if (y.Exists) _call.Weight(first, weight).Multiply(x, y, bias: _call.In(first + 1));
        if (!_call.Input(first + 2).Exists) return;
        Down(x, h);
        if (y.Exists)
            _call.Gemm.Multiply(h.View, _call.View(first + 3).T, y.View, scale, beta: 1);
    }

    /// <summary>h = drop(x) a^T.</summary>
    public void Down(Matrix<T> x, Matrix<T> h)
    {
        MatrixView a = _call.View(first + 2);
        Dropout<T> dropout = Mask();
        if (!dropout.Active)
        {
            _call.Gemm.Multiply(x.View, a.T, h.View);
        }
        else
        {
            int tile = TileRows(x);
            Matrix<T> dropped = _call.Scratch(new Shape(tile, x.Cols));
            for (int r = 0; r < x.Rows; r += tile)
            {
                Matrix<T> rows = x.Slice(r, tile), kept = dropped.Slice(0, rows.Rows);
                dropout.Apply(_call.Workers, rows, r, kept, accumulate: false);
                _call.Gemm.Multiply(kept.View, a.T, h.Slice(r, tile).View);
            }
        }
    }

    // With t = scale * dy bb: dbb = scale * dy^T h, da = t^T drop(x), dx = dy w + mask * (t a).
    public void Backward(Matrix<T> x, Matrix<T> dy, Matrix<T> h, Gradient<T> dx)
    {
        _call.Weight(first, weight).MultiplyTransposed(dy, dx);
        _call.Multiply(dy.View.T, x.View, _call.Gradient(first));
        Sum.Rows(_call, dy, _call.Gradient(first + 1));
        if (!_call.Input(first + 2).Exists) return;
        Gradient<T> da = _call.Gradient(first + 2);
        _call.Multiply(dy.View.T, h.View, _call.Gradient(first + 3), scale);
        if (!dx.Wanted && !da.Wanted) return;
        Matrix<T> t = _call.Scratch(new Shape(h.Rows, h.Cols));
        _call.Gemm.Multiply(dy.View, _call.View(first + 3), t.View, scale);
        BackDown(x, t, dx);
    }

    /// <summary>da = t^T drop(x), or adds it, and dx += mask * (t a), where they are
    /// wanted.</summary>
    public void BackDown(Matrix<T> x, Matrix<T> t, Gradient<T> dx)
    {
        Gradient<T> da = _call.Gradient(first + 2);
        Dropout<T> dropout = Mask();
        if (dropout.Active && x.Rows > 0)
        {
            BackThroughMask(dropout, x, t, dx, da);
            return;
        }

        _call.Multiply(t.View.T, x.View, da);
        if (dx.Wanted) _call.Gemm.Multiply(t.View, _call.View(first + 2), dx.Into.View, beta: 1);
    }

    private void BackThroughMask(
        Dropout<T> dropout, Matrix<T> x, Matrix<T> t, Gradient<T> dx, Gradient<T> da)
    {
        int tile = TileRows(x);
        Matrix<T> scratch = _call.Scratch(new Shape(tile, x.Cols));
        for (int r = 0; r < x.Rows; r += tile)
        {
            Matrix<T> rows = x.Slice(r, tile), part = t.Slice(r, tile);
            Matrix<T> masked = scratch.Slice(0, rows.Rows);
            if (da.Wanted)
            {
                dropout.Apply(_call.Workers, rows, r, masked, accumulate: false);
                _call.Multiply(part.View.T, masked.View, new(da.Into, da.Accumulate || r > 0));
            }

            if (!dx.Wanted) continue;
            _call.Gemm.Multiply(part.View, _call.View(first + 2), masked.View);
            dropout.Apply(_call.Workers, masked, r, dx.Into.Slice(r, tile), accumulate: true);
        }
    }

    private Dropout<T> Mask() => new(_call.Random, layer, p);

    private static int TileRows(Matrix<T> x) =>
        Math.Min(Math.Max(32, TileElements / Math.Max(1, x.Cols)), Math.Max(1, x.Rows));
}
