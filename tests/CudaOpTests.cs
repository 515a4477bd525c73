using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Every case of <see cref="OpCases"/> on the CUDA device, in float and bf16. The tolerance is not
/// chosen: the largest error against double may be twice that of the plain CPU path whose inputs,
/// outputs and saved tensors are rounded to the same storage type, + 1e-5 of the largest magnitude,
/// or 1e-6 where no long sums are.
/// </summary>
[TestFixture]
public sealed class CudaOpTests
{
    private const int GradientSize = 7, AlignedSize = 16, WideSize = 64, LongSize = 8000;

    private CudaUnderTest _cuda = null!;

    internal static IEnumerable<TestCaseData> Cases =>
        from c in OpCases.All
        from type in (DType[])[DType.F32, DType.BF16]
        select new TestCaseData(c, type).SetArgDisplayNames(c.Name, type.ToString());

    private static IEnumerable<TestCaseData> WithReference =>
        Cases.Where(c => OpReferences.Has((OpCase)c.Arguments[0]!));

    [SetUp]
    public void Make()
    {
        // A fault breaks the emulated GPU, as it does a real context; the next test gets a new one.
        if (_cuda is null || _cuda.Emulator?.Fault is not null)
        {
            _cuda?.Dispose();
            _cuda = new();
        }

        _cuda.ForgetSteps();
    }

    [OneTimeTearDown]
    public void Free() => _cuda?.Dispose();

    [TestCaseSource(nameof(WithReference))]
    public void ReferenceCasesAgree(object value, object type)
    {
        var c = (OpCase)value;
        CompareReference(Device(c, (DType)type), c, (DType)type);
    }

    [TestCaseSource(nameof(Cases))]
    public void OddSizesAgree(object value, object type)
    {
        var c = (OpCase)value;
        foreach (int n in c.Sizes)
            Compare(Device(c, (DType)type), c, (DType)type, c.Op, c.Inputs(n), null,
                $"{c.Name} n={n}");
    }

    [TestCaseSource(nameof(Cases))]
    public void GradientsAccumulateAndMayBeAbsent(object value, object type)
    {
        // Rows of less than 16 bytes, of whole vectors, and of more of them than a block keeps.
        var c = (OpCase)value;
        foreach (int size in (int[])[GradientSize, WideSize,
            .. c.Sizes.Where(n => n > LongSize && n % 8 == 0 && (DType)type != DType.F32)])
            GradientsAccumulateAndMayBeAbsent(c, (DType)type, size);
    }

    private void GradientsAccumulateAndMayBeAbsent(OpCase c, DType type, int size)
    {
        Value[] inputs = Rounded(c.Inputs(size), type);
        using var run = new OpRun(Device(c, type), c.Op, inputs);
        double[] dy = Storage.Round(Fill.Normal(77, run.Count), type);
        double[]?[] plain =
            OpTests.GradientsAccumulateAndMayBeAbsent(run, inputs, dy, Rounding(type));
        if (type == DType.F32) return;
        // A trained tensor may be an operation's activation: its gradient is F32 then. And the
        // table of a lookup may be one that has another gradient before. They may lie anywhere.
        int shifted = size == GradientSize ? inputs.Length + 2 : -1;
        using var cast = new OpRun(Device(c, type), c.Op, inputs, shifted);
        cast.Forward();
        foreach (var (other, adds) in ((DType, bool)[])
            [(DType.F32, false), (DType.F32, true), (type, true)])
        {
            cast.Want(_ => true, _ => adds, other);
            cast.Backward(dy);
            for (int i = 0; i < inputs.Length; i++)
            {
                if (!cast.HasGradient(i)) continue;
                double[] start = OpRun.Start(i, adds ? plain[i]!.Length : 0);
                double[] expected = adds ? [.. plain[i]!.Zip(start, (g, s) => g + s)] : plain[i]!;
                OpTests.AreClose(cast.Gradient(i), expected,
                    Rounding(type) * (Largest(plain[i]!) + (adds ? Largest(start) : 0)),
                    $"{other} gradient of {inputs[i].Name}, added: {adds}");
            }
        }
    }

