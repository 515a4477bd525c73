using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;
using static MiniCpmNative.Tests.PtxProbe;

namespace MiniCpmNative.Tests;

/// <summary>Instruction semantics, expected values worked out from the PTX ISA's
/// definitions.</summary>
[TestFixture]
public sealed class EmulatorInstructionTests
{
    private const uint NaN = 0x7fc00000, Infinity = 0x7f800000, MinusZero = 0x80000000,
        Subnormal = 0x00012345;
    private TestGpu _gpu = null!;

    [OneTimeSetUp]
    public void Open() => _gpu = new();

    [OneTimeTearDown]
    public void Close() => _gpu.Dispose();

    private void Check(string lines, uint[] a, uint[] b, uint[] c, uint[] expected) =>
        Assert.That(Run(_gpu, lines, a, b, c), Is.EqualTo(expected), lines);

    private void Check(string lines, uint[] a, uint[] expected) =>
        Check(lines, a, [], [], expected);

    private void Check(string lines, uint[] a, uint[] b, uint[] expected) =>
        Check(lines, a, b, [], expected);

    [Test]
    public void ShiftCountsAreClamped()
    {
        uint[] value = [0x80000001, 0x80000001, 0x80000001, 0x80000001], count = [0, 31, 32, 200];
        Check("shl.b32 %d, %a, %b;", value, count, [0x80000001, 0x80000000, 0, 0]);
        Check("shr.u32 %d, %a, %b;", value, count, [0x80000001, 1, 0, 0]);
        Check("shr.s32 %d, %a, %b;", value, count, [0x80000001, ~0u, ~0u, ~0u]);
        ulong[] wide = [0x8000000000000001, 0x8000000000000001, 0x8000000000000001];
        Assert.That(Run64(_gpu, "shl.b64 %ld, %la, %b;", wide, [1, 63, 64]),
            Is.EqualTo(new ulong[] { 2, 1ul << 63, 0 }));
        Assert.That(Run64(_gpu, "shr.s64 %ld, %la, %b;", wide, [1, 63, 64]),
            Is.EqualTo(new ulong[] { 0xC000000000000000, ~0ul, ~0ul }));
        Check("cvt.u16.u32 %h0, %a; shl.b16 %h1, %h0, %b; cvt.u32.u16 %d, %h1;", [0xFFFF8001, 1],
            [1, 16], [2, 0]);
        Check("shf.l.wrap.b32 %d, %a, %b, %c;", [0x80000000, 1], [1, 2], [1, 33], [3, 4]);
        Check("shf.r.clamp.b32 %d, %a, %b, %c;", [1, 1], [6, 6], [1, 40], [0, 6]);
    }

    [Test]
    public void MinimumAndMaximumTakeTheNumber()
    {
        uint[] a = [NaN, F(1f), MinusZero, 0], b = [F(2f), NaN, 0, MinusZero];
        Check("min.f32 %d, %a, %b;", a, b, [F(2f), F(1f), MinusZero, MinusZero]);
        Check("max.f32 %d, %a, %b;", a, b, [F(2f), F(1f), 0, 0]);
        Assert.That(float.IsNaN(F(Run(_gpu, "min.NaN.f32 %d, %a, %b;", a, b)[0])));
        Check("min.s32 %d, %a, %b;", [~0u], [1], [~0u]);
        Check("min.u32 %d, %a, %b;", [~0u], [1], [1]);
    }

