using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>mbarrier, numbered barriers with arrivals, and flags between blocks: what waits goes on
/// when it may, finds what was handed over, and a wait for nothing is a deadlock.</summary>
[TestFixture]
public sealed class EmulatorBarrierTests
{
    // t: thread; w: warp; d, a: pointers of the thread; s: its word of shared memory.
    private const string Start = """
        mov.u32 %t0, %tid.x; shr.u32 %t1, %t0, 5; mul.wide.u32 %l9, %t0, 4;
        ld.param.u64 %l0, [d]; add.s64 %l0, %l0, %l9; ld.param.u64 %l1, [a]; add.s64 %l1, %l1, %l9;
        mov.u32 %t2, space; shl.b32 %t3, %t0, 2; add.u32 %t2, %t2, %t3; add.u32 %t2, %t2, 1024;
        mov.u32 %t4, space; mov.u32 %t9, 0;
        """;

    // Barriers full (byte 0) and empty (8): of as many arrivals as a warp has lanes.
    private const string Made = """
        setp.ne.u32 %p0, %t0, 0; @%p0 bra MADE;
        mbarrier.init.shared::cta.b64 [%t4], 32; mbarrier.init.shared::cta.b64 [%t4+8], 32;
        fence.mbarrier_init.release.cluster;
        MADE: bar.sync 0; setp.ne.u32 %p1, %t1, 0;
        """;

    private const string Handed = Start + Made + """
        @%p1 bra CONSUME;
        PRODUCE: xor.b32 %t8, %t9, 1; and.b32 %t8, %t8, 1;
        EMPTY: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%t4+8], %t8; @!%p2 bra EMPTY;
        ld.global.u32 %t7, [%l1]; add.u32 %t7, %t7, %t9; st.shared.u32 [%t2], %t7;
        mbarrier.arrive.shared::cta.b64 _, [%t4];
        add.u32 %t9, %t9, 1; setp.lt.u32 %p2, %t9, 10; @%p2 bra PRODUCE; bra END;
        CONSUME: mov.u32 %t6, 0; xor.b32 %t3, %t2, 124; sub.u32 %t3, %t3, 128;
        AGAIN: and.b32 %t8, %t9, 1;
        FULL: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%t4], %t8, 1000; @!%p2 bra FULL;
        ld.shared.u32 %t7, [%t3]; mad.lo.u32 %t6, %t6, 3, %t7;
        mbarrier.arrive.release.cta.shared::cta.b64 %l5, [%t4+8];
        add.u32 %t9, %t9, 1; setp.lt.u32 %p2, %t9, 10; @%p2 bra AGAIN;
        st.global.u32 [%l0], %t6;
        END:
        """;

    private static void Launch(TestGpu gpu, string lines, int blocks, int threads, ulong d, ulong a)
    {
        var module = EmulatorWarpgroupTests.Load(gpu, lines);
        var arguments = module.Kernel("k").Arguments();
        arguments.Pointer(d, DType.I64).Pointer(a, DType.I64).Pointer(d, DType.I64)
            .Pointer(d, DType.I64);
        arguments.Launch(gpu.Stream, blocks, threads);
    }

    private static TestGpu Gpu(int seed = 0, int threads = 0) =>
        new(new() { Architecture = 90, Seed = seed, Threads = threads });

    [Test]
    public void StagesAreHandedBetweenWarps([Values(0, 1, 2, 3)] int seed)
    {
        using var gpu = Gpu(seed);
        uint[] a = [.. Enumerable.Range(0, 64).Select(n => (uint)(n * n))];
        ulong d = gpu.Upload(new uint[64]);
        Launch(gpu, Handed, 1, 64, d, gpu.Upload(a));
        uint[] got = gpu.Download<uint>(d, 64);
        for (uint lane = 0; lane < 32; lane++)
        {
            uint expected = 0;
            for (uint n = 0; n < 10; n++) expected = expected * 3 + a[31 - lane] + n;
            Assert.That(got[32 + lane], Is.EqualTo(expected), $"lane {lane}");
        }
    }

