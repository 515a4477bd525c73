using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Activation functions where the op cases do not look: small values to a small relative error, and
/// the far ends. In float; the storage types only round the same numbers. And rows of heads that
/// take a block several turns.
/// </summary>
[TestFixture]
public sealed class CudaElementwiseTests
{
    private CudaUnderTest _cuda = null!;

    private static Op[] Ops { get; } =
        [new Gelu(GeluKind.Tanh), new Gelu(GeluKind.Erf), new SwiGlu(), new Relu()];

    [OneTimeSetUp]
    public void Make() => _cuda = new();

    [OneTimeTearDown]
    public void Free() => _cuda?.Dispose();

    // The argument of e^x, up to 87 here, is the result of five roundings of 6e-8 each: 2.6e-5 of
    // the smallest results. Subnormal ones become 0.
    [TestCaseSource(nameof(Ops))]
    public void TailsAreRelativelyExact(Op op)
    {
        const int Count = 4001;
        double[] x =
            [.. Enumerable.Range(0, Count).Select(i => (double)(float)((i - 2000) * 0.006))];
        using CpuDevice wide = Cpu(DType.F64);
        using OpRun exact = Forward(wide, op, x), run = Forward(_cuda.Device(DType.F32), op, x);
        double[] got = run.Output, expected = exact.Output;
        for (int i = 0; i < Count; i++)
            Assert.That(got[i], Is.EqualTo(expected[i]).Within(
                (2.6e-5 * Math.Abs(expected[i])) + 1e-36), $"{op} of {x[i]}");
    }

    [TestCaseSource(nameof(Ops))]
    public void TheFarEndsAreThoseOfTheCpu(Op op)
    {
        double[] x =
        [
            0, -0.0, 1e-40, 1e-30, -1e-30, 20, -20, 90, -90, 500, -500, 1e10, -1e10, 1e19,
            -1e19, 1e30,
            -1e30, float.MaxValue, float.MinValue, double.PositiveInfinity, double.NegativeInfinity,
            double.NaN,
        ];
        double[] dy = [.. x.Select(_ => 1.5)];
        using CpuDevice single = Cpu(DType.F32);
        using OpRun cpu = Forward(single, op, x), gpu = Forward(_cuda.Device(DType.F32), op, x);
        cpu.Want(_ => true);
        gpu.Want(_ => true);
        cpu.Backward(dy);
        gpu.Backward(dy);
        Agree(gpu.Output, cpu.Output, "output");
        Agree(gpu.Gradient(0), cpu.Gradient(0), "gradient");

        void Agree(double[] got, double[] expected, string what)
        {
            for (int i = 0; i < x.Length; i++)
                Assert.That(got[i], Is.EqualTo(expected[i]).Within(1e-3).Percent.Or
                    .EqualTo(expected[i]).Within(1e-30), $"{op}: {what} of {x[i]}");
        }
    }

    // In vectors of 16 bytes, and in halves of heads that have none.
    [TestCase(16, 257)]
    [TestCase(6, 129)]
    public void LongRowsOfHeads(int headDim, int heads)
    {
        OpCase c = OpCases.All.Single(each => each.Name == "linears");
        int[] outputs = [headDim * (heads - 2), headDim, headDim];
        var op = new Linears([.. outputs.Select(n => new LinearPart(n))], 1, 0, headDim, 2);
        List<Value> inputs = [Of("x", 3, 2)];
        foreach (int n in outputs)
            inputs.AddRange([Of("w", n, 2), Value.Float("b", [n], Fill.Normal(n, n)),
                Value.Absent("a"), Value.Absent("bb")]);
        inputs.AddRange([Value.Int("positions", 4, 0, 2), Of("cos", 5, headDim / 2),
            Of("sin", 5, headDim / 2)]);
        foreach (DType type in (DType[])[DType.F32, DType.BF16])
            CudaOpTests.Compare(_cuda.Device(type), c, type, op, [.. inputs], null, "heads");
    }

    private static Value Of(string name, int rows, int cols) => Value.Float(
        name, [rows, cols], Fill.Normal(name[0] + rows, rows * cols));

    private static CpuDevice Cpu(DType type) => new(threads: 1, stepBytes: 1 << 20, type);

    // SwiGLU's other operand is 1.
    private static OpRun Forward(Device device, Op op, double[] x)
    {
        Value[] inputs = [Value.Float("x", [x.Length], x)];
        if (op is SwiGlu)
            inputs = [.. inputs, Value.Float("up", [x.Length], [.. x.Select(_ => 1.0)])];
        var run = new OpRun(device, op, inputs);
        run.Forward();
        return run;
    }
}
