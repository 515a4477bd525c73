using NUnit.Framework;
using static MiniCpmNative.Tests.PtxProbe;

namespace MiniCpmNative.Tests;

/// <summary>What the PTX ISA says of limits, NaN and rare instructions that other compilers emit;
/// expected values worked out from its text.</summary>
[TestFixture]
public sealed class EmulatorEdgeTests
{
    private const uint NaN = 0x7fc00000, Infinity = 0x7f800000, Largest = 0x7f7fffff,
        MinusZero = 0x80000000, Subnormal = 0x00012345, Sign = 0x80000000;
    private TestGpu _gpu = null!;

    [SetUp]
    public void Open() => _gpu = new();

    [TearDown]
    public void Close() => _gpu.Dispose();

    private void Check(string lines, uint[] a, uint[] b, uint[] c, uint[] expected) =>
        Assert.That(Run(_gpu, lines, a, b, c), Is.EqualTo(expected), lines);

    // "NaN: zero if the source is not .f64 and the destination not 64 bits, else 1 << (width - 1)".
    [TestCase("s32")]
    [TestCase("u32")]
    public void NaNOfDoublesBecomesTheHighestBit(string type)
    {
        ulong[] a = [D(double.NaN), D(-3.7), D(1e300), D(-1e300)];
        ulong least = type == "s32" ? 0x80000000 : 0;
        Assert.That(Run64(_gpu, $"cvt.rzi.{type}.f64 %d, %la; cvt.u64.u32 %ld, %d;", a),
            Is.EqualTo(new[]
            {
                0x80000000, type == "s32" ? 0xFFFFFFFD : 0ul,
                type == "s32" ? 0x7FFFFFFFul : 0xFFFFFFFF, least,
            }));
        Check($"cvt.rzi.{type}.f32 %d, %a;", [NaN], [], [], [0]);
        Assert.That(Run64(_gpu, $"cvt.rzi.{type.Replace("32", "64")}.f32 %ld, %a;", [NaN]),
            Is.EqualTo(new[] { 1ul << 63 }));
    }

    [Test]
    public void RoundingTowardZeroStaysFinite()
    {
        uint[] a = [Largest, Largest | Sign, Largest, Infinity],
            b = [Largest, Largest | Sign, Largest | Sign, F(1f)];
        Check("add.rz.f32 %d, %a, %b;", a, b, [], [Largest, Largest | Sign, 0, Infinity]);
        Check("add.rm.f32 %d, %a, %b;", a, b, [], [Largest, Infinity | Sign, MinusZero, Infinity]);
        Check("add.rp.f32 %d, %a, %b;", a, b, [], [Infinity, Largest | Sign, 0, Infinity]);
        Check("mul.rz.f32 %d, %a, %b;", a, b, [],
            [Largest, Largest, Largest | Sign, Infinity]);
        Check("fma.rz.f32 %d, %a, %b, %c;", a, b, [0, 0, 0, 0],
            [Largest, Largest, Largest | Sign, Infinity]);
    }

    [Test]
    public void ExactZeroRoundedDownIsNegative()
    {
        uint[] a = [F(3f), F(-3f), 0, MinusZero, 0], b = [F(2f), F(2f), F(2f), F(2f), F(2f)],
            c = [F(-6f), F(6f), 0, MinusZero, MinusZero];
        Check("fma.rm.f32 %d, %a, %b, %c;", a, b, c,
            [MinusZero, MinusZero, 0, MinusZero, MinusZero]);
        Check("fma.rp.f32 %d, %a, %b, %c;", a, b, c, [0, 0, 0, MinusZero, 0]);
        Check("fma.rz.f32 %d, %a, %b, %c;", a, b, c, [0, 0, 0, MinusZero, 0]);
        Check("sub.rm.f32 %d, %a, %b;", [F(5f), 0], [F(5f), 0], [], [MinusZero, MinusZero]);
    }

    // "For 2^126 < |b| < 2^128, if a is infinity div.approx.f32 returns NaN, otherwise 0".
    [Test]
    public void ApproximateDivisionByTheLargestIsZero()
    {
        uint[] a = [F(1e38f), F(1e38f), Infinity, F(1e38f), F(8f)],
            b = [F(1.7e38f), F(-1.7e38f), F(1.7e38f), F(8e37f), Infinity];
        uint[] got = Run(_gpu, "div.approx.f32 %d, %a, %b;", a, b);
        Assert.That(got[0], Is.Zero);
        Assert.That(F(got[1]), Is.Zero);
        Assert.That(float.IsNaN(F(got[2])));
        Assert.That(F(got[3]), Is.EqualTo(1.25f).Within(1e-6f));
        Assert.That(got[4], Is.Zero);
        Assert.That(F(Run(_gpu, "div.full.f32 %d, %a, %b;", a, b)[0]),
            Is.EqualTo(1e38f / 1.7e38f).Within(1e-6f));
    }

    // "atom.add.f32 on global memory flushes subnormal inputs and results to sign-preserving zero;
    // on shared memory it supports them".
    [TestCase("global", 0u, 0u, 0x00900000u)]
    [TestCase("shared", Subnormal, Subnormal * 2, 0x00900000u)]
    public void AtomicAdditionFlushesInGlobalMemoryOnly(string space, uint zero, uint two,
        uint normal)
    {
        string place = space == "global"
            ? "mov.b64 %lt0, %pd; st.global.u32 [%lt0], %a;"
            : "mov.u32 %t0, space; mad.lo.u32 %t0, %lane, 4, %t0; cvt.u64.u32 %lt0, %t0; st.shared.u32 [%lt0], %a;";
        Check($"{place} atom.{space}.add.f32 %t1, [%lt0], %b; bar.warp.sync -1; ld.{space}.u32 %d, [%lt0];",
            [0, Subnormal, 0x00900000, 0x00900000], [Subnormal, Subnormal, 0, 0x80880000], [],
            [zero, two, normal, space == "global" ? 0 : 0x00080000u]);
    }

