namespace MiniCpmNative.GpuEmulator.Driver;

/// <summary>CUresult values that the emulated driver returns, with their names.</summary>
internal static class Results
{
    public const int Success = 0, InvalidValue = 1, OutOfMemory = 2, NotInitialised = 3,
        NoDevice = 100,
        InvalidDevice = 101, InvalidContext = 201, InvalidPtx = 218, UnsupportedPtxVersion = 222,
        InvalidHandle = 400, NotFound = 500, NotReady = 600, IllegalAddress = 700,
            LaunchOutOfResources = 701,
        MisalignedAddress = 716, LaunchFailed = 719;

    public static string Name(int result) => result switch
    {
        Success => "CUDA_SUCCESS",
        InvalidValue => "CUDA_ERROR_INVALID_VALUE",
        OutOfMemory => "CUDA_ERROR_OUT_OF_MEMORY",
        NotInitialised => "CUDA_ERROR_NOT_INITIALIZED",
        NoDevice => "CUDA_ERROR_NO_DEVICE",
        InvalidDevice => "CUDA_ERROR_INVALID_DEVICE",
        InvalidContext => "CUDA_ERROR_INVALID_CONTEXT",
        InvalidPtx => "CUDA_ERROR_INVALID_PTX",
        UnsupportedPtxVersion => "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        InvalidHandle => "CUDA_ERROR_INVALID_HANDLE",
        NotFound => "CUDA_ERROR_NOT_FOUND",
        NotReady => "CUDA_ERROR_NOT_READY",
        IllegalAddress => "CUDA_ERROR_ILLEGAL_ADDRESS",
        LaunchOutOfResources => "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
        MisalignedAddress => "CUDA_ERROR_MISALIGNED_ADDRESS",
        LaunchFailed => "CUDA_ERROR_LAUNCH_FAILED",
        _ => $"CUDA_ERROR_{result}",
    };

    /// <summary>The result a real driver would give for such a fault.</summary>
    public static int Of(Check check) => check switch
    {
        Check.Misaligned => MisalignedAddress,
        Check.OutOfBounds or Check.UseAfterFree or Check.ForeignPointer or Check.ConstantWrite =>
            IllegalAddress,
        _ => LaunchFailed,
    };
}
