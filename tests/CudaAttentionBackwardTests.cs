using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// The gradients of attention on CUDA, from the output and lse of the formulas in double, so that
/// no forward kernel has a part in it. The tolerance of F32 is that of <see cref="CudaOpTests"/>,
/// that of BF16 is worked out for each element by <see cref="AttentionRounding"/>.
/// </summary>
[TestFixture]
public sealed class CudaAttentionBackwardTests
{
    private static readonly DType[] Types = [DType.F32, DType.BF16];

    private CudaUnderTest _cuda = null!;

    // F32 has one kernel for all head dimensions; the others of it are below.
    private static IEnumerable<TestCaseData> Cases =>
        from headDim in (int[])[64, 72, 80, 96, 128, 256, 8]
        from type in Types
        where type != DType.F32 || headDim is 8 or 72
        from make in (Func<int, AttentionProblem>[])
        [
            d => Self(1, 1, d, [0, 1, 7, 63], causal: true),
            d => Self(4, 1, d, [64, 65], causal: true),
            d => Self(7, 1, d, [129], causal: false),
            d => Self(4, 2, d, [200, 0, 1], causal: true),
            d => AttentionProblem.Random(2, 1, d, [10, 70, 0, 3], [129, 10, 5, 0], causal: true),
            d => AttentionProblem.Random(4, 4, d, [10, 70, 0, 3], [129, 10, 5, 0], causal: false),
            d => Self(2, 2, d, [65, 64, 7, 129], causal: false, [33, 100, 0, 70]),
            d => AttentionProblem.Random(8, 2, d, [30, 30], [150, 30], causal: true, [120, 20]),
            d => Self(8, 2, d, [300, 100], causal: true),
            d => Self(6, 2, d, [400], causal: false),
            d => AttentionProblem.Random(2, 1, d, [200], [140], causal: true),
            d => Self(2, 1, d, [], causal: true),
        ]
        let problem = make(headDim)
        select new TestCaseData(problem, type).SetArgDisplayNames(Name(problem), type.ToString());

    // A head dimension with rows of no whole 16 bytes, one in between, the largest, and keys in a
    // cache with room for more.
    private static IEnumerable<TestCaseData> OtherHeadDims =>
        from headDim in (int[])[9, 48, 64, 72, 128, 256]
        from type in Types
        from cached in (bool[])[false, true]
        let problem = cached
            ? AttentionProblem.Random(3, 1, headDim, [1, 5, 0, 20], [70, 40, 4, 30], causal: true,
                [60, 33, 3, 20]) with
            { Cached = true }
            : Self(3, 1, headDim, [1, 5, 1, 33], causal: true)
        select new TestCaseData(problem, type).SetArgDisplayNames(Name(problem), type.ToString());

    private static IEnumerable<TestCaseData> OnTensorCores =>
        from headDim in (int[])[64, 72, 80, 96, 128, 256]
        let problem = Self(4, 2, headDim, [130, 7], causal: true, [130, 5])
        select new TestCaseData(problem).SetArgDisplayNames(Name(problem));

    [SetUp]
    public void Make()
    {
        if (_cuda?.Emulator?.Fault is null && _cuda is not null) return;
        _cuda?.Dispose();
        _cuda = new();
    }

    [OneTimeTearDown]
    public void Free() => _cuda?.Dispose();

    [TestCaseSource(nameof(Cases))]
    [TestCaseSource(nameof(OtherHeadDims))]
    public void GradientsAgree(object value, object type) =>
        Compare(_cuda, (AttentionProblem)value, (DType)type);

    // CPMX_SEEDS tries more.
    [TestCase(64)]
    [TestCase(72)]
    [TestCase(128)]
    [TestCase(9)]
    public void GradientsAgreeFromOtherNumbers(int headDim) => AgreeFromOtherNumbers(_cuda, headDim);

    internal static void AgreeFromOtherNumbers(CudaUnderTest cuda, int headDim)
    {
        int seeds = int.Parse(Environment.GetEnvironmentVariable("CPMX_SEEDS") ?? "2");
        for (int seed = 1; seed <= seeds; seed++)
        {
            int first = 1 + (seed * 29 % 80);
            Compare(cuda, AttentionProblem.Random(4, 2, headDim, [first, 9], [first + 3, 5],
                causal: seed % 2 == 0, spread: 0.25 * (1 << (seed % 4)), seed: seed), DType.BF16);
        }
    }

    [TestCaseSource(nameof(OnTensorCores))]
    public void GradientsAgreeAsClangCompiles(object value) =>
        CompareOn((AttentionProblem)value, new(), DeviceCompiler.Clang);

