using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Every case of <see cref="OpCases"/> through every check an operation must pass.
/// </summary>
[TestFixture]
public sealed class OpTests
{
    private const long StepBytes = 1L << 28;
    /// <summary>Of random numbers; of more than 32 bits.</summary>
    internal const ulong Seed = (5UL << 32) + 12345;

    private const int GradientSize = 7, AlignedSize = 16, CheckedElements = 60;
    private const double Step = 1e-5;

    private static IEnumerable<OpCase> Cases => OpCases.All;

    private static IEnumerable<OpCase> WithReference => Cases.Where(OpReferences.Has);

    [Test]
    public void EveryOpHasACase()
    {
        var declared = typeof(Op).Assembly.GetTypes().Where(t => t.IsSubclassOf(typeof(Op)));
        Assert.That(Cases.Select(c => c.Op.GetType()).Distinct(), Is.EquivalentTo(declared));
    }

    [TestCaseSource(nameof(WithReference))]
    public void EqualsPyTorch(object value)
    {
        var (c, count) = ((OpCase)value, 0);
        using var single = Device(c);
        using var wide = Device(c, DType.F64);
        foreach (var (name, problem) in OpReferences.Of(c))
        {
            count++;
            foreach (CpuDevice device in (CpuDevice[])[single, wide])
            {
                using var run = new OpRun(device, problem.Op, problem.Inputs);
                run.Forward();
                run.Want(_ => true);
                run.Backward(problem.OutputGradient);
                foreach (Expected e in problem.Expected)
                {
                    double[] got = e.Slot == Slot.Output ? run.Output
                        : e.Slot == Slot.Saved ? run.Saved(e.Index) : run.Gradient(e.Index);
                    double largest =
                        Math.Max(e.Values.Length > 0 ? e.Values.Max(Math.Abs) : 0, 1e-30);
                    double tolerance = device == single
                        ? Math.Max((4 * e.F32Error) + (2e-6 * largest), e.Relative * largest)
                        : (e.Rounded ? 1e-7 : 1e-9) * Math.Max(1, largest);
                    AreClose(got, e.Values, tolerance, $"{name} {device.Activations} {e.Name}");
                }
            }
        }

        Assert.That(count, Is.GreaterThan(1), $"reference cases of {c.Name}");
    }

    [TestCaseSource(nameof(Cases))]
    public void GradientsEqualCentralDifferences(object value)
    {
        var c = (OpCase)value;
        using var device = Device(c, DType.F64);
        using var run = new OpRun(device, c.Op, c.Inputs(GradientSize));
        Value[] inputs = c.Inputs(GradientSize);
        double[] dy = Fill.Normal(77, run.Count);
        run.Forward();
        run.Want(_ => true);
        run.Backward(dy);
        double worst = 0;
        int checkedInputs = 0;
        for (int i = 0; i < inputs.Length; i++)
        {
            if (!run.HasGradient(i)) continue;
            checkedInputs++;
            double[] gradient = run.Gradient(i);
            double largest = gradient.Max(Math.Abs);
            Assert.That(largest, Is.GreaterThan(1e-3),
                $"the gradient of {inputs[i].Name} is tested");
            int stride = Math.Max(1, gradient.Length / CheckedElements);
            for (int e = 0; e < gradient.Length; e += stride)
            {
                double x = inputs[i].Data[e], up = Loss(x + Step), down = Loss(x - Step);
                run.Set(i, e, x);
                worst = Math.Max(worst,
                    Math.Abs(((up - down) / (2 * Step)) - gradient[e]) / largest);

                double Loss(double moved)
                {
                    run.Set(i, e, moved);
                    run.Forward();
                    return run.Output.Zip(dy, (y, d) => y * d).Sum();
                }
            }
        }

        Assert.That(checkedInputs,
            c.Op.Writes is null && c.Op is not AdaptedNorm && run.State is null
            ? Is.GreaterThan(0) : Is.Zero);
        Assert.That(worst, Is.LessThan(1e-6));
        TestContext.Out.WriteLine($"{c.Name}: worst relative error {worst:E1}");
    }

