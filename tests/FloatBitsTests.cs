using System.Globalization;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

[TestFixture]
public sealed unsafe class FloatBitsTests
{
    private static readonly float[] s_special =
    [
        0f, -0f, float.Epsilon, -float.Epsilon, float.MaxValue, float.MinValue, 1f, -1f, 65504f,
        65519.996f,
        65520f, 1e-8f, 5.9604645e-8f, 2.9802322e-8f, 2.9802326e-8f, float.PositiveInfinity,
        float.NegativeInfinity, float.NaN,
    ];

    [Test]
    public void ReferenceBitsAreEqual()
    {
        var reference = ReferenceFile.Open("ops/float_bits");
        float[] values = Array.ConvertAll(reference.Ints("f32"), BitConverter.Int32BitsToSingle);
        Assert.That(Narrowed(values, DType.BF16), Is.EqualTo(reference.Ints("bf16")));
        Assert.That(Narrowed(values, DType.F16), Is.EqualTo(reference.Ints("f16")));
        Assert.That(values.Select(v => (int)FloatBits.ToBF16(v)),
            Is.EqualTo(reference.Ints("bf16")));
        Assert.That(values.Select(v => (int)FloatBits.ToF16(v)), Is.EqualTo(reference.Ints("f16")));

        ushort[] halves = Array.ConvertAll(reference.Ints("half"), v => (ushort)v);
        var widened = new float[halves.Length];
        fixed (ushort* from = halves)
        fixed (float* to = widened)
            FloatBits.Widen(from, DType.F16, to, halves.Length);
        Assert.That(
            Array.ConvertAll(widened, BitConverter.SingleToInt32Bits),
            Is.EqualTo(reference.Ints("half_f32")));
    }

    [Test]
    public void NotANumberStaysOneAtEveryPlaceOfAVector()
    {
        float[] nans = Array.ConvertAll(
            ReferenceFile.Open("ops/float_bits").Ints("nan_f32"), BitConverter.Int32BitsToSingle);
        foreach (float nan in nans)
        {
            for (int place = 0; place < 40; place++)
            {
                var values = new float[40];
                values[place] = nan;
                int bf16 = Narrowed(values, DType.BF16)[place],
                    f16 = Narrowed(values, DType.F16)[place];
                Assert.That(float.IsNaN(FloatBits.FromBF16((ushort)bf16)));
                Assert.That(float.IsNaN(FloatBits.FromF16((ushort)f16)));
                Assert.That(bf16 >> 15, Is.EqualTo(float.IsNegative(nan) ? 1 : 0));
            }
        }
    }

    [Test]
    public void EveryBf16AndF16SurvivesWideningAndNarrowing()
    {
        var all = Enumerable.Range(0, 65536).Select(i => (ushort)i).ToArray();
        foreach (var type in new[] { DType.BF16, DType.F16 })
        {
            var wide = new float[all.Length];
            fixed (ushort* from = all)
            fixed (float* to = wide)
                FloatBits.Widen(from, type, to, all.Length);
            int[] back = Narrowed(wide, type);
            for (int i = 0; i < all.Length; i++)
                if (!float.IsNaN(wide[i])) Assert.That(back[i], Is.EqualTo(i), $"{type} {i:x4}");
        }
    }

    // The oracle rounds in exact arithmetic: scaled to the step of the target's last bit, where
    // Math.Round to even is the definition.
    [Test]
    public void NarrowingRoundsToNearestEven()
    {
        var random = new Random(7);
        float[] values = [.. s_special.Where(float.IsFinite), .. Enumerable.Range(0, 20000)
            .Select(_ => BitConverter.Int32BitsToSingle(random.Next(int.MinValue, int.MaxValue)))
            .Where(float.IsFinite)];
        int[] bf16 = Narrowed(values, DType.BF16), f16 = Narrowed(values, DType.F16);
        for (int i = 0; i < values.Length; i++)
        {
            string value = values[i].ToString("R", CultureInfo.InvariantCulture);
            Assert.That((double)FloatBits.FromBF16((ushort)bf16[i]),
                Is.EqualTo(Rounded(values[i], 7, -126, 127)), value);
            Assert.That((double)FloatBits.FromF16((ushort)f16[i]),
                Is.EqualTo(Rounded(values[i], 10, -14, 15)), value);
        }
    }

    [TestCase(DType.F32)]
    [TestCase(DType.BF16)]
    [TestCase(DType.F16)]
    [TestCase(DType.F64)]
    public void EveryLengthAndAlignmentAgreesWithOneByOne(DType type)
    {
        const int Guard = 16;
        var random = new Random(3);
        int size = type.Size();
        for (int count = 0; count < 140; count++)
        {
            int shift = count % 3;
            var values = Enumerable.Range(0, count).Select(i => i % 7 == 6
                ? s_special[random.Next(s_special.Length)]
                : (random.NextSingle() - 0.5f) * 1e3f).ToArray();
            var stored = new byte[(count * size) + (2 * Guard)];
            stored.AsSpan().Fill(0xA5);
            var back = new float[count + (2 * Guard)];
            back.AsSpan().Fill(77f);
            fixed (float* from = values)
            fixed (byte* bytes = stored)
            fixed (float* to = back)
            {
                FloatBits.Narrow(from, bytes + Guard + shift, type, count);
                FloatBits.Widen(bytes + Guard + shift, type, to + Guard, count);
            }

            Assert.That(stored[..(Guard + shift)], Is.All.EqualTo(0xA5));
            Assert.That(stored[(Guard + shift + (count * size))..], Is.All.EqualTo(0xA5));
            Assert.That(back[..Guard], Is.All.EqualTo(77f));
            Assert.That(back[(Guard + count)..], Is.All.EqualTo(77f));
            Assert.That(back[Guard..(Guard + count)], Is.EqualTo(values.Select(v => type switch
            {
                DType.BF16 => FloatBits.FromBF16(FloatBits.ToBF16(v)),
                DType.F16 => FloatBits.FromF16(FloatBits.ToF16(v)),
                _ => v,
            })), $"{type} {count}");
        }
    }

    [Test]
    public void IntegersAreNotConverted()
    {
        Assert.Throws<ArgumentOutOfRangeException>(() =>
            FloatBits.Narrow(null, null, DType.I32, 0));
        Assert.Throws<ArgumentOutOfRangeException>(() => FloatBits.Widen(null, DType.U8, null, 0));
    }

    private static int[] Narrowed(float[] values, DType type)
    {
        var bits = new ushort[values.Length];
        fixed (float* from = values)
        fixed (ushort* to = bits)
            FloatBits.Narrow(from, to, type, values.Length);
        return Array.ConvertAll(bits, b => (int)b);
    }

    private static double Rounded(float value, int fraction, int minExponent, int maxExponent)
    {
        if (value == 0) return value;
        int exponent = Math.Max(Math.ILogB(value), minExponent);
        double rounded = Math.ScaleB(
            Math.Round(Math.ScaleB(value, fraction - exponent), MidpointRounding.ToEven),
            exponent - fraction);
        return Math.Abs(rounded) < Math.ScaleB(1, maxExponent + 1)
            ? rounded : value < 0 ? double.NegativeInfinity : double.PositiveInfinity;
    }
}
