using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Attention's forward on the kernels of sm_90a, with the tolerance of
/// <see cref="CudaAttentionTests"/>: more tiles of queries than the emulated GPU has
/// multiprocessors, tiles of keys that are masked, whole and absent, every head size.
/// </summary>
[TestFixture]
public sealed class CudaHopperAttentionTests
{
    private CudaUnderTest _cuda = null!;

    private static IEnumerable<TestCaseData> Cases =>
        from headDim in (int[])[64, 72, 80, 96, 128, 256]
        from make in (Func<int, AttentionProblem>[])
        [
            d => AttentionProblem.Random(2, 1, d, [130, 0, 7], [130, 0, 7], causal: true),
            d => AttentionProblem.Random(2, 1, d, [10, 70, 3], [300, 10, 0], causal: true),
            d => AttentionProblem.Random(2, 2, d, [65, 20], [140, 9], causal: false, [133, 0]),
        ]
        let problem = make(headDim)
        select new TestCaseData(problem)
            .SetArgDisplayNames(headDim.ToString(), CudaAttentionTests.Name(problem));

    private static IEnumerable<TestCaseData> OfOneSize =>
        from problem in (AttentionProblem[])
        [
            AttentionProblem.Random(2, 1, 64, [200], [200], causal: true, spread: 12),
            AttentionProblem.Random(3, 1, 64, [1, 5, 0, 40], [130, 80, 4, 70], causal: true,
                [100, 70, 3, 40]) with
            { Cached = true },
            AttentionProblem.Random(1, 1, 128, [400], [400], causal: true),
            AttentionProblem.Random(2, 1, 64, [0, 0], [3, 70], causal: true),
        ]
        select new TestCaseData(problem).SetArgDisplayNames(CudaAttentionTests.Name(problem));

    [SetUp]
    public void Make()
    {
        if (_cuda?.Emulator?.Fault is null && _cuda is not null) return;
        _cuda?.Dispose();
        _cuda = new(new EmulatorOptions { Architecture = 90 });
        if (_cuda.Context.Architecture != 90) Assert.Ignore("the GPU is of another generation");
    }

    [OneTimeTearDown]
    public void Free()
    {
        _cuda?.Dispose();
        _cuda = null!;
    }

    [TestCaseSource(nameof(Cases))]
    [TestCaseSource(nameof(OfOneSize))]
    public void Agrees(AttentionProblem problem)
    {
        CudaAttentionTests.Compare(problem, DType.BF16, _cuda.Device(DType.BF16));
        if (_cuda.Emulator is { } gpu)
            Assert.That(gpu.Launches[^1].Kernel,
                Is.EqualTo($"attention_forward_hopper_{problem.HeadDim}"));
    }
}
