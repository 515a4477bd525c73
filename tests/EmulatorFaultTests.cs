using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>Each check of the emulator, found by name in a kernel with just that mistake.</summary>
[TestFixture]
public sealed class EmulatorFaultTests
{
    // y and x have 256 floats, x is written; t is the thread, 128 of them in one block unless said.
    private static readonly (string Name, Check Check, string Body, int Blocks)[] s_mistakes =
    [
        ("store behind the end", Check.OutOfBounds, "y[t + 129] = x[t];", 1),
        ("load before the start", Check.OutOfBounds, "y[t] = x[t - 1];", 1),
        ("misaligned vector", Check.Misaligned, "*(float4*)(y + 1) = make_float4(0, 0, 0, 0);", 1),
        ("never written", Check.Uninitialised, "y[t] += 1;", 1),
        ("a number as pointer", Check.ForeignPointer, "*(volatile float*)(0x1000 + 4 * t) = 1;", 1),
        ("shared, between warps", Check.SharedRaceBetweenWarps,
            "s[t] = 0; __syncthreads(); s[t] = x[t]; y[t] = s[t ^ 32];", 1),
        ("shared, within a warp", Check.SharedRaceWithinWarp, "s[t] = x[t]; y[t] = s[t ^ 1];", 1),
        ("shared, one word twice", Check.SharedRaceWithinWarp,
            "s[t / 2] = x[t]; __syncthreads(); y[t] = s[t];", 1),
        ("no second barrier in a loop", Check.SharedRaceBetweenWarps,
            "float v = 0; for (int i = 0; i < n; i++) { s[t] = x[t] + i; __syncthreads(); v += s[t ^ 64]; } y[t] = v;", 1),
        ("shared never written", Check.Uninitialised, "y[t] = *(volatile float*)(s + t);", 1),
        ("shared behind the end", Check.OutOfBounds,
            "s[t + n * 100] = x[t]; __syncthreads(); y[t] = s[t];", 1),
        ("dynamic shared too small", Check.OutOfBounds,
            "extern __shared__ float d[]; d[t] = x[t]; y[t] = d[t];", 1),
        ("barrier for half a warp", Check.BarrierDivergence,
            "if (t & 1) __syncthreads(); else __syncwarp(); y[t] = x[t];", 1),
        ("different barriers", Check.Deadlock,
            "if (t < 64) asm volatile(\"bar.sync 1;\" ::: \"memory\"); else asm volatile(\"bar.sync 2;\" ::: \"memory\");"
            + " y[t] = x[t]; if (t < 64) asm volatile(\"bar.sync 2;\" ::: \"memory\");", 1),
        ("shuffle without its lanes", Check.LaneMissing,
            "if (t & 1) return; y[t] = __shfl_xor_sync(0xffffffffu, x[t], 1);", 1),
        ("not in the member mask", Check.LaneMissing,
            "y[t] = __shfl_xor_sync(0x0000ffffu, x[t], 1);", 1),
        ("trap", Check.Trap, "if (t == 77) __trap(); y[t] = x[t];", 1),
        ("endless", Check.Endless,
            "int k = n; do asm volatile(\"add.s32 %0, %0, 2;\" : \"+r\"(k)); while (k != 4); y[t] = k;",
            1),
        ("waits for what nobody writes", Check.Deadlock,
            "while (*(volatile int*)x != 7) { } y[t] = 1;", 1),
        ("two blocks, one place", Check.GlobalRace, "y[t] = x[t] + blockIdx.x;", 2),
        ("reads another block's result", Check.GlobalRace,
            "y[t + 128 * blockIdx.x] = x[t]; __syncthreads(); y[t + 128 * blockIdx.x] = y[t] + 1;",
            2),
        ("non-coherent read of a written place", Check.NonCoherentRead,
            "y[t] = x[t]; __syncthreads(); float v; asm volatile(\"ld.global.nc.f32 %0, [%1];\" : \"=f\"(v) : \"l\"(y + t)); y[t] = v + 1;", 1),
        ("constant written", Check.ConstantWrite,
            "asm volatile(\"st.f32 [%0], %1;\" :: \"l\"(table + (t & 3)), \"f\"(x[t]) : \"memory\");", 1),
        ("copy not waited for", Check.AsyncCopyNotWaitedFor,
            "COPY(s + t * 4, x + t * 4) COMMIT WAIT(1) y[t] = s[t * 4];", 1),
        ("copy of another thread without a barrier", Check.SharedRaceBetweenWarps,
            "for (int i = 0; i < 4; i++) s[t + i * 128] = 0; __syncthreads();"
            + " COPY(s + t * 4, x + t % 64 * 4) COMMIT WAIT(0) y[t] = s[(t ^ 32) * 4];", 1),
        ("copy over what is still read", Check.SharedRaceBetweenWarps,
            "COPY(s + t * 4, x + t % 64 * 4) COMMIT WAIT(0) __syncthreads(); y[t] = s[(t ^ 32) * 4];"
            + " COPY(s + t * 4, x + t % 64 * 4) COMMIT WAIT(0)", 1),
    ];

