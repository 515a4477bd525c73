using System.Runtime.InteropServices;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cases;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Updates;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Every optimizer at sizes with tails, with and without a rounded copy, and with one tensor after
/// the other off alignment: the formula in double, and the same numbers wherever tensors lie.
/// </summary>
public sealed partial class OptimizerUpdateTests
{
    private static readonly OptimizerForm[] s_forms =
    [
        new(UpdateRule.AdamW), new(UpdateRule.AdamW, DType.BF16),
        new(UpdateRule.AdamWDecaysLast, DType.U8), new(UpdateRule.AdamWDecaysLast),
        new(UpdateRule.Lion), new(UpdateRule.Lion, DType.U8), new(UpdateRule.Sgd),
        new(UpdateRule.Adafactor),
    ];

    private static IEnumerable<TestCaseData> Forms =>
        from form in s_forms
        from copy in (DType[])[DType.F32, DType.BF16, DType.F16]
        from cuda in (bool[])[false, true]
        select new TestCaseData(form, copy, cuda).SetArgDisplayNames(
            $"{form.Rule}", $"{form.Moments}", $"{copy}", cuda ? "cuda" : "cpu");

    [TestCaseSource(nameof(Forms))]
    public void AnySizeAndPlace(object value, object type, bool cuda)
    {
        var (form, copy) = ((OptimizerForm)value, (DType)type);
        using var cpu = new CpuDevice(2, StepBytes);
        Device device = cuda ? Cuda(DType.F32) : cpu;
        Shape[] shapes = form.Rule == UpdateRule.Adafactor
            ? [new Shape(3, 6, 35), new Shape(68), new Shape(1, 1)]
            : [new Shape(1), new Shape(3), new Shape(68), new Shape(511), new Shape(1031)];
        foreach (Shape shape in shapes)
        {
            Updated whole = Update(device, form, copy, shape, shifted: -1);
            Expect(form, shape, whole.Values);
            Updated still = Update(device, form, copy, shape, shifted: -1, bad: true);
            Assert.That(still.Values, Is.EqualTo(Narrow(Fill.Normal(1, shape.Count))));
            Assert.That(still.States, Is.EqualTo(still.Before), "of a gradient that is no number");
            // What is rounded at random is so on both devices, by the same draws.
            if (cuda && form.Moments == DType.BF16)
                Assert.That(whole.States, Is.EqualTo(
                    Update(cpu, form, copy, shape, shifted: -1).States), $"{shape}");
            for (int shifted = 0; shifted < whole.Tensors; shifted++)
            {
                Updated other = Update(device, form, copy, shape, shifted);
                string what = $"{shape}, tensor {shifted} shifted";
                Close(other.Values, whole.Values, what);
                for (int i = 0; i < other.States.Length; i++)
                    if (form.Moments == DType.F32)
                        Close(MemoryMarshal.Cast<byte, float>(other.States[i]).ToArray(),
                            MemoryMarshal.Cast<byte, float>(whole.States[i]).ToArray(),
                            $"{what}, state {i}");
                    else
                        Assert.That(other.States[i], Is.EqualTo(whole.States[i]),
                            $"{what}, state {i}");
            }
        }
    }

    // A compiler may fuse other products where it moves vectors.
    private static void Close(float[] got, float[] expected, string what)
    {
        for (int i = 0; i < got.Length; i++)
            Assert.That(got[i], Is.EqualTo(expected[i]).Within(
                3e-7 * Math.Max(1, Math.Abs(expected[i]))), $"{what} [{i}]");
    }

    private sealed record Updated(float[] Values, byte[][] Before, byte[][] States, int Tensors);

    private static readonly UpdateStep s_step = new(1e-2, 0.9, 0.99, 1e-3, 0.1, 3, Seed: 9);

