using MiniCpmNative.Engine.Model;
using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Attention's forward on CUDA, o and lse, with the tolerance of <see cref="CudaOpTests"/>. The
/// plain computation is the formula in float; where the kernel multiplies on tensor cores it rounds
/// p to the storage type before the product with v, as such a product takes no wider one.
/// </summary>
[TestFixture]
public sealed class CudaAttentionTests
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
            d => Self(2, 2, d, [0, 1, 7, 63], causal: true),
            d => Self(4, 1, d, [64, 65, 0], causal: true),
            d => Self(7, 1, d, [129], causal: false),
            d => Self(4, 1, d, [200, 0, 1], causal: true),
            d => AttentionProblem.Random(2, 1, d, [10, 70, 0, 3], [129, 10, 5, 0], causal: true),
            d => AttentionProblem.Random(2, 2, d, [10, 70, 0, 3], [129, 10, 5, 0], causal: false),
            d => Self(2, 2, d, [65, 64, 7, 129], causal: false, [33, 100, 0, 70]),
            d => AttentionProblem.Random(7, 1, d, [30, 30], [150, 30], causal: true, [120, -3]),
            d => Self(1, 1, d, [.. Enumerable.Range(0, 70).Select(s => s % 4)], causal: true),
            d => AttentionProblem.Random(2, 1, d, [90], [90], causal: true, spread: 12),
        ]
        let problem = make(headDim)
        select new TestCaseData(problem, type).SetArgDisplayNames(Name(problem), type.ToString());

    private static IEnumerable<TestCaseData> OtherCases =>
        from type in Types
        from problem in (AttentionProblem[])
        [
            Self(3, 1, 1, [33], causal: true), Self(2, 1, 6, [17, 40], causal: false),
            Self(2, 1, 9, [5, 33], causal: true), Self(2, 2, 33, [40], causal: true),
            Self(2, 1, 256, [40], causal: true), Self(28, 4, 128, [70], causal: true),
            Self(16, 16, 72, [65], causal: false), Self(2, 1, 64, [], causal: true),
            AttentionProblem.Random(2, 1, 64, [0, 0], [3, 70], causal: true),
            Self(3, 1, 48, [1, 1, 33, 1], causal: true), Self(6, 2, 48, [20], causal: false),
            Self(3, 1, 256, [1, 30, 1], causal: true), Cached(64), Cached(72), Cached(128),
            Cached(48), Cached(256),
        ]
        select new TestCaseData(problem, type).SetArgDisplayNames(Name(problem), type.ToString());

    // One query of each sequence at most, over keys of one share and of several.
    private static IEnumerable<TestCaseData> Decoding =>
        from type in Types
        from problem in (AttentionProblem[])
        [
            Few(28, 4, 128, [1], [700], [677]), Few(16, 1, 72, [1, 0], [900, 300], [513, 7]),
            Few(4, 2, 256, [0, 1, 1], [520, 600, 530], [9, 600, 0]), Few(3, 1, 8, [1], [70], [70]),
            Few(2, 2, 64, [2, 0, 0], [40, 0, 30], [33, 0, 4]),
            Few(4, 1, 80, [1, 1], [70, 70], [0, 64]), Few(2, 1, 9, [1], [70], [70]),
            Few(9, 1, 96, [1, 1, 1], [700, 700, 700], [64, 128, 129]),
            AttentionProblem.Random(2, 1, 128, [1], [600], causal: true, [580], spread: 12) with
            {
                Cached = true,
            },
        ]
        select new TestCaseData(problem, type).SetArgDisplayNames(Name(problem), type.ToString());

    private static IEnumerable<TestCaseData> OnTensorCores =>
        from headDim in (int[])[64, 72, 80, 96, 128, 256]
        let problem = Self(4, 2, headDim, [130, 7], causal: true, [130, 5])
        select new TestCaseData(problem).SetArgDisplayNames(Name(problem));

    // One query, several and a whole sequence behind keys in a cache with room for more.
    private static AttentionProblem Cached(int headDim) =>
        AttentionProblem.Random(6, 2, headDim, [1, 5, 1, 0, 40], [130, 80, 9, 4, 70], causal: true,
            [100, 70, 1, 3, 40]) with
        { Cached = true };

    private static AttentionProblem Few(
        int heads, int kvHeads, int headDim, int[] queries, int[] room, int[] lengths) =>
        AttentionProblem.Random(heads, kvHeads, headDim, queries, room, causal: true, lengths) with
        {
            Cached = true,
        };

    [SetUp]
    public void Make()
    {
        if (_cuda?.Emulator?.Fault is null && _cuda is not null) return;
        _cuda?.Dispose();
        _cuda = new();
    }

    [OneTimeTearDown]
    public void Free()
    {
        _cuda?.Dispose();
        _cuda = null!;
    }

    [TestCaseSource(nameof(Cases))]
    [TestCaseSource(nameof(OtherCases))]
    [TestCaseSource(nameof(Decoding))]
    public void Agrees(AttentionProblem problem, object type) =>
        Compare(problem, (DType)type, _cuda.Device((DType)type));

    [TestCaseSource(nameof(OnTensorCores))]
    public void AgreesWhereHardwareIsFree(AttentionProblem problem)
    {
        if (CudaUnderTest.IsReal) Assert.Ignore("only the emulator has these options");
        Free(); // there is one at a time
        foreach (DeviceCompiler compiler in Enum.GetValues<DeviceCompiler>())
        {
            using var cuda = new CudaUnderTest(
                new EmulatorOptions
                {
                    Seed = 3,
                    EarlyAsyncCopies = compiler == DeviceCompiler.Clang,
                    ApproximateUlps = 2,
                    ReverseMma = true,
                }, compiler);
            Compare(problem, DType.BF16, cuda.Device(DType.BF16));
            Compare(Self(4, 2, 8, [130, 7], causal: true), DType.BF16, cuda.Device(DType.BF16));
        }
    }

    // Smaller tiles, for blocks of no more than 99 KiB of shared memory.
    [TestCaseSource(nameof(OnTensorCores))]
    public void AgreesInSmallTiles(AttentionProblem problem)
    {
        if (CudaUnderTest.IsReal) Assert.Ignore("a real GPU has the size that it has");
        Free();
        using var cuda = new CudaUnderTest(new EmulatorOptions { Architecture = 86 });
        Compare(problem, DType.BF16, cuda.Device(DType.BF16));
    }

    [Test]
    public void DecodingAgreesWhereHardwareIsFree()
    {
        if (CudaUnderTest.IsReal) Assert.Ignore("only the emulator has these options");
        Free(); // there is one at a time
        foreach (DeviceCompiler compiler in Enum.GetValues<DeviceCompiler>())
        {
            using var cuda = new CudaUnderTest(
                new EmulatorOptions { Seed = 3, ApproximateUlps = 2 }, compiler);
            foreach (DType type in Types)
                foreach (AttentionProblem problem in (AttentionProblem[])
                    [
                        Few(7, 1, 128, [1, 1], [600, 600], [590, 3]),
                        Few(4, 4, 72, [1], [70], [65]),
                    ])
                {
                    Compare(problem, type, cuda.Device(type));
                    using OpRun a = Run(problem, type, cuda.Device(type)),
                        b = Run(problem, type, cuda.Device(type));
                    Assert.That(a.Output.AsSpan().SequenceEqual(b.Output), "same bits");
                    Assert.That(a.Saved(0).AsSpan().SequenceEqual(b.Saved(0)), "same bits");
                }
        }
    }

    // What is behind the keys that count is never read; one that counts shows.
    [TestCase(599, true)]
    [TestCase(600, false)]
    public void ABadKeyReachesTheQueryThatSeesIt(int bad, bool seen)
    {
        foreach (DType type in Types)
            foreach (int input in (int[])[1, 2])
            {
                Value[] values = Inputs(Rounded(Few(2, 1, 64, [1], [700], [600]), type));
                values[input].Data[bad * 64] = double.NaN;
                using var run = new OpRun(
                    _cuda.Device(type), OpOf(Few(2, 1, 64, [1], [700], [600])), values);
                run.Forward();
                Assert.That(double.IsNaN(run.Output[0]), Is.EqualTo(seen));
            }
    }

    [TestCase(3, new[] { 0, 2, 2 }, "cu_seqlens_q[1] is 2")]
    [TestCase(4, new[] { 0, 141, 140 }, "cu_seqlens_k[1] is 141")]
    public void ForeignStartsOfACacheAreReported(int input, int[] starts, string message)
    {
        Value[] values = Inputs(Rounded(Few(2, 1, 64, [1, 0], [70, 70], [60, 60]), DType.BF16));
        values[input] = Value.Int("starts", starts);
        using var run = new OpRun(
            _cuda.Device(DType.BF16), OpOf(Few(2, 1, 64, [1, 0], [70, 70], [60, 60])), values);
        run.Forward();
        Assert.That(
            () => run.Output, Throws.TypeOf<ShapeException>().With.Message.Contains(message));
    }

    // PyTorch's softmax of nothing but -infinity is NaN. Here of a query that is infinite, and of
    // the first, which sees the first key alone, where that key is.
    [TestCase(64, 0)]
    [TestCase(64, 1)]
    [TestCase(8, 0)]
    [TestCase(8, 1)]
    public void ScoresThatAreAllInfiniteGiveNotANumber(int headDim, int input)
    {
        const int Bad = 5;
        foreach (DType type in Types)
        {
            AttentionProblem p = Rounded(Self(1, 1, headDim, [70], causal: true), type);
            Value[] values = Inputs(p);
            for (int token = 0; token < p.Tokens; token++)
                values[0].Data[token * headDim] = values[1].Data[token * headDim] = 1;
            int at = input == 0 ? Bad : 0;
            values[input].Data[at * headDim] = double.NegativeInfinity;
            using var run = new OpRun(_cuda.Device(type), OpOf(p), values);
            run.Forward();
            double[] o = run.Output, lse = run.Saved(0);
            for (int token = 0; token < p.Tokens; token++)
            {
                string what = $"token {token}, {type}";
                Assert.That(double.IsNaN(lse[token]), Is.EqualTo(token == at), what);
                Assert.That(double.IsNaN(o[token * headDim]), Is.EqualTo(token == at), what);
            }
        }
    }

    [TestCaseSource(nameof(OnTensorCores))]
    public void MatrixLoadsHaveNoBankConflicts(AttentionProblem problem)
    {
        if (CudaUnderTest.IsReal) Assert.Ignore("counted by the emulator");
        using OpRun run = Run(problem, DType.BF16, _cuda.Device(DType.BF16));
        Assert.That(run.Output, Is.Not.Empty); // waits for the launch
        LaunchCounters launch = _cuda.Emulator!.Launches[^1];
        Assert.That(launch.Kernel, Is.EqualTo($"attention_forward_{problem.HeadDim}"));
        Assert.That(launch.MatrixLoadConflicts, Is.Zero);
        Assert.That(launch.TensorFlops, Is.Positive);
    }

    [TestCaseSource(nameof(OnTensorCores))]
    public void SameBitsInEveryRun(AttentionProblem problem)
    {
        foreach (DType type in Types)
        {
            CudaDevice device = _cuda.Device(type);
            using OpRun a = Run(problem, type, device), b = Run(problem, type, device);
            Assert.That(a.Output.AsSpan().SequenceEqual(b.Output), type.ToString());
            Assert.That(a.Saved(0).AsSpan().SequenceEqual(b.Saved(0)), type.ToString());
        }
    }

    // Rows of 72 * 2 bytes from an address that is no multiple of 16 go to the other kernel.
    [Test]
    public void TensorsMayStartAnywhere()
    {
        CudaDevice device = _cuda.Device(DType.BF16);
        AttentionProblem p = Rounded(Self(1, 1, 72, [9, 70], causal: true), DType.BF16);
        Tensor[] inputs = [.. Inputs(p).Select(v => Shifted(device, v))];
        Tensor o = Shifted(device, Value.Float("o", [p.Tokens, 72], new double[p.Q.Length]));
        Tensor lse = device.Allocate(new Spec(DType.F32, new Shape(p.Tokens, 1)), "lse");
        device.Forward(OpOf(p), new OpCall(inputs, o, [lse], recorded: true));
        double[] got = Array.ConvertAll(device.ReadFloats(o), y => (double)y);
        Agree(got, Storage.Round(Plain(p, DType.F32).O, DType.BF16), p.Naive().O, "o");
    }

    // Every row that sees a bad number must show it; a row of another sequence must not.
    [TestCaseSource(nameof(OnTensorCores))]
    public void BadNumbersReachTheRowsThatSeeThem(AttentionProblem problem)
    {
        const int Bad = 70, FirstEnd = 130;
        int row = problem.Heads * problem.HeadDim;
        foreach (DType type in (DType[])[DType.F32, DType.BF16])
            foreach (double bad in (double[])[double.NaN, double.PositiveInfinity])
                for (int input = 0; input < 3; input++)
                {
                    Value[] values = Inputs(Rounded(problem, type));
                    // In the first head; an infinite key is seen where its score is positive.
                    for (int token = 0; token < problem.Tokens; token++)
                        values[0].Data[token * row] = 1;
                    values[input].Data[Bad * values[input].Shape[1]] = bad;
                    using var run = new OpRun(_cuda.Device(type), OpOf(problem), values);
                    run.Forward();
                    double[] o = run.Output;
                    for (int token = 0; token < problem.Tokens; token++)
                    {
                        bool sees = input == 0 ? token == Bad : token is >= Bad and < FirstEnd;
                        string what = $"{bad} in input {input}, token {token}, {type}";
                        if (sees) Assert.That(double.IsFinite(o[token * row]), Is.False, what);
                        else if (token >= FirstEnd)
                            Assert.That(double.IsFinite(o[token * row]), what);
                    }
                }
    }

    [TestCase(3, new[] { 1, 5, 12 }, "cu_seqlens_q[0] is 1")]
    [TestCase(3, new[] { 0, 13, 12 }, "cu_seqlens_q[1] is 13")]
    [TestCase(3, new[] { 0, 5, 13 }, "cu_seqlens_q[2] is 13")]
    [TestCase(3, new[] { 0, 5, 11 }, "cu_seqlens_q[2] is 11")]
    [TestCase(3, new[] { 0, -5, 12 }, "cu_seqlens_q[1] is -5")]
    [TestCase(3, new[] { 0, int.MaxValue, 12 }, "cu_seqlens_q[1] is 2147483647")]
    [TestCase(4, new[] { 0, int.MinValue, 12 }, "cu_seqlens_k[1] is -2147483648")]
    [TestCase(4, new[] { 0, 1 << 30, 12 }, "cu_seqlens_k[1] is 1073741824")]
    public void ForeignStartsAreReported(int input, int[] starts, string message)
    {
        foreach (int headDim in (int[])[64, 8])
        {
            AttentionProblem p = Self(2, 1, headDim, [5, 7], causal: true);
            Value[] values = Inputs(Rounded(p, DType.BF16));
            values[input] = Value.Int("starts", starts);
            using var run = new OpRun(_cuda.Device(DType.BF16), OpOf(p), values);
            run.Forward();
            Assert.That(
                () => run.Output, Throws.TypeOf<ShapeException>().With.Message.Contains(message));
        }
    }

    [TestCase(3, 2, 64, 1.0, "multiple")]
    [TestCase(2, 2, 257, 1.0, "head dimension")]
    [TestCase(2, 2, 64, 0.0, "scale")]
    [TestCase(2, 2, 64, double.NaN, "scale")]
    public void WhatKernelsDoNotTakeIsRefused(
        int heads, int kvHeads, int headDim, double scale, string message)
    {
        AttentionProblem p =
            Self(heads, kvHeads, headDim, [5], causal: true) with { Scale = scale };
        using var run = new OpRun(_cuda.Device(DType.F32), OpOf(p), Inputs(p));
        Assert.That(
            () => run.Forward(), Throws.TypeOf<ShapeException>().With.Message.Contains(message));
    }

    internal static void Compare(AttentionProblem problem, DType type, CudaDevice device)
    {
        AttentionProblem rounded = Rounded(problem, type);
        using OpRun run = Run(problem.WithBadKeysUnseen(), type, device);
        AttentionResult exact = rounded.Naive();
        bool onTensorCores = type != DType.F32 && !Decodes(problem)
            && problem.HeadDim is 64 or 72 or 80 or 96 or 128 or 256;
        var (o, lse) = Plain(rounded, onTensorCores ? type : DType.F32);
        Agree(run.Output, Storage.Round(o, type), exact.O, "o");
        Agree(run.Saved(0), lse, exact.Lse, "lse");
        if (type != DType.F32)
            CudaRoundingTests.HasNoSide(run.Output, exact.O, "o", problem.HeadDim);
    }

    private static bool Decodes(AttentionProblem p) =>
        p.Cached && p.Tokens < p.StartsQ.Length && p.HeadDim % 8 == 0;

    private static void Agree(double[] got, double[] plain, double[] exact, string what)
    {
        double[] finite = [.. exact.Where(double.IsFinite)];
        double error = plain.Zip(exact, (a, b) => a == b ? 0 : Math.Abs(a - b))
            .DefaultIfEmpty(0).Max();
        double allowed = (2 * error) + (1e-5 * finite.Append(1).Max(Math.Abs));
        Assert.That(got, Has.Length.EqualTo(exact.Length), what);
        for (int i = 0; i < got.Length; i++)
            if (!(got[i] == exact[i] || Math.Abs(got[i] - exact[i]) <= allowed))
                Assert.Fail($"{what}[{i}]: {got[i]:R}, expected {exact[i]:R} +- {allowed:E1}");
    }

    /// <summary>The formula in float, p rounded to a type before its product with v.</summary>
    private static (double[] O, double[] Lse) Plain(AttentionProblem x, DType product)
    {
        double[] o = new double[x.Q.Length], lse = new double[x.Tokens * x.Heads];
        for (int s = 0; s + 1 < x.StartsQ.Length; s++)
            for (int i = 0; i < x.StartsQ[s + 1] - x.StartsQ[s]; i++)
                for (int h = 0; h < x.Heads; h++)
                {
                    int row = ((x.StartsQ[s] + i) * x.Heads) + h, seen = Math.Max(0, x.Seen(s, i));
                    var scores = new float[seen];
                    int Key(int j) =>
                        (((x.StartsK[s] + j) * x.KvHeads) + (h / (x.Heads / x.KvHeads)))
                            * x.HeadDim;
                    for (int j = 0; j < seen; j++)
                        for (int d = 0; d < x.HeadDim; d++)
                            scores[j] += (float)x.Q[(row * x.HeadDim) + d] * (float)x.K[Key(j) + d];
                    float max = scores.Append(float.NegativeInfinity).Max(), scale = (float)x.Scale;
                    float[] p = Array.ConvertAll(scores, y => MathF.Exp(scale * (y - max)));
                    float sum = 0;
                    foreach (float each in p) sum += each;
                    lse[row] = seen == 0 ? double.NegativeInfinity : (scale * max) + MathF.Log(sum);
                    double[] rounded = Storage.Round(Array.ConvertAll(p, y => (double)y), product);
                    for (int d = 0; d < x.HeadDim && seen > 0; d++)
                    {
                        float y = 0;
                        for (int j = 0; j < seen; j++)
                            y += (float)rounded[j] * (float)x.V[Key(j) + d];
                        o[(row * x.HeadDim) + d] = y / sum;
                    }
                }

        return (o, lse);
    }

    private static OpRun Run(AttentionProblem problem, DType type, CudaDevice device)
    {
        var run = new OpRun(device, OpOf(problem), Inputs(Rounded(problem, type)));
        run.Forward();
        return run;
    }

    internal static Attention OpOf(AttentionProblem p) =>
        new(p.Heads, p.KvHeads, p.HeadDim, p.Causal, p.Scale, p.Cached);

    // What the device will hold.
    private static AttentionProblem Rounded(AttentionProblem p, DType type) => p with
    {
        Q = Storage.Round(p.Q, type),
        K = Storage.Round(p.K, type),
        V = Storage.Round(p.V, type),
    };

    internal static Value[] Inputs(AttentionProblem p) =>
    [
        Value.Float("q", [p.Tokens, p.Heads * p.HeadDim], p.Q),
        Value.Float("k", [p.KeyTokens, p.KvHeads * p.HeadDim], p.K),
        Value.Float("v", [p.KeyTokens, p.KvHeads * p.HeadDim], p.V),
        Value.Int("cu_seqlens_q", p.StartsQ), Value.Int("cu_seqlens_k", p.StartsK),
        p.KeyLengths is null ? Value.Absent("key_lengths") : Value.Int("key_lengths", p.KeyLengths),
    ];

    // The tensor two bytes (integers four) behind an aligned address.
    private static Tensor Shifted(CudaDevice device, Value value)
    {
        if (!value.Exists) return Tensor.None;
        Spec spec = value.Spec(DType.BF16);
        int size = spec.Type.Size();
        var room = new Spec(DType.U8, new Shape(checked((int)spec.Bytes) + size));
        var tensor = new Tensor(device.Allocate(room, value.Name).Data + size, spec);
        if (value.IsInteger) device.Write<int>(tensor, Array.ConvertAll(value.Data, v => (int)v));
        else device.WriteFloats(tensor, Array.ConvertAll(value.Data, v => (float)v));
        return tensor;
    }

    private static AttentionProblem Self(
        int heads, int kvHeads, int headDim, int[] lengths, bool causal,
        int[]? keyLengths = null) =>
        AttentionProblem.Random(heads, kvHeads, headDim, lengths, lengths, causal, keyLengths);

    internal static string Name(AttentionProblem p) =>
        $"{p.Heads}/{p.KvHeads} heads of {p.HeadDim}, starts {Starts(p.StartsQ)} and {Starts(p.StartsK)}"
        + (p.Causal ? ", causal" : "")
        + (p.Cached ? ", cached" : p.KeyLengths is null ? "" : ", cut")
        + (p.Q.Length > 0 && p.Q.Max() > 2 ? ", large" : "");

    private static string Starts(int[] starts) =>
        starts.Length > 8 ? $"{starts.Length} to {starts[^1]}" : string.Join(' ', starts);
}
