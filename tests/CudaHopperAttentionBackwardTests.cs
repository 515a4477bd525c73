using System.Text.RegularExpressions;
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
public sealed partial class CudaHopperAttentionBackwardTests
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

    [TestCase(64)]
    [TestCase(96)]
    public void GradientsAgreeFromOtherNumbers(int headDim) =>
        CudaAttentionBackwardTests.AgreeFromOtherNumbers(_cuda, headDim);

    private static IEnumerable<TestCaseData> Few =>
        from make in (Func<int, AttentionProblem>[])
        [
            d => Self(2, 1, d, [200, 7], causal: true, [190, 5]),
            d => Self(2, 2, d, [70, 7], causal: false),
        ]
        from headDim in (int[])[72, 128]
        let problem = make(headDim)
        select new TestCaseData(problem).SetArgDisplayNames(Name(problem));

    [TestCaseSource(nameof(Few))]
    public void GradientsAgreeAsClangCompiles(object value) =>
        CompareOn((AttentionProblem)value, new() { Architecture = Hopper }, DeviceCompiler.Clang);

    [TestCaseSource(nameof(Few))]
    public void GradientsAgreeInAnySchedule(object value)
    {
        for (int seed = 1; seed < 3; seed++)
        {
            CompareOn((AttentionProblem)value, new()
            {
                Architecture = Hopper,
                Seed = seed,
                EarlyAsyncCopies = seed == 1,
                ApproximateUlps = 2,
                ReverseMma = true,
            });
        }
    }

    [TestCaseSource(nameof(Few))]
    public void GradientsAccumulateAndMayBeAbsent(object value) =>
        CudaAttentionBackwardTests.AccumulateAndOmit(_cuda, (AttentionProblem)value);

    // Mistakes that the rule, or the emulated GPU, must find.
    [TestCase("backward_load", "ring_parity(step) ^ 1", "ring_parity(step)")]
    [TestCase("backward_load", "b.queries - first", "S::QUERIES")]
    [TestCase("backward_add_dq", "load_acquire(b.turns + tile) != b.turn", "false")]
    [TestCase("backward_add_dq", "b.turn == 0", "true")]
    [TestCase("backward_multiply", "group_sync(1, 2 * WARPGROUP);", "")]
    [TestCase("backward_multiply", "first < unmasked", "false")]
    [TestCase("backward_multiply", "key - at.before", "key + 1 - at.before")]
    [TestCase("backward_multiply", "key >= at.visible", "key >= at.keys")]
    [TestCase("backward_multiply", "2 ? two.w : two.y", "2 ? two.y : two.w")]
    [TestCase("place_of_tile", " + sequence", "")]
    [TestCase("attention_backward", "b.turn = at.first / S::KEYS", "b.turn = 0")]
    [TestCase("attention_backward_hopper_finish", "turns[place] != 0", "true")]
    [TestCase("attention_backward_hopper_finish", "heads / kv_heads", "1")]
    public void MistakesAreFound(string function, string from, string to)
    {
        using CudaUnderTest spoilt = Changed(function, from, to);
        AttentionProblem problem = AttentionProblem.Random(
            2, 1, 64, [200, 130], [60, 140], causal: true, [55, 139]);
        Exception? e = Assert.Catch(
            () => CudaAttentionBackwardTests.Compare(spoilt, problem, DType.BF16));
        Assert.That(e, Is.InstanceOf<AssertionException>().Or.InstanceOf<CudaException>());
        TestContext.Out.WriteLine(spoilt.Emulator!.Fault?.ToString() ?? e!.Message);
    }

    // The heads of long sequences go in groups, here of two: one whole, and what is left.
    [Test]
    public void HeadsMayGoInGroups()
    {
        using CudaUnderTest cuda = Changed("attention_backward", "int first_head =",
            "neighbours = 2;\n    int first_head =");
        CudaAttentionBackwardTests.Compare(
            cuda, Self(3, 1, 64, [200, 7], causal: true), DType.BF16);
    }

    private CudaUnderTest Changed(string function, string from, string to)
    {
        _cuda?.Dispose();
        _cuda = null!;
        string source = KernelText.Sections(
            KernelText.Replace(CudaKernels.HopperSource, function, from, to), [1, 2, 4]);
        return new(new() { Architecture = Hopper }, hopperSource: OtherHeads().Replace(source, ""));
    }

    // Kernels of head dimensions but 64, which would only take time to compile.
    [GeneratedRegex(@"extern ""C"" [^{]*_hopper_(?!64)\d+\([^{]*\{[^}]*\}")]
    private static partial Regex OtherHeads();

    private void CompareOn(AttentionProblem problem, EmulatorOptions options,
        DeviceCompiler compiler = DeviceCompiler.Nvrtc)
    {
        _cuda?.Dispose();
        _cuda = null!;
        using var other = new CudaUnderTest(options, compiler);
        CudaAttentionBackwardTests.Compare(other, problem, DType.BF16);
    }

    private static AttentionProblem Self(int heads, int kvHeads, int headDim, int[] lengths,
        bool causal, int[]? keyLengths = null) =>
        AttentionProblem.Random(heads, kvHeads, headDim, lengths, lengths, causal, keyLengths);

    private static string Name(AttentionProblem problem) =>
        CudaAttentionBackwardTests.Name(problem);
}
