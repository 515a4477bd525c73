using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>Each mistake with wgmma, found by name in a kernel with just that mistake.</summary>
[TestFixture]
public sealed class EmulatorWarpgroupFaultTests
{
    // A is 64 x 16 ones, written by its 128 threads; B its first 8 rows. D = A B is 16 everywhere,
    // twice 32; %d0 + %d1 is stored, then the tile is used again.
    private const string Right = """
        mov.u32 %t0, %tid.x; shr.u32 %t1, %t0, 5; mov.u32 %t9, space; mad.lo.u32 %t8, %t0, 16, %t9;
        mov.u32 %t2, 0x3F803F80; mov.u32 %t3, %t2; mov.u32 %t4, %t2; mov.u32 %t5, %t2;
        st.shared.v4.u32 [%t8], {%t2, %t3, %t4, %t5};
        fence.proxy.async.shared::cta;
        bar.sync 0;
        shr.u32 %t9, %t9, 4; cvt.u64.u32 %l0, %t9; or.b64 %da, %l0, 0x1000080000; mov.b64 %db, %da;
        mov.f32 %d0, 0f00000000; mov.f32 %d1, %d0; mov.f32 %d2, %d0; mov.f32 %d3, %d0;
        setp.eq.u32 %p0, 0, 0;
        wgmma.fence.sync.aligned;
        FIRST: wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, %da, %db, %p0, 1, 1, 0, 0;
        mov.f32 %d4, %d0; mov.f32 %d0, %d4;
        SECOND: wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, {%t2, %t3, %t4, %t5}, %db, %p0, 1, 1, 0;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        add.f32 %d5, %d0, %d1;
        bar.sync 1, 128;
        st.shared.v4.u32 [%t8], {%t0, %t0, %t0, %t0};
        ld.param.u64 %l1, [d]; mul.wide.u32 %l2, %t0, 4; add.s64 %l1, %l1, %l2;
        st.global.f32 [%l1], %d5;
        """;

    private const string Fence = "wgmma.fence.sync.aligned;",
        Commit = "wgmma.commit_group.sync.aligned;", Wait = "wgmma.wait_group.sync.aligned 0;",
        Proxy = "fence.proxy.async.shared::cta;",
        Store = "st.shared.v4.u32 [%t8], {%t2, %t3, %t4, %t5};";

    private static readonly (string Name, Check Check, string From, string To)[] s_mistakes =
    [
        ("no wgmma.fence", Check.WarpgroupOrder, Fence, ""),
        ("accumulator changed behind the fence", Check.WarpgroupOrder, Fence,
            Fence + " add.f32 %d3, %d3, %d3;"),
        ("fragment changed behind the fence", Check.WarpgroupOrder, "SECOND:",
            "or.b32 %t5, %t5, %t5; SECOND:"),
        ("accumulator read before the wait", Check.WarpgroupOrder, Wait, ""),
        ("copy of an accumulator read before the wait", Check.WarpgroupOrder, Commit,
            "mov.f32 %d9, %d2; add.f32 %d9, %d9, %d9; " + Commit),
        ("wait for all but this group", Check.WarpgroupOrder, Wait,
            "wgmma.wait_group.sync.aligned 1;"),
        ("not committed", Check.WarpgroupOrder, Commit, ""),
        ("fragment changed before the wait", Check.WarpgroupOrder, Wait,
            "or.b32 %t3, %t3, %t3; " + Wait),
        ("result as fragment before the wait", Check.WarpgroupOrder, "SECOND:",
            "mov.b32 %t5, %d1; SECOND:"),
        ("a group more in one warp", Check.WarpgroupOrder, "FIRST:",
            "setp.ne.u32 %p1, %t1, 0; @%p1 bra FIRST; " + Commit + " FIRST:"),
        ("no fence.proxy.async", Check.ProxyFenceMissing, Proxy, ""),
        ("fence.proxy.async before the store", Check.ProxyFenceMissing, Store + "\n" + Proxy,
            Proxy + " " + Store),
        ("no barrier behind the store", Check.SharedRaceBetweenWarps, "bar.sync 0;", ""),
        ("overwritten before the wait", Check.SharedRaceBetweenWarps, Wait,
            "bar.sync 2; st.shared.u32 [%t8], %t0; " + Wait),
        ("never written", Check.Uninitialised, Store,
            "setp.gt.u32 %p1, %t0, 126; @!%p1 " + Store),
        ("behind the end", Check.OutOfBounds, "mov.b64 %db, %da;",
            "mov.b64 %db, %da; add.u64 %da, %da, 4096;"),
        ("stride leads behind the end", Check.OutOfBounds, "0x1000080000", "0x3FFF00080000"),
        ("misaligned for 128-byte swizzle", Check.Misaligned, "or.b64 %da, %l0, 0x1000080000;",
            "or.b64 %da, %l0, 0x4000001000080000; add.u64 %da, %da, 8;"),
        ("misaligned for 32-byte swizzle", Check.Misaligned, "or.b64 %da, %l0, 0x1000080000;",
            "or.b64 %da, %l0, 0xC000001000080000; add.u64 %da, %da, 8;"),
        ("base offset", Check.Descriptor, "0x1000080000", "0x2001000080000"),
        ("bits that must be zero", Check.Descriptor, "0x1000080000", "0x0400001000080000"),
        ("descriptors differ", Check.Descriptor, "mov.b64 %db, %da;",
            "mov.b64 %db, %da; setp.eq.u32 %p1, %t0, 5; @%p1 add.u64 %db, %db, 16;"),
        ("scale-d differs", Check.Descriptor, "setp.eq.u32 %p0, 0, 0;",
            "setp.ne.u32 %p0, %t0, 99;"),
        ("a warp does not come", Check.Deadlock, "FIRST:",
            "setp.eq.u32 %p1, %t1, 2; @%p1 bra END; FIRST:"),
        ("half a warp", Check.Deadlock, "FIRST:",
            "setp.eq.u32 %p1, %t0, 77; @%p1 bra END; bra FIRST; FIRST:"),
        ("another product", Check.BarrierDivergence, "FIRST:",
            "setp.eq.u32 %p1, %t1, 2; @%p1 bra SECOND; FIRST:"),
    ];

