using System.Reflection;

namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// The kernels that a device launches: those of kernels.cu, which every GPU from sm_80 on runs,
/// and those of kernels_sm90a.cu, written in instructions that compute capability 9.0 alone has
/// (wgmma, setmaxnreg) and NVRTC knows from 12 on. Operations ask which of them are there.
/// </summary>
public sealed class CudaKernels : IDisposable
{
    private const int HopperArchitecture = 90, HopperNvrtc = 12;

    private readonly CudaModule[] _modules;
    private readonly Dictionary<string, CudaKernel> _known = [];

    /// <param name="modules">With different kernels each.</param>
    public CudaKernels(params CudaModule[] modules) => _modules = modules;

    /// <summary>The text of kernels.cu, which the assembly carries.</summary>
    public static string Source { get; } = Read("kernels.cu");

    /// <summary>The text of kernels_sm90a.cu.</summary>
    public static string HopperSource { get; } = Read("kernels_sm90a.cu");

    /// <summary>Names of all kernels.</summary>
    public IEnumerable<string> Names => _modules.SelectMany(m => m.Names);

    /// <summary>
    /// Names of those that were not asked for so far, but for kernels that one of sm_90a replaces.
    /// </summary>
    public IEnumerable<string> Idle => Names.Except(_known.Keys).Where(name =>
        name.LastIndexOf('_') is var at && (at < 0 || !Has($"{name[..at]}_hopper{name[at..]}")));

    /// <summary>Compiles what the device runs and the compiler knows.</summary>
    /// <exception cref="CudaException">It does not compile or is not taken.</exception>
    public static CudaKernels Load(
        CudaContext context, ModuleCompiler compiler, DType storage, bool lineInfo = false)
    {
        var options = new ModuleOptions(storage, context.Architecture, lineInfo);
        CudaModule all = CudaModule.Load(context, compiler, Source, "kernels.cu", options);
        if (!TakesHopper(storage, context.Architecture, compiler.Version.Major, Wish))
            return new(all);
        return new(all, CudaModule.Load(context, compiler, HopperSource, "kernels_sm90a.cu",
            options with { Specific = true }));
    }

    // $CPMX_ATTENTION: "sm_80" keeps a device to kernels.cu, to compare the two.
    internal static string? Wish => Environment.GetEnvironmentVariable("CPMX_ATTENTION");

    /// <summary>
    /// Whether kernels_sm90a.cu is loaded; not for F32, which its products do not take.
    /// </summary>
    internal static bool TakesHopper(
        DType storage, int architecture, int nvrtc, string? wish) =>
        storage != DType.F32 && architecture == HopperArchitecture && nvrtc >= HopperNvrtc
        && wish != "sm_80";

    /// <summary>What attention in 16 bits is written for, and why not for the device.</summary>
    public static string Generation(CudaContext context, ModuleCompiler compiler) =>
        context.Architecture != HopperArchitecture ? "sm_80 and later (mma.sync)"
        : Wish == "sm_80" ? "sm_80 and later (mma.sync): CPMX_ATTENTION is sm_80"
        : compiler.Version.Major >= HopperNvrtc ? "sm_90a (wgmma)"
        : $"sm_80 and later (mma.sync): NVRTC {HopperNvrtc} or newer knows sm_90a, this is "
            + $"{compiler.Version.Major}.{compiler.Version.Minor}";

    /// <summary>Whether kernels_sm90a.cu is among them.</summary>
    public bool Hopper => _modules.Length > 1;

    public bool Has(string name) => Find(name) is not null;

    /// <summary>A kernel by name; looked up once.</summary>
    /// <exception cref="CudaException">There is none of that name.</exception>
    public CudaKernel this[string name] => _known.TryGetValue(name, out CudaKernel? known) ? known
        : _known[name] = (Find(name) ?? _modules[0]).Kernel(name);

    public void Dispose()
    {
        foreach (CudaModule module in _modules) module.Dispose();
    }

    // Asked at every launch: a lambda would be allocated each time.
    private CudaModule? Find(string name)
    {
        foreach (CudaModule module in _modules)
            if (module.Has(name)) return module;
        return null;
    }

    private static string Read(string name)
    {
        using Stream stream = Assembly.GetExecutingAssembly().GetManifestResourceStream(name)!;
        return new StreamReader(stream).ReadToEnd();
    }
}
