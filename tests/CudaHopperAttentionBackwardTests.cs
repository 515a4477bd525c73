using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// The gradients of attention by the kernels of sm_90a, on an emulated GPU that has them, by the
/// rule of <see cref="CudaAttentionBackwardTests"/>.
/// </summary>
[TestFixture]
public sealed class CudaHopperAttentionBackwardTests
{
    private const int Hopper = 90;

    private CudaUnderTest _cuda = null!;

    // Tiles are 64 queries by 128 keys: one short, whole, one more; several that wait for another;
    // empty sequences; grouped heads; keys before the first query and caches with room; a head
    // dimension that fills its tiles and ones that do not.
    private static IEnumerable<TestCaseData> Cases =>
        from headDim in (int[])[64, 72, 80, 96, 128]
        from make in (Func<int, AttentionProblem>[])
        [
            d => Self(1, 1, d, [0, 1, 7, 64], causal: true),
            d => Self(2, 1, d, [300, 65], causal: true),
            d => Self(2, 2, d, [129], causal: false),
            d => AttentionProblem.Random(2, 1, d, [10, 70, 0, 3], [129, 10, 5, 0], causal: true),
            d => Self(2, 2, d, [65, 7, 129], causal: false, [33, 0, 70]),
            d => AttentionProblem.Random(2, 1, d, [30, 150], [150, 290], causal: true,
                [120, 260]) with
            { Cached = true },
        ]
        let problem = make(headDim)
        select new TestCaseData(problem).SetArgDisplayNames(Name(problem));

    [SetUp]
    public void Make()
    {
        if (CudaUnderTest.IsReal) Assert.Ignore("a real GPU is what it is");
        if (_cuda?.Emulator?.Fault is null && _cuda is not null) return;
        _cuda?.Dispose();
        _cuda = new(new() { Architecture = Hopper });
    }

    [OneTimeTearDown]
    public void Free() => _cuda?.Dispose();

    [TestCaseSource(nameof(Cases))]
    public void GradientsAgree(object value)
    {
        int before = _cuda.Emulator!.Launches.Count;
        var problem = (AttentionProblem)value;
        CudaAttentionBackwardTests.Compare(_cuda, problem, DType.BF16);
        Assert.That(_cuda.Emulator.Launches.Skip(before).Select(l => l.Kernel),
            Has.Member($"attention_backward_hopper_{problem.HeadDim}"));
    }

    private static AttentionProblem Self(int heads, int kvHeads, int headDim, int[] lengths,
        bool causal, int[]? keyLengths = null) =>
        AttentionProblem.Random(heads, kvHeads, headDim, lengths, lengths, causal, keyLengths);

    private static string Name(AttentionProblem problem) =>
        CudaAttentionBackwardTests.Name(problem);
}