    private static IEnumerable<TestCaseData> Mistakes => s_mistakes.Select((m, n) =>
        new TestCaseData(n).SetName($"Found({m.Name})"));

    private static ulong Launch(TestGpu gpu, string lines, int threads = 128)
    {
        ulong d = gpu.Upload(new float[128]);
        var module = EmulatorWarpgroupTests.Load(gpu, lines + "\nEND:");
        var arguments = module.Kernel("k").Arguments();
        for (int n = 0; n < 4; n++) arguments.Pointer(d, DType.I64);
        arguments.Launch(gpu.Stream, 1, threads);
        return d;
    }

    [TestCaseSource(nameof(Mistakes))]
    public void Finds(int index)
    {
        var (_, check, from, to) = s_mistakes[index];
        Assert.That(Right, Does.Contain(from));
        using var gpu = new TestGpu(new() { Architecture = 90 });
        Launch(gpu, Right.Replace(from, to));
        var fault = gpu.Finding();
        Assert.That(fault.Check, Is.EqualTo(check), fault.ToString());
        Assert.That(fault.Instruction, Is.Not.Empty);
    }

    [TestCase(Fence, Fence)]
    [TestCase(Proxy, "")] // the reader may fence too, behind the barrier
    [TestCase("SECOND:", Commit + " SECOND:")]
    [TestCase("bar.sync 1, 128;", "")] // a product is over for its whole warpgroup
    public void NothingIsFoundInTheRightKernel(string from, string to)
    {
        string lines = Right.Replace(from, to);
        if (from == Proxy) lines = lines.Replace("bar.sync 0;", "bar.sync 0; " + Proxy);
        foreach (int seed in (ReadOnlySpan<int>)[0, 1, 2])
        {
            using var gpu = new TestGpu(new() { Architecture = 90, Seed = seed });
            Assert.That(gpu.Download<float>(Launch(gpu, lines), 128), Is.All.EqualTo(64));
        }
    }

    [Test]
    public void ThreeWarpsAreNoWarpgroup()
    {
        using var gpu = new TestGpu(new() { Architecture = 90 });
        Launch(gpu, Right.Replace("bar.sync 1, 128;", ""), 96);
        Assert.That(gpu.Finding().Check, Is.EqualTo(Check.BarrierDivergence));
    }

    [TestCase("wgmma.mma_async.sync.aligned.m64n12k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, %da, %db, %p0, 1, 1, 0, 0;",
        "multiple of 8")]
    [TestCase("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d0, %d1, %d2}, %da, %db, %p0, 1, 1, 0, 0;",
        "4 registers")]
    [TestCase("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%d0, %d1, %d2, %d3}, %da, %db, %p0, 1, 1, 0, 0;",
        "not known")]
    [TestCase("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, %da, %db, %p0, 2, 1, 0, 0;",
        "imm-scale")]
    [TestCase("setmaxnreg.dec.sync.aligned.u32 25;", "multiples of 8")]
    [TestCase("fence.proxy.tensormap::generic.release.gpu;", "fence.proxy")]
    [TestCase("tcgen05.fence::before_thread_sync;", "not known")]
    public void WhatIsNotKnownIsRefused(string line, string why)
    {
        using var gpu = new TestGpu(new() { Architecture = 90 });
        Assert.That(Assert.Throws<Kernels.Cuda.CudaException>(() =>
            EmulatorWarpgroupTests.Load(gpu, line))!.Message, Does.Contain(why));
    }
}