    [Test]
    public void SubnormalsAreFlushedOnlyWithFtz()
    {
        Check("add.f32 %d, %a, %b;", [Subnormal, 0x80000001], [0, 0], [Subnormal, 0x80000001]);
        Check("add.ftz.f32 %d, %a, %b;", [Subnormal, 0x80000001], [MinusZero, MinusZero],
            [0, MinusZero]);
        // A result below the normal range: 2^-126 * 0.5.
        Check("mul.f32 %d, %a, %b;", [0x00800000], [F(0.5f)], [0x00400000]);
        Check("mul.ftz.f32 %d, %a, %b;", [0x00800000, 0x80800000], [F(0.5f), F(0.5f)],
            [0, MinusZero]);
        Check("fma.rn.ftz.f32 %d, %a, %b, %c;", [Subnormal], [F(4f)], [F(1f)], [F(1f)]);
        Check("setp.eq.ftz.f32 %p0, %a, %b; selp.b32 %d, 1, 0, %p0;", [Subnormal], [0], [1]);
        Check("setp.eq.f32 %p0, %a, %b; selp.b32 %d, 1, 0, %p0;", [Subnormal], [0], [0]);
        Check("abs.ftz.f32 %d, %a;", [0x80000001], [0]);
    }

    [Test]
    public void FusedMultiplyAddRoundsOnceInEachDirection()
    {
        // (1 + 2^-23)^2 = 1 + 2^-22 + 2^-46: the last term is lost by rounding, but not by a sum
        // with -1 - 2^-22.
        uint one = 0x3f800001, minus = F(-1f - MathF.Pow(2, -22));
        Check("fma.rn.f32 %d, %a, %b, %c;", [one], [one], [minus], [F(MathF.Pow(2, -46))]);
        uint[] a = [one, one], b = [one, F(-F(one))], zero = [0, 0];
        Check("fma.rm.f32 %d, %a, %b, %c;", a, b, zero, [0x3f800002, 0xbf800003]);
        Check("fma.rp.f32 %d, %a, %b, %c;", a, b, zero, [0x3f800003, 0xbf800002]);
        Check("fma.rz.f32 %d, %a, %b, %c;", a, b, zero, [0x3f800002, 0xbf800002]);
        Check("add.rz.f32 %d, %a, %b;", [F(1f)], [0x33ffffff], [F(1f)]);
        Check("add.rp.f32 %d, %a, %b;", [F(1f)], [1], [0x3f800001]);
    }

    [Test]
    public void ConversionsRoundAndSaturate()
    {
        uint[] values = [F(2.5f), F(-2.5f), F(3.5f), F(3e9f), F(-3e9f), NaN, Infinity];
        Check("cvt.rni.s32.f32 %d, %a;", values,
            [2, unchecked((uint)-2), 4, 0x7fffffff, 0x80000000, 0, 0x7fffffff]);
        Check("cvt.rzi.s32.f32 %d, %a;", values,
            [2, unchecked((uint)-2), 3, 0x7fffffff, 0x80000000, 0, 0x7fffffff]);
        Check("cvt.rmi.s32.f32 %d, %a;", values,
            [2, unchecked((uint)-3), 3, 0x7fffffff, 0x80000000, 0, 0x7fffffff]);
        Check("cvt.rpi.s32.f32 %d, %a;", values,
            [3, unchecked((uint)-2), 4, 0x7fffffff, 0x80000000, 0, 0x7fffffff]);
        Check("cvt.rzi.u32.f32 %d, %a;", values, [2, 0, 3, 3000000000, 0, 0, ~0u]);
        Check("cvt.rzi.f32.f32 %d, %a;", [F(-0.5f), F(2.9f)], [MinusZero, F(2f)]);
        Check("cvt.sat.f32.f32 %d, %a;", [F(1.5f), F(-1f), NaN, F(0.25f)], [F(1f), 0, 0, F(0.25f)]);
        Check("cvt.rn.f32.s32 %d, %a;", [16777217, ~0u], [F(16777216f), F(-1f)]);
        Check("cvt.rn.f32.u32 %d, %a;", [~0u], [F(4294967296f)]);
        Check("cvt.s32.s8 %d, %a;", [0x1FF, 0x17F], [~0u, 127]);
        Check("cvt.u32.u16 %d, %h0;".Insert(0, "cvt.u16.u32 %h0, %a; "), [0x12345678], [0x5678]);
        Check("cvt.sat.u8.s32 %h0, %a; cvt.u32.u16 %d, %h0;", [300, unchecked((uint)-5), 7],
            [255, 0, 7]);
        Assert.That(Run64(_gpu, "cvt.s64.s32 %ld, %a;", [0xFFFFFFFF, 5]),
            Is.EqualTo(new ulong[] { ~0ul, 5 }));
        Assert.That(Run64(_gpu, "cvt.rn.f64.s64 %ld, %la;", [5, ~0ul]),
            Is.EqualTo(new[] { D(5), D(-1) }));
        Check("cvt.rn.f32.f64 %d, %la;", [0], [0]);
    }