    private static IEnumerable<TestCaseData> Mistakes => s_mistakes.Select((m, n) =>
        new TestCaseData(n).SetName($"Found({m.Name})"));

    private static string Source(string body) => $$"""
        #define COPY(to, from) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from) : "memory");
        #define COMMIT asm volatile("cp.async.commit_group;" ::: "memory");
        #define WAIT(n) asm volatile("cp.async.wait_group " #n ";" ::: "memory");
        __constant__ float table[4] = { 1, 2, 3, 4 };
        extern "C" __global__ void k(float* y, const float* x, int n) {
            __shared__ __attribute__((aligned(16))) float s[512];
            int t = threadIdx.x; if (n < 0) y[0] = s[n & 7] + table[n & 3];
            {{body}}
        }
        """;

    [TestCaseSource(nameof(Mistakes))]
    public void Finds(int index)
    {
        var (_, check, body, blocks) = s_mistakes[index];
        using var gpu = new TestGpu(new() { WarpSteps = 10000, Threads = 1 });
        var arguments = gpu.Compile(Source(body)).Kernel("k").Arguments();
        arguments.Pointer(gpu.Allocate(1024), DType.F32)
            .Pointer(gpu.Upload(TestGpu.Numbers(256, 1)), DType.F32).Int(5);
        arguments.Launch(gpu.Stream, blocks, 128);
        var fault = gpu.Finding();
        Assert.That(fault.Check, Is.EqualTo(check), fault.ToString());
        Assert.That(fault.ToString(),
            Does.Contain(" in k at kernels.cu:").And.Contain("block (").And.Contain("warp "));
        Assert.That(fault.Instruction, Is.Not.Empty);
    }

    private const string Named = """
        extern "C" __global__ void k(float* y, const float* x, int n) {
            __shared__ float s[256];
            int t = threadIdx.x, pair = t / 64;
            s[t] = 0; __syncthreads();
            s[t] = x[t];
            asm volatile("bar.sync %0, 64;" :: "r"(pair + 1) : "memory");
            y[t] = s[t ^ n];
        }
        """;

    // Barriers of two warps each order those two, and no others.
    [TestCase(32, false)]
    [TestCase(64, true)]
    public void NamedBarriersOrderTheirOwnWarps(int distance, bool races)
    {
        using var gpu = new TestGpu();
        float[] x = TestGpu.Numbers(256, 1);
        ulong y = gpu.Allocate(1024);
        var arguments = gpu.Compile(Named).Kernel("k").Arguments();
        arguments.Pointer(y, DType.F32).Pointer(gpu.Upload(x), DType.F32).Int(distance);
        arguments.Launch(gpu.Stream, 1, 256);
        if (races) Assert.That(gpu.Finding().Check, Is.EqualTo(Check.SharedRaceBetweenWarps));
        else Assert.That(gpu.Download<float>(y, 256), Is.EqualTo(x.Select((_, t) => x[t ^ 32])));
    }

    [TestCase(1)]
    [TestCase(2)]
    [TestCase(3)]
    public void RacesAreFoundUnderEverySchedule(int seed)
    {
        using var gpu = new TestGpu(new() { Seed = seed });
        var arguments = gpu.Compile(Named).Kernel("k").Arguments();
        arguments.Pointer(gpu.Allocate(1024), DType.F32)
            .Pointer(gpu.Upload(TestGpu.Numbers(256, 1)), DType.F32).Int(64);
        arguments.Launch(gpu.Stream, 1, 256);
        Assert.That(gpu.Finding().Check, Is.EqualTo(Check.SharedRaceBetweenWarps));
    }

