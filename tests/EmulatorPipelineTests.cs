using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>Warps that bring tiles and a warpgroup that multiplies them, two stages apart: right
/// under every schedule, and each mistake found.</summary>
[TestFixture]
public sealed class EmulatorPipelineTests
{
    // Warp 4 copies five tiles of 64 x 16 to two stages, warps 0 to 3 add up the tiles' products
    // with themselves. Barriers: full 0 and 1 at byte 4096, empty at 4112.
    private const string Right = """
        mov.u32 %t0, %tid.x; shr.u32 %t1, %t0, 5; mov.u32 %t2, space; mov.u32 %t9, 0;
        setp.ne.u32 %p0, %t0, 0; @%p0 bra MADE;
        mbarrier.init.shared::cta.b64 [%t2+4096], 32; mbarrier.init.shared::cta.b64 [%t2+4104], 32;
        mbarrier.init.shared::cta.b64 [%t2+4112], 128; mbarrier.init.shared::cta.b64 [%t2+4120], 128;
        MADE: bar.sync 0;
        setp.lt.u32 %p1, %t1, 4; @%p1 bra CONSUME;
        setmaxnreg.dec.sync.aligned.u32 40;
        setp.ne.u32 %p1, %t1, 4; @%p1 bra END;
        PRODUCE: and.b32 %t3, %t9, 1; shr.u32 %t4, %t9, 1; xor.b32 %t4, %t4, 1; and.b32 %t4, %t4, 1;
        mad.lo.u32 %t5, %t3, 8, %t2;
        EMPTY: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%t5+4112], %t4; @!%p2 bra EMPTY;
        shl.b32 %t6, %t3, 11; add.u32 %t6, %t6, %t2; and.b32 %t7, %t0, 31; mad.lo.u32 %t6, %t7, 16, %t6;
        ld.param.u64 %l0, [a]; mul.wide.u32 %l1, %t9, 2048; add.s64 %l0, %l0, %l1;
        mul.wide.u32 %l1, %t7, 16; add.s64 %l0, %l0, %l1;
        cp.async.cg.shared.global [%t6], [%l0], 16; cp.async.cg.shared.global [%t6+512], [%l0+512], 16;
        cp.async.cg.shared.global [%t6+1024], [%l0+1024], 16;
        cp.async.cg.shared.global [%t6+1536], [%l0+1536], 16;
        cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%t5+4096];
        add.u32 %t9, %t9, 1; setp.lt.u32 %p2, %t9, 5; @%p2 bra PRODUCE; bra END;
        CONSUME: setmaxnreg.inc.sync.aligned.u32 240; setp.eq.u32 %p0, 0, 0;
        mov.f32 %d0, 0f00000000; mov.f32 %d1, %d0; mov.f32 %d2, %d0; mov.f32 %d3, %d0;
        AGAIN: and.b32 %t3, %t9, 1; shr.u32 %t4, %t9, 1; and.b32 %t4, %t4, 1; mad.lo.u32 %t5, %t3, 8, %t2;
        FULL: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%t5+4096], %t4; @!%p2 bra FULL;
        fence.proxy.async.shared::cta;
        shl.b32 %t6, %t3, 11; add.u32 %t6, %t6, %t2; shr.u32 %t6, %t6, 4; cvt.u64.u32 %l0, %t6;
        or.b64 %da, %l0, 0x1000080000;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, %da, %da, %p0, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        mbarrier.arrive.shared::cta.b64 _, [%t5+4112];
        add.u32 %t9, %t9, 1; setp.lt.u32 %p2, %t9, 5; @%p2 bra AGAIN;
        ld.param.u64 %l0, [d]; mul.wide.u32 %l1, %t0, 4; add.s64 %l0, %l0, %l1;
        st.global.f32 [%l0], %d3;
        END:
        """;

    private const string Wait = "wgmma.wait_group.sync.aligned 0;",
        Release = "mbarrier.arrive.shared::cta.b64 _, [%t5+4112];",
        Full = "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%t5+4096];";