    [Test]
    public void BrainAndHalfRoundToEven()
    {
        // Halfway cases above an even and an odd last bit, then just above halfway, NaN, overflow,
        // -0.
        uint[] values = [0x3f808000, 0x3f818000, 0x3f808001, 0x7f800001, 0x7f7fffff, MinusZero];
        Check("cvt.rn.bf16.f32 %h0, %a; mov.b32 %d, {%h0, %h0};", values,
            [0x3f803f80, 0x3f823f82, 0x3f813f81, 0x7fff7fff, 0x7f807f80, 0x80008000]);
        Check("cvt.rn.bf16x2.f32 %d, %a, %b;", [F(1f)], [F(-2f)], [0x3f80c000]);
        Check("cvt.rn.f16.f32 %h0, %a; mov.b32 %d, {%h0, %h0};",
            [F(65520f), F(65519.996f), F(5.9604645e-8f), NaN],
            [0x7c007c00, 0x7bff7bff, 0x00010001, 0x7fff7fff]);
        Check("mov.b32 {%h0, %h1}, %a; cvt.f32.f16 %d, %h1;", [0x3c00c000, 0x00010000],
            [F(1f), F(5.9604645e-8f)]);
        // 1 + 2^-10 plus a little less than 2^-11: one rounding goes down; a float between would be
        // a tie.
        Check("fma.rn.f16x2 %d, %a, %b, %c;", [0x28012801], [0x23fe23fe], [0x3c013c01],
            [0x3c013c01]);
        Check("fma.rn.bf16x2 %d, %a, %b, %c;", [0x40003f80], [0x40403f80], [0x3f803f80],
            [0x40e04000]);
    }

    [Test]
    public void IntegerDivisionByZeroAndOverflow()
    {
        uint minus = 0x80000000;
        Check("div.s32 %d, %a, %b;", [7, unchecked((uint)-7), minus], [2, 2, ~0u],
            [3, unchecked((uint)-3), minus]);
        Check("rem.s32 %d, %a, %b;", [7, unchecked((uint)-7), minus], [2, 2, ~0u], [1, ~0u, 0]);
        Check("div.u32 %d, %a, %b;", [7, ~0u], [0, 2], [~0u, 0x7fffffff]);
        Check("div.rn.f32 %d, %a, %b;", [F(1f), F(-1f), 0, F(1f)], [0, 0, F(2f), F(3f)],
            [Infinity, 0xff800000, 0, 0x3eaaaaab]);
    }

