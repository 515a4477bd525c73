using System.Numerics;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels;

/// <summary>
/// What a projection multiplies by, W[Outputs, Inputs]: the object between a file and the
/// operations. A kind says how W lies in memory and multiplies by it; Linear, LoraLinear and the
/// model above them never know which. A new kind is a class of its own and touches no operation.
/// Dense weights are the operation's input w, so that the tape can give them a gradient; all other
/// kinds are frozen, stand in no input and are handed to the operation's constructor.
/// </summary>
public abstract class Weight
{
    public abstract int Outputs { get; }

    public abstract int Inputs { get; }

    /// <summary>Bytes of device memory that it holds for the whole run.</summary>
    public abstract long Bytes { get; }

    /// <summary>What the operation takes as its input w; nothing but for dense weights.</summary>
    public virtual Tensor Tensor => Tensor.None;

    /// <summary>
    /// y = alpha x W^T + beta y + bias. x[rows, Inputs], y[rows, Outputs], bias[Outputs] or none.
    /// With beta 0 y is not read. Scratch comes from the call; nothing is allocated.
    /// </summary>
    public abstract void Multiply<T>(in CpuCall<T> call, Matrix<T> x, Matrix<T> y, double alpha,
        double beta, Matrix<T> bias)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>;

    /// <summary>
    /// y = alpha x W + beta y + bias. x[rows, Outputs], y[rows, Inputs], bias[Inputs] or none: the
    /// gradient dx = dy W.
    /// </summary>
    /// <inheritdoc cref="Multiply"/>
    public abstract void MultiplyTransposed<T>(in CpuCall<T> call, Matrix<T> x, Matrix<T> y,
        double alpha, double beta, Matrix<T> bias)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>;

    /// <summary>
    /// Queues y = alpha x W^T + beta y. x[rows, Inputs] in the storage type of activations,
    /// y[rows, Outputs] in that or F32. With beta 0 y is not read.
    /// </summary>
    public abstract void Multiply(in CudaCall call, CudaMatrix x, CudaMatrix y, double alpha,
        double beta);

    /// <summary>Queues y = alpha x W + beta y. x[rows, Outputs], y[rows, Inputs].</summary>
    public abstract void MultiplyTransposed(in CudaCall call, CudaMatrix x, CudaMatrix y,
        double alpha, double beta);

    public override string ToString() => $"{GetType().Name}[{Outputs}, {Inputs}]";
}

/// <summary>
/// A plain matrix: row-major or packed, in any float storage, trainable or frozen.
/// </summary>
public sealed class DenseWeight(Tensor tensor, long? bytes = null) : Weight
{
    public override int Outputs => Tensor.Shape[0];

    public override int Inputs => Tensor.Shape[1];

    public override long Bytes => bytes ?? Tensor.Spec.Bytes;

    public override Tensor Tensor { get; } = tensor;

    public override void Multiply<T>(in CpuCall<T> call, Matrix<T> x, Matrix<T> y, double alpha,
        double beta, Matrix<T> bias) =>
        new CpuWeight<T>(call, Tensor, null).Multiply(x, y, alpha, beta, bias);

    public override void MultiplyTransposed<T>(in CpuCall<T> call, Matrix<T> x, Matrix<T> y,
        double alpha, double beta, Matrix<T> bias) =>
        new CpuWeight<T>(call, Tensor, null).MultiplyTransposed(x, y, alpha, beta, bias);

    public override void Multiply(in CudaCall call, CudaMatrix x, CudaMatrix y, double alpha,
        double beta) =>
        new CudaWeight(call, Tensor, null).Multiply(x, y, alpha, beta);

    public override void MultiplyTransposed(in CudaCall call, CudaMatrix x, CudaMatrix y,
        double alpha, double beta) =>
        new CudaWeight(call, Tensor, null).MultiplyTransposed(x, y, alpha, beta);
}