    // What hardware is free to choose: the order of warps and blocks, when copies arrive, the last
    // places of exp2, the order of a product's sums.
    [TestCaseSource(nameof(OnTensorCores))]
    public void GradientsAgreeInAnySchedule(object value)
    {
        for (int seed = 1; seed < 3; seed++)
        {
            CompareOn((AttentionProblem)value, new()
            {
                Seed = seed,
                EarlyAsyncCopies = seed == 1,
                ApproximateUlps = 2,
                ReverseMma = true,
            });
        }
    }

    [TestCaseSource(nameof(OnTensorCores))]
    public void GradientsAccumulateAndMayBeAbsent(object value) =>
        AccumulateAndOmit(_cuda, (AttentionProblem)value);

    internal static void AccumulateAndOmit(CudaUnderTest cuda, AttentionProblem value)
    {
        AttentionProblem problem = Rounded(value, DType.BF16);
        using OpRun run = Run(cuda, problem, DType.BF16);
        run.Want(_ => true);
        run.Backward(problem.DO);
        double[][] plain = [run.Gradient(0), run.Gradient(1), run.Gradient(2)];
        run.Want(_ => true);
        run.Backward(problem.DO);
        for (int i = 0; i < 3; i++)
            Assert.That(run.Gradient(i), Is.EqualTo(plain[i]), $"again {i}");
        for (int only = 0; only < 3; only++)
        {
            run.Want(i => i == only);
            run.Backward(problem.DO);
            Assert.That(run.Gradient(only), Is.EqualTo(plain[only]), $"only {only}");
        }

        // dq and dk, then dk and dv: no two are always added to together.
        foreach (int kept in (int[])[2, 0])
        {
            run.Want(_ => true, accumulate: i => i != kept);
            run.Backward(problem.DO);
            for (int i = 0; i < 3; i++)
            {
                if (i == kept)
                {
                    Assert.That(run.Gradient(i), Is.EqualTo(plain[i]), $"not accumulated {i}");
                    continue;
                }

                // A sum is rounded once; the gradient by itself, with which it is compared, too.
                double half = 1.0 / 256;
                double[] start = OpRun.Start(i, plain[i].Length);
                OpTests.AreClose(run.Gradient(i), [.. plain[i].Zip(start, (g, s) => g + s)],
                    half * (start.Max(Math.Abs) + (2 * plain[i].Max(Math.Abs))),
                    $"accumulated {i}");
            }
        }
    }

    [TestCaseSource(nameof(OnTensorCores))]
    public void MatricesAreReadWithoutBankConflicts(object value)
    {
        if (_cuda.Emulator is not { } gpu)
        {
            Assert.Ignore("counted by the emulator");
            return;
        }

        AttentionProblem problem = Rounded((AttentionProblem)value, DType.BF16);
        using OpRun run = Run(_cuda, problem, DType.BF16);
        run.Want(_ => true);
        int before = gpu.Launches.Count;
        run.Backward(problem.DO);
        run.Gradient(0); // waits for the launches
        LaunchCounters[] launches =
            [.. gpu.Launches.Skip(before)
                .Where(l => l.Kernel.EndsWith($"_backward_{problem.HeadDim}"))];
        Assert.That(launches, Has.Length.EqualTo(1));
        foreach (LaunchCounters launch in launches)
        {
            Assert.That(launch.TensorFlops, Is.GreaterThan(0));
            Assert.That(launch.MatrixLoadConflicts, Is.Zero);
            Assert.That(launch.BankConflicts, Is.Zero);
        }
    }

    // As the host lists them for a batch, keys of many tiles among several sequences.
    [TestCase(true)]
    [TestCase(false)]
    public void TilesMayComeWithTheBatch(bool causal)
    {
        AttentionProblem problem = Self(2, 1, 64, [300, 300, 7], causal);
        Compare(_cuda, problem, DType.BF16, lists: true);
    }

    // Smaller tiles, for blocks of no more than 99 KiB of shared memory.
    [TestCaseSource(nameof(OnTensorCores))]
    public void GradientsAgreeInSmallTiles(object value) =>
        CompareOn((AttentionProblem)value, new() { Architecture = 86 });

