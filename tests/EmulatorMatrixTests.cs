using MiniCpmNative.GpuEmulator;
using NUnit.Framework;
using static MiniCpmNative.Tests.PtxProbe;

namespace MiniCpmNative.Tests;

/// <summary>
/// mma, ldmatrix and cp.async against the tables of the PTX ISA (sections on mma.m16n8k16, m16n8k8,
/// ldmatrix and cp.async), independent of any kernel: a layout wrong in both would cancel.
/// </summary>
[TestFixture]
public sealed class EmulatorMatrixTests
{
    // Lane's address in parameter p, bytes apart.
    private static string Lane(string parameter, int bytes) =>
        $"ld.param.u64 %lt0, [{parameter}]; mul.wide.u32 %lt1, %lane, {bytes}; add.s64 %lt0, %lt0, %lt1;";

    private static ushort Narrow(float value, bool brain) => brain
        ? (ushort)(BitConverter.SingleToUInt32Bits(value) >> 16)
        : BitConverter.HalfToUInt16Bits((Half)value);

    // "For a_i, row = groupID where i is 0, 1, 4, 5 else groupID + 8; col = threadID_in_group * 2 +
    // (i & 1), + 8 for i >= 4"; for k8 there are a_0 to a_3 only. "For b_i, row = threadID_in_group
    // * 2 + (i & 1), + 8 for i >= 2; col = groupID". "For c_i, row = groupID for i < 2 else groupID
    // + 8; col = 2 * tig + (i & 1)".
    [TestCase(16, true, false)]
    [TestCase(16, true, true)]
    [TestCase(16, false, false)]
    [TestCase(8, true, false)]
    [TestCase(8, false, false)]
    public void MultiplyFollowsTheFragmentTables(int depth, bool brain, bool reverse)
    {
        // Small whole numbers: every sum is exact, in any order.
        var random = new Random(depth);
        float[,] a = new float[16, depth], b = new float[depth, 8], c = new float[16, 8];
        for (int r = 0; r < 16; r++)
            for (int k = 0; k < depth; k++) a[r, k] = random.Next(-9, 10);
        for (int k = 0; k < depth; k++)
            for (int n = 0; n < 8; n++) b[k, n] = random.Next(-9, 10);
        for (int r = 0; r < 16; r++)
            for (int n = 0; n < 8; n++) c[r, n] = random.Next(-99, 100);
        ushort[] laneA = new ushort[32 * 8], laneB = new ushort[32 * 4];
        float[] laneC = new float[32 * 4];
        for (int lane = 0; lane < 32; lane++)
        {
            int group = lane >> 2, tig = lane & 3;
            for (int i = 0; i < depth / 2; i++)
                laneA[lane * 8 + i] = Narrow(
                    a[i is 0 or 1 or 4 or 5 ? group : group + 8, (tig * 2) + (i & 1)
                    + (i >= 4 ? 8 : 0)], brain);
            for (int i = 0; i < depth / 4; i++)
                laneB[lane * 4 + i] =
                    Narrow(b[(tig * 2) + (i & 1) + (i >= 2 ? 8 : 0), group], brain);
            for (int i = 0; i < 4; i++)
                laneC[lane * 4 + i] = c[i < 2 ? group : group + 8, (tig * 2) + (i & 1)];
        }
        string type = brain ? "bf16" : "f16";
        string fragments = depth == 16 ? "{%t0, %t1, %t2, %t3}, {%t4, %t5}" : "{%t0, %t1}, {%t4}";
        using var gpu = new TestGpu(new() { ReverseMma = reverse });
        using var module = Load(gpu, Text($$"""
            {{Lane("a", 16)}} ld.global.v4.u32 {%t0, %t1, %t2, %t3}, [%lt0];
            {{Lane("b", 8)}} ld.global.v2.u32 {%t4, %t5}, [%lt0];
            {{Lane("c", 16)}} ld.global.v4.u32 {%t6, %t7, %t8, %t9}, [%lt0];
            mma.sync.aligned.m16n8k{{depth}}.row.col.f32.{{type}}.{{type}}.f32
                {%t6, %t7, %t8, %t9}, {{fragments}}, {%t6, %t7, %t8, %t9};
            {{Lane("d", 16)}} st.global.v4.u32 [%lt0], {%t6, %t7, %t8, %t9};
            ret;
            """));
        ulong d = gpu.Allocate(32 * 16);
        var arguments = module.Kernel("probe").Arguments();
        arguments.Pointer(d, Kernels.DType.I64).Pointer(gpu.Upload(laneA), Kernels.DType.I64)
            .Pointer(gpu.Upload(laneB), Kernels.DType.I64)
            .Pointer(gpu.Upload(laneC), Kernels.DType.I64);
        arguments.Launch(gpu.Stream, 1, 32);
        float[] got = gpu.Download<float>(d, 128);
        for (int r = 0; r < 16; r++)
            for (int n = 0; n < 8; n++)
            {
                float expected = c[r, n];
                for (int k = 0; k < depth; k++) expected += a[r, k] * b[k, n];
                int lane = ((r & 7) * 4) + (n / 2), i = (r >= 8 ? 2 : 0) + (n & 1);
                Assert.That(got[lane * 4 + i], Is.EqualTo(expected), $"row {r}, column {n}");
            }
    }