    private static readonly (string Name, Check Check, string From, string To)[] s_mistakes =
    [
        ("empty not waited for", Check.SharedRaceBetweenWarps, "@!%p2 bra EMPTY;", ""),
        ("empty with the full parity", Check.Deadlock, "xor.b32 %t8, %t9, 1;", "mov.b32 %t8, %t9;"),
        ("full with the wrong parity", Check.Deadlock, "AGAIN: and.b32 %t8, %t9, 1;",
            "AGAIN: and.b32 %t8, %t9, 1; xor.b32 %t8, %t8, 1;"),
        ("one arrival too many", Check.Deadlock, "[%t4], 32;", "[%t4], 33;"),
        ("more arrivals than are pending", Check.MemoryBarrier, "mbarrier.arrive.shared::cta.b64 _, [%t4];",
            "mbarrier.arrive.shared::cta.b64 _, [%t4], 3;"),
        ("read after the arrival", Check.SharedRaceBetweenWarps,
            "%t6, 3, %t7;\nmbarrier.arrive.release.cta.shared::cta.b64 %l5, [%t4+8];",
            "%t6, 3, %t7;\nmbarrier.arrive.release.cta.shared::cta.b64 %l5, [%t4+8]; "
            + "ld.shared.u32 %t7, [%t3];"),
        ("no barrier behind init", Check.SharedRaceBetweenWarps, "MADE: bar.sync 0;", "MADE:"),
        ("made twice", Check.MemoryBarrier, "mbarrier.init.shared::cta.b64 [%t4+8], 32;",
            "mbarrier.init.shared::cta.b64 [%t4], 32;"),
        ("never made", Check.MemoryBarrier, "mbarrier.init.shared::cta.b64 [%t4+8], 32;", ""),
        ("written over", Check.MemoryBarrier, "st.shared.u32 [%t2], %t7;",
            "st.shared.u32 [%t4], %t7;"),
        ("no count", Check.MemoryBarrier, "[%t4], 32;", "[%t4], 0;"),
        ("misaligned", Check.Misaligned, "[%t4+8], 32;", "[%t4+12], 32;"),
        ("bytes never come", Check.Deadlock, "mbarrier.arrive.shared::cta.b64 _, [%t4];",
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%t4], 16;"),
    ];

    private static IEnumerable<TestCaseData> Mistakes => s_mistakes.Select((m, n) =>
        new TestCaseData(n).SetName($"Found({m.Name})"));

    [TestCaseSource(nameof(Mistakes))]
    public void Finds(int index)
    {
        var (_, check, from, to) = s_mistakes[index];
        Assert.That(Handed, Does.Contain(from));
        using var gpu = Gpu();
        Launch(gpu, Handed.Replace(from, to), 1, 64, gpu.Upload(new uint[64]),
            gpu.Upload(new uint[64]));
        var fault = gpu.Finding();
        Assert.That(fault.Check, Is.EqualTo(check), fault.ToString());
    }

    [Test]
    public void StatesAndBytesCompleteAPhase()
    {
        // Lane 0 arrives with 24 bytes to come, then completes them in two parts.
        using var gpu = Gpu();
        ulong d = gpu.Upload(new uint[64]);
        Launch(gpu, Start + """
            setp.ne.u32 %p0, %t0, 0; @%p0 bra END;
            mbarrier.init.shared.b64 [%t4], 2;
            mbarrier.arrive.expect_tx.shared.b64 %l2, [%t4], 24;
            mbarrier.test_wait.shared.b64 %p1, [%t4], %l2; selp.u32 %t5, 1, 0, %p1;
            mbarrier.complete_tx.relaxed.cta.shared.b64 [%t4], 16;
            mbarrier.arrive.noComplete.shared.b64 %l3, [%t4];
            mbarrier.test_wait.shared.b64 %p1, [%t4], %l2; selp.u32 %t6, 2, 0, %p1; or.b32 %t5, %t5, %t6;
            mbarrier.complete_tx.shared.b64 [%t4], 8;
            mbarrier.test_wait.shared.b64 %p1, [%t4], %l2; selp.u32 %t6, 4, 0, %p1; or.b32 %t5, %t5, %t6;
            mbarrier.test_wait.parity.shared.b64 %p1, [%t4], 0; selp.u32 %t6, 8, 0, %p1; or.b32 %t5, %t5, %t6;
            mbarrier.test_wait.parity.shared.b64 %p1, [%t4], 1; selp.u32 %t6, 16, 0, %p1; or.b32 %t5, %t5, %t6;
            st.global.u32 [%l0], %t5;
            END:
            """.Replace(".noComplete", ""), 1, 32, d, d);
        Assert.That(gpu.Download<uint>(d, 1)[0], Is.EqualTo(4 + 8));
    }

    // Warps 0 and 1 write and arrive; warps 2 and 3 wait and read.
    [TestCase("bar.arrive 1, 128;", false)]
    [TestCase("bar.arrive 1, 128; st.shared.u32 [%t2], 7;", true)]
    public void ArrivalsOrderWhatWasBefore(string arrive, bool races)
    {
        foreach (int seed in (ReadOnlySpan<int>)[0, 1, 2])
        {
            using var gpu = Gpu(seed);
            ulong d = gpu.Upload(new uint[128]);
            Launch(gpu, Start + $"""
                setp.ge.u32 %p0, %t1, 2; @%p0 bra READ;
                st.shared.u32 [%t2], %t0; {arrive} bra END;
                READ: bar.sync 1, 128; xor.b32 %t3, %t2, 256; ld.shared.u32 %t5, [%t3];
                st.global.u32 [%l0], %t5;
                END:
                """, 1, 128, d, d);
            if (races)
                Assert.That(gpu.Finding().Check, Is.EqualTo(Check.SharedRaceBetweenWarps));
            else
                Assert.That(gpu.Download<uint>(d, 128)[64..],
                    Is.EqualTo(Enumerable.Range(0, 64)));
        }
    }