    // Mistakes in the tensor-core kernel that the rule, or the emulated GPU, must find: in blocks
    // of several heads, keys of several tiles, and with parts to add.
    [TestCase("attention_backward_tile", "__syncthreads(); // p and ds are there", "")]
    [TestCase("attention_backward_tile", "wait_copies<0>()", "wait_copies<1>()")]
    [TestCase("attention_backward_tile", "stage ^= 1;", "")]
    [TestCase("attention_backward_tile", "query >= first_query + key",
        "query >= first_query")]
    [TestCase("attention_backward_tile", "key < keys_left", "true")]
    [TestCase("attention_backward_tile", "(dp[m][n][i] - delta[i % 2])",
        "dp[m][n][i]")]
    [TestCase("attention_backward_tile", "tile * KEYS - at.before",
        "tile * KEYS + STEP - at.before")]
    [TestCase("attention_backward_tile", "bool waits = a.dq && tile > 0",
        "bool waits = a.dq && tile > 1")]
    [TestCase("attention_backward_tile", "int head = key_head * group + part * group / a.parts",
        "int head = key_head * group")]
    [TestCase("attention_backward_tile", "(part + 1) * group / a.parts - 1",
        "part * group / a.parts")]
    [TestCase("attention_backward_tile", "(u64)(column % a.parts) * a.key_tokens", "0 * a.key_tokens")]
    [TestCase("multiply_transposed", "b + 2", "b")]
    [TestCase("multiply_rows", "b + 2", "b")]
    [TestCase("store_part", "half * 2 + 1", "half * 2")]
    [TestCase("attention_statistics", "delta = warp_sum(delta)", "delta = delta")]
    [TestCase("attention_backward_tile", "store_turn(a.turns + added, tile + 1)",
        "store_turn(a.turns + added, tile)")]
    public void MistakesAreFound(string function, string from, string to) =>
        IsFound(function, from, to, Self(8, 2, 64, [300, 100], causal: true, [290, 100]));

    [TestCase("transpose_quad", "t / 2 ? w[i] : w[i + 2]", "t / 2 ? w[i + 2] : w[i]")]
    public void MistakesOfWideHeadsAreFound(string function, string from, string to) =>
        IsFound(function, from, to, Self(2, 1, 128, [150], causal: true));

    [TestCase("attention_statistics", "dq && log_sum == MINUS_INFINITY", "false")]
    [TestCase("attention_backward_tile", "if (at.first + KEYS >= at.visible) next_lowest",
        "if (0) next_lowest")]
    public void MistakesWhereQueriesSeeNoKeyAreFound(string function, string from, string to) =>
        IsFound(function, from, to,
            AttentionProblem.Random(2, 1, 64, [20, 200], [0, 100], causal: true));

    private void IsFound(string function, string from, string to, AttentionProblem problem)
    {
        if (CudaUnderTest.IsReal) Assert.Ignore("mistakes are planted on the emulated GPU only");
        _cuda?.Dispose();
        _cuda = null!;
        string source = KernelText.Replace(CudaKernels.Source, function, from, to);
        using var spoilt =
            new CudaUnderTest(source: KernelText.Sections(source, [1, 2, 3, 4, 10, 11]));
        Exception? e = Assert.Catch(() => Compare(spoilt, problem, DType.BF16));
        Assert.That(e, Is.InstanceOf<AssertionException>().Or.InstanceOf<CudaException>());
        TestContext.Out.WriteLine(spoilt.Emulator!.Fault?.ToString() ?? e!.Message);
    }

    [TestCase(3, "cu_seqlens_q[1] is 90, expected to rise from 0 to 20")]
    [TestCase(4, "cu_seqlens_k[1] is 90, expected to rise from 0 to 20")]
    public void WrongStartsAreReported(int input, string message)
    {
        foreach (int headDim in (int[])[8, 64])
        {
            AttentionProblem problem =
                Rounded(Self(2, 1, headDim, [12, 8], causal: true), DType.BF16);
            using OpRun run = Run(_cuda, problem, DType.BF16);
            run.Set(input, 1, 90);
            run.Want(_ => true);
            run.Backward(problem.DO);
            var e = Assert.Throws<ShapeException>(() => run.Gradient(0));
            Assert.That(e!.Message, Does.Contain(message));
        }
    }

    // On another emulated GPU; only one can exist.
    private void CompareOn(
        AttentionProblem problem, EmulatorOptions options,
        DeviceCompiler compiler = DeviceCompiler.Nvrtc)
    {
        if (CudaUnderTest.IsReal) Assert.Ignore("a real GPU has no such choice");
        _cuda?.Dispose();
        _cuda = null!;
        using var other = new CudaUnderTest(options, compiler);
        Compare(other, problem, DType.BF16);
    }