    // "Lanes 0-7 give the row addresses of matrix 0, 8-15 of matrix 1 ...; lane l receives elements
    // (l / 4, 2 * (l % 4)) and the next one, of the transposed matrix with .trans."
    [TestCase(1, false)]
    [TestCase(2, false)]
    [TestCase(4, false)]
    [TestCase(1, true)]
    [TestCase(2, true)]
    [TestCase(4, true)]
    public void LoadMatrixFollowsTheTables(int count, bool transposed)
    {
        // Row r of matrix m lies at 16 * ((r * 5 + m * 11) % 32): rows in no order, matrices
        // interleaved.
        static int Place(int m, int r) => ((r * 5) + (m * 11)) % 32;
        var shared = new ushort[32 * 8];
        for (int n = 0; n < shared.Length; n++) shared[n] = (ushort)(n * 3 + 1);
        string registers = string.Join(", ", Enumerable.Range(0, count).Select(m => $"%t{m}"));
        int[] places = [.. Enumerable.Range(0, 32).Select(lane => Place(lane >> 3, lane & 7) * 16)];
        using var gpu = new TestGpu();
        using var module = Load(gpu, Text($$"""
            {{Lane("a", 16)}} ld.global.v4.u32 {%t0, %t1, %t2, %t3}, [%lt0];
            mov.u32 %t9, space; mad.lo.u32 %t8, %lane, 16, %t9; st.shared.v4.u32 [%t8], {%t0, %t1, %t2, %t3};
            bar.sync 0;
            {{Lane("b", 4)}} ld.global.u32 %t8, [%lt0]; add.u32 %t9, %t9, %t8;
            mov.u32 %t1, 0; mov.u32 %t2, 0; mov.u32 %t3, 0;
            ldmatrix.sync.aligned.m8n8.x{{count}}{{(transposed ? ".trans" : "")}}.shared.b16 {{{registers}}}, [%t9];
            {{Lane("d", 16)}} st.global.v4.u32 [%lt0], {%t0, %t1, %t2, %t3};
            ret;
            """));
        ulong d = gpu.Allocate(32 * 16), zeros = gpu.Upload(new ulong[64]);
        var arguments = module.Kernel("probe").Arguments();
        arguments.Pointer(d, Kernels.DType.I64).Pointer(gpu.Upload(shared), Kernels.DType.I64)
            .Pointer(gpu.Upload([.. places, .. new int[32]]), Kernels.DType.I64)
            .Pointer(zeros, Kernels.DType.I64);
        arguments.Launch(gpu.Stream, 1, 32);
        ushort[] got = gpu.Download<ushort>(d, 256);
        for (int m = 0; m < count; m++)
            for (int lane = 0; lane < 32; lane++)
                for (int half = 0; half < 2; half++)
                {
                    int r = lane / 4, c = (lane % 4 * 2) + half;
                    if (transposed) (r, c) = (c, r);
                    Assert.That(got[(lane * 8) + (m * 2) + half],
                        Is.EqualTo(shared[(Place(m, r) * 8) + c]),
                        $"matrix {m}, lane {lane}, half {half}");
                }
    }