    [Test]
    public void ProductsOfEveryWidth()
    {
        Check("mul.hi.u32 %d, %a, %b;", [~0u, 0x80000000], [~0u, 6], [0xFFFFFFFE, 3]);
        Check("mul.hi.s32 %d, %a, %b;", [~0u, 0x80000000], [2, 4], [~0u, unchecked((uint)-2)]);
        const string Halves = "cvt.u16.u32 %h0, %a; cvt.u16.u32 %h1, %b; ";
        Check(Halves + "mul.hi.u16 %h0, %h0, %h1; cvt.u32.u16 %d, %h0;", [0xFFFF, 58255],
            [0xFFFF, 9], [0xFFFE, 8]);
        Check(Halves + "mul.hi.s16 %h0, %h0, %h1; cvt.u32.u16 %d, %h0;", [0x8000, 58255],
            [0x8000, 9], [0x4000, 0xFFFF]);
        Check("mad.lo.s32 %d, %a, %b, %c;", [7], [unchecked((uint)-3)], [1],
            [unchecked((uint)-20)]);
        Assert.That(Run64(_gpu, "mul.wide.s32 %ld, %a, %b;", [~0u], [5]),
            Is.EqualTo(new[] { unchecked((ulong)-5) }));
        Assert.That(Run64(_gpu, "mul.wide.u32 %ld, %a, %b;", [~0u], [5]),
            Is.EqualTo(new[] { 0x4FFFFFFFBul }));
        Assert.That(Run64(_gpu, "mul.lo.s64 %ld, %la, %lb;", [1ul << 40], [3]),
            Is.EqualTo(new[] { 3ul << 40 }));
        Assert.That(Run64(_gpu, "mul.hi.u64 %ld, %la, %lb;", [1ul << 63], [6]),
            Is.EqualTo(new[] { 3ul }));
        Assert.That(Run64(_gpu, "mad.wide.u32 %ld, %a, %b, %lc;", [~0u], [2], [1]),
            Is.EqualTo(new[] { 0x1FFFFFFFFul }));
        Check("mul.lo.s16 %h0, %h1, %h1; cvt.u32.u16 %d, %h0;".Insert(0, "cvt.u16.u32 %h1, %a; "),
            [300], [90000 & 0xFFFF]);
    }

    [Test]
    public void BitFields()
    {
        Check("bfind.u32 %d, %a;", [0, 1, 0x80000000], [~0u, 0, 31]);
        Check("bfind.shiftamt.u32 %d, %a;", [0, 1, 0x40000000], [~0u, 31, 1]);
        Check("bfind.s32 %d, %a;", [~0u, 0xFFFFFFF0, 8], [~0u, 3, 3]);
        Check("popc.b32 %d, %a;", [0xF0F0], [8]);
        Check("clz.b32 %d, %a;", [0, 1, 0x80000000], [32, 31, 0]);
        Check("brev.b32 %d, %a;", [1, 0x12345678], [0x80000000, 0x1E6A2C48]);
        Check("bfe.u32 %d, %a, %b, %c;", [0xABCD1234, ~0u, ~0u], [4, 28, 40], [8, 8, 4],
            [0x23, 15, 0]);
        Check("bfe.s32 %d, %a, %b, %c;", [0x00000F00, 0x80000000, 5], [8, 30, 0], [4, 8, 0],
            [~0u, unchecked((uint)-2), 0]);
        Check("bfi.b32 %d, %a, %b, %c, 8;", [0x1FF], [0xFFFF0000], [4], [0xFFFF0FF0]);
        Check("prmt.b32 %d, %a, %b, %c;", [0x33221100, 0x00008000], [0x77665544, 0],
            [0x7531, 0x9999],
            [0x77553311, ~0u]);
        Check("lop3.b32 %d, %a, %b, %c, 0x96;", [0b1100], [0b1010], [0b1111], [0b1001]);
        Check("sad.s32 %d, %a, %b, %c;", [unchecked((uint)-5)], [7], [1], [13]);
    }

