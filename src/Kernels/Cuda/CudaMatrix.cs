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

    /// <summary>Rows begin..begin+count of a matrix as it lies.</summary>
    public CudaMatrix RowsFrom(int begin, int count) =>
        Part((long)begin * Data.Shape.Cols, count, Cols);

    /// <summary>Columns begin..begin+count of a matrix as it lies.</summary>
    public CudaMatrix ColumnsFrom(int begin, int count) => Part(begin, Rows, count);

    private CudaMatrix Part(long offset, int rows, int cols)
    {
        if (IsTransposed) throw new ShapeException($"a part of a transposed {Data.Spec}");
        nint address = Data.Data + (nint)(offset * Data.Type.Size());
        return new(Data with { Data = address }, rows, cols, false);
    }
}
