using MiniCpmNative.Engine.Model;
using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Tests;

/// <summary>
/// The CUDA device that tests run on: production code on the emulator, or on a real GPU when
/// CPMX_TEST_GPU=1. One exists at a time; a fixture makes it and disposes of it. Compiled kernels
/// are kept on disk between runs, by the hash of their source.
/// </summary>
internal sealed class CudaUnderTest : IDisposable
{
    private const long StepBytes = 1L << 26;

    private readonly Dictionary<DType, CudaDevice> _devices = [];
    private readonly ModuleCompiler _compiler;
    private readonly DeviceCompiler _kind;
    private readonly string _source;
    private readonly string? _hopperSource;

    /// <param name="options">Of the emulator.</param>
    /// <param name="compiler">Which one turns the kernels into PTX.</param>
    /// <param name="source">Kernels in place of kernels.cu; null takes that.</param>
    /// <param name="hopperSource">The same for kernels_sm90a.cu, by clang.</param>
    /// <param name="keep">Keeps a source's own compiled kernels too: more than one test has
    /// it.</param>
    public CudaUnderTest(EmulatorOptions? options = null,
        DeviceCompiler compiler = DeviceCompiler.Nvrtc, string? source = null,
        string? hopperSource = null, bool keep = false)
    {
        (_kind, _source, _hopperSource) = (compiler, source ?? CudaKernels.Source, hopperSource);
        CudaApi api;
        if (IsReal)
        {
            api = CudaApi.Load();
        }
        else
        {
            Emulator = new(options, CudaTools.Compiler(compiler));
            api = Emulator.Api;
        }

        Context = new(api);
        // What clang makes depends on a prelude too, which the key of a kept module does not know.
        _compiler = new(api.Nvrtc, compiler == DeviceCompiler.Clang
            || (source is not null && !keep) ? null : Cache);
    }

    /// <summary>Where compiled kernels are kept between runs.</summary>
    public static string Cache { get; } = Path.Combine(
        Path.GetTempPath(), $"cpmx-test-kernels-{Environment.UserName}");

    public static bool IsReal => Environment.GetEnvironmentVariable("CPMX_TEST_GPU") == "1";

    /// <summary>Null on a real GPU.</summary>
    public EmulatedGpu? Emulator { get; }

    public CudaContext Context { get; }

    /// <summary>Where runs get the same GPU from.</summary>
    public DeviceSource Devices => new()
    {
        Cuda = () => new(
            Context.Api.Driver, CudaTools.Compiler(DeviceCompiler.Nvrtc), Context.Api.Cublas),
        Cache = Cache,
    };

    /// <summary>
    /// The device for a type of activations; compiled and loaded when first asked for.
    /// </summary>
    public CudaDevice Device(DType activations)
    {
        if (_devices.TryGetValue(activations, out CudaDevice? device)) return device;
        return _devices[activations] = new(Context, activations, StepBytes, Kernels(activations));
    }

    // NVRTC 11.8 leaves the kernels of an emulated Hopper GPU to HopperPtx, and in 16 bits those of
    // a Blackwell one to what NVRTC 13 makes for it.
    private CudaKernels Kernels(DType activations)
    {
        if (Emulator is null) return CudaKernels.Load(Context, _compiler, activations);
        if (Context.Architecture == 120 && activations == DType.BF16)
            return new(CommittedPtx.Blackwell.Load(Context));
        var all = CudaModule.Load(Context, _compiler, _source, "kernels.cu",
            new(activations, Context.Architecture, LineInfo: true));
        return activations == DType.F32 || Context.Architecture != 90
            ? new(all) : new(all, HopperPtx.Load(Context, _kind, _hopperSource));
    }

    /// <summary>
    /// Makes the emulated memory of steps count as never written, so that a kernel that reads
    /// scratch nobody wrote is found even where an earlier test wrote there.
    /// </summary>
    public void ForgetSteps()
    {
        if (Emulator is not { Fault: null }) return;
        foreach (CudaDevice device in _devices.Values)
        {
            device.Stream.Synchronise();
            ArenaMark mark = device.Step.Mark();
            Tensor first = device.Step.Push(new Spec(DType.I32, new Shape(1)), "first");
            device.Step.Pop(mark);
            Emulator.Forget((ulong)first.Data, StepBytes);
        }
    }

    public void Dispose()
    {
        // A device that met a fault cannot be torn down call by call.
        if (Emulator?.Fault is null)
        {
            foreach (CudaDevice device in _devices.Values) device.Dispose();
            Context.Dispose();
        }

        Emulator?.Dispose();
    }
}