    [Test]
    public void ComparisonsOrderedAndUnordered()
    {
        uint[] a = [F(1f), NaN, F(2f)], b = [F(2f), F(2f), F(2f)];
        string Set(string comparison) =>
            $"setp.{comparison}.f32 %p0, %a, %b; selp.b32 %d, 1, 0, %p0;";
        Check(Set("lt"), a, b, [1, 0, 0]);
        Check(Set("ltu"), a, b, [1, 1, 0]);
        Check(Set("geu"), a, b, [0, 1, 1]);
        Check(Set("ne"), a, b, [1, 0, 0]);
        Check(Set("neu"), a, b, [1, 1, 0]);
        Check(Set("nan"), a, b, [0, 1, 0]);
        Check(Set("num"), a, b, [1, 0, 1]);
        Check("setp.lt.u32 %p0, %a, %b; selp.b32 %d, 1, 0, %p0;", [1, ~0u], [2, 2], [1, 0]);
        Check("setp.lt.s32 %p0|%p1, %a, %b; selp.b32 %t0, 1, 0, %p0; selp.b32 %d, 2, %t0, %p1;",
            [1, 5], [2, 2], [1, 2]);
        Check("setp.eq.s32 %p1, %c, 1; setp.lt.and.s32 %p0, %a, %b, !%p1; selp.b32 %d, 1, 0, %p0;",
            [1, 1], [2, 2], [0, 1], [1, 0]);
    }

    [Test]
    public void BytesIntoWiderRegisters()
    {
        // A signed byte load fills its register with the sign; a store takes the low part only.
        Check("""
            mov.u32 %t0, space; mad.lo.u32 %t0, %lane, 4, %t0; st.shared.u32 [%t0], %a;
            ld.shared.s8 %d, [%t0+1];
            """, [0x0000FE00, 0x00007F00], [unchecked((uint)-2), 127]);
        Check("""
            mov.u32 %t0, space; mad.lo.u32 %t0, %lane, 4, %t0; st.shared.u32 [%t0], 0; st.shared.u8 [%t0+2], %a;
            ld.shared.u32 %d, [%t0];
            """, [0x12345678], [0x00780000]);
    }

    [Test]
    public void ShuffleModesAndSegments()
    {
        uint[] lanes = [.. Enumerable.Range(0, 32).Select(n => (uint)n)];
        uint[] Shuffled(string arguments) =>
            Run(_gpu, $"shfl.sync.{arguments}, 0xffffffff;", lanes);
        Assert.That(Shuffled("bfly.b32 %d, %a, 5, 0x1f"), Is.EqualTo(lanes.Select(n => n ^ 5)));
        Assert.That(Shuffled("down.b32 %d, %a, 4, 0x1f"),
            Is.EqualTo(lanes.Select(n => n + 4 > 31 ? n : n + 4)));
        Assert.That(Shuffled("up.b32 %d, %a, 4, 0"),
            Is.EqualTo(lanes.Select(n => n < 4 ? n : n - 4)));
        Assert.That(Shuffled("idx.b32 %d, %a, 9, 0x1f"), Is.EqualTo(lanes.Select(_ => 9u)));
        // Segments of eight lanes: c is (32 - 8) << 8 | 31; up's clamp is 0.
        Assert.That(Shuffled("idx.b32 %d, %a, 3, 0x181f"),
            Is.EqualTo(lanes.Select(n => (n & 24) + 3)));
        Assert.That(Shuffled("down.b32 %d, %a, 1, 0x181f"),
            Is.EqualTo(lanes.Select(n => (n & 7) == 7 ? n : n + 1)));
        Assert.That(Shuffled("up.b32 %d, %a, 2, 0x1800"),
            Is.EqualTo(lanes.Select(n => (n & 7) < 2 ? n : n - 2)));
        uint[] inside = Run(_gpu,
            "shfl.sync.down.b32 %t0|%p0, %a, 30, 0x1f, 0xffffffff; selp.b32 %d, 1, 0, %p0;", lanes);
        Assert.That(inside, Is.EqualTo(lanes.Select(n => n < 2 ? 1u : 0)));
    }