    [TestCaseSource(nameof(Cases))]
    public void FloatEqualsDoubleAtOddSizes(object value)
    {
        var c = (OpCase)value;
        using var single = Device(c);
        using var wide = Device(c, DType.F64);
        foreach (int n in c.Sizes)
        {
            using var a = new OpRun(single, c.Op, c.Inputs(n));
            using var b = new OpRun(wide, c.Op, c.Inputs(n));
            double[] dy = Fill.Normal(77, a.Count);
            foreach (OpRun run in (OpRun[])[a, b])
            {
                run.Forward();
                run.Want(_ => true);
                run.Backward(dy);
                RoundedCrossEntropy.LabelsAgree(run, c.Op, c.Inputs(n),
                    run == a ? DType.F32 : DType.F64, $"{c.Name} n={n}");
            }

            AreClose(a.Output, b.Output, 1e-5 * Largest(b.Output), $"{c.Name} n={n}");
            if (b.State is { } state) Assert.That(a.State, Is.EqualTo(state), $"{c.Name} n={n}");
            for (int i = 0; i < c.Inputs(n).Length; i++)
                if (a.HasGradient(i))
                    AreClose(a.Gradient(i), b.Gradient(i), 2e-5 * Largest(b.Gradient(i)),
                        $"{c.Name} n={n} gradient {i}");
        }
    }

    [TestCaseSource(nameof(Cases))]
    public void GradientsAccumulateAndMayBeAbsent(object value)
    {
        var c = (OpCase)value;
        using var device = Device(c, DType.F64);
        using var run = new OpRun(device, c.Op, c.Inputs(GradientSize));
        GradientsAccumulateAndMayBeAbsent(
            run, c.Inputs(GradientSize), Fill.Normal(77, run.Count), 1e-12);
    }

    /// <summary>All gradients of a run added to what is there, each alone added, each alone
    /// asked for.</summary>
    internal static double[]?[] GradientsAccumulateAndMayBeAbsent(
        OpRun run, Value[] inputs, double[] dy, double rounding)
    {
        run.Forward();
        run.Want(_ => true);
        run.Backward(dy);
        int[] those = [.. Enumerable.Range(0, inputs.Length).Where(run.HasGradient)];
        double[]?[] plain =
            [.. inputs.Select((_, i) => run.HasGradient(i) ? run.Gradient(i) : null)];
        // -1 stands for all, and none is among them twice.
        foreach (int adding in (int[])[-1, .. those.Length > 1 ? those : []])
        {
            run.Want(_ => true, accumulate: i => adding < 0 || i == adding);
            run.Backward(dy);
            foreach (int i in those)
            {
                double[] start = OpRun.Start(i, plain[i]!.Length);
                if (adding >= 0 && i != adding)
                    Assert.That(run.Gradient(i), Is.EqualTo(plain[i]),
                        $"{inputs[i].Name} while {inputs[adding].Name} is added to");
                else
                    AreClose(run.Gradient(i), [.. plain[i]!.Zip(start, (g, s) => g + s)],
                        rounding * (Largest(start) + Largest(plain[i]!)),
                        $"accumulated {inputs[i].Name}");
            }
        }

        foreach (int only in those)
        {
            run.Want(i => i == only);
            run.Backward(dy);
            Assert.That(run.Gradient(only), Is.EqualTo(plain[only]), $"only {inputs[only].Name}");
        }

        return plain;
    }

    // Whole vectors, so that what starts elsewhere must be noticed by its address.
    [TestCaseSource(nameof(Cases))]
    public void TensorsMayStartAnywhere(object value)
    {
        var c = (OpCase)value;
        using var device = Device(c);
        TensorsMayStartAnywhere(device, c, c.Inputs(AlignedSize), 2e-6);
    }

