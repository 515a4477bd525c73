namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// A linear layer in one run of an operation, whose inputs from `first` on are w, b, a and bb; a and
/// bb are a low-rank adapter, or absent.
/// </summary>
/// <param name="call">The run.</param>
/// <param name="first">Number of the input w.</param>
/// <param name="weight">What stands for w where it is not dense.</param>
/// <param name="layer">Keys the adapter's mask.</param>
/// <param name="scale">alpha / rank.</param>
/// <param name="p">Probability of a zero.</param>
internal readonly ref struct CudaAdapter(
    CudaCall call, int first, Weight? weight, int layer, double scale, double p)
{
    private readonly CudaCall _call = call;

    private bool Exists => _call.Input(first + 2).Exists;

    /// <summary>y = x w^T + b + scale * h bb^T, h = drop(x) a^T; y may be none.</summary>
    // Without a mask every product is cuBLAS's: h = x a^T reads x once too. With one, h reads x
    // once and draws the mask on the way, where a dropped copy of x would be written and read
    // again. The adapter's part is stored first, in y and in dx, and the frozen weight's added to
    // it: what is rounded twice is then the smaller part, and nothing while bb is 0.
    public void Forward(CudaMatrix x, in Tensor y, in Tensor h)
    {
        Tensor b = _call.Floats(first + 1);
        if (Exists)
        {
            Tensor a = _call.In(first + 2);
            if (CudaLoraProducts.Drops(_call, p))
                new CudaLoraProducts(_call, x, [a], [layer], p).Down(_call, x, h);
            else
                _call.Multiply(x, ((CudaMatrix)a).T, h);
        }

        if (!y.Exists) return;
        if (b.Exists) _call.FillRows(y, b);
        if (Exists)
            _call.Multiply(
                h, ((CudaMatrix)_call.In(first + 3)).T, y, scale, beta: b.Exists ? 1 : 0);
        _call.Weight(first, weight).Multiply(x, y, beta: Exists || b.Exists ? 1 : 0);
    }

    /// <summary>The gradients of w, b, a and bb, and dx; x may be none where <see cref="ReadsX"/>
    /// is not.</summary>
    public void Backward(CudaMatrix x, in Tensor dy, in Tensor h, GradientTarget dx)
    {
        CudaMatrix own = dy;
        _call.Multiply(own.T, x, _call.AnyGradient(first));
        _call.SumRows(dy, _call.FloatGradient(first + 1));
        if (Exists) Adapter(x, own, h, dx);
        if (dx.Wanted)
            _call.Weight(first, weight)
                .MultiplyTransposed(own, dx.Buffer, beta: Exists || dx.Accumulate ? 1 : 0);
    }

    /// <summary>Whether the backward reads x: for the gradients of w and a.</summary>
    public bool ReadsX =>
        _call.AnyGradient(first).Wanted || _call.AnyGradient(first + 2).Wanted;

    private void Adapter(CudaMatrix x, CudaMatrix dy, in Tensor h, GradientTarget dx)
    {
        _call.Multiply(dy.T, h, _call.AnyGradient(first + 3), scale);
        GradientTarget da = _call.FloatGradient(first + 2);
        if (!dx.Wanted && !da.Wanted) return;
        Tensor a = _call.In(first + 2), t = _call.Scratch(_call.Real, dy.Rows, h.Shape.Cols);
        _call.Multiply(dy, _call.In(first + 3), t, scale);
        if (CudaLoraProducts.Drops(_call, p))
        {
            var masked = new CudaLoraProducts(_call, x, [a], [layer], p);
            if (da.Wanted) masked.GradientA(_call, x, t, [da]);
            if (dx.Wanted) masked.GradientX(_call, t, dx);
            return;
        }

        _call.Multiply(((CudaMatrix)t).T, x, da);
        _call.Multiply(t, a, dx);
    }
}
