using System.Text;
using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>Library search, version policy, signatures, the module cache; the real libcuda and
/// NVRTC.</summary>
[TestFixture]
public sealed unsafe class CudaBindingTests
{
    private string _folder = "";

    [SetUp]
    public void MakeFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-cuda").FullName;

    [TearDown]
    public void RemoveFolder() => Directory.Delete(_folder, recursive: true);

    private static CudaDriverApi RealDriver()
    {
        try
        {
            return CudaDriverApi.Load(CudaTools.Search);
        }
        catch (CudaUnavailableException)
        {
            Assert.Ignore("libcuda.so.1 is not here: tests/install-cuda-tools.sh unpacks it");
            throw;
        }
    }

    [Test]
    public void EveryDriverEntryPointResolvesInTheRealLibrary()
    {
        // Loading throws for the first name that is missing.
        var driver = RealDriver();
        int version = 0;
        Assert.That(driver.DriverGetVersion(&version), Is.Zero);
        Assert.That(version, Is.GreaterThanOrEqualTo(11080));
    }

    [Test]
    public void TheRealDriverWithoutADeviceSaysSoInOneLine()
    {
        var driver = RealDriver();
        if (driver.Init(0) == 0) Assert.Ignore("this machine has a device");
        var error = Assert.Throws<CudaUnavailableException>(() => CudaApi.Start(driver));
        Assert.That(error!.Message, Does.Match(
            @"^cuda: driver .*libcuda\.so\.1 \(CUDA 1\d\.\d\) finds no usable device: cuInit: CUDA_ERROR_NO_DEVICE: [^\n]+$"));
    }

    [Test]
    public void WhatIsMissingIsNamedWithTheSearchedPlaces()
    {
        var search = new CudaSearch(name => name == CudaSearch.OverrideVariable ? _folder : null,
            onlyOverride: true);
        var error = Assert.Throws<CudaUnavailableException>(() => CudaApi.Load(search));
        Assert.That(error!.Message, Is.EqualTo(
            $"cuda: driver not found: looked for libcuda.so.1 in {_folder}; install the NVIDIA driver"));
        error = Assert.Throws<CudaUnavailableException>(() => CudaApi.Toolkit(search, 12));
        Assert.That(error!.Message,
            Does.StartWith($"cuda: NVRTC not found: looked for libnvrtc.so.12 in {_folder};"));
        Assert.That(error.Message, Does.Contain(CudaSearch.OverrideVariable));
        File.WriteAllText(Path.Combine(_folder, "libcuda.so.1"), "no library");
        error = Assert.Throws<CudaUnavailableException>(() => CudaApi.Load(search));
        Assert.That(error!.Message, Does.Contain("libcuda.so.1 has 10 bytes, which is no shared library"));
    }

    [Test]
    public void PlacesComeInTheirOrder()
    {
        string packages = Path.Combine(_folder, "lib", "python3.12", "site-packages");
        Directory.CreateDirectory(packages);
        var search = new CudaSearch(name => name switch
        {
            CudaSearch.OverrideVariable => "/own/one:/own/two",
            "CUDA_HOME" => "/cuda",
            "CONDA_PREFIX" => "/conda",
            "VIRTUAL_ENV" => _folder,
            _ => null,
        });
        string?[] places = [.. search.Places(CudaLibrary.Nvrtc)];
        string?[] wanted = ["/own/one", "/own/two", null, "/cuda/lib64", "/cuda/lib", "/conda/lib",
            $"{packages}/nvidia/cu13/lib", $"{packages}/nvidia/cuda_nvrtc/lib"];
        Assert.That(places.Where(p => wanted.Contains(p)), Is.EqualTo(wanted));
        Assert.That(search.Places(CudaLibrary.Cublas),
            Does.Contain($"{packages}/nvidia/cublas/lib"));
        Assert.That(search.Places(CudaLibrary.Driver).Last(), Is.EqualTo("/usr/lib/wsl/lib"));
        Assert.That(CudaSearch.Names(CudaLibrary.Nvrtc, 0),
            Is.EqualTo(new[] { "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2" }));
    }

    private const string Source = """
        typedef unsigned char u8; typedef unsigned long long u64; typedef unsigned short u16; typedef u16 bf16;
        /* extern "C" __global__ void commented(int x) */
        // extern "C" __global__ void out(int x)
        extern "C" __global__ void __launch_bounds__(256)
        first(real* __restrict__ y, const float *x, const u8* q, int n, u64 seed, float eps, const uint4* v) {}
        extern "C" __global__ void second(const int* __restrict__ ids, bf16* y, unsigned count, double d) {}
        extern "C" __global__ void none() {}
        """;

    [Test]
    public void SignaturesAreRead()
    {
        var found = KernelSignatures.Parse(Source, DType.F16);
        Assert.That(found.Keys, Is.EquivalentTo(new[] { "first", "second", "none" }));
        Assert.That(found["first"].Parameters, Is.EqualTo(new KernelParameter[]
        {
            new("y", ParameterKind.Pointer, DType.F16, true),
                new("x", ParameterKind.Pointer, DType.F32, false),
            new("q", ParameterKind.Pointer, DType.U8, false),
                new("n", ParameterKind.Int32, null, false),
            new("seed", ParameterKind.Int64, null, false),
                new("eps", ParameterKind.Float32, null, false),
            new("v", ParameterKind.Pointer, null, false),
        }));
        Assert.That(found["first"].Offsets, Is.EqualTo(new[] { 0, 8, 16, 24, 32, 40, 48 }));
        Assert.That(found["first"].ArgumentBytes, Is.EqualTo(56));
        Assert.That(found["second"].Parameters.Select(p => p.Element),
            Is.EqualTo(new DType?[] { DType.I32, DType.BF16, null, null }));
        var error = Assert.Throws<CudaException>(() =>
            KernelSignatures.Parse("extern \"C\" __global__ void k(Thing t) {}", DType.F32));
        Assert.That(error!.Message,
            Is.EqualTo("kernel k: type \"Thing\" of parameter t is not known"));
    }