    private static readonly (string Name, Check Check, string Kernel, string From,
        string To)[] s_mutations =
    [
        ("wait_group 2 for 1", Check.AsyncCopyNotWaitedFor, "flash_fwd_d64",
            "cp.async.wait_group 1;", "cp.async.wait_group 2;"),
        ("no barrier behind the wait", Check.SharedRaceWithinWarp, "flash_fwd_d64",
            "asm volatile(\"cp.async.wait_group 1;\":::\"memory\"); __syncthreads();",
            "asm volatile(\"cp.async.wait_group 1;\":::\"memory\");"),
        ("no barrier at the loop's end", Check.SharedRaceWithinWarp, "flash_fwd_d64",
            "    __syncthreads(); }\n  l0+=", "    }\n  l0+="),
        ("ragged tail not guarded", Check.OutOfBounds, "flash_fwd_d64",
            "(ok?row0+r:0)*stride+k*8, ok?16:0", "(row0+r)*stride+k*8, 16"),
        ("output of the tail not guarded", Check.OutOfBounds, "flash_fwd_d64", "if(r0+8<T) Op",
            "Op"),
        ("tile twice as far", Check.OutOfBounds, "flash_fwd_d64", "sV=sK+2*TB", "sV=sK+4*TB"),
        ("no barrier in the block sum", Check.Uninitialised, "rmsnorm_fwd",
            "if(l==0) sh[w]=v; __syncthreads();\n  if(w==0){ v= l<nw? sh[l]:0.f;",
            "if(l==0) sh[w]=v;\n  if(w==0){ v= l<nw? sh[l]:0.f;"),
        ("no barrier before the sum is read", Check.SharedRaceWithinWarp, "rmsnorm_fwd",
            "if(l==0) sh[0]=v; } __syncthreads(); return sh[0]; }\nDEV float bmax",
            "if(l==0) sh[0]=v; } return sh[0]; }\nDEV float bmax"),
        ("one row too many", Check.OutOfBounds, "rmsnorm_fwd", "yr=(uint4*)(y+(u64)blockIdx.x*n)",
            "yr=(uint4*)(y+(u64)(blockIdx.x+1)*n)"),
        ("one element too many", Check.OutOfBounds, "rmsnorm_fwd",
            "i<n/8;i+=blockDim.x){ uint4 v=xr[i],g", "i<=n/8;i+=blockDim.x){ uint4 v=xr[i],g"),
        ("row at half its place", Check.Misaligned, "rmsnorm_fwd",
            "xr=(const uint4*)(x+(u64)blockIdx.x*n)", "xr=(const uint4*)(x+(u64)blockIdx.x*n/2+1)"),
        ("all blocks write row 0", Check.GlobalRace, "rmsnorm_fwd",
            "yr=(uint4*)(y+(u64)blockIdx.x*n)", "yr=(uint4*)(y)"),
    ];

    private static IEnumerable<TestCaseData> Mutations => s_mutations.Select((m, n) =>
        new TestCaseData(n).SetName($"FoundInSample({m.Kernel}, {m.Name})"));

    [TestCaseSource(nameof(Mutations))]
    public void FindsInRealKernel(int index)
    {
        var (_, check, kernel, from, to) = s_mutations[index];
        string source =
            File.ReadAllText(Path.Combine(ReferenceFile.Root, "ptx", "sample-kernels.cu"));
        Assert.That(source, Does.Contain(from));
        // Only the kernel in question is kept, so that the compiler has little to do.
        source = Cut(source.Replace(from, to), kernel);
        using var gpu = new TestGpu(new() { Threads = 1 });
        var module = gpu.Compile(source);
        if (kernel == "rmsnorm_fwd") LaunchNorm(gpu, module);
        else LaunchFlash(gpu, module);
        var fault = gpu.Finding();
        Assert.That(fault.Check, Is.EqualTo(check), fault.ToString());
        Assert.That(fault.Source.Line, Is.InRange(1, 200));
    }

    private static string Cut(string source, string kernel)
    {
        int norm = source.IndexOf("// 1. RMSNorm", StringComparison.Ordinal);
        int second = source.IndexOf("// 2. fused", StringComparison.Ordinal);
        int flash = source.IndexOf("// 7. flash", StringComparison.Ordinal);
        int large = source.IndexOf(
            "extern \"C\" __global__ void __launch_bounds__(128) flash_fwd_d128",
            StringComparison.Ordinal);
        return kernel == "rmsnorm_fwd" ? source[..second] : source[..norm] + source[flash..large];
    }

    private static void LaunchNorm(TestGpu gpu, CudaModule module)
    {
        const int rows = 3, n = 2048;
        var a = module.Kernel("rmsnorm_fwd").Arguments();
        a.Pointer(gpu.Allocate(rows * n * 2), DType.BF16).Pointer(gpu.Allocate(rows * 4), DType.F32)
            .Pointer(gpu.Upload(TestGpu.Brain(TestGpu.Numbers(rows * n, 1))), DType.BF16)
            .Pointer(gpu.Upload(TestGpu.Brain(TestGpu.Numbers(n, 2))), DType.BF16).Int(n)
            .Float(1e-6f);
        a.Launch(gpu.Stream, rows, 256);
    }

    private static void LaunchFlash(TestGpu gpu, CudaModule module)
    {
        const int tokens = 200, heads = 1, size = 64;
        ulong Random(int seed) =>
            gpu.Upload(TestGpu.Brain(TestGpu.Numbers(tokens * heads * size, seed)));
        var a = module.Kernel("flash_fwd_d64").Arguments();
        a.Pointer(gpu.Allocate(tokens * heads * size * 2), DType.BF16)
            .Pointer(gpu.Allocate(tokens * heads * 4), DType.F32)
            .Pointer(Random(1), DType.BF16).Pointer(Random(2), DType.BF16)
            .Pointer(Random(3), DType.BF16)
            .Int(tokens).Int(heads).Int(heads).Float(0.18f).Int(0);
        a.Launch(gpu.Stream, new((tokens + 63) / 64, heads, 1), 128, 5 * 64 * size * 2);
    }
}