    // Those of files may have another type than activations; the self-test takes the third.
    [TestCaseSource(nameof(Cases))]
    public void ParametersMayBeF16(object value, object type)
    {
        var (c, storage) = ((OpCase)value, (DType)type);
        double[][]? whole = null;
        foreach (DType stored in (DType[])[DType.F64, DType.F16])
        {
            Value[] inputs = Array.ConvertAll(Rounded(c.Inputs(AlignedSize), storage),
                v => v.IsParameter && v.Exists ? v with { Type = stored } : v);
            double[][] got = Results(Device(c, storage), c.Op, inputs);
            whole ??= got;
            for (int i = 0; i < got.Length; i++)
                OpTests.AreClose(got[i], whole[i], Rounding(storage) * Largest(whole[i]),
                    $"{c.Name} of {stored}, result {i}");
        }
    }

    [TestCaseSource(nameof(Cases))]
    public void TensorsMayStartAnywhere(object value, object type)
    {
        var (c, storage) = ((OpCase)value, (DType)type);
        OpTests.TensorsMayStartAnywhere(Device(c, storage), c,
            Rounded(c.Inputs(AlignedSize), storage), Rounding(storage));
    }

    [TestCaseSource(nameof(Cases))]
    public void SameBitsInEveryRun(object value, object type)
    {
        var c = (OpCase)value;
        double[][]? first = null;
        for (int round = 0; round < 2; round++)
        {
            double[][] results = Results(Device(c, (DType)type), c, size: 65);
            first ??= results;
            for (int i = 0; i < results.Length; i++)
                Assert.That(results[i].AsSpan().SequenceEqual(first[i]), $"result {i}");
        }
    }

