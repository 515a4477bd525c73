using System.Runtime.InteropServices;
using System.Security.Cryptography;
using System.Text;

namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// How a CUDA source is compiled. Architecture is 10 * major + minor; LineInfo keeps source lines
/// in the PTX (the emulator's reports need them; ptxas 11.8 crashes on them for sm_90).
/// </summary>
public sealed record ModuleOptions(DType Storage, int Architecture, bool LineInfo = false,
    bool Cubin = false)
{
    /// <summary>For devices whose blocks have less than 160 KiB of shared memory.</summary>
    public bool SmallShared { get; init; }

    /// <summary>Further options, as NVRTC takes them.</summary>
    public string[] Extra { get; init; } = [];

    /// <summary>
    /// Code for this very architecture, with what no later one has: 90a in place of 90.
    /// </summary>
    public bool Specific { get; init; }

    /// <summary>
    /// C++17 and the architecture are always explicit, since NVRTC's defaults differ by version.
    /// The storage type arrives as STORAGE_F32 or STORAGE_BF16, the numbers that the host shares as
    /// <see cref="KernelConstants"/> names them.
    /// </summary>
    public string[] Arguments() =>
    [
        "-std=c++17",
        $"--gpu-architecture={(Cubin ? "sm" : "compute")}_{Architecture}{(Specific ? "a" : "")}",
        $"-DSTORAGE_{Storage}=1",
        .. KernelConstants.Macros,
        .. SmallShared ? (string[])["-DSMALL_SHARED=1"] : [],
        .. LineInfo ? (string[])["-lineinfo"] : [],
        .. Extra,
    ];
}

/// <summary>
/// Compiles CUDA sources with NVRTC and keeps the results on disk, by the SHA-256 of source,
/// options and compiler version (<see cref="ModuleCache"/>).
/// </summary>
public sealed unsafe class ModuleCompiler
{
    private readonly NvrtcApi _nvrtc;
    private readonly ModuleCache? _cache;

    /// <param name="nvrtc">The compiler.</param>
    /// <param name="cache">Directory of compiled modules; null keeps none.</param>
    public ModuleCompiler(NvrtcApi nvrtc, string? cache)
    {
        (_nvrtc, _cache) = (nvrtc, cache is null ? null : new ModuleCache(cache));
        int major = 0, minor = 0;
        nvrtc.Check(nvrtc.Version(&major, &minor), "nvrtcVersion");
        Version = (major, minor);
    }

    public (int Major, int Minor) Version { get; }

    /// <summary>Programs compiled by this object, not found on disk.</summary>
    public int Compiled { get; private set; }

    /// <summary>$XDG_CACHE_HOME/cpmx/kernels or ~/.cache/cpmx/kernels (LocalApplicationData
    /// elsewhere).</summary>
    public static string DefaultCache()
    {
        string? root = Environment.GetEnvironmentVariable("XDG_CACHE_HOME");
        if (string.IsNullOrEmpty(root))
            root = OperatingSystem.IsWindows()
                ? Environment.GetFolderPath(Environment.SpecialFolder.LocalApplicationData)
                : Path.Combine(Environment.GetFolderPath(Environment.SpecialFolder.UserProfile),
                ".cache");
        return Path.Combine(root, "cpmx", "kernels");
    }

    /// <summary>The largest architecture this NVRTC knows that the device can run.</summary>
    /// <exception cref="CudaException">It knows none that old.</exception>
    public int Architecture(int device)
    {
        int count = 0;
        _nvrtc.Check(_nvrtc.GetNumSupportedArchs(&count), "nvrtcGetNumSupportedArchs");
        var known = new int[count];
        fixed (int* into = known)
            _nvrtc.Check(_nvrtc.GetSupportedArchs(into), "nvrtcGetSupportedArchs");
        int best = known.Where(a => a <= device).DefaultIfEmpty(0).Max();
        return best > 0
            ? best
            : throw new CudaException(
            $"NVRTC {Version.Major}.{Version.Minor} compiles for compute capability " +
                $"{known.Min() / 10.0:0.0} and newer, the device has {device / 10.0:0.0}");
    }

    /// <summary>PTX text (ending in a zero byte), or a CUBIN image when the options ask for
    /// one.</summary>
    /// <param name="source">The text.</param>
    /// <param name="name">What the compiler calls it.</param>
    /// <param name="options">How it is compiled.</param>
    /// <param name="anew">Whether a kept result is made again: the driver refuses it.</param>
    /// <exception cref="CudaException">The source does not compile; carries NVRTC's
    /// log.</exception>
    public byte[] Compile(string source, string name, ModuleOptions options, bool anew = false)
    {
        string key = Key(source, name, options);
        if (!anew && _cache?.Read(key) is { } cached)
        {
            WasCached = true;
            return cached;
        }

        byte[] image = Build(source, name, options);
        WasCached = false;
        Compiled++;
        _cache?.Write(key, image);
        return image;
    }

    /// <summary>Whether the last result was found on disk.</summary>
    public bool WasCached { get; private set; }

    private string Key(string source, string name, ModuleOptions options)
    {
        string all =
            $"{Version.Major}.{Version.Minor}\0{name}\0"
                + $"{string.Join('\0', options.Arguments())}\0\0{source}";
        string hash = Convert.ToHexStringLower(SHA256.HashData(Encoding.UTF8.GetBytes(all)));
        return $"{hash}.{(options.Cubin ? "cubin" : "ptx")}";
    }

    private byte[] Build(string source, string name, ModuleOptions options)
    {
        nint program = 0;
        fixed (byte* text = Utf8(source), file = Utf8(name))
            _nvrtc.Check(_nvrtc.CreateProgram(&program, text, file, 0, null, null),
                "nvrtcCreateProgram", name);
        try
        {
            string[] arguments = options.Arguments();
            byte** pointers = stackalloc byte*[arguments.Length];
            for (int n = 0; n < arguments.Length; n++)
                pointers[n] = (byte*)Marshal.StringToCoTaskMemUTF8(arguments[n]);
            int result = _nvrtc.CompileProgram(program, arguments.Length, pointers);
            for (int n = 0; n < arguments.Length; n++) Marshal.FreeCoTaskMem((nint)pointers[n]);
            if (result != 0)
                _nvrtc.Check(result, "nvrtcCompileProgram",
                    $"{string.Join(' ', arguments)}: {Log(program)}");
            return options.Cubin
                ? Take(program, _nvrtc.GetCubinSize, _nvrtc.GetCubin, "nvrtcGetCUBIN")
                : Take(program, _nvrtc.GetPtxSize, _nvrtc.GetPtx, "nvrtcGetPTX");
        }
        finally
        {
            _nvrtc.DestroyProgram(&program);
        }
    }

    private byte[] Take(
        nint program, delegate* unmanaged<nint, nuint*, int> size,
            delegate* unmanaged<nint, byte*, int> get,
        string call)
    {
        nuint bytes = 0;
        _nvrtc.Check(size(program, &bytes), call + "Size");
        var image = new byte[bytes];
        fixed (byte* to = image) _nvrtc.Check(get(program, to), call);
        return image;
    }

    private string Log(nint program)
    {
        nuint bytes = 0;
        if (_nvrtc.GetLogSize(program, &bytes) != 0 || bytes <= 1) return "no log";
        var text = new byte[bytes];
        fixed (byte* to = text)
            if (_nvrtc.GetLog(program, to) != 0) return "no log";
        return Encoding.UTF8.GetString(text).TrimEnd('\0', '\n');
    }

    private static byte[] Utf8(string text) => Encoding.UTF8.GetBytes(text + "\0");
}
