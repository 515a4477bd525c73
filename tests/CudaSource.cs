using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.GpuEmulator;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>Where runs get their GPU from; after them nothing may have been found.</summary>
internal sealed class CudaSource(int seed = 0) : IDisposable
{
    private readonly EmulatedGpu? _emulator = CudaUnderTest.IsReal
        ? null
        : new(new EmulatorOptions { Seed = seed, MemoryBytes = 1L << 28 },
            CudaTools.Compiler(DeviceCompiler.Nvrtc));

    public DeviceSource Source => _emulator is null ? DeviceSource.Default : new DeviceSource
    {
        Cuda = () => _emulator.Api,
        Cache = CudaUnderTest.Cache,
        LineInfo = true,
    };

    public void Dispose()
    {
        Assert.That(_emulator?.Fault, Is.Null);
        _emulator?.Dispose();
    }
}