    // Values, gradient, copy and states, each in memory of its own that ends in zeros.
    private static Updated Update(
        Device device, OptimizerForm form, DType copy, Shape shape, int shifted, bool bad = false)
    {
        // A range's elements may be more than 32 bits count.
        const long First = (1L << 32) + 12;
        const int Behind = 16;
        var made = new List<Tensor>();
        Tensor New(Spec spec)
        {
            int shift = made.Count == shifted ? (int)spec.Type.Size() : 0;
            Tensor all = device.Allocate(
                new(DType.U8, new Shape((int)spec.Bytes + (2 * Behind))), "t");
            device.Write<byte>(all, new byte[all.Shape.Count]);
            made.Add(new(all.Data + shift, spec));
            return made[^1];
        }

        int count = (int)shape.Count;
        Tensor p = New(new(DType.F32, shape)), g = New(new(DType.F32, shape));
        Tensor weights = copy == DType.F32 ? p : New(new(copy, shape));
        device.WriteFloats(p, Narrow(Fill.Normal(1, count)));
        float[] gradient = Narrow(Fill.Normal(2, count));
        if (bad) gradient[count / 2] = float.NaN;
        device.WriteFloats(g, gradient);
        var states = new List<Tensor>();
        foreach (var (name, spec) in form.StatesOf(form.Moments, shape))
        {
            Tensor state = New(spec);
            double[] values = Fill.Normal(states.Count + 3, spec.Shape.Count);
            if (spec.Type == DType.U8)
                device.Write<byte>(state, [.. values.Select(Code)]);
            else
                device.WriteFloats(state, Narrow(name == "first_moment" ? values : Squares(values)));
            states.Add(state);
        }

        byte[][] before = States();
        Tensor norm = device.Allocate(GradientNorm.Spec, "norm");
        device.GradientNorm([g], 0.5, norm, Tensor.None);
        device.Update(s_step with { Rule = form.Rule }, OptimizerForm.Range(weights,
            copy == DType.F32 ? Tensor.None : p, g, First, states.ToArray()), norm);
        float[] got = device.ReadFloats(p);
        if (bad && copy != DType.F32) Assert.That(device.ReadFloats(weights), Is.All.Zero);
        else if (copy != DType.F32)
            Assert.That(device.ReadFloats(weights), Is.EqualTo(Narrow(Storage.Round(
                Array.ConvertAll(got, x => (double)x), copy))), "the copy");
        foreach (Tensor each in made)
        {
            var behind = new Tensor(
                each.Data + (nint)each.Spec.Bytes, new(DType.U8, new Shape(Behind)));
            Assert.That(Bytes(device, behind), Is.All.Zero, "behind the end");
        }

        return new(got, before, States(), made.Count);

        byte[][] States() => [.. states.Select(s => Bytes(
            device, new Tensor(s.Data, new(DType.U8, new Shape((int)s.Spec.Bytes)))))];
    }

    private static byte Code(double x) => (byte)Math.Clamp(128 + (x * 50), 0, 255);

    // As BF16 holds them, which all types of moments do.
    private static double[] Squares(double[] values) =>
        Storage.Round([.. values.Select(x => (x * x) + 0.01)], DType.BF16);

    // What elements become that know nothing of each other; of the others tests are above.
    private static void Expect(OptimizerForm form, Shape shape, float[] got)
    {
        if (form.Rule == UpdateRule.Adafactor || form.Moments == DType.U8) return;
        int count = got.Length;
        double[] p = Fill.Normal(1, count), g = Fill.Normal(2, count), m = Fill.Normal(3, count);
        double[] v = Squares(Fill.Normal(4, count));
        double factor = Math.Min(1, 0.5 / (Math.Sqrt(g.Sum(x => x * x)) + 1e-6));
        for (int i = 0; i < count; i++)
        {
            double gradient = g[i] * factor, mean = (0.9 * m[i]) + (0.1 * gradient);
            double square = (0.99 * v[i]) + (0.01 * gradient * gradient);
            double adam = mean / (1 - Math.Pow(0.9, 3))
                / (Math.Sqrt(square / (1 - Math.Pow(0.99, 3))) + 1e-3);
            const double Keep = 1 - (1e-2 * 0.1);
            double expected = form.Rule switch
            {
                UpdateRule.AdamW => (p[i] * Keep) - (1e-2 * adam),
                UpdateRule.AdamWDecaysLast => (p[i] - (1e-2 * adam)) * Keep,
                UpdateRule.Lion => (p[i] * Keep) - (1e-2 * Math.Sign(mean)),
                _ => (p[i] * Keep) - (1e-2 * gradient),
            };
            Assert.That(got[i], Is.EqualTo(expected).Within(2e-6 * Math.Max(1, Math.Abs(adam))),
                $"{shape} [{i}]");
        }
    }
}