    [Test]
    public void LoadMatrixCountsBankConflicts()
    {
        // Rows 128 bytes apart all start in bank 0: seven extra passes; rows 144 apart hit all
        // banks.
        foreach (var (pitch, conflicts) in (ReadOnlySpan<(int, int)>)[(128, 7), (144, 0), (16, 0)])
        {
            using var gpu = new TestGpu();
            Run(gpu, $$"""
                mov.u32 %t9, space; mad.lo.u32 %t8, %lane, 4, %t9; mov.u32 %t0, 0;
                L: st.shared.u32 [%t8], 0; add.u32 %t8, %t8, 128; add.u32 %t0, %t0, 1;
                setp.lt.u32 %p0, %t0, 32; @%p0 bra L;
                bar.sync 0; and.b32 %t1, %lane, 7; mad.lo.u32 %t9, %t1, {{pitch}}, %t9;
                ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%d}, [%t9];
                """, [1]);
            Assert.That(gpu.Emulator.Launches[^1].MatrixLoadConflicts, Is.EqualTo(conflicts),
                $"pitch {pitch}");
        }
    }

    private const string CopyLane = "mov.u32 %t9, space; mad.lo.u32 %t9, %lane, 8, %t9; ";

    [TestCase(true)]
    [TestCase(false)]
    public void AsyncCopiesArriveByGroups(bool early)
    {
        // Two groups of copies; waiting for all but one makes the first readable, waiting for all
        // both.
        using var gpu = new TestGpu(new() { EarlyAsyncCopies = early });
        ulong[] a = [.. Enumerable.Range(0, 32).Select(n => (ulong)(n * 7))],
            b = [.. a.Select(v => v + 1000)];
        ulong[] got = Run64(gpu, CopyLane + $$"""
            {{Lane("a", 8)}} cp.async.ca.shared.global [%t9], [%lt0], 8; cp.async.commit_group;
            {{Lane("b", 8)}} cp.async.ca.shared.global [%t9+256], [%lt0], 8; cp.async.commit_group;
            cp.async.wait_group 1; ld.shared.u64 %lt2, [%t9];
            cp.async.wait_group 0; ld.shared.u64 %lt3, [%t9+256];
            add.u64 %ld, %lt2, %lt3;
            """, a, b);
        Assert.That(got, Is.EqualTo(a.Zip(b, (x, y) => x + y)));
    }

    [Test]
    public void AsyncCopyFillsWhatItsSourceLacksWithZeros()
    {
        using var gpu = new TestGpu();
        ulong[] a = [.. Enumerable.Repeat(0x1122334455667788ul, 32)];
        ulong[] got = Run64(gpu, CopyLane + $$"""
            {{Lane("a", 8)}} and.b32 %t0, %lane, 3; shl.b32 %t0, %t0, 1;
            cp.async.ca.shared.global [%t9], [%lt0], 8, %t0; cp.async.wait_all; ld.shared.u64 %ld, [%t9];
            """, a);
        Assert.That(got[..4], Is.EqualTo(new ulong[] { 0, 0x7788, 0x55667788, 0x334455667788 }));
    }

    [TestCase("cp.async.commit_group; cp.async.wait_group 1;")]
    [TestCase("cp.async.wait_group 0;")] // not committed: belongs to no group yet
    [TestCase("")]
    public void ReadingBeforeTheCopyIsWaitedForIsFound(string wait)
    {
        using var gpu = new TestGpu(new() { EarlyAsyncCopies = true });
        Assert.Throws<Kernels.Cuda.CudaException>(() => Run64(gpu, CopyLane +
            $"{Lane("a", 8)} cp.async.ca.shared.global [%t9], [%lt0], 8; {wait} ld.shared.u64 %ld, [%t9];", new ulong[32]));
        Assert.That(gpu.Fault!.Check, Is.EqualTo(Check.AsyncCopyNotWaitedFor));
    }

    [Test]
    public void LateCopyReadsItsSourceWhenItIsWaitedFor()
    {
        // The source changes after the issue: early copies bring the old value, late ones the new.
        foreach (bool early in (ReadOnlySpan<bool>)[true, false])
        {
            using var gpu = new TestGpu(new() { EarlyAsyncCopies = early });
            ulong[] got = Run64(gpu, CopyLane + $$"""
                {{Lane("a", 8)}} cp.async.ca.shared.global [%t9], [%lt0], 8; mov.u64 %lt2, 2; st.global.u64 [%lt0], %lt2;
                cp.async.wait_all; ld.shared.u64 %ld, [%t9];
                """, [.. Enumerable.Repeat(1ul, 32)]);
            Assert.That(got[0], Is.EqualTo(early ? 1 : 2));
        }
    }
}
