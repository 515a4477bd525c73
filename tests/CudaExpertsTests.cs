using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// The mixture of experts on CUDA at the sizes that the op cases leave out: several tiles of rows,
/// of columns and of depth, with and without whole vectors, one expert with all rows and others
/// with none.
/// </summary>
[TestFixture]
public sealed class CudaExpertsTests
{
    private CudaUnderTest _cuda = null!;

    public CudaExpertsTests()
    {
    }

    internal CudaExpertsTests(CudaUnderTest cuda) => _cuda = cuda;

    [OneTimeSetUp]
    public void Make() => _cuda = new();

    [OneTimeTearDown]
    public void Free() => _cuda?.Dispose();

    [TestCase(DType.F32, 70, 72, 1)]
    [TestCase(DType.BF16, 70, 136, 1)]
    [TestCase(DType.BF16, 140, 136, 2)]
    [TestCase(DType.BF16, 66, 131, 3)]
    public void TilesAgree(DType type, int rows, int width, int chosen)
    {
        const int Count = 5, Inner = 72;
        double[] logits = Fill.Normal(1, rows * Count);
        for (int r = 0; r < rows; r++) (logits[r * Count], logits[(r * Count) + 4]) = (4, -64);
        OpCase c = OpCases.All.First(c => c.Name == "experts");
        CudaOpTests.Compare(CudaOpTests.Prepare(_cuda.Device(type), c), c, type,
            new Experts(chosen),
            [
                Value.Float("x", [rows, width], Fill.Normal(2, rows * width)),
                Value.Float("logits", [rows, Count], logits),
                Value.Float("w", [Count * 2 * Inner, width],
                    Fill.Normal(3, Count * 2 * Inner * width, 0.1)),
                Value.Float("w1", [Count * width, Inner], Fill.Normal(4, Count * width * Inner, 0.1)),
            ], null, $"{rows} rows");
    }

    // e^200 is no float.
    [TestCase(DType.F32)]
    [TestCase(DType.BF16)]
    public void LargeLogitsAgree(DType type)
    {
        OpCase c = OpCases.All.First(c => c.Name == "experts");
        Value[] inputs = c.Inputs(3);
        for (int i = 0; i < inputs[1].Data.Length; i++) inputs[1].Data[i] += 200;
        CudaOpTests.Compare(_cuda.Device(type), c, type, c.Op, inputs, null, "large logits");
    }

    // A logit that is no number is the largest, wherever it stands.
    [TestCase(0)]
    [TestCase(16)]
    [TestCase(34)]
    public void ABadLogitIsSeen(int expert)
    {
        const int Rows = 3, Bad = 1;
        OpCase c = OpCases.All.First(c => c.Name == "experts");
        Value[] inputs = c.Inputs(Rows);
        int experts = inputs[1].Shape[1], width = inputs[0].Shape[1];
        inputs[1].Data[(Bad * experts) + expert] = double.NaN;
        using var run = new OpRun(_cuda.Device(DType.F32), c.Op, inputs);
        run.Forward();
        for (int i = 0; i < run.Output.Length; i++)
            Assert.That(double.IsNaN(run.Output[i]), Is.EqualTo(i / width == Bad), $"[{i}]");
    }
}
