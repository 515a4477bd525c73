using System.Numerics;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// The weight of one run of an operation: its input w as it lies, or a <see cref="Weight"/> of
/// another kind.
/// </summary>
public readonly unsafe ref struct CpuWeight<T>(CpuCall<T> call, Tensor dense, Weight? other)
    where T : unmanaged, IBinaryFloatingPointIeee754<T>
{
    private readonly CpuCall<T> _call = call;

    /// <inheritdoc cref="Weight.Multiply"/>
    public void Multiply(Matrix<T> x, Matrix<T> y, double alpha = 1, double beta = 0,
        Matrix<T> bias = default)
    {
        if (dense.Exists)
            _call.Gemm.Multiply(x.View, CpuCall<T>.View(dense).T, y.View, alpha, beta, bias.Data);
        else
            other!.Multiply(_call, x, y, alpha, beta, bias);
    }

    /// <inheritdoc cref="Weight.MultiplyTransposed"/>
    public void MultiplyTransposed(Matrix<T> x, Matrix<T> y, double alpha = 1, double beta = 0,
        Matrix<T> bias = default)
    {
        if (dense.Exists)
            _call.Gemm.Multiply(x.View, CpuCall<T>.View(dense), y.View, alpha, beta, bias.Data);
        else
            other!.MultiplyTransposed(_call, x, y, alpha, beta, bias);
    }

    /// <summary>dx = dy W^T, or adds it, if it is wanted.</summary>
    public void Multiply(Matrix<T> dy, Gradient<T> dx)
    {
        if (dx.Wanted) Multiply(dy, dx.Into, beta: dx.Accumulate ? 1 : 0);
    }

    /// <summary>dx = dy W, or adds it, if it is wanted.</summary>
    public void MultiplyTransposed(Matrix<T> dy, Gradient<T> dx)
    {
        if (dx.Wanted) MultiplyTransposed(dy, dx.Into, beta: dx.Accumulate ? 1 : 0);
    }
}
