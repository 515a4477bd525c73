using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Results in bf16 are not pulled to one side. Cutting off in place of rounding at most doubles the
/// largest error, which the rule of <see cref="CudaOpTests"/> can let through; but it makes every
/// magnitude smaller, and the mean of many errors shows that.
/// </summary>
[TestFixture]
public sealed class CudaRoundingTests
{
    private const int Size = 257, Fewest = 200;

    private CudaUnderTest? _cuda;

    public CudaRoundingTests()
    {
    }

    internal CudaRoundingTests(CudaUnderTest cuda) => _cuda = cuda;

    private static IEnumerable<TestCaseData> Cases =>
        CudaOpTests.Cases.Where(c => (DType)c.Arguments[1]! == DType.BF16)
            .Select(c =>
                new TestCaseData(c.Arguments[0]).SetArgDisplayNames(c.Arguments[0]!.ToString()!));

    [OneTimeTearDown]
    public void Free() => _cuda?.Dispose();

    [TestCaseSource(nameof(Cases))]
    public void ErrorsHaveNoSide(object value)
    {
        var c = (OpCase)value;
        _cuda ??= new();
        var device = CudaOpTests.Prepare(_cuda.Device(DType.BF16), c);
        double[][] got = CudaOpTests.Results(device, c, Size);
        using CpuDevice cpu = OpTests.Device(c, DType.F64);
        double[][] exact = CudaOpTests.Results(cpu, c, Size, DType.BF16);
        // Gradients of weights are F32; what is rounded on the way
        // to them is shared by many elements.
        int row = c.Op is Attention attention ? attention.HeadDim : 1;
        for (int i = 0; i < got.Length; i++)
            if (Storage.Round(got[i], DType.BF16).AsSpan().SequenceEqual(got[i]))
                HasNoSide(
                    got[i], exact[i], $"{c.Name} {(i == 0 ? "output" : $"gradient {i}")}", row);
    }

    /// <summary>
    /// The mean of errors away from zero is within five standard deviations of none, as that of
    /// independent roundings is. Values that occur several times are rounded alike and count once;
    /// so do rows that share a rounding (those of attention's probabilities and of their
    /// gradients), each by its sum.
    /// </summary>
    internal static void HasNoSide(double[] got, double[] exact, string what, int row = 1)
    {
        IEnumerable<(double Exact, double Got)> values = exact.Zip(got);
        if (row == 1) values = values.Where(v => v.Exact != 0).DistinctBy(v => v.Exact);
        double[] errors = [.. values.Select(v => (v.Got - v.Exact) * Math.Sign(v.Exact))
            .Chunk(row).Select(r => r.Sum())];
        if (errors.Length < Fewest) return;
        double mean = errors.Average();
        double deviation = Math.Sqrt(errors.Average(e => (e - mean) * (e - mean)));
        double allowed = (5 * deviation / Math.Sqrt(errors.Length))
            + (1e-6 * row * exact.Average(Math.Abs));
        Assert.That(Math.Abs(mean), Is.LessThanOrEqualTo(allowed),
            $"{what}: the mean of {errors.Length} errors, which are {deviation:E1} off");
    }
}
