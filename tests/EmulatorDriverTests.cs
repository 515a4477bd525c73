using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>The emulated driver: late copies, stream order, events, memory's life, launch
/// limits.</summary>
[TestFixture]
public sealed unsafe class EmulatorDriverTests
{
    private const string Source = """
        extern "C" __global__ void __launch_bounds__(128) add(float* y, const float* x, int n, float by) {
            extern __shared__ float s[];
            int i = blockIdx.x * blockDim.x + threadIdx.x;
            if (i < n) y[i] = x[i] + by;
            if (n < 0) s[i] = 0;
        }
        """;

    private static void Add(TestGpu gpu, CudaStream stream, ulong y, ulong x, float by,
        int shared = 0, int block = 64)
    {
        var kernel = gpu.Compile(Source).Kernel("add");
        var a = kernel.Arguments();
        a.Pointer(y, DType.F32).Pointer(x, DType.F32).Int(64).Float(by);
        a.Launch(stream, 1, block, shared);
    }

    [Test]
    public void CopiesRunWhenSomebodyWaits()
    {
        using var gpu = new TestGpu();
        using var pinned = new PinnedMemory(gpu.Context, 256);
        ulong x = gpu.Allocate(256);
        pinned.Span<float>().Fill(1);
        gpu.Stream.Upload(x, pinned.Pointer, 256);
        // Changing the source before the copy has run is a mistake that must show.
        pinned.Span<float>().Fill(2);
        Assert.That(gpu.Download<float>(x, 64)[5], Is.EqualTo(2));
    }

    [TestCase(1)]
    [TestCase(2)]
    [TestCase(3)]
    public void EventsOrderStreamsUnderEverySeed(int seed)
    {
        using var gpu = new TestGpu(new() { Seed = seed });
        using var second = new CudaStream(gpu.Context);
        using var ready = new CudaEvent(gpu.Context);
        ulong x = gpu.Upload(new float[64]), y = gpu.Allocate(256), z = gpu.Allocate(256);
        Add(gpu, gpu.Stream, y, x, 1);
        ready.Record(gpu.Stream);
        second.Wait(ready);
        Add(gpu, second, z, y, 1);
        second.Synchronise();
        Assert.That(gpu.Download<float>(z, 64), Is.All.EqualTo(2));
        Assert.That(ready.IsReached());
    }

    [Test]
    public void AMissingEventShowsUnderSomeSeed()
    {
        int found = 0;
        for (int seed = 1; seed <= 8; seed++)
        {
            using var gpu = new TestGpu(new() { Seed = seed });
            using var second = new CudaStream(gpu.Context);
            ulong x = gpu.Upload(new float[64]), y = gpu.Allocate(256), z = gpu.Allocate(256);
            Add(gpu, gpu.Stream, y, x, 1);
            Add(gpu, second, z, y, 1);
            try
            {
                gpu.Context.Synchronise();
            }
            catch (CudaException)
            {
                Assert.That(gpu.Fault!.Check, Is.EqualTo(Check.Uninitialised));
                found++;
            }
        }
        Assert.That(found, Is.InRange(1, 7));
    }

    [Test]
    public void FreedMemoryIsNotUsed()
    {
        using var gpu = new TestGpu();
        ulong x = gpu.Upload(new float[64]), y = gpu.Allocate(256);
        Assert.That(gpu.Context.Api.Driver.MemFree(x), Is.Zero);
        Add(gpu, gpu.Stream, y, x, 1);
        Assert.That(gpu.Finding().Check, Is.EqualTo(Check.UseAfterFree));
    }

    [Test]
    public void FreeWaitsForQueuedWork()
    {
        using var gpu = new TestGpu();
        ulong x = gpu.Upload(new float[64]), y = gpu.Allocate(256);
        Add(gpu, gpu.Stream, y, x, 3);
        Assert.That(gpu.Context.Api.Driver.MemFree(x), Is.Zero);
        Assert.That(gpu.Download<float>(y, 64), Is.All.EqualTo(3));
    }

    [Test]
    public void DownloadOfUnwrittenMemoryIsFound()
    {
        using var gpu = new TestGpu();
        ulong x = gpu.Allocate(256);
        Assert.Throws<CudaException>(() => gpu.Download<float>(x, 4));
        Assert.That(gpu.Fault!.Check, Is.EqualTo(Check.Uninitialised));
    }

    [Test]
    public void ForgottenMemoryCountsAsUnwritten()
    {
        using var gpu = new TestGpu();
        ulong x = gpu.Upload(new float[64]);
        gpu.Emulator.Forget(x + 4, 4);
        Assert.That(gpu.Download<float>(x, 1), Is.EqualTo(new float[1]));
        Assert.Throws<CudaException>(() => gpu.Download<float>(x, 2));
    }