    [Test]
    public void ALaneReadsItsOwnAtomicBack()
    {
        const string own = "mov.u32 %t0, space; mad.lo.u32 %t0, %lane, 4, %t0; st.shared.u32 [%t0], %a;";
        Check(own + "atom.shared.add.u32 %t1, [%t0], 5; ld.shared.u32 %d, [%t0];", [1, 2], [], [],
            [6, 7]);
        Assert.Throws<Kernels.Cuda.CudaException>(() => Run(_gpu, own + "bar.warp.sync -1; "
            + "mov.u32 %t2, space; atom.shared.add.u32 %t1, [%t2], 1; ld.shared.u32 %d, [%t2];",
            [1, 2]));
        Assert.That(_gpu.Fault!.Check, Is.EqualTo(GpuEmulator.Check.SharedRaceWithinWarp));
    }

    [TestCase("finite", 0b00111100u)]
    [TestCase("infinite", 0b00000011u)]
    [TestCase("number", 0b00111111u)]
    [TestCase("notanumber", 0b11000000u)]
    [TestCase("normal", 0b00100000u)]
    [TestCase("subnormal", 0b00010000u)]
    public void PropertiesAreTested(string property, uint expected)
    {
        uint[] a = [Infinity, Infinity | Sign, 0, MinusZero, Subnormal, F(1f), NaN, NaN | Sign];
        uint[] got = Run(_gpu, $"testp.{property}.f32 %p0, %a; selp.u32 %d, 1, 0, %p0;", a);
        for (int n = 0; n < 8; n++) Assert.That(got[n], Is.EqualTo(expected >> n & 1), $"{n}");
        ulong[] wide = [.. a.Select(v => D(F(v)))];
        wide[4] = 12345;
        ulong[] got64 = Run64(_gpu,
            $"testp.{property}.f64 %p0, %la; selp.u64 %ld, 1, 0, %p0;", wide);
        for (int n = 0; n < 8; n++) Assert.That(got64[n], Is.EqualTo(expected >> n & 1), $"{n}");
    }

    [Test]
    public void SelectionGoesByTheSign()
    {
        Check("slct.u32.s32 %d, %a, %b, %c;", [1, 1, 1], [2, 2, 2], [0, 5, ~0u], [1, 1, 2]);
        uint[] c = [0, MinusZero, F(-1f), NaN, Subnormal | Sign];
        Check("slct.b32.f32 %d, %a, %b, %c;", [1, 1, 1, 1, 1], [2, 2, 2, 2, 2], c, [1, 1, 2, 2, 2]);
        Check("slct.ftz.s32.f32 %d, %a, %b, %c;", [1, 1, 1, 1, 1], [2, 2, 2, 2, 2], c,
            [1, 1, 2, 2, 1]);
        Assert.That(Run64(_gpu, "slct.f64.s32 %ld, %la, %lb, %c;", [7, 7], [9, 9], [1, 1ul << 31]),
            Is.EqualTo(new ulong[] { 7, 9 }));
    }

    [Test]
    public void SumsAreClamped()
    {
        uint[] a = [0x7fffffff, 0x80000000, 5, ~0u], b = [1, ~0u, 6, 0x80000000];
        Check("add.sat.s32 %d, %a, %b;", a, b, [], [0x7fffffff, 0x80000000, 11, 0x80000000]);
        Check("sub.sat.s32 %d, %a, %b;", a, b, [], [0x7ffffffe, 0x80000001, ~0u, 0x7fffffff]);
        Check("min.relu.s32 %d, %a, %b;", [7, ~0u, 3], [5, 9, 0x80000000], [], [5, 0, 0]);
        Check("max.relu.s32 %d, %a, %b;", [7, ~0u, ~2u], [5, 9, 0x80000000], [], [7, 9, 0]);
    }

    // Both halves; a number wins over NaN but for .NaN, and +0 over -0 as the larger.
    [Test]
    public void TwoByteFloatsAreComparedAndAdded()
    {
        uint[] a = [0x3F803F80, 0x7FC0BF80, 0x80000000], b = [0x40003E80, 0x3F80C000, 0x00008000];
        Check("max.bf16x2 %d, %a, %b;", a, b, [], [0x40003F80, 0x3F80BF80, 0]);
        Check("min.bf16x2 %d, %a, %b;", a, b, [], [0x3F803E80, 0x3F80C000, 0x80008000]);
        Check("max.NaN.bf16x2 %d, %a, %b;", a[1..2], b[1..2], [], [0x7FFFBF80]);
        Check("min.NaN.bf16x2 %d, %a, %b;", a[1..2], b[1..2], [], [0x7FFFC000]);
        // 1 + 2 and 1 + 0.25; 1 - 2 and 1 - 0.25; 1 * 2 and 1 * 0.25.
        Check("add.rn.bf16x2 %d, %a, %b;", a[..1], b[..1], [], [0x40403FA0]);
        Check("sub.bf16x2 %d, %a, %b;", a[..1], b[..1], [], [0xBF803F40]);
        Check("mul.bf16x2 %d, %a, %b;", a[..1], b[..1], [], [0x40003E80]);
        Check("max.f16x2 %d, %a, %b;", [0x3C00C000], [0x40003800], [], [0x40003800]);
        Check("cvt.u16.u32 %h0, %a; cvt.u16.u32 %h1, %b; max.bf16 %h2, %h0, %h1; cvt.u32.u16 %d, %h2;",
            [0x3F80], [0x4000], [], [0x4000]);
    }
}
