using System.Runtime.InteropServices;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.GpuEmulator.Driver;

/// <summary>
/// cuBLAS's table: refuses what the real library refuses at the call (types, operations, leading
/// dimensions, null pointers) and queues the product, whose memory is checked when it runs.
/// </summary>
internal static unsafe class CublasEntryPoints
{
    private const int Success = 0, NotInitialised = 1, InvalidValue = 7, NotSupported = 15;

    /// <summary>A handle: which stream its work goes to.</summary>
    private sealed class Handle
    {
        public nint Stream { get; set; }
    }

    private static EmulatedGpu Gpu => EmulatedGpu.Current
        ?? throw new InvalidOperationException("no emulated GPU exists");

    public static CublasApi Table() => new()
    {
        Path = "the emulator",
        Create = &Create,
        Destroy = &Destroy,
        GetVersion = &GetVersion,
        SetStream = &SetStream,
        SetWorkspace = &SetWorkspace,
        SetMathMode = &SetMathMode,
        GemmEx = &GemmEx,
        GemmStridedBatchedEx = &GemmStridedBatchedEx,
    };

    [UnmanagedCallersOnly]
    private static int Create(nint* handle)
    {
        lock (Gpu.Gate) *handle = Gpu.Register(new Handle());
        return Success;
    }

    [UnmanagedCallersOnly]
    private static int Destroy(nint handle)
    {
        var gpu = Gpu;
        lock (gpu.Gate)
        {
            if (gpu.Find<Handle>(handle) == null) return NotInitialised;
            gpu.Forget(handle);
            return Success;
        }
    }

    [UnmanagedCallersOnly]
    private static int GetVersion(nint handle, int* version)
    {
        if (Gpu.Find<Handle>(handle) == null) return NotInitialised;
        *version = 130000;
        return Success;
    }

    [UnmanagedCallersOnly]
    private static int SetStream(nint handle, nint stream)
    {
        var gpu = Gpu;
        lock (gpu.Gate)
        {
            if (gpu.Find<Handle>(handle) is not { } h) return NotInitialised;
            if (gpu.Stream(stream) == null) return InvalidValue;
            h.Stream = stream;
            return Success;
        }
    }

    // Sums are float here in any case; other modes would compute what this does not.
    [UnmanagedCallersOnly]
    private static int SetMathMode(nint handle, int mode)
    {
        if (Gpu.Find<Handle>(handle) == null) return NotInitialised;
        return mode is 0 or CublasApi.NoReducedPrecision ? Success : InvalidValue;
    }

    [UnmanagedCallersOnly]
    private static int SetWorkspace(nint handle, ulong workspace, nuint bytes)
    {
        var gpu = Gpu;
        lock (gpu.Gate)
        {
            if (gpu.Find<Handle>(handle) == null) return NotInitialised;
            if (workspace % 256 != 0) return InvalidValue;
            return bytes == 0 || gpu.Memory.Refusal(workspace, (long)bytes) == null ? Success
                : InvalidValue;
        }
    }

    [UnmanagedCallersOnly]
    private static int GemmEx(
        nint handle, int transA, int transB, int m, int n, int k, void* alpha, ulong a, int typeA,
            int lda, ulong b,
        int typeB, int ldb, void* beta, ulong c, int typeC, int ldc, int compute, int algorithm) =>
        Enqueue(handle, alpha, beta, compute, new(
            "cublasGemmEx", transA, transB, m, n, k, new(a, typeA, lda, 0), new(b, typeB, ldb, 0),
            new(c, typeC, ldc, 0), 1));

    [UnmanagedCallersOnly]
    private static int GemmStridedBatchedEx(
        nint handle, int transA, int transB, int m, int n, int k, void* alpha, ulong a, int typeA,
            int lda,
        long strideA, ulong b, int typeB, int ldb, long strideB, void* beta, ulong c, int typeC,
        int ldc,
        long strideC, int count, int compute, int algorithm) =>
        Enqueue(handle, alpha, beta, compute, new(
            "cublasGemmStridedBatchedEx", transA, transB, m, n, k, new(a, typeA, lda, strideA),
            new(b, typeB, ldb, strideB), new(c, typeC, ldc, strideC), count));

    private static int Enqueue(nint handle, void* alpha, void* beta, int compute, Gemm gemm)
    {
        var gpu = Gpu;
        lock (gpu.Gate)
        {
            if (gpu.Find<Handle>(handle) is not { } h) return NotInitialised;
            bool tf32 = compute == CublasApi.ComputeTf32;
            if (alpha == null || beta == null || (compute != CublasApi.Compute32F && !tf32))
                return InvalidValue;
            // Scalars are read at the call: pointer mode is the host's.
            gemm = gemm with { Alpha = *(float*)alpha, Beta = *(float*)beta, Tf32 = tf32 };
            if (gemm.RefusedValue() is { } reason)
            {
                gpu.LastError = reason;
                return InvalidValue;
            }
            if (!gemm.IsSupported()) return NotSupported;
            if (gpu.Fault != null) return 13;
            gpu.Stream(h.Stream)!.Work.Enqueue((null, () => gemm.Run(gpu)));
            return Success;
        }
    }
}