    internal static void Compare(
        CudaUnderTest cuda, AttentionProblem value, DType type, bool lists = false)
    {
        AttentionProblem problem = Rounded(value, type);
        AttentionResult exact = problem.Naive();
        using OpRun run = Run(cuda, problem.WithBadKeysUnseen(), type, lists);
        run.Want(_ => true);
        run.Backward(problem.DO);
        double[] dq = run.Gradient(0), dk = run.Gradient(1), dv = run.Gradient(2);
        if (type == DType.F32)
        {
            AttentionResult plain = new AttentionRunner<float>().Run(problem);
            Agree(dq, plain.DQ, exact.DQ, "dq");
            Agree(dk, plain.DK, exact.DK, "dk");
            Agree(dv, plain.DV, exact.DV, "dv");
            return;
        }

        var allowed = AttentionRounding.Allowed(problem, exact, type);
        Within(dq, exact.DQ, allowed.DQ, "dq");
        Within(dk, exact.DK, allowed.DK, "dk");
        Within(dv, exact.DV, allowed.DV, "dv");
    }

    private static void Agree(double[] got, double[] plain, double[] exact, string what)
    {
        double error = plain.Zip(exact, (a, b) => Math.Abs(a - b)).DefaultIfEmpty(0).Max();
        double largest = Math.Max(1, exact.Select(Math.Abs).DefaultIfEmpty(0).Max());
        OpTests.AreClose(got, exact, (2 * error) + (1e-5 * largest), what);
    }

    private static void Within(double[] got, double[] exact, double[] allowed, string what)
    {
        Assert.That(got, Has.Length.EqualTo(exact.Length), what);
        Assert.That(got, Has.All.Matches<double>(double.IsFinite), what);
        int worst = -1;
        double most = 0;
        for (int i = 0; i < got.Length; i++)
        {
            double share = Math.Abs(got[i] - exact[i]) / allowed[i];
            if (share <= most) continue;
            (worst, most) = (i, share);
        }

        TestContext.Out.WriteLine($"{what}: {most:0.00} of what is allowed");
        Assert.That(most, Is.LessThanOrEqualTo(1), () => $"{what}[{worst}] is {got[worst]}, exactly "
            + $"{exact[worst]}, where {allowed[worst]} are allowed");
    }

    // The op on the device, with what a forward would have left.
    private static OpRun Run(
        CudaUnderTest cuda, AttentionProblem problem, DType type, bool lists = false)
    {
        int row = problem.Heads * problem.HeadDim, keyRow = problem.KvHeads * problem.HeadDim;
        var op = new Attention(
            problem.Heads, problem.KvHeads, problem.HeadDim, problem.Causal, problem.Scale,
            problem.Cached);
        AttentionResult exact = problem.Naive();
        var run = new OpRun(cuda.Device(type), op,
        [
            Value.Float("q", [problem.Tokens, row], problem.Q),
            Value.Float("k", [problem.KeyTokens, keyRow], problem.K),
            Value.Float("v", [problem.KeyTokens, keyRow], problem.V),
            Value.Int("cu_seqlens_q", [.. problem.StartsQ]),
            Value.Int("cu_seqlens_k", [.. problem.StartsK]),
            problem.KeyLengths is null
                ? Value.Absent("key_lengths")
                : Value.Int("key_lengths", problem.KeyLengths),
            .. lists ? (Value[])[List(ofKeys: false), List(ofKeys: true)] : [],
        ]);
        run.SetResults(exact.O, exact.Lse);
        return run;

        Value List(bool ofKeys)
        {
            int count = AttentionTiles.Count(ofKeys ? problem.StartsK : problem.StartsQ);
            var tiles = new int[count * AttentionTiles.Fields];
            AttentionTiles.Fill(tiles, problem.StartsQ, problem.StartsK, problem.Causal, ofKeys);
            return Value.Int(ofKeys ? "key_tiles" : "query_tiles", tiles) with
            {
                Shape = [count, AttentionTiles.Fields],
            };
        }
    }

    private static AttentionProblem Rounded(AttentionProblem problem, DType type) => problem with
    {
        Q = Storage.Round(problem.Q, type),
        K = Storage.Round(problem.K, type),
        V = Storage.Round(problem.V, type),
        DO = Storage.Round(problem.DO, type),
    };

    private static AttentionProblem Self(
        int heads, int kvHeads, int headDim, int[] lengths, bool causal,
        int[]? keyLengths = null) =>
        AttentionProblem.Random(heads, kvHeads, headDim, lengths, lengths, causal, keyLengths);

    internal static string Name(AttentionProblem p) =>
        $"{p.Heads}/{p.KvHeads} heads of {p.HeadDim}, {string.Join('+', Lengths(p.StartsQ))} queries, "
        + $"{string.Join('+', Lengths(p.StartsK))} keys{(p.Causal ? ", causal" : "")}"
        + (p.Cached ? ", cached" : p.KeyLengths is null ? "" : ", cut");

    private static IEnumerable<int> Lengths(int[] starts) =>
        starts.Skip(1).Zip(starts, (a, b) => a - b);
}
