using System.Runtime.InteropServices;
using System.Text;

namespace MiniCpmNative.Kernels.Cuda;

/// <summary>Loaded device code and its kernels, with the signatures its source declares.</summary>
public sealed unsafe class CudaModule : IDisposable
{
    private const int UnsupportedPtxVersion = 222, LogBytes = 8192;

    private readonly CudaContext _context;
    private readonly nint _handle;
    private readonly IReadOnlyDictionary<string, KernelSignature> _signatures;
    private readonly Dictionary<string, CudaKernel> _kernels = [];

    private CudaModule(CudaContext context, nint handle,
        IReadOnlyDictionary<string, KernelSignature> signatures) =>
        (_context, _handle, _signatures) = (context, handle, signatures);

    /// <summary>
    /// Compiles a source and loads it: PTX first, so that the driver makes the best of the device;
    /// a driver older than the compiler refuses that, and then gets machine code for the device
    /// itself.
    /// </summary>
    /// <exception cref="CudaException">It does not compile, or the driver takes neither
    /// form.</exception>
    public static CudaModule Load(
        CudaContext context, ModuleCompiler compiler, string source, string name,
            ModuleOptions options)
    {
        var signatures = KernelSignatures.Parse(source, options.Storage);
        int architecture = compiler.Architecture(context.Architecture);
        options = options with
        {
            Architecture = architecture,
            Cubin = false,
            SmallShared = context.SmallShared,
        };
        int result =
            TryLoad(context, compiler, source, name, options, out nint handle, out string log);
        if (result == UnsupportedPtxVersion && architecture == context.Architecture)
            result = TryLoad(context, compiler, source, name, options with { Cubin = true },
                out handle, out log);
        if (result == UnsupportedPtxVersion)
            throw new CudaException(
                "the driver (CUDA "
                    + $"{context.DriverVersion / 1000}.{context.DriverVersion % 1000 / 10}) is "
                    + "older than " +
                $"NVRTC {compiler.Version.Major}.{compiler.Version.Minor}: update the driver, or "
                    + "install an NVRTC " +
                "that is not newer than it", result);
        context.Api.Driver.Check(result, "cuModuleLoadDataEx", log.Length > 0 ? log : name);
        return new(context, handle, signatures);
    }

    /// <summary>Loads PTX text made elsewhere; the signatures come from the source it was made
    /// of.</summary>
    public static CudaModule LoadPtx(CudaContext context, byte[] ptx, string source, DType storage)
    {
        int result = TryLoad(context, ptx, out nint handle, out string log);
        context.Api.Driver.Check(result, "cuModuleLoadDataEx", log);
        return new(context, handle, KernelSignatures.Parse(source, storage));
    }

    // What the driver does not take may be a fault of the kept file.
    private static int TryLoad(CudaContext context, ModuleCompiler compiler, string source,
        string name, ModuleOptions options, out nint handle, out string log)
    {
        int result =
            TryLoad(context, compiler.Compile(source, name, options), out handle, out log);
        return result is 0 or UnsupportedPtxVersion || !compiler.WasCached ? result
            : TryLoad(context, compiler.Compile(source, name, options, anew: true), out handle,
                out log);
    }

    private static int TryLoad(CudaContext context, byte[] image, out nint handle, out string log)
    {
        // CU_JIT_INFO_LOG_BUFFER 3, its size 4, CU_JIT_ERROR_LOG_BUFFER 5, its size 6.
        byte* text = stackalloc byte[LogBytes * 2];
        text[0] = text[LogBytes] = 0;
        int* names = stackalloc int[] { 3, 4, 5, 6 };
        void** values = stackalloc void*[4];
        values[0] = text;
        values[2] = text + LogBytes;
        values[1] = values[3] = (void*)LogBytes;
        nint loaded = 0;
        int result;
        fixed (byte* data = image)
            result = context.Api.Driver.ModuleLoadDataEx(&loaded, data, 4, names, values);
        text[LogBytes * 2 - 1] = 0;
        log = (Marshal.PtrToStringUTF8((nint)(text + LogBytes)) ?? "").Trim();
        handle = loaded;
        return result;
    }

    /// <summary>A kernel by name; looked up once.</summary>
    /// <exception cref="CudaException">The module has none of that name.</exception>
    public CudaKernel Kernel(string name)
    {
        if (_kernels.TryGetValue(name, out var known)) return known;
        if (!_signatures.TryGetValue(name, out var signature))
            throw new CudaException(
                $"kernel {name} is not declared in the source (extern \"C\" __global__)");
        nint function = 0;
        fixed (byte* text = Encoding.UTF8.GetBytes(name + "\0"))
            _context.Api.Driver.Check(
                _context.Api.Driver.ModuleGetFunction(&function, _handle, text),
                "cuModuleGetFunction", name);
        return _kernels[name] = new(_context, function, signature);
    }

    /// <summary>Names of all kernels the source declares.</summary>
    public IEnumerable<string> Names => _signatures.Keys;

    public bool Has(string name) => _signatures.ContainsKey(name);

    public void Dispose() => _context.Api.Driver.ModuleUnload(_handle);
}