    [Test]
    public void FillsAndDeviceCopies()
    {
        using var gpu = new TestGpu();
        ulong x = gpu.Allocate(64), y = gpu.Allocate(64);
        gpu.Stream.Fill(x, 0x11, 32);
        gpu.Stream.FillWords(x + 32, 0x01020304, 8);
        gpu.Stream.Copy(y, x, 64);
        uint[] got = gpu.Download<uint>(y, 16);
        Assert.That(got[..8], Is.All.EqualTo(0x11111111));
        Assert.That(got[8..], Is.All.EqualTo(0x01020304));
    }

    [Test]
    public void ADeviceStaysBrokenAfterAFinding()
    {
        using var gpu = new TestGpu();
        ulong y = gpu.Allocate(256);
        Add(gpu, gpu.Stream, y, y, 1);
        gpu.Finding();
        var again = Assert.Throws<CudaException>(() => gpu.Stream.Fill(y, 0, 4));
        Assert.That(again!.Message, Does.Contain("Uninitialised").And.Contain("kernels.cu:4"));
    }

    [Test]
    public void LaunchLimitsAreThoseOfADevice()
    {
        using var gpu = new TestGpu();
        var kernel = gpu.Compile(Source).Kernel("add");
        ulong x = gpu.Upload(new float[64]), y = gpu.Allocate(256);
        string Refused(Action launch) => Assert.Throws<CudaException>(() => launch())!.Message;
        Assert.That(Refused(() => Add(gpu, gpu.Stream, y, x, 1, shared: 50 << 10)),
            Does.Contain("CUDA_ERROR_INVALID_VALUE").And.Contain("SharedMemoryOptIn"));
        Assert.That(Refused(() => Add(gpu, gpu.Stream, y, x, 1, block: 256)),
            Does.Contain("at most 128"));
        Assert.That(Refused(() =>
        {
            var a = kernel.Arguments();
            a.Pointer(y, DType.F32).Pointer(x, DType.F32).Int(64).Float(1);
            a.Launch(gpu.Stream, new(1, 70000), 64);
        }), Does.Contain("65535"));
        Assert.That(Refused(() => kernel.AllowShared(200 << 10)),
            Does.Contain("cuFuncSetAttribute"));
        kernel.AllowShared(64 << 10);
        Assert.DoesNotThrow(() =>
        {
            var a = kernel.Arguments();
            a.Pointer(y, DType.F32).Pointer(x, DType.F32).Int(64).Float(1);
            a.Launch(gpu.Stream, 1, 64, 64 << 10);
        });
        gpu.Stream.Synchronise();
    }

    [Test]
    public void ArgumentsAreCheckedAgainstTheSignature()
    {
        using var gpu = new TestGpu();
        var kernel = gpu.Compile(Source).Kernel("add");
        string Refused(Action launch) => Assert.Throws<CudaException>(() => launch())!.Message;
        Assert.That(Refused(() => { var a = kernel.Arguments(); a.Pointer(1, DType.BF16); }),
            Is.EqualTo("add: argument 1, y, is a pointer to F32, got one to BF16"));
        Assert.That(Refused(() => { var a = kernel.Arguments(); a.Pointer(1, DType.F32).Int(2); }),
            Is.EqualTo("add: argument 2, x, is a pointer, got an int"));
        Assert.That(Refused(() =>
        {
            var a = kernel.Arguments();
            a.Pointer(1, DType.F32).Pointer(1, DType.F32).Int(2);
            a.Launch(gpu.Stream, 1, 1);
        }), Is.EqualTo("add: takes 4 arguments, got 3"));
        Assert.That(Refused(() =>
        {
            var a = kernel.Arguments();
            a.Pointer(1, DType.F32).Pointer(1, DType.F32).Int(2).Float(1).Float(1);
        }), Is.EqualTo("add: takes 4 arguments, got more"));
    }

    [Test]
    public void AWrongArgumentSizeIsRefused()
    {
        using var gpu = new TestGpu();
        // The source declares one parameter less than the PTX has: the packed buffer is too short.
        byte[] ptx = new ModuleCompiler(CudaTools.Compiler(DeviceCompiler.Nvrtc), null)
            .Compile(Source, "kernels.cu", new(DType.BF16, 80));
        using var module =
            CudaModule.LoadPtx(gpu.Context, ptx, Source.Replace(", float by", ""), DType.BF16);
        var error = Assert.Throws<CudaException>(() =>
        {
            var a = module.Kernel("add").Arguments();
            a.Pointer(1, DType.F32).Pointer(1, DType.F32).Int(2);
            a.Launch(gpu.Stream, 1, 1);
        });
        Assert.That(error!.Message,
            Does.Contain("ArgumentSize: 20 bytes of arguments, the kernel takes 24"));
    }

