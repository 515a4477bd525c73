namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// Products by cuBLAS, which sees row-major matrices as the transposed ones: c = a b is
/// c^T = b^T a^T there. Sums are float, whatever the storage types: no parts of one are added in 16
/// bits, and TF32 is not used unless asked for.
/// </summary>
internal sealed unsafe class CudaGemm : IDisposable
{
    // What cuBLAS recommends for its workspace; given explicitly,
    // results do not depend on the stream.
    private const long WorkspaceBytes = 32L << 20;

    private readonly CublasApi _cublas;
    private readonly DeviceSlab _workspace;
    private readonly nint _handle;

    public CudaGemm(CudaContext context, CudaStream stream)
    {
        _cublas = context.Api.Cublas;
        nint handle = 0;
        CublasApi.Check(_cublas.Create(&handle), "cublasCreate");
        _handle = handle;
        CublasApi.Check(_cublas.SetStream(handle, stream.Handle), "cublasSetStream");
        CublasApi.Check(
            _cublas.SetMathMode(handle, CublasApi.NoReducedPrecision), "cublasSetMathMode");
        _workspace = new(context, WorkspaceBytes);
        CublasApi.Check(
            _cublas.SetWorkspace(handle, _workspace.Address, (nuint)WorkspaceBytes),
            "cublasSetWorkspace");
    }

    /// <summary>Whether products of F32 are made in TF32.</summary>
    public bool Tf32 { get; set; }

    public int Version
    {
        get
        {
            int version = 0;
            CublasApi.Check(_cublas.GetVersion(_handle, &version), "cublasGetVersion");
            return version;
        }
    }

    /// <summary>
    /// c = alpha a b + beta c. a[m, k] and b[k, n] of one type; c[m, n] of that type or F32; m, n
    /// and k are not 0.
    /// </summary>
    public void Multiply(CudaMatrix a, CudaMatrix b, CudaMatrix c, double alpha, double beta)
    {
        if (a.Cols != b.Rows || a.Rows != c.Rows || b.Cols != c.Cols || c.IsTransposed)
            throw new ShapeException(
                $"product of [{a.Rows}, {a.Cols}] and [{b.Rows}, {b.Cols}] into [{c.Rows}, "
                    + $"{c.Cols}]");
        float scale = (float)alpha, keep = (float)beta;
        int result =
            _cublas.GemmEx(_handle, Operation(b), Operation(a), c.Cols, c.Rows, a.Cols, &scale,
            (ulong)b.Data.Data, TypeOf(b), Stride(b), (ulong)a.Data.Data, TypeOf(a),
            Stride(a), &keep, (ulong)c.Data.Data, TypeOf(c), Stride(c),
            Tf32 && a.Data.Type == DType.F32 ? CublasApi.ComputeTf32 : CublasApi.Compute32F,
            CublasApi.DefaultAlgorithm);
        if (result != 0)
            CublasApi.Check(result, "cublasGemmEx", $"{c.Data.Spec} = {a.Data.Spec} {b.Data.Spec}");
    }

    public void Dispose()
    {
        _cublas.Destroy(_handle);
        _workspace.Dispose();
    }

    private static int Operation(CudaMatrix m) =>
        m.IsTransposed ? CublasApi.Transposed : CublasApi.AsIs;

    private static int Stride(CudaMatrix m) => m.Data.Shape.Cols;

    private static int TypeOf(CudaMatrix m) => m.Data.Type switch
    {
        DType.F32 => CublasApi.F32,
        DType.BF16 => CublasApi.BF16,
        _ => throw new ShapeException($"no product of {m.Data.Spec}"),
    };
}
