using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cases;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Ops;
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

    // The list that comes with a batch and the one that the device makes: the same tiles in another
    // order, and so by other blocks.
    [Test]
    public void BothListsGiveTheSameBits()
    {
        AttentionProblem p =
            AttentionProblem.Random(2, 1, 64, [130, 0, 150], [130, 7, 160], causal: true);
        var list = new int[AttentionTiles.Count(p.StartsQ) * AttentionTiles.Fields];
        AttentionTiles.Fill(list, p.StartsQ, p.StartsK, causal: true, ofKeys: false);
        var tiles = new Value("query_tiles", DType.I32,
            [list.Length / AttentionTiles.Fields, AttentionTiles.Fields],
            Array.ConvertAll(list, i => (double)i));
        Value[] inputs = CudaAttentionTests.Inputs(p);
        using OpRun a = Run(p, inputs), b = Run(p, [.. inputs, tiles]);
        Assert.That(b.Output, Is.EqualTo(a.Output));
        Assert.That(b.Saved(0), Is.EqualTo(a.Saved(0)));
    }

    // A row all of whose scores are -infinity is no row that sees no key.
    [Test]
    public void InfiniteScoresAreNotHidden()
    {
        AttentionProblem p =
            AttentionProblem.Random(1, 1, 64, [3, 2], [3, 2], causal: true);
        p.Q[64] = double.PositiveInfinity;
        for (int key = 0; key < 3; key++) p.K[64 * key] = -1;
        using OpRun run = Run(p, CudaAttentionTests.Inputs(p));
        for (int row = 0; row < 5; row++)
            Assert.That(run.Output.Skip(64 * row).Take(64).Select(double.IsNaN),
                Has.All.EqualTo(row == 1), $"row {row}");
    }

    private OpRun Run(AttentionProblem p, Value[] inputs)
    {
        var run = new OpRun(_cuda.Device(DType.BF16), CudaAttentionTests.OpOf(p), inputs);
        run.Forward();
        return run;
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

    [TestCase(DType.BF16, 90, 13, null, true)]
    [TestCase(DType.BF16, 90, 12, "", true)]
    [TestCase(DType.BF16, 90, 11, null, false)]
    [TestCase(DType.BF16, 90, 13, "sm_80", false)]
    [TestCase(DType.BF16, 80, 13, null, false)]
    [TestCase(DType.BF16, 100, 13, null, false)]
    [TestCase(DType.F32, 90, 13, null, false)]
    public void TheDeviceAndItsCompilerDecide(
        DType storage, int architecture, int nvrtc, string? wish, bool expected) =>
        Assert.That(
            CudaKernels.TakesHopper(storage, architecture, nvrtc, wish), Is.EqualTo(expected));
}
