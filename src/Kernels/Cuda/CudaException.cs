namespace MiniCpmNative.Kernels.Cuda;

/// <summary>A call to the CUDA driver, NVRTC or cuBLAS failed; one line with the call and its
/// error.</summary>
public sealed class CudaException(string message, int code = 0) : Exception(message)
{
    /// <summary>The library's result code; 0 when the failure is not a library's.</summary>
    public int Code { get; } = code;
}

/// <summary>CUDA cannot be used here: one line that says what was looked for, where, what to
/// do.</summary>
public sealed class CudaUnavailableException(string message) : Exception(message);
