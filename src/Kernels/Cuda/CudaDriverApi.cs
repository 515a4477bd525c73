using System.Runtime.InteropServices;

namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// Entry points of the CUDA driver (libcuda), under their names without the version suffix. Filled
/// from the library, or by the tests' emulator. Device pointers are ulong, handles nint.
/// </summary>
public sealed unsafe class CudaDriverApi
{
    /// <summary>Where the library was found.</summary>
    public string Path { get; init; } = "";

    public delegate* unmanaged<uint, int> Init;
    public delegate* unmanaged<int*, int> DriverGetVersion;
    public delegate* unmanaged<int*, int> DeviceGetCount;
    public delegate* unmanaged<int*, int, int> DeviceGet;
    public delegate* unmanaged<byte*, int, int, int> DeviceGetName;
    public delegate* unmanaged<int*, int, int, int> DeviceGetAttribute;
    public delegate* unmanaged<nuint*, int, int> DeviceTotalMem;
    public delegate* unmanaged<nint*, int, int> DevicePrimaryCtxRetain;
    public delegate* unmanaged<int, int> DevicePrimaryCtxRelease;
    public delegate* unmanaged<nint, int> CtxSetCurrent;
    public delegate* unmanaged<int> CtxSynchronize;
    public delegate* unmanaged<nuint*, nuint*, int> MemGetInfo;
    public delegate* unmanaged<ulong*, nuint, int> MemAlloc;
    public delegate* unmanaged<ulong, int> MemFree;
    public delegate* unmanaged<void**, nuint, uint, int> MemHostAlloc;
    public delegate* unmanaged<void*, int> MemFreeHost;
    public delegate* unmanaged<ulong, void*, nuint, nint, int> MemcpyHtoDAsync;
    public delegate* unmanaged<void*, ulong, nuint, nint, int> MemcpyDtoHAsync;
    public delegate* unmanaged<ulong, ulong, nuint, nint, int> MemcpyDtoDAsync;
    public delegate* unmanaged<ulong, byte, nuint, nint, int> MemsetD8Async;
    public delegate* unmanaged<ulong, uint, nuint, nint, int> MemsetD32Async;
    public delegate* unmanaged<nint*, uint, int> StreamCreate;
    public delegate* unmanaged<nint, int> StreamDestroy;
    public delegate* unmanaged<nint, int> StreamSynchronize;
    public delegate* unmanaged<nint, nint, uint, int> StreamWaitEvent;
    public delegate* unmanaged<nint*, uint, int> EventCreate;
    public delegate* unmanaged<nint, int> EventDestroy;
    public delegate* unmanaged<nint, nint, int> EventRecord;
    public delegate* unmanaged<nint, int> EventSynchronize;
    public delegate* unmanaged<nint, int> EventQuery;
    public delegate* unmanaged<float*, nint, nint, int> EventElapsedTime;
    public delegate* unmanaged<nint*, void*, uint, int*, void**, int> ModuleLoadDataEx;
    public delegate* unmanaged<nint, int> ModuleUnload;
    public delegate* unmanaged<nint*, nint, byte*, int> ModuleGetFunction;
    public delegate* unmanaged<nint, int, int, int> FuncSetAttribute;
    public delegate* unmanaged<int*, int, nint, int> FuncGetAttribute;
    public delegate* unmanaged<int*, nint, int, nuint, int> OccupancyMaxActiveBlocks;
    public delegate* unmanaged<
        nint, uint, uint, uint, uint, uint, uint, uint, nint, void**, void**, int> LaunchKernel;
    public delegate* unmanaged<int, byte**, int> GetErrorName;
    public delegate* unmanaged<int, byte**, int> GetErrorString;

    /// <summary>Loads libcuda from where the search finds it; does not initialise it.</summary>
    /// <exception cref="CudaUnavailableException">Not found, or an entry point is
    /// missing.</exception>
    public static CudaDriverApi Load(CudaSearch search) =>
        From(search.Open(CudaLibrary.Driver, major: 0));

