using System.Runtime.InteropServices;

namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// Entry points of NVRTC, the run-time compiler. Few on purpose: 11.8 to 13 all have these.
/// </summary>
public sealed unsafe class NvrtcApi
{
    public string Path { get; init; } = "";

    public delegate* unmanaged<int*, int*, int> Version;
    public delegate* unmanaged<nint*, byte*, byte*, int, byte**, byte**, int> CreateProgram;
    public delegate* unmanaged<nint, int, byte**, int> CompileProgram;
    public delegate* unmanaged<nint*, int> DestroyProgram;
    public delegate* unmanaged<nint, nuint*, int> GetPtxSize;
    public delegate* unmanaged<nint, byte*, int> GetPtx;
    public delegate* unmanaged<nint, nuint*, int> GetCubinSize;
    public delegate* unmanaged<nint, byte*, int> GetCubin;
    public delegate* unmanaged<nint, nuint*, int> GetLogSize;
    public delegate* unmanaged<nint, byte*, int> GetLog;
    public delegate* unmanaged<int, byte*> GetErrorString;
    public delegate* unmanaged<int*, int> GetNumSupportedArchs;
    public delegate* unmanaged<int*, int> GetSupportedArchs;

    /// <summary>Loads NVRTC of a major version, its built-ins first: without them it cannot
    /// compile.</summary>
    /// <exception cref="CudaUnavailableException">Not found, or an entry point is
    /// missing.</exception>
    public static NvrtcApi Load(CudaSearch search, int major)
    {
        var library = search.Open(CudaLibrary.Nvrtc, major);
        string? directory = System.IO.Path.GetDirectoryName(library.Path);
        if (!string.IsNullOrEmpty(directory) && Directory.Exists(directory))
        {
            string pattern = OperatingSystem.IsWindows() ? "nvrtc-builtins64_*.dll"
                : "libnvrtc-builtins.so.*";
            foreach (string file in Directory.GetFiles(directory, pattern)
                .Order(StringComparer.Ordinal))
                if (NativeLibrary.TryLoad(file, out _)) break;
        }
        return From(library);
    }

    private static NvrtcApi From(LoadedLibrary l) => new()
    {
        Path = l.Path,
        Version = (delegate* unmanaged<int*, int*, int>)l["nvrtcVersion"],
        CreateProgram =
            (delegate* unmanaged<nint*, byte*, byte*, int, byte**, byte**,
            int>)l["nvrtcCreateProgram"],
        CompileProgram = (delegate* unmanaged<nint, int, byte**, int>)l["nvrtcCompileProgram"],
        DestroyProgram = (delegate* unmanaged<nint*, int>)l["nvrtcDestroyProgram"],
        GetPtxSize = (delegate* unmanaged<nint, nuint*, int>)l["nvrtcGetPTXSize"],
        GetPtx = (delegate* unmanaged<nint, byte*, int>)l["nvrtcGetPTX"],
        GetCubinSize = (delegate* unmanaged<nint, nuint*, int>)l["nvrtcGetCUBINSize"],
        GetCubin = (delegate* unmanaged<nint, byte*, int>)l["nvrtcGetCUBIN"],
        GetLogSize = (delegate* unmanaged<nint, nuint*, int>)l["nvrtcGetProgramLogSize"],
        GetLog = (delegate* unmanaged<nint, byte*, int>)l["nvrtcGetProgramLog"],
        GetErrorString = (delegate* unmanaged<int, byte*>)l["nvrtcGetErrorString"],
        GetNumSupportedArchs = (delegate* unmanaged<int*, int>)l["nvrtcGetNumSupportedArchs"],
        GetSupportedArchs = (delegate* unmanaged<int*, int>)l["nvrtcGetSupportedArchs"],
    };

    /// <summary>Throws unless the result is NVRTC_SUCCESS.</summary>
    public void Check(int result, string call, string what = "")
    {
        if (result == 0) return;
        string reason = Marshal.PtrToStringUTF8((nint)GetErrorString(result)) ?? $"error {result}";
        throw new CudaException($"{call}: {reason}" + (what.Length > 0 ? $" ({what})" : ""),
            result);
    }
}