    [TestCaseSource(nameof(Cases))]
    public void NotANumberIsNeverHidden(object value, object type)
    {
        var c = (OpCase)value;
        Value[] inputs = c.Inputs(GradientSize);
        CudaDevice device = Device(c, (DType)type);
        for (int i = 0; i < inputs.Length; i++)
        {
            if (inputs[i].IsInteger || !inputs[i].Exists) continue;
            foreach (double bad in (double[])[double.NaN, double.PositiveInfinity])
            {
                Value[] spoilt = c.Inputs(GradientSize);
                Array.Fill(spoilt[i].Data, bad);
                using var run = new OpRun(device, c.Op, spoilt);
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
    public void AWarmCallAllocatesNothing(object value, object type)
    {
        var c = (OpCase)value;
        using CudaContext context = CountingCuda.Context(new("counted", 8, 80, 1 << 30));
        using CudaDevice device = CountingCuda.Device(context, (DType)type);
        device.Random = new(OpTests.Seed, 7, c.Dropout);
        using var run = new OpRun(device, c.Op, c.Inputs(129));
        run.Forward();
        run.Want(_ => true);
        run.Backward(Fill.Normal(77, run.Count));
        run.ForwardAgain();
        run.BackwardAgain();
        long before = GC.GetAllocatedBytesForCurrentThread();
        run.ForwardAgain();
        run.BackwardAgain();
        Assert.That(GC.GetAllocatedBytesForCurrentThread() - before, Is.Zero);
    }

    /// <summary>The output and all gradients of a case, its numbers rounded to a type (the
    /// device's).</summary>
    internal static double[][] Results(Device device, OpCase c, int size, DType? rounded = null)
    {
        DType type = rounded ?? device.Activations;
        return Results(device, c.Op, Rounded(c.Inputs(size), type), type);
    }

    private static double[][] Results(
        Device device, Op op, Value[] inputs, DType? rounded = null)
    {
        using var run = new OpRun(device, op, inputs);
        run.Forward();
        run.Want(_ => true);
        run.Backward(Storage.Round(Fill.Normal(77, run.Count), rounded ?? device.Activations));
        return
        [
            run.Output,
            .. Enumerable.Range(0, inputs.Length).Where(run.HasGradient).Select(run.Gradient),
        ];
    }

    /// <summary>Every problem of the operation's reference file.</summary>
    internal static void CompareReference(
        CudaDevice device, OpCase c, DType type, bool coarse = false)
    {
        int count = 0;
        foreach (var (name, problem) in OpReferences.Of(c))
        {
            count++;
            Compare(device, c, type, problem.Op, problem.Inputs, problem.OutputGradient, name,
                coarse);
        }

        Assert.That(count, Is.GreaterThan(1), $"reference cases of {c.Name}");
    }

    /// <summary>Runs a problem on a device and holds it to the rule above; coarse where the
    /// hardware's approximations are made worse than they are.</summary>
    internal static void Compare(CudaDevice device, OpCase c, DType type, Op op, Value[] values,
        double[]? outputGradient, string what, bool coarse = false)
    {
        double beside = coarse ? 1e-5 : Beside(op);
        Value[] inputs = Rounded(values, type);
        using CpuDevice wide = OpTests.Device(c, DType.F64), single = OpTests.Device(c);
        using var exact = new OpRun(wide, op, Rounded(values, type));
        using var plain = new OpRun(single, Plain(op, type), Rounded(values, type));
        using var run = new OpRun(device, op, inputs);
        (wide.Random, single.Random) = (device.Random, device.Random);
        double[] dy = Storage.Round(outputGradient ?? Fill.Normal(77, run.Count), type);
        foreach (OpRun each in (OpRun[])[exact, plain, run])
        {
            each.Forward();
            if (each == plain && type != DType.F32) plain.RoundResults(type);
            each.Want(_ => true);
            each.Backward(dy);
        }

        Agree(beside, run.Output, plain.Output, exact.Output, $"{what} {type} output");
        RoundedCrossEntropy.LabelsAgree(run, op, inputs, type, $"{what} {type}");
        if (run.State is { } state)
            Agree(beside, state, plain.State!, exact.State!, $"{what} {type} state");
        for (int i = 0; i < inputs.Length; i++)
        {
            if (!run.HasGradient(i)) continue;
            double[] gradient =
                RoundedCrossEntropy.Gradient(op, inputs, dy, type, i) ?? plain.Gradient(i);
            double[] stored = inputs[i].IsParameter
                ? gradient
                : Storage.Round(gradient, type);
            Agree(beside, run.Gradient(i), stored, exact.Gradient(i),
                $"{what} {type} gradient of {inputs[i].Name}");
        }
    }

    // The operation of the plain path where a kernel must round what the CPU keeps in float between
    // two products.
    private static Op Plain(Op op, DType type) => op switch
    {
        LoraLinear lora when type != DType.F32 => new RoundedLora(lora, type),
        DoraLinear dora when type != DType.F32 => new RoundedDora(dora, type),
        Linears linears when type != DType.F32 => new RoundedLinears(linears, type),
        DeltaRule rule when type != DType.F32 => new RoundedDeltaRule(rule, type),
        Experts experts when type != DType.F32 => new RoundedExperts(experts, type),
        _ => op,
    };

    private static void Agree(
        double beside, double[] got, double[] plain, double[] exact, string what)
    {
        double allowed = (2 * Error(plain, exact)) + (beside * Largest(exact));
        OpTests.AreClose(got, exact, allowed, what);
    }

    // Sums are made in another order; what has a few terms has the hardware's approximations only.
    private static double Beside(Op op) =>
        op is Gelu or SwiGlu or Add or Scale or Columns or Rope or SigmoidGate or AdaptedNorm
            ? 1e-6 : 1e-5;

    private static double Error(double[] values, double[] exact) =>
        values.Zip(exact, (a, b) => Math.Abs(a - b)).DefaultIfEmpty(0).Max();

    /// <summary>The device with the random numbers of the case.</summary>
    internal static CudaDevice Prepare(CudaDevice device, OpCase c)
    {
        device.Random = new(OpTests.Seed, 7, c.Dropout);
        return device;
    }

    private CudaDevice Device(OpCase c, DType type) => Prepare(_cuda.Device(type), c);

    // What the device will hold, so that the reference computes with the same numbers.
    private static Value[] Rounded(Value[] values, DType type) => Array.ConvertAll(
        values, v => v.Type == DType.F64 ? v with { Data = Storage.Round(v.Data, type) } : v);

    private static double Rounding(DType type) => type == DType.F32 ? 1e-6 : 1.0 / 128;

    private static double Largest(double[] values) =>
        values.Length == 0 ? 1 : Math.Max(values.Max(Math.Abs), 1);
}
