namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// The weight of one run of an operation: its input w, brought to the storage type of activations
/// where it has another, or a <see cref="Weight"/> of another kind.
/// </summary>
public readonly ref struct CudaWeight(CudaCall call, Tensor dense, Weight? other)
{
    private readonly CudaCall _call = call;
    private readonly Tensor _dense = call.As(dense, call.Real);

    /// <inheritdoc cref="Weight.Multiply(in CudaCall, CudaMatrix, CudaMatrix, double, double)"/>
    public void Multiply(CudaMatrix x, CudaMatrix y, double alpha = 1, double beta = 0)
    {
        if (_dense.Exists) _call.Multiply(x, ((CudaMatrix)_dense).T, y, alpha, beta);
        else other!.Multiply(_call, x, y, alpha, beta);
    }

    /// <inheritdoc
    /// cref="Weight.MultiplyTransposed(in CudaCall, CudaMatrix, CudaMatrix, double, double)"/>
    public void MultiplyTransposed(CudaMatrix x, CudaMatrix y, double alpha = 1, double beta = 0)
    {
        if (_dense.Exists) _call.Multiply(x, _dense, y, alpha, beta);
        else other!.MultiplyTransposed(_call, x, y, alpha, beta);
    }

    /// <summary>dx = dy W^T, or adds it, if it is wanted.</summary>
    public void Multiply(CudaMatrix dy, GradientTarget dx)
    {
        if (dx.Wanted) Multiply(dy, dx.Buffer, beta: dx.Accumulate ? 1 : 0);
    }

    /// <summary>dx = dy W, or adds it, if it is wanted.</summary>
    public void MultiplyTransposed(CudaMatrix dy, GradientTarget dx)
    {
        if (dx.Wanted) MultiplyTransposed(dy, dx.Buffer, beta: dx.Accumulate ? 1 : 0);
    }
}
