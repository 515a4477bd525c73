using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Tests;

/// <summary>
/// The CUDA device that tests run on: production code on the emulator, or on a real GPU when
/// CPMX_TEST_GPU=1. One exists at a time; a fixture makes it and disposes of it. Compiled kernels are
/// kept on disk between runs, by the hash of their source.
/// </summary>
internal sealed class CudaUnderTest : IDisposable
{
    private const long StepBytes = 1L << 26;

    private readonly Dictionary<DType, CudaDevice> _devices = [];
    private readonly ModuleCompiler _compiler;

    public CudaUnderTest(
        EmulatorOptions? options = null, DeviceCompiler compiler = DeviceCompiler.Nvrtc)
    {
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
        _compiler = new(api.Nvrtc, Path.Combine(Path.GetTempPath(), "cpmx-test-kernels"));
    }

    public static bool IsReal => Environment.GetEnvironmentVariable("CPMX_TEST_GPU") == "1";

    /// <summary>Null on a real GPU.</summary>
    public EmulatedGpu? Emulator { get; }

    public CudaContext Context { get; }

    /// <summary>The device for a type of activations; compiled and loaded when first asked for.</summary>
    public CudaDevice Device(DType activations)
    {
        if (_devices.TryGetValue(activations, out CudaDevice? device)) return device;
        return _devices[activations] = new(
            Context, _compiler, activations, StepBytes, lineInfo: Emulator is not null);
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
