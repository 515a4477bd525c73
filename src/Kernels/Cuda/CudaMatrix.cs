namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// A row-major matrix on the device as an operand of a product, as it lies or transposed: the first
/// columns of Data, all of them but where rows are padded.
/// </summary>
public readonly record struct CudaMatrix(Tensor Data, int Rows, int Cols, bool IsTransposed)
{
    /// <summary>All axes but the last are rows.</summary>
    public static implicit operator CudaMatrix(in Tensor tensor) =>
        new(tensor, checked((int)tensor.Shape.Rows), tensor.Shape.Cols, false);

    public CudaMatrix T => new(Data, Cols, Rows, !IsTransposed);
}