    [Test]
    public void LaunchesAllocateNothing()
    {
        using var gpu = new TestGpu();
        var kernel = gpu.Compile(Source).Kernel("add");
        // The emulator's queue allocates; production's part is measured against an entry that only
        // counts.
        gpu.Context.Api.Driver.LaunchKernel = &Accept;
        s_accepted = 0;
        long Measure()
        {
            long before = GC.GetAllocatedBytesForCurrentThread();
            for (int n = 0; n < 100; n++)
            {
                var a = kernel.Arguments();
                a.Pointer(1, DType.F32).Pointer(1, DType.F32).Int(64).Float(1);
                a.Launch(gpu.Stream, 1, 64);
            }
            return GC.GetAllocatedBytesForCurrentThread() - before;
        }
        Measure();
        Assert.That(Measure(), Is.Zero);
        Assert.That(s_accepted, Is.EqualTo(200));
    }

    private static int s_accepted;

    [System.Runtime.InteropServices.UnmanagedCallersOnly]
    private static int Accept(nint function, uint gridX, uint gridY, uint gridZ, uint blockX,
        uint blockY, uint blockZ,
        uint shared, nint stream, void** parameters, void** extra)
    {
        s_accepted += *(nuint*)extra[3] == 24 && *(int*)((byte*)extra[1] + 16) == 64 ? 1 : 0;
        return 0;
    }

    [Test]
    public void CountersAreExact()
    {
        using var gpu = new TestGpu(new() { Footprint = true });
        ulong x = gpu.Upload(new float[64]), y = gpu.Allocate(256);
        Add(gpu, gpu.Stream, y, x, 1);
        gpu.Stream.Synchronise();
        var counters = gpu.Emulator.Launches.Single();
        Assert.That(counters.Kernel, Is.EqualTo("add"));
        Assert.That(counters.GlobalReadBytes, Is.EqualTo(256));
        Assert.That(counters.GlobalWriteBytes, Is.EqualTo(256));
        Assert.That(counters.GlobalReadSectors, Is.EqualTo(8), "two warps of four 32-byte sectors");
        Assert.That(counters.DramReadBytes, Is.EqualTo(256));
        Assert.That(counters.DramWriteBytes, Is.EqualTo(256));
        Assert.That(counters.Flops, Is.EqualTo(64));
        Assert.That(counters.ActiveLanes, Is.EqualTo(1));
        Assert.That(counters.Mix["st"], Is.EqualTo(2));
    }

    // Lane n touches shared word n * stride, and global bytes n * 4 * stride.
    [TestCase(1, 0, 4)]
    [TestCase(2, 1, 8)]
    [TestCase(3, 0, 12)]
    [TestCase(8, 7, 32)]
    [TestCase(32, 31, 32)]
    public void ConflictsAndSectorsOfStrides(int stride, int conflicts, int sectors)
    {
        const string source = """
            extern "C" __global__ void k(float* y, const float* x, int stride) {
                __shared__ float s[1024];
                for (int i = threadIdx.x; i < 1024; i += 32) s[i] = 1;
                __syncthreads();
                y[threadIdx.x] = s[threadIdx.x * stride] + x[threadIdx.x * stride];
            }
            """;
        using var gpu = new TestGpu();
        ulong y = gpu.Allocate(128), x = gpu.Upload(new float[1024]);
        var a = gpu.Compile(source).Kernel("k").Arguments();
        a.Pointer(y, DType.F32).Pointer(x, DType.F32).Int(stride);
        a.Launch(gpu.Stream, 1, 32);
        gpu.Stream.Synchronise();
        var counters = gpu.Emulator.Launches.Single();
        Assert.That(counters.BankConflicts, Is.EqualTo(conflicts));
        Assert.That(counters.GlobalReadSectors, Is.EqualTo(sectors));
    }

    [Test]
    public void ThreadsOfTheHostDoNotChangeResults()
    {
        var results = new List<float[]>();
        foreach (int threads in (ReadOnlySpan<int>)[1, 2, 4])
        {
            using var gpu = new TestGpu(new() { Threads = threads, Seed = threads });
            ulong x = gpu.Upload(TestGpu.Numbers(20000, 3)), y = gpu.Allocate(80000);
            var a = gpu.Compile(Source).Kernel("add").Arguments();
            a.Pointer(y, DType.F32).Pointer(x, DType.F32).Int(20000).Float(0.5f);
            a.Launch(gpu.Stream, (20000 + 127) / 128, 128);
            results.Add(gpu.Download<float>(y, 20000));
        }
        Assert.That(results[0], Is.EqualTo(TestGpu.Numbers(20000, 3).Select(v => v + 0.5f)));
        Assert.That(results, Is.All.EqualTo(results[0]));
    }
}
