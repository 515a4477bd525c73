namespace MiniCpmNative.Kernels.Cuda;

/// <summary>Entry points of cuBLAS: a handle, its stream, and the two general products.</summary>
public sealed unsafe class CublasApi
{
    /// <summary>cudaDataType_t of the storage types.</summary>
    public const int F32 = 0, F64 = 1, F16 = 2, BF16 = 14;

    /// <summary>cublasOperation_t: as it is, transposed.</summary>
    public const int AsIs = 0, Transposed = 1;

    /// <summary>cublasComputeType_t CUBLAS_COMPUTE_32F; cublasGemmAlgo_t
    /// CUBLAS_GEMM_DEFAULT.</summary>
    public const int Compute32F = 68, DefaultAlgorithm = -1;

    /// <summary>CUBLAS_COMPUTE_32F_FAST_TF32.</summary>
    public const int ComputeTf32 = 77;

    /// <summary>cublasMath_t CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: parts of a sum over
    /// k are added in the compute type, not in that of the result.</summary>
    public const int NoReducedPrecision = 16;

    public string Path { get; init; } = "";

    public delegate* unmanaged<nint*, int> Create;
    public delegate* unmanaged<nint, int> Destroy;
    public delegate* unmanaged<nint, int*, int> GetVersion;
    public delegate* unmanaged<nint, nint, int> SetStream;
    public delegate* unmanaged<nint, ulong, nuint, int> SetWorkspace;
    public delegate* unmanaged<nint, int, int> SetMathMode;

    /// <summary>handle, transA, transB, m, n, k, alpha, A, type, lda, B, type, ldb, beta, C, type,
    /// ldc, compute, algo.</summary>
    public delegate* unmanaged<
        nint, int, int, int, int, int, void*, ulong, int, int, ulong, int, int, void*, ulong, int,
            int, int, int,
        int> GemmEx;

    /// <summary>As GemmEx with a stride in elements after each leading dimension and a batch
    /// count.</summary>
    public delegate* unmanaged<
        nint, int, int, int, int, int, void*, ulong, int, int, long, ulong, int, int, long, void*,
            ulong, int, int,
        long, int, int, int, int> GemmStridedBatchedEx;

    /// <summary>Loads cuBLAS of a major version, cublasLt of the same major first.</summary>
    /// <exception cref="CudaUnavailableException">Not found, or an entry point is
    /// missing.</exception>
    public static CublasApi Load(CudaSearch search, int major)
    {
        search.Open(CudaLibrary.CublasLt, major);
        var l = search.Open(CudaLibrary.Cublas, major);
        return new()
        {
            Path = l.Path,
            Create = (delegate* unmanaged<nint*, int>)l["cublasCreate_v2"],
            Destroy = (delegate* unmanaged<nint, int>)l["cublasDestroy_v2"],
            GetVersion = (delegate* unmanaged<nint, int*, int>)l["cublasGetVersion_v2"],
            SetStream = (delegate* unmanaged<nint, nint, int>)l["cublasSetStream_v2"],
            SetWorkspace = (delegate* unmanaged<nint, ulong, nuint, int>)l["cublasSetWorkspace_v2"],
            SetMathMode = (delegate* unmanaged<nint, int, int>)l["cublasSetMathMode"],
            GemmEx = (delegate* unmanaged<
                nint, int, int, int, int, int, void*, ulong, int, int, ulong, int, int, void*,
                ulong, int, int, int,
                int, int>)l["cublasGemmEx"],
            GemmStridedBatchedEx = (delegate* unmanaged<
                nint, int, int, int, int, int, void*, ulong, int, int, long, ulong, int, int, long,
                void*, ulong,
                int, int, long, int, int, int, int>)l["cublasGemmStridedBatchedEx"],
        };
    }

    /// <summary>Throws unless the status is CUBLAS_STATUS_SUCCESS.</summary>
    public static void Check(int status, string call, string what = "")
    {
        if (status == 0) return;
        string reason = status switch
        {
            1 => "CUBLAS_STATUS_NOT_INITIALIZED",
            3 => "CUBLAS_STATUS_ALLOC_FAILED",
            7 => "CUBLAS_STATUS_INVALID_VALUE",
            8 => "CUBLAS_STATUS_ARCH_MISMATCH",
            11 => "CUBLAS_STATUS_MAPPING_ERROR",
            13 => "CUBLAS_STATUS_EXECUTION_FAILED",
            14 => "CUBLAS_STATUS_INTERNAL_ERROR",
            15 => "CUBLAS_STATUS_NOT_SUPPORTED",
            _ => $"status {status}",
        };
        throw new CudaException($"{call}: {reason}" + (what.Length > 0 ? $" ({what})" : ""),
            status);
    }
}