    // Lanes of one warp wait for one another: the lower half for what the upper half arrives at.
    [Test]
    public void LanesOfOneWarpWaitForOneAnother()
    {
        using var gpu = Gpu();
        ulong d = gpu.Upload(new uint[32]);
        Launch(gpu, Start + """
            setp.ne.u32 %p0, %t0, 0; @%p0 bra MADE;
            mbarrier.init.shared::cta.b64 [%t4], 16;
            MADE: bar.warp.sync -1; setp.ge.u32 %p1, %t0, 16; @%p1 bra UPPER;
            WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%t4], 0; @!%p2 bra WAIT;
            st.global.u32 [%l0], %t0; bra END;
            UPPER: mbarrier.arrive.shared::cta.b64 _, [%t4];
            END:
            """, 1, 32, d, d);
        Assert.That(gpu.Download<uint>(d, 32)[..16], Is.EqualTo(Enumerable.Range(0, 16)));
    }

    // Block n adds to what block n - 1 left, told by a flag; block 0 is the one begun last, or
    // first.
    private static string Chain(string wait, string tell, bool last) => Start + $"""
        mov.u32 %t1, %ctaid.x; mov.u32 %t3, %nctaid.x; sub.u32 %t3, %t3, 1;
        {(last ? "sub.u32 %t1, %t3, %t1;" : "")}
        ld.param.u64 %l2, [a]; add.s64 %l2, %l2, 1024;
        setp.ne.u32 %p0, %t0, 0; @%p0 bra READY;
        SPIN: {wait} setp.ne.u32 %p1, %t5, %t1; @%p1 bra SPIN;
        READY: bar.sync 0;
        ld.global.u32 %t6, [%l0]; mad.lo.u32 %t6, %t6, 3, %t1; st.global.u32 [%l0], %t6;
        bar.sync 0; @%p0 bra END; add.u32 %t5, %t1, 1; {tell}
        END:
        """;

    private const string Acquire = "ld.acquire.gpu.global.u32 %t5, [%l2];",
        Release = "st.release.gpu.global.u32 [%l2], %t5;";

    [TestCase(Acquire, Release, false, 1)]
    [TestCase(Acquire, Release, true, 1)]
    [TestCase(Acquire, Release, true, 3)]
    [TestCase(Acquire, "red.release.gpu.global.add.u32 [%l2], 1;", true, 2)]
    [TestCase("ld.volatile.global.u32 %t5, [%l2]; membar.gl;",
        "membar.gl; st.volatile.global.u32 [%l2], %t5;", true, 2)]
    [TestCase("atom.acquire.gpu.global.cas.b32 %t5, [%l2], 77, 77;",
        "fence.acq_rel.gpu; st.relaxed.gpu.global.u32 [%l2], %t5;", true, 2)]
    public void BlocksWaitForOneAnother(string wait, string tell, bool last, int threads)
    {
        const int blocks = 20;
        foreach (int seed in (ReadOnlySpan<int>)[0, 1])
        {
            using var gpu = Gpu(seed, threads);
            ulong d = gpu.Upload(new uint[64]);
            Launch(gpu, Chain(wait, tell, last), blocks, 64, d, gpu.Upload(new uint[512]));
            uint expected = 0;
            for (uint n = 0; n < blocks; n++) expected = expected * 3 + n;
            Assert.That(gpu.Download<uint>(d, 64), Is.All.EqualTo(expected));
        }
    }

    [TestCase("st.relaxed.gpu.global.u32 [%l2], %t5;", Check.GlobalRace)] // orders nothing
    [TestCase("", Check.Deadlock)]
    public void BlocksThatCannotGoOnAreFound(string tell, Check check)
    {
        foreach (int threads in (ReadOnlySpan<int>)[1, 2])
        {
            using var gpu = Gpu(threads: threads);
            ulong d = gpu.Upload(new uint[64]);
            Launch(gpu, Chain(Acquire, tell, true), 8, 64, d, gpu.Upload(new uint[512]));
            var fault = gpu.Finding();
            Assert.That(fault.Check, Is.EqualTo(check), fault.ToString());
        }
    }

    // The first block waits for the last: that works while all are on the device.
    [TestCase(132 * 3, true)]
    [TestCase(132 * 3 + 1, false)]
    public void ABlockIsBegunOnlyWhereThereIsRoom(int blocks, bool fits)
    {
        using var gpu = Gpu();
        ulong d = gpu.Upload(new uint[64]);
        Launch(gpu, Chain(Acquire, Release, true), blocks, 64, d, gpu.Upload(new uint[512]));
        if (fits) Assert.DoesNotThrow(() => gpu.Download<uint>(d, 1));
        else Assert.That(gpu.Finding().Check, Is.EqualTo(Check.Deadlock));
    }

    [Test]
    public void OneLaneIsElected()
    {
        using var gpu = Gpu();
        ulong d = gpu.Upload(new uint[32]);
        Launch(gpu, Start + """
            elect.sync %t5|%p1, 0xffffffff; elect.sync _|%p2, -1;
            @%p1 add.u32 %t5, %t5, 100; @%p2 add.u32 %t5, %t5, 1000; st.global.u32 [%l0], %t5;
            """, 1, 32, d, d);
        uint[] got = gpu.Download<uint>(d, 32);
        Assert.That(got[0], Is.EqualTo(1100));
        Assert.That(got[1..], Is.All.EqualTo(0));
    }
}