    [Test]
    public void VotesMatchesAndReductions()
    {
        uint[] lanes = [.. Enumerable.Range(0, 32).Select(n => (uint)n * 3)];
        string even = "and.b32 %t0, %a, 1; setp.eq.u32 %p0, %t0, 0; ";
        Assert.That(Run(_gpu, even + "vote.sync.ballot.b32 %d, %p0, -1;", lanes)[0],
            Is.EqualTo(0x55555555));
        Assert.That(Run(_gpu, even + "vote.sync.ballot.b32 %d, !%p0, -1;", lanes)[0],
            Is.EqualTo(0xAAAAAAAA));
        Assert.That(Run(_gpu, even + "vote.sync.any.pred %p1, %p0, -1; selp.b32 %d, 1, 0, %p1;",
            lanes)[9], Is.EqualTo(1));
        Assert.That(Run(_gpu, even + "vote.sync.all.pred %p1, %p0, -1; selp.b32 %d, 1, 0, %p1;",
            lanes)[9], Is.Zero);
        Assert.That(Run(_gpu, "redux.sync.add.u32 %d, %a, -1;", lanes)[5],
            Is.EqualTo(31 * 32 / 2 * 3));
        Assert.That(Run(_gpu, "sub.s32 %t0, %a, 10; redux.sync.min.s32 %d, %t0, -1;", lanes)[5],
            Is.EqualTo(unchecked((uint)-10)));
        Assert.That(Run(_gpu, "and.b32 %t0, %lane, 3; match.any.sync.b32 %d, %t0, -1;", lanes)[6],
            Is.EqualTo(0x44444444));
        Assert.That(Run(_gpu,
            "setp.lt.u32 %p0, %lane, 5; @%p0 bra L; mov.u32 %d, 7; bra M; L: activemask.b32 %d; M:",
            lanes),
            Is.EqualTo(lanes.Select((_, n) => n < 5 ? 0x1Fu : 7u)));
    }

    [Test]
    public void ApproximateFunctionsAtTheirEdges()
    {
        Check("ex2.approx.f32 %d, %a;", [F(3f), 0xff800000, Infinity, 0],
            [F(8f), 0, Infinity, F(1f)]);
        Check("lg2.approx.f32 %d, %a;", [F(8f), 0, F(1f)], [F(3f), 0xff800000, 0]);
        Check("rcp.approx.ftz.f32 %d, %a;", [F(4f), 0, Subnormal], [F(0.25f), Infinity, Infinity]);
        Check("rsqrt.approx.f32 %d, %a;", [F(16f), 0], [F(0.25f), Infinity]);
        Check("sqrt.rn.f32 %d, %a;", [F(2f)], [F(MathF.Sqrt(2))]);
        Assert.That(Run64(_gpu, "sqrt.rn.f64 %ld, %la;", [D(2)]),
            Is.EqualTo(new[] { D(Math.Sqrt(2)) }));
        Check("copysign.f32 %d, %a, %b;", [F(-1f), F(1f)], [F(3f), F(-3f)], [F(-3f), F(3f)]);
    }

    [Test]
    public void AtomicsReturnTheOldValue()
    {
        string place = "mov.u32 %t0, space; st.shared.u32 [%t0], 100; bar.warp.sync -1; ";
        string all = " bar.warp.sync -1; ld.shared.u32 %d, [%t0];";
        uint[] lanes = [.. Enumerable.Range(0, 32).Select(n => (uint)n)];
        Assert.That(Run(_gpu, place + "atom.shared.add.u32 %d, [%t0], 1;", lanes),
            Is.EqualTo(lanes.Select(n => n + 100)));
        Assert.That(Run(_gpu, place + "red.shared.add.u32 [%t0], 1;" + all, lanes)[3],
            Is.EqualTo(132));
        Assert.That(Run(_gpu, place + "atom.shared.max.s32 %t1, [%t0], %a;" + all, [5, 300, 7])[0],
            Is.EqualTo(300));
        Assert.That(Run(_gpu, place + "atom.shared.cas.b32 %t1, [%t0], 100, %a;" + all, [5, 9])[0],
            Is.EqualTo(5));
        Assert.That(Run(_gpu, place + "atom.shared.inc.u32 %t1, [%t0], 110;" + all, lanes)[0],
            Is.EqualTo(132 - 111));
        Assert.That(Run(_gpu, place + "atom.shared.exch.b32 %d, [%t0], %a;", lanes)[1],
            Is.EqualTo(0));
    }

