using System.Runtime.InteropServices;
using MiniCpmNative.GpuEmulator;
using MiniCpmNative.GpuEmulator.Driver;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>Which compiler turns CUDA sources into PTX in a test.</summary>
internal enum DeviceCompiler
{
    Nvrtc, Clang,
}

/// <summary>
/// The libraries that tests/install-cuda-tools.sh unpacks (CPMX_CUDA_TOOLS or /opt/cpmx-cuda): real
/// NVRTC and libcuda without a driver. Where NVRTC is missing, clang compiles, and the output says
/// so.
/// </summary>
internal static class CudaTools
{
    private static readonly Lazy<NvrtcApi?> s_nvrtc = new(LoadNvrtc);

    public static string Folder { get; } =
        Environment.GetEnvironmentVariable("CPMX_CUDA_TOOLS") is { Length: > 0 } own ? own
            : "/opt/cpmx-cuda";

    public static CudaSearch Search { get; } = new(name => name == CudaSearch.OverrideVariable
        ? Path.Combine(Folder, "lib")
        : Environment.GetEnvironmentVariable(name));

    public static NvrtcApi? Nvrtc => s_nvrtc.Value;

    public static bool HasClang => ClangNvrtc.Clang != null;

    private static NvrtcApi? LoadNvrtc()
    {
        try
        {
            return NvrtcApi.Load(Search, 11);
        }
        catch (CudaUnavailableException e)
        {
            TestContext.Progress.WriteLine(
                $"NVRTC is not here, clang compiles instead: {e.Message}");
            return null;
        }
    }

    /// <summary>The table of the compiler, of the other one where it is missing; ignores the test
    /// without both.</summary>
    public static NvrtcApi Compiler(DeviceCompiler wanted)
    {
        if (wanted == DeviceCompiler.Nvrtc && Nvrtc != null) return Nvrtc;
        if (ClangNvrtc.Clang != null) return ClangNvrtc.Table();
        Assert.Ignore(
            "neither NVRTC nor clang is installed: tests/install-cuda-tools.sh installs them");
        throw new InvalidOperationException();
    }
}

/// <summary>An emulated device with a stream, and short ways to move arrays to and from
/// it.</summary>
internal sealed unsafe class TestGpu : IDisposable
{
    private static readonly Dictionary<(DeviceCompiler, string), byte[]> s_compiled = [];
    private readonly DeviceCompiler _compiler;

    public TestGpu(EmulatorOptions? options = null, DeviceCompiler compiler = DeviceCompiler.Nvrtc)
    {
        _compiler = compiler;
        Emulator = new(options);
        Context = new(Emulator.Api);
        Stream = new(Context);
    }

    public EmulatedGpu Emulator { get; }
    public CudaContext Context { get; }
    public CudaStream Stream { get; }
    public Fault? Fault => Emulator.Fault;

    /// <summary>Compiles once per test run and compiler, with source lines; storage is
    /// bf16.</summary>
    public CudaModule Compile(string source)
    {
        if (!s_compiled.TryGetValue((_compiler, source), out byte[]? ptx))
        {
            var compiler = new ModuleCompiler(CudaTools.Compiler(_compiler), cache: null);
            ptx = compiler.Compile(source, "kernels.cu", new(DType.BF16, 80, LineInfo: true));
            s_compiled[(_compiler, source)] = ptx;
        }
        return CudaModule.LoadPtx(Context, ptx, source, DType.BF16);
    }

    public ulong Allocate(long bytes)
    {
        ulong address = 0;
        Context.Api.Driver.Check(Context.Api.Driver.MemAlloc(&address, (nuint)bytes), "cuMemAlloc");
        return address;
    }

    public ulong Upload<T>(ReadOnlySpan<T> values) where T : unmanaged
    {
        ulong address = Allocate(Math.Max(1, values.Length) * (long)sizeof(T));
        fixed (T* from = values)
        {
            Stream.Upload(address, from, values.Length * (long)sizeof(T));
            Stream.Synchronise();
        }
        return address;
    }

    public ulong Upload<T>(T[] values) where T : unmanaged => Upload((ReadOnlySpan<T>)values);

    public T[] Download<T>(ulong address, int count) where T : unmanaged
    {
        var values = new T[count];
        fixed (T* to = values)
        {
            Stream.Download(to, address, count * (long)sizeof(T));
            Stream.Synchronise();
        }
        return values;
    }

    /// <summary>Waits for the stream and returns the finding, which must exist.</summary>
    public Fault Finding()
    {
        Assert.Throws<CudaException>(Stream.Synchronise);
        return Fault!;
    }

    public void Dispose() => Emulator.Dispose();

    public static ushort[] Brain(ReadOnlySpan<float> values)
    {
        var bits = new ushort[values.Length];
        for (int n = 0; n < bits.Length; n++)
        {
            uint b = BitConverter.SingleToUInt32Bits(values[n]);
            bits[n] = (ushort)((b + 0x7fff + (b >> 16 & 1)) >> 16);
        }
        return bits;
    }

    public static double Widen(ushort brain) => BitConverter.UInt32BitsToSingle((uint)brain << 16);

    /// <summary>Numbers around zero of about unit size; the same for the same seed.</summary>
    public static float[] Numbers(int count, int seed, float scale = 1)
    {
        var random = new Random(seed);
        var values = new float[count];
        for (int n = 0; n < count; n++) values[n] = (float)(random.NextDouble() * 2 - 1) * scale;
        return values;
    }
}