    /// <summary>One tensor after the other starts one element further; what was there is
    /// added to.</summary>
    internal static void TensorsMayStartAnywhere(
        Device device, OpCase c, Value[] inputs, double rounding)
    {
        double[][]? whole = null;
        int tensors = (2 * inputs.Length) + 2;
        for (int shifted = -1; shifted < tensors; shifted++)
        {
            if (shifted >= 0 && shifted < inputs.Length && !inputs[shifted].Exists) continue;
            using var run = new OpRun(device, c.Op, inputs, shifted);
            int gradient = shifted - inputs.Length - 2;
            if (gradient >= 0 && !run.HasGradient(gradient)) continue;
            run.Forward();
            run.Want(_ => true, accumulate: _ => true);
            run.Backward(Storage.Round(Fill.Normal(77, run.Count), device.Activations));
            double[][] got = [run.Output, run.State ?? [], .. Enumerable.Range(0, inputs.Length)
                .Where(run.HasGradient).Select(run.Gradient)];
            whole ??= got;
            for (int i = 0; i < got.Length; i++)
                AreClose(got[i], whole[i], rounding * Largest(whole[i]),
                    $"{c.Name}, tensor {shifted} shifted, result {i}");
        }
    }

    [TestCaseSource(nameof(Cases))]
    public void SameBitsInEveryRunAndOnAnyNumberOfThreads(object value)
    {
        var c = (OpCase)value;
        double[][]? first = null;
        foreach (int threads in (int[])[1, 1, 2, 3])
        {
            using var device = Device(c, threads: threads);
            using var run = new OpRun(device, c.Op, c.Inputs(257));
            run.Forward();
            run.Want(_ => true);
            run.Backward(Fill.Normal(77, run.Count));
            double[][] results =
            [
                run.Output,
                .. Enumerable.Range(0, c.Inputs(0).Length).Where(run.HasGradient)
                .Select(run.Gradient),
            ];
            first ??= results;
            for (int i = 0; i < results.Length; i++)
                Assert.That(results[i].AsSpan().SequenceEqual(first[i]),
                    $"{threads} threads, result {i}");
        }
    }

    [TestCaseSource(nameof(Cases))]
    public void WrongTensorsAreRefusedByName(object value)
    {
        var c = (OpCase)value;
        Value[] inputs = c.Inputs(GradientSize);
        string[] names = [.. inputs.Select(v => v.Name)];
        for (int i = 0; i < inputs.Length; i++)
        {
            if (!inputs[i].Exists) continue;
            bool optional = inputs[i].Name is "state" || (inputs[i].Name is "b" or "b1" or "b2"
                && c.Op is Linear or LoraLinear or Linears or DoraLinear);
            Spec spec = inputs[i].Spec(DType.F32);
            Spec other = inputs[i].IsInteger ? spec.As(DType.F32) : spec.As(DType.I32);
            Refused(i, other, [names[i]]);
            if (!optional) Refused(i, default, [names[i]]);
            if (c.FreeColumns.Contains(names[i])) continue;
            int[] shape = inputs[i].Shape;
            Refused(i, new Spec(spec.Type, new Shape([.. shape[..^1], shape[^1] + 1])), names);
        }

        void Refused(int index, Spec wrong, string[] named)
        {
            Spec[] specs = Array.ConvertAll(inputs, v => v.Spec(DType.F32));
            specs[index] = wrong;
            var error = Assert.Throws<ShapeException>(() =>
                c.Op.Infer(specs, DType.F32), $"{wrong}")!;
            Assert.That(error.Message, Does.StartWith(c.Op.Name + ": "));
            Assert.That(named.Any(n => error.Message.Contains($": {n} ")), error.Message);
        }
    }