    [Test]
    public void LoopsWithDifferentLengthsComeTogether()
    {
        uint[] lanes = [.. Enumerable.Range(0, 32).Select(n => (uint)n)];
        Assert.That(Run(_gpu, """
            mov.u32 %t0, %a;
            L: setp.eq.u32 %p0, %t0, 0;
            @%p0 bra M;
            add.u32 %d, %d, %t0;
            sub.u32 %t0, %t0, 1;
            bra L;
            M: shfl.sync.idx.b32 %t1, %d, 31, 0x1f, 0xffffffff;
            add.u32 %d, %d, %t1;
            """, lanes), Is.EqualTo(lanes.Select(n => (n * (n + 1) / 2) + 496)));
    }

    [TestCase("foo.u32 %d, %a;", "instruction \"foo.u32\" is not known")]
    [TestCase("add.f32.wild %d, %a, %b;", "type .wild")]
    [TestCase("add.odd.f32 %d, %a, %b;", "modifier .odd")]
    [TestCase("add.u64 %ld, %a, %lb;", "expected 8 bytes")]
    [TestCase("add.u32 %d, %a, %zz;", "operand %zz")]
    [TestCase("bra NOWHERE;", "label NOWHERE")]
    [TestCase("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%d}, {%a}, {%b}, {%c};",
        "m16n8k16")]
    public void UnknownTextFailsAtLoadWithItsLine(string line, string expected)
    {
        string text = Text("mov.u32 %t9, 1;\n" + line);
        int number = text.Split('\n').ToList().FindIndex(l => l.Contains(line)) + 1;
        var error = Assert.Throws<CudaException>(() => Load(_gpu, text));
        Assert.That(error!.Message, Does.Contain(expected).And.Contain($"PTX line {number}"));
    }

    // Whatever is wrong with the text, it is a message that names the place, never an exception of
    // ours.
    [Test]
    public void DamagedTextIsRefusedWithAMessage()
    {
        string text = Text("""
            .loc 1 3 7, function_name $L1, inlined_at 1 2 3
            setp.lt.and.s32 %p0|%p1, %a, 5, !%p2;
            @!%p0 bra L;
            { .reg .b32 %x; mov.b32 %x, 0f3F800000; add.f32 %d, %x, %x; }
            L: mad.wide.s32 %ld, %a, -4, %lc; st.shared.v2.u32 [space+8], {%a, %b};
            mov.b64 {%t0, %t1}, %la; shfl.sync.down.b32 %t2|%p3, %a, 4, 0x1f, -1;
            cp.async.ca.shared.global [%t0+-4], [%la], 8, %t3; cp.async.wait_group 1;
            """);
        string[] pieces =
            [";", ",", "{", "}", "[", "]", "%a", "%p0", ".", "::", "-", "0x", "@", "\"", "/*", "<",
            "9999999999999",
            ".reg", ".pred", "é", "\0", "ld.param.u64", "x4", ":", "|", "!", "+", ""];
        var random = new Random(5);
        int refused = 0;
        for (int n = 0; n < 3000; n++)
        {
            string damaged = text;
            for (int edits = random.Next(1, 4); edits > 0; edits--)
            {
                int at = random.Next(damaged.Length),
                    length = Math.Min(random.Next(0, 6), damaged.Length - at);
                damaged = damaged[..at] + pieces[random.Next(pieces.Length)]
                    + damaged[(at + length)..];
            }
            try
            {
                using var module = Load(_gpu, damaged);
            }
            catch (CudaException e)
            {
                refused++;
                Assert.That(e.Message, Does.Not.Contain("Exception:"), damaged);
            }
        }
        Assert.That(refused, Is.GreaterThan(1500));
    }
}