    private const string Tiny =
        "extern \"C\" __global__ void tiny(float* y) { y[threadIdx.x] = 1; }";

    [Test]
    public void TheCacheIsUsedAndABrokenEntryIsMadeAnew()
    {
        var nvrtc = CudaTools.Compiler(DeviceCompiler.Nvrtc);
        var options = new ModuleOptions(DType.F32, 80);
        var first = new ModuleCompiler(nvrtc, _folder);
        byte[] ptx = first.Compile(Tiny, "tiny.cu", options);
        Assert.That(Encoding.UTF8.GetString(ptx), Does.Contain(".entry tiny").And.Contain("sm_80"));
        Assert.That(first.Compiled, Is.EqualTo(1));
        string file = Directory.GetFiles(_folder).Single();

        var second = new ModuleCompiler(nvrtc, _folder);
        Assert.That(second.Compile(Tiny, "tiny.cu", options), Is.EqualTo(ptx));
        Assert.That(second.Compiled, Is.Zero);

        byte[] whole = File.ReadAllBytes(file);
        byte[][] broken =
            [whole[..^1], whole[..10], [], [.. whole, 1],
            [.. whole[..60], (byte)(whole[60] ^ 1), .. whole[61..]]];
        foreach (byte[] bytes in broken)
        {
            File.WriteAllBytes(file, bytes);
            var again = new ModuleCompiler(nvrtc, _folder);
            Assert.That(again.Compile(Tiny, "tiny.cu", options), Is.EqualTo(ptx));
            Assert.That(again.Compiled, Is.EqualTo(1), $"{bytes.Length} bytes");
        }
        second.Compile(Tiny + " ", "tiny.cu", options);
        second.Compile(Tiny, "tiny.cu", options with { Storage = DType.BF16 });
        Assert.That(second.Compiled, Is.EqualTo(2), "source and options are part of the key");
        Assert.That(Directory.GetFiles(_folder), Has.Length.EqualTo(3),
            "and no temporary file stays");
    }

    [Test]
    public void ACacheThatCannotBeWrittenIsDoneWithout()
    {
        string file = Path.Combine(_folder, "file");
        File.WriteAllText(file, "");
        var compiler =
            new ModuleCompiler(CudaTools.Compiler(DeviceCompiler.Nvrtc),
            Path.Combine(file, "below"));
        Assert.That(compiler.Compile(Tiny, "tiny.cu", new(DType.F32, 80)), Is.Not.Empty);
    }

    [Test]
    public void ACompileErrorCarriesTheCompilersLog()
    {
        var compiler = new ModuleCompiler(CudaTools.Compiler(DeviceCompiler.Nvrtc), null);
        var error = Assert.Throws<CudaException>(() =>
            compiler.Compile("extern \"C\" __global__ void k() { nonsense; }", "bad.cu",
            new(DType.F32, 80)));
        Assert.That(error!.Message,
            Does.StartWith("nvrtcCompileProgram: ").And.Contain("nonsense"));
    }

    [Test]
    public void TheNewestKnownArchitectureNotAboveTheDeviceIsTaken()
    {
        if (CudaTools.Nvrtc == null) Assert.Ignore("NVRTC is not installed");
        var compiler = new ModuleCompiler(CudaTools.Nvrtc, null);
        Assert.That(compiler.Version, Is.EqualTo((11, 8)));
        Assert.That(compiler.Architecture(80), Is.EqualTo(80));
        Assert.That(compiler.Architecture(120), Is.EqualTo(90), "NVRTC 11.8 knows nothing newer");
        var error = Assert.Throws<CudaException>(() => compiler.Architecture(30));
        Assert.That(error!.Message, Does.Contain("the device has 3.0"));
    }

    // A driver that answers 222 to PTX gets a CUBIN; the emulator's own table with one entry
    // exchanged.
    [Test]
    public void ADriverOlderThanTheCompilerGetsMachineCode()
    {
        if (CudaTools.Nvrtc == null) Assert.Ignore("NVRTC is not installed");
        using var emulator = new EmulatedGpu(nvrtc: CudaTools.Nvrtc);
        emulator.Api.Driver.ModuleLoadDataEx = &RefusePtx;
        var context = new CudaContext(emulator.Api);
        s_images = "";
        using (CudaModule.Load(context, new(CudaTools.Nvrtc, null), Tiny, "tiny.cu",
            new(DType.F32, 0)))
            Assert.That(s_images, Is.EqualTo("ptx elf "));
        s_refuseAll = true;
        try
        {
            var error = Assert.Throws<CudaException>(() =>
                CudaModule.Load(context, new(CudaTools.Nvrtc, null), Tiny, "tiny.cu",
                new(DType.F32, 0)));
            Assert.That(error!.Message,
                Is.EqualTo("the driver (CUDA 13.0) is older than NVRTC 11.8: update the driver, " +
                "or install an NVRTC that is not newer than it"));
        }
        finally
        {
            s_refuseAll = false;
        }
    }

    private static string s_images = "";
    private static bool s_refuseAll;

    [System.Runtime.InteropServices.UnmanagedCallersOnly]
    private static int RefusePtx(nint* module, void* image, uint options, int* names, void** values)
    {
        bool elf = *(byte*)image == 0x7f;
        s_images += elf ? "elf " : "ptx ";
        *module = 1;
        return elf && !s_refuseAll ? 0 : 222;
    }
}