    private static CudaDriverApi From(LoadedLibrary l) => new()
    {
        Path = l.Path,
        Init = (delegate* unmanaged<uint, int>)l["cuInit"],
        DriverGetVersion = (delegate* unmanaged<int*, int>)l["cuDriverGetVersion"],
        DeviceGetCount = (delegate* unmanaged<int*, int>)l["cuDeviceGetCount"],
        DeviceGet = (delegate* unmanaged<int*, int, int>)l["cuDeviceGet"],
        DeviceGetName = (delegate* unmanaged<byte*, int, int, int>)l["cuDeviceGetName"],
        DeviceGetAttribute = (delegate* unmanaged<int*, int, int, int>)l["cuDeviceGetAttribute"],
        DeviceTotalMem = (delegate* unmanaged<nuint*, int, int>)l["cuDeviceTotalMem_v2"],
        DevicePrimaryCtxRetain =
            (delegate* unmanaged<nint*, int, int>)l["cuDevicePrimaryCtxRetain"],
        DevicePrimaryCtxRelease = (delegate* unmanaged<int, int>)l["cuDevicePrimaryCtxRelease_v2"],
        CtxSetCurrent = (delegate* unmanaged<nint, int>)l["cuCtxSetCurrent"],
        CtxSynchronize = (delegate* unmanaged<int>)l["cuCtxSynchronize"],
        MemGetInfo = (delegate* unmanaged<nuint*, nuint*, int>)l["cuMemGetInfo_v2"],
        MemAlloc = (delegate* unmanaged<ulong*, nuint, int>)l["cuMemAlloc_v2"],
        MemFree = (delegate* unmanaged<ulong, int>)l["cuMemFree_v2"],
        MemHostAlloc = (delegate* unmanaged<void**, nuint, uint, int>)l["cuMemHostAlloc"],
        MemFreeHost = (delegate* unmanaged<void*, int>)l["cuMemFreeHost"],
        MemcpyHtoDAsync =
            (delegate* unmanaged<ulong, void*, nuint, nint, int>)l["cuMemcpyHtoDAsync_v2"],
        MemcpyDtoHAsync =
            (delegate* unmanaged<void*, ulong, nuint, nint, int>)l["cuMemcpyDtoHAsync_v2"],
        MemcpyDtoDAsync =
            (delegate* unmanaged<ulong, ulong, nuint, nint, int>)l["cuMemcpyDtoDAsync_v2"],
        MemsetD8Async = (delegate* unmanaged<ulong, byte, nuint, nint, int>)l["cuMemsetD8Async"],
        MemsetD32Async = (delegate* unmanaged<ulong, uint, nuint, nint, int>)l["cuMemsetD32Async"],
        StreamCreate = (delegate* unmanaged<nint*, uint, int>)l["cuStreamCreate"],
        StreamDestroy = (delegate* unmanaged<nint, int>)l["cuStreamDestroy_v2"],
        StreamSynchronize = (delegate* unmanaged<nint, int>)l["cuStreamSynchronize"],
        StreamWaitEvent = (delegate* unmanaged<nint, nint, uint, int>)l["cuStreamWaitEvent"],
        EventCreate = (delegate* unmanaged<nint*, uint, int>)l["cuEventCreate"],
        EventDestroy = (delegate* unmanaged<nint, int>)l["cuEventDestroy_v2"],
        EventRecord = (delegate* unmanaged<nint, nint, int>)l["cuEventRecord"],
        EventSynchronize = (delegate* unmanaged<nint, int>)l["cuEventSynchronize"],
        EventQuery = (delegate* unmanaged<nint, int>)l["cuEventQuery"],
        EventElapsedTime = (delegate* unmanaged<float*, nint, nint, int>)l["cuEventElapsedTime"],
        ModuleLoadDataEx =
            (delegate* unmanaged<nint*, void*, uint, int*, void**, int>)l["cuModuleLoadDataEx"],
        ModuleUnload = (delegate* unmanaged<nint, int>)l["cuModuleUnload"],
        ModuleGetFunction = (delegate* unmanaged<nint*, nint, byte*, int>)l["cuModuleGetFunction"],
        FuncSetAttribute = (delegate* unmanaged<nint, int, int, int>)l["cuFuncSetAttribute"],
        FuncGetAttribute = (delegate* unmanaged<int*, int, nint, int>)l["cuFuncGetAttribute"],
        OccupancyMaxActiveBlocks =
            (delegate* unmanaged<int*, nint, int, nuint,
            int>)l["cuOccupancyMaxActiveBlocksPerMultiprocessor"],
        LaunchKernel = (delegate* unmanaged<
            nint, uint, uint, uint, uint, uint, uint, uint, nint, void**, void**,
            int>)l["cuLaunchKernel"],
        GetErrorName = (delegate* unmanaged<int, byte**, int>)l["cuGetErrorName"],
        GetErrorString = (delegate* unmanaged<int, byte**, int>)l["cuGetErrorString"],
    };

    /// <summary>Throws unless the result is CUDA_SUCCESS.</summary>
    /// <exception cref="CudaException">"cuX: CUDA_ERROR_Y: explanation (what)".</exception>
    public void Check(int result, string call, string what = "")
    {
        if (result != 0) throw Failure(result, call, what);
    }

    private CudaException Failure(int result, string call, string what)
    {
        byte* name = null, text = null;
        GetErrorName(result, &name);
        GetErrorString(result, &text);
        string reason = Marshal.PtrToStringUTF8((nint)name) ?? $"error {result}";
        if (text != null) reason += ": " + Marshal.PtrToStringUTF8((nint)text);
        string place = call + (what.Length > 0 ? $" ({what})" : "");
        return new(IsOfEarlierWork(result)
            ? $"cuda: {reason}, in work queued before; noticed at {place}; with "
                + "CUDA_LAUNCH_BLOCKING=1 in the environment the kernel itself is named"
            : $"{call}: {reason}" + (what.Length > 0 ? $" ({what})" : ""), result);
    }

    // Errors of kernels and of the card, which come out of whatever call is next and stay; unless
    // each launch is waited for.
    private static bool IsOfEarlierWork(int result) =>
        (result is 214 or 220 or 700 or 702 or 710 or (>= 714 and <= 720))
        && Environment.GetEnvironmentVariable("CUDA_LAUNCH_BLOCKING") != "1";
}