    private static ulong Launch(TestGpu gpu, string lines)
    {
        var tiles = new ushort[5 * 1024];
        for (int n = 0; n < tiles.Length; n++)
            tiles[n] = (ushort)(BitConverter.SingleToUInt32Bits(1 + n / 1024) >> 16);
        ulong d = gpu.Upload(new float[128]);
        var module = EmulatorWarpgroupTests.Load(gpu, lines, ".maxntid 384, 1, 1");
        var arguments = module.Kernel("k").Arguments();
        arguments.Pointer(d, DType.I64).Pointer(gpu.Upload(tiles), DType.I64)
            .Pointer(d, DType.I64).Pointer(d, DType.I64);
        arguments.Launch(gpu.Stream, 1, 384);
        return d;
    }

    private static TestGpu Gpu(int seed = 0, bool early = false) =>
        new(new() { Architecture = 90, Seed = seed, EarlyAsyncCopies = early });

    // One warp of the group may speak for it: a product is over for all four.
    [TestCase("", "")]
    [TestCase(" 128;", Release)]
    public void TilesAreMultipliedAsTheyCome(string count, string release)
    {
        string lines = count.Length == 0 ? Right : Right.Replace(count, " 1;")
            .Replace(release, "@!%p3 " + release)
            .Replace("CONSUME:", "CONSUME: setp.eq.u32 %p3, %t0, 64;");
        foreach (int seed in (ReadOnlySpan<int>)[0, 1, 2, 3])
        {
            if (count.Length > 0) lines = lines.Replace("@!%p3", "@%p3");
            using var gpu = Gpu(seed, early: seed == 1);
            Assert.That(gpu.Download<float>(Launch(gpu, lines), 128),
                Is.All.EqualTo(16 * (1 + 4 + 9 + 16 + 25)));
        }
    }

    private static readonly (string Name, Check Check, string From, string To)[] s_mistakes =
    [
        ("released before the product is over", Check.SharedRaceBetweenWarps,
            Wait + "\n" + Release, Release + " " + Wait),
        ("released before the product begins", Check.SharedRaceBetweenWarps, Release + "\n",
            "\n"),
        ("full not waited for", Check.SharedRaceBetweenWarps, "@!%p2 bra FULL;", ""),
        ("no fence.proxy.async", Check.ProxyFenceMissing, "fence.proxy.async.shared::cta;", ""),
        ("arrives before its copies", Check.AsyncCopyNotWaitedFor, Full,
            "mbarrier.arrive.shared::cta.b64 _, [%t5+4096];"),
        ("arrival not counted", Check.Deadlock, ".noinc", ""),
        ("half the group releases", Check.Deadlock, Release,
            "setp.lt.u32 %p3, %t0, 64; @%p3 " + Release),
        ("no registers given back", Check.Deadlock, "setmaxnreg.dec.sync.aligned.u32 40;", ""),
        ("fewer registers asked of inc", Check.RegisterCount, "aligned.u32 240;",
            "aligned.u32 96;"),
        ("more registers asked of dec", Check.RegisterCount, "aligned.u32 40;",
            "aligned.u32 176;"),
    ];

    private static IEnumerable<TestCaseData> Mistakes => s_mistakes.Select((m, n) =>
        new TestCaseData(n).SetName($"Found({m.Name})"));

    [TestCaseSource(nameof(Mistakes))]
    public void Finds(int index)
    {
        var (name, check, from, to) = s_mistakes[index];
        Assert.That(Right, Does.Contain(from));
        string lines = Right.Replace(from, to);
        if (name.EndsWith("begins", StringComparison.Ordinal))
            lines = lines.Replace("fence.proxy.async", Release + " fence.proxy.async");
        foreach (int seed in (ReadOnlySpan<int>)[0, 1])
        {
            using var gpu = Gpu(seed);
            Launch(gpu, lines);
            var fault = gpu.Finding();
            Assert.That(fault.Check, Is.EqualTo(check), fault.ToString());
        }
    }

    // A producer that waits for nobody overwrites a stage, or its barrier is two phases ahead.
    [Test]
    public void FindsAStageThatIsNotWaitedFor([Values(0, 1, 2, 3)] int seed)
    {
        using var gpu = Gpu(seed);
        Launch(gpu, Right.Replace("@!%p2 bra EMPTY;", ""));
        Assert.That(gpu.Finding().Check, Is.AnyOf(Check.SharedRaceBetweenWarps, Check.Deadlock));
    }
}