    [TestCaseSource(nameof(Cases))]
    public void NotANumberIsNeverHidden(object value)
    {
        var c = (OpCase)value;
        Value[] inputs = c.Inputs(GradientSize);
        using var device = Device(c);
        for (int i = 0; i < inputs.Length; i++)
        {
            using var run = new OpRun(device, c.Op, c.Inputs(GradientSize));
            if (inputs[i].IsInteger || !inputs[i].Exists) continue;
            foreach (double bad in (double[])[double.NaN, double.PositiveInfinity])
            {
                for (int e = 0; e < inputs[i].Data.Length; e++) run.Set(i, e, bad);
                run.Forward();
                Assert.That(run.Output.Any(y => !double.IsFinite(y)), $"{bad} in {inputs[i].Name}");
            }
        }

        using var back = new OpRun(device, c.Op, c.Inputs(GradientSize));
        back.Forward();
        back.Want(_ => true);
        back.Backward([.. Enumerable.Repeat(double.NaN, back.Count)]);
        for (int i = 0; i < inputs.Length; i++)
            if (back.HasGradient(i))
                Assert.That(back.Gradient(i).Any(double.IsNaN), $"gradient of {inputs[i].Name}");
    }

    [TestCaseSource(nameof(Cases))]
    public void AWarmCallAllocatesNothing(object value)
    {
        var c = (OpCase)value;
        using var device = Device(c, threads: 2);
        using var run = new OpRun(device, c.Op, c.Inputs(129));
        run.Forward();
        run.Want(_ => true);
        run.Backward(Fill.Normal(77, run.Count));
        Spec[] specs = Array.ConvertAll(c.Inputs(129), v => v.Spec(DType.F32));
        for (int i = 0; i < 3; i++) Both();
        long before = GC.GetAllocatedBytesForCurrentThread();
        Both();
        Assert.That(GC.GetAllocatedBytesForCurrentThread() - before, Is.Zero);

        void Both()
        {
            c.Op.Infer(specs, DType.F32);
            run.ForwardAgain();
            run.BackwardAgain();
        }
    }

    [TestCaseSource(nameof(Cases))]
    public void SixteenBitWeightsEqualTheirWidenedValues(object value)
    {
        var c = (OpCase)value;
        using var device = Device(c);
        Value[] inputs = c.Inputs(GradientSize);
        if (inputs.Count(v => v.Exists && !v.IsInteger) < 2) return;
        double[][] plain = Results(inputs);
        foreach (DType type in (DType[])[DType.BF16, DType.F16])
        {
            // Inputs are bf16 values; f16 holds them too, as none is far from one.
            Value[] narrow = [.. inputs.Select((v, i) =>
                i > 0 && v.Exists && !v.IsInteger && v.Name != "state" ? v with { Type = type } : v)];
            double[][] got = Results(narrow);
            for (int i = 0; i < got.Length; i++)
                AreClose(got[i], plain[i], 2e-6 * Largest(plain[i]), $"{type}, result {i}");
        }

        double[][] Results(Value[] values)
        {
            using var run = new OpRun(device, c.Op, values);
            run.Forward();
            run.Want(_ => true);
            run.Backward(Fill.Normal(77, run.Count));
            return
            [
                run.Output, .. Enumerable.Range(0, values.Length).Where(run.HasGradient)
                    .Select(run.Gradient),
            ];
        }
    }

    internal static CpuDevice Device(OpCase c, DType type = DType.F32, int? threads = null) =>
        new(threads, StepBytes, type) { Random = new(Seed, 7, c.Dropout) };

    internal static void AreClose(double[] got, double[] expected, double tolerance, string what)
    {
        Assert.That(got, Has.Length.EqualTo(expected.Length), what);
        for (int i = 0; i < got.Length; i++)
            if (!(Math.Abs(got[i] - expected[i]) <= tolerance))
                Assert.Fail($"{what}[{i}]: {got[i]:R}, expected {expected[i]:R} +- {tolerance:E1}");
    }

    // Inputs are about 1, and so are the terms of which a small result may be the difference.
    private static double Largest(double[] values) =>
        values.Length == 0 ? 1 : Math.Max(values.Max(Math.Abs), 1);
}
