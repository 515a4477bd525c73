using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>cp.async.bulk both ways: values, barriers and groups, and each mistake with
/// them.</summary>
[TestFixture]
public sealed class EmulatorBulkCopyTests
{
    // Thread 0 brings 256 bytes of a to shared byte 1024, all wait for the barrier at byte 0, add
    // their number, and thread 32 sends them to d, then adds them there.
    private const string Right = """
        mov.u32 %t0, %tid.x; mov.u32 %t1, space; add.u32 %t2, %t1, 1024;
        mad.lo.u32 %t3, %t0, 4, %t2; ld.param.u64 %l0, [a]; ld.param.u64 %l1, [d];
        setp.ne.u32 %p0, %t0, 0; @%p0 bra WAIT;
        mbarrier.init.shared::cta.b64 [%t1], 1; fence.mbarrier_init.release.cluster;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [%t1], 256;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%t2], [%l0], 128, [%t1];
        cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.L2::cache_hint [%t2+128], [%l0+128], 128, [%t1], %l5;
        WAIT: bar.sync 0;
        TEST: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%t1], 0; @!%p1 bra TEST;
        ld.shared.f32 %d0, [%t3]; cvt.rn.f32.u32 %d1, %t0; add.f32 %d0, %d0, %d1;
        st.shared.f32 [%t3], %d0;
        fence.proxy.async.shared::cta; bar.sync 0;
        setp.ne.u32 %p0, %t0, 32; @%p0 bra OUT;
        cp.async.bulk.global.shared::cta.bulk_group [%l1], [%t2], 256;
        cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
        cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%l1], [%t2], 256;
        cp.async.bulk.commit_group;
        READ: cp.async.bulk.wait_group.read 0;
        OUT: bar.sync 0;
        st.shared.f32 [%t3], %d1;
        """;

    private static ulong Launch(TestGpu gpu, string lines)
    {
        float[] a = [.. Enumerable.Range(0, 64).Select(n => n * 0.5f)];
        ulong d = gpu.Upload(new float[64]);
        var module = EmulatorWarpgroupTests.Load(gpu, lines);
        var arguments = module.Kernel("k").Arguments();
        arguments.Pointer(d, DType.I64).Pointer(gpu.Upload(a), DType.I64).Pointer(d, DType.I64)
            .Pointer(d, DType.I64);
        arguments.Launch(gpu.Stream, 1, 64);
        return d;
    }

    private static TestGpu Gpu(bool early = false, int seed = 0) =>
        new(new() { Architecture = 90, EarlyAsyncCopies = early, Seed = seed });

    [Test]
    public void BytesGoThereAndBack([Values] bool early, [Values(0, 1, 2)] int seed)
    {
        using var gpu = Gpu(early, seed);
        Assert.That(gpu.Download<float>(Launch(gpu, Right), 64),
            Is.EqualTo(Enumerable.Range(0, 64).Select(n => 2 * (n * 0.5f + n))));
    }

    private const string Test = "@!%p1 bra TEST;",
        Expect = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%t1], 256;",
        Read = "cp.async.bulk.wait_group.read 0;",
        Fence = "fence.proxy.async.shared::cta;";

    private static readonly (string Name, Check Check, string From, string To)[] s_mistakes =
    [
        ("not waited for", Check.AsyncCopyNotWaitedFor, Test, ""),
        ("bytes not expected", Check.AsyncCopyNotWaitedFor, Expect,
            "mbarrier.arrive.shared::cta.b64 _, [%t1];"),
        ("too many bytes expected", Check.Deadlock, "[%t1], 256;", "[%t1], 272;"),
        ("overwritten while it comes", Check.AsyncCopyNotWaitedFor, "WAIT: bar.sync 0;",
            "WAIT: bar.sync 0; st.shared.f32 [%t3], %d1;"),
        ("copied twice", Check.AsyncCopyNotWaitedFor, "[%t2+128], [%l0+128]", "[%t2], [%l0+128]"),
        ("no barrier there", Check.MemoryBarrier, "128, [%t1];", "128, [%t1+8];"),
        ("no fence.proxy.async", Check.ProxyFenceMissing, Fence, ""),
        ("changed behind the fence", Check.ProxyFenceMissing, Fence,
            Fence + " st.shared.f32 [%t3], %d1;"),
        ("sent before the others have written", Check.SharedRaceBetweenWarps,
            Fence + " bar.sync 0;", Fence),
        ("overwritten before it is read", Check.SharedRaceBetweenWarps, Read, ""),
        ("waits for all but one group", Check.SharedRaceBetweenWarps, Read,
            "cp.async.bulk.wait_group.read 1;"),
        ("not committed", Check.SharedRaceBetweenWarps, "cp.async.bulk.commit_group;\nREAD:",
            "READ:"),
        ("never waited for", Check.AsyncCopyNotWaitedFor, Read + "\nOUT: bar.sync 0;\n"
            + "st.shared.f32 [%t3], %d1;", "\nOUT:"),
        ("not whole 16 bytes", Check.AsyncCopyShape, "[%t2], [%l0], 128", "[%t2], [%l0], 120"),
        ("misaligned", Check.Misaligned, "[%t2], [%l0], 128", "[%t2], [%l0+8], 128"),
        ("source too short", Check.OutOfBounds, "[%l0+128], 128", "[%l0+144], 128"),
        ("target too short", Check.OutOfBounds, "bulk_group [%l1], [%t2], 256",
            "bulk_group [%l1+16], [%t2], 256"),
    ];

    private static IEnumerable<TestCaseData> Mistakes => s_mistakes.Select((m, n) =>
        new TestCaseData(n).SetName($"Found({m.Name})"));

    [TestCaseSource(nameof(Mistakes))]
    public void Finds(int index)
    {
        var (_, check, from, to) = s_mistakes[index];
        Assert.That(Right, Does.Contain(from));
        using var gpu = Gpu();
        Launch(gpu, Right.Replace(from, to));
        var fault = gpu.Finding();
        Assert.That(fault.Check, Is.EqualTo(check), fault.ToString());
    }
}
