using System.Numerics.Tensors;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Products against a plain sums in double over the very values that the operands hold. The
/// bound is the textbook one for a sum of k products in float, k * 2^-24 * sum |a||b|, and 2^-53 in
/// double (Higham, Accuracy and Stability, 3.1), with a small multiple for alpha, beta and bias.
/// </summary>
public sealed unsafe class GemmTests
{
    private static readonly int[] s_sizes = [1, 2, 7, 13, 16, 31, 33, 64, 100, 385];

    public static IEnumerable<InstructionSet> Sets =>
        Enum.GetValues<InstructionSet>().Where(set => set <= Gemm.Best);

    [Test]
    public void EveryTransposeSizeAndDType(
        [ValueSource(nameof(Sets))] InstructionSet set,
        [Values(DType.F32, DType.BF16, DType.F16)] DType type,
        [Values] bool aT,
        [Values] bool bT,
        [Values] bool packed)
    {
        using var workers = new Workers(2);
        using var gemm = new Gemm(workers, set);
        var random = new Random(1);
        foreach (int m in s_sizes)
        {
            for (int trial = 0; trial < 6; trial++)
            {
                int n = s_sizes[random.Next(s_sizes.Length)];
                int k = s_sizes[random.Next(s_sizes.Length)];
                using var test = new GemmCase(random, m, n, k, DType.F32, type, aT, bT);
                if (packed) test.Pack(workers);
                test.Alpha = trial % 2 == 0 ? 1 : -0.75;
                test.Beta = trial % 3 == 0 ? 0 : trial % 3 == 1 ? 1 : 0.5;
                if (trial % 2 == 1) test.AddBias(random);
                test.Check(gemm);
            }
        }
    }

    [Test]
    public void LargerThanEveryBlock(
        [ValueSource(nameof(Sets))] InstructionSet set, [Values] bool aT, [Values] bool bT)
    {
        using var workers = new Workers(2);
        using var gemm = new Gemm(workers, set);
        var random = new Random(2);
        (int, int, int)[] shapes =
        [
            (37, 417, 1023), (417, 65, 1100), (217, 16, 1023), (16, 417, 1100), (1023, 33, 16),
        ];
        foreach (var (m, n, k) in shapes)
        {
            using var test =
                new GemmCase(random, m, n, k, DType.F32, DType.F32, aT, bT) { Beta = 1 };
            test.Check(gemm);
        }
    }

    [Test]
    public void MoreRowsAndDepthThanArePackedAtATime()
    {
        using var workers = new Workers(2);
        using var gemm = new Gemm(workers);
        var random = new Random(3);
        using var tall = new GemmCase(random, 4200, 70, 1200, DType.F32, DType.BF16, false, true);
        tall.AddBias(random);
        tall.Check(gemm);
    }

    [Test]
    public void Double([Values] bool aT, [Values] bool bT, [Values] bool packed)
    {
        using var workers = new Workers(2);
        using var gemm = new Gemm(workers);
        var random = new Random(5);
        foreach (int m in s_sizes)
        {
            foreach (int n in s_sizes)
            {
                int k = s_sizes[random.Next(s_sizes.Length)];
                using var test = new GemmCase(random, m, n, k, DType.F64, DType.F64, aT, bT)
                {
                    Alpha = 0.5,
                    Beta = m % 2,
                };
                if (packed) test.Pack(workers);
                if (n % 2 == 0) test.AddBias(random);
                test.Check(gemm);
            }
        }
    }

    [Test]
    public void TransposedResult([ValueSource(nameof(Sets))] InstructionSet set)
    {
        using var workers = new Workers(2);
        using var gemm = new Gemm(workers, set);
        using var test = new GemmCase(new Random(6), 45, 37, 29, DType.F32, DType.F32, false, true);
        float* c = stackalloc float[45 * 37];
        gemm.Multiply(test.A, test.B, new MatrixView(c, DType.F32, 37, 45).T);
        test.Multiply(gemm);
        for (int i = 0; i < 45; i++)
            for (int j = 0; j < 37; j++)
                Assert.That(c[(j * 45) + i], Is.EqualTo(test.Result(i, j)));
    }

    [Test]
    public void NothingToSum([Values(0.0, 1.0, -2.0)] double beta)
    {
        using var workers = new Workers(2);
        using var gemm = new Gemm(workers);
        var random = new Random(7);
        using var test = new GemmCase(random, 5, 9, 0, DType.F32, DType.F32, false, false);
        test.Beta = beta;
        test.AddBias(random);
        test.Check(gemm);
        foreach (var (m, n) in new[] { (0, 9), (5, 0), (0, 0) })
        {
            using var empty =
                new GemmCase(new Random(9), m, n, 4, DType.F32, DType.BF16, false, true);
            empty.Check(gemm);
        }
    }

    [Test]
    public void BetaZeroDoesNotRead([ValueSource(nameof(Sets))] InstructionSet set)
    {
        using var workers = new Workers(2);
        using var gemm = new Gemm(workers, set);
        foreach (var (m, n, k) in new[] { (3, 5, 40), (40, 33, 20), (100, 16, 50), (16, 100, 50) })
        {
            using var test = new GemmCase(
                new Random(10), m, n, k, DType.F32, DType.F32, m == 100, m == 3);
            new Span<float>(test.C.Data, (int)test.C.Stride * m).Fill(float.NaN);
            test.Check(gemm);
        }
    }

    [Test]
    public void InfinitiesAndNaNSpreadToTheirRowAndColumnOnly(
        [ValueSource(nameof(Sets))] InstructionSet set, [Values] bool bT, [Values] bool packed)
    {
        using var workers = new Workers(2);
        using var gemm = new Gemm(workers, set);
        foreach (int m in new[] { 2, 40 })
        {
            using var test =
                new GemmCase(new Random(11), m, 50, 70, DType.F32, DType.BF16, false, bT);
            ((float*)test.A.Data)[test.A.Stride + 3] = float.NaN;
            ((float*)test.A.Data)[5] = float.PositiveInfinity;
            long b = bT ? (17 * test.B.Stride) + 20 : (20 * test.B.Stride) + 17;
            ((ushort*)test.B.Data)[b] = 0xFF80;
            if (packed) test.Pack(workers);
            test.Check(gemm);
        }
    }

    [Test]
    public void SameBitsForAnyNumberOfThreads()
    {
        var random = new Random(12);
        using var packers = new Workers(2);
        foreach (var (m, n, k, aT, bT, packed) in new[]
        {
            (100, 1000, 900, false, true, false), (300, 16, 900, false, true, false),
            (900, 16, 500, true, false, false), (16, 900, 500, true, false, false),
            (5, 300, 700, false, true, false), (500, 500, 64, true, false, false),
            (301, 500, 1100, false, true, true), (301, 500, 1100, false, false, true),
            (40, 1100, 1000, false, false, true),
        })
        {
            using var test = new GemmCase(random, m, n, k, DType.F32, DType.F32, aT, bT);
            if (packed) test.Pack(packers);
            byte[]? expected = null;
            foreach (int threads in new[] { 1, 2, 5 })
            {
                using var workers = new Workers(threads);
                using var gemm = new Gemm(workers);
                for (int run = 0; run < 2; run++)
                {
                    test.Multiply(gemm);
                    byte[] bits = new Span<byte>(test.C.Data, (int)test.C.Stride * m * 4).ToArray();
                    expected ??= bits;
                    Assert.That(
                        bits.AsSpan().SequenceEqual(expected), $"{m} {n} {k}, {threads} threads");
                }
            }
        }
    }

    [Test]
    public void WarmCallsAllocateNothing()
    {
        using var workers = new Workers(2);
        using var gemm = new Gemm(workers);
        var random = new Random(13);
        using var large = new GemmCase(random, 200, 300, 400, DType.F32, DType.BF16, false, true);
        using var narrow = new GemmCase(random, 200, 16, 400, DType.F32, DType.F32, false, true);
        using var row = new GemmCase(random, 1, 300, 400, DType.F32, DType.BF16, false, true);
        using var packed = new GemmCase(random, 200, 300, 400, DType.F32, DType.BF16, false, false);
        packed.Pack(workers);
        GemmCase[] all = [large, narrow, row, packed];
        foreach (var test in all) test.Multiply(gemm);
        long before = GC.GetAllocatedBytesForCurrentThread();
        for (int i = 0; i < 20; i++)
            for (int j = 0; j < all.Length; j++) all[j].Multiply(gemm);
        Assert.That(GC.GetAllocatedBytesForCurrentThread() - before, Is.Zero);
    }

    [Test]
    public void CallsInsideWorkersRunOnTheirThread()
    {
        using var workers = new Workers(4);
        using var gemm = new Gemm(workers);
        var cases = Enumerable.Range(0, 16)
            .Select(i => new GemmCase(
                new Random(i), 70, 90, 410, DType.F32, DType.F32, i % 2 == 0, true))
            .ToArray();
        s_nested = (gemm, cases);
        workers.For(cases.Length, default(Nested));
        foreach (var test in cases)
        {
            test.CheckResult();
            test.Dispose();
        }
    }

    private static (Gemm Gemm, GemmCase[] Cases) s_nested;

    private readonly struct Nested : IRangeBody
    {
        public void Run(int begin, int end, int worker)
        {
            for (int i = begin; i < end; i++) s_nested.Cases[i].Multiply(s_nested.Gemm);
        }
    }

    [Test]
    public void PackedFormKeepsEveryBit(
        [Values(DType.F32, DType.BF16, DType.F16, DType.F64)] DType type)
    {
        using var workers = new Workers(2);
        foreach (var (rows, cols) in new[] { (1, 1), (31, 7), (32, 33), (100, 40), (65, 1023) })
        {
            int size = type.Size(), stride = (cols + 3) * size;
            var random = new Random(rows);
            byte[] source = new byte[rows * stride], back = new byte[rows * stride];
            random.NextBytes(source);
            using var memory = new HugeMemory(PackedMatrix.Bytes(rows, cols, type));
            fixed (byte* from = source)
            fixed (byte* to = back)
            {
                var w = new MatrixView(from, type, rows, cols, cols + 3);
                var packed = PackedMatrix.Pack(workers, w, memory.Data);
                packed.Unpack(workers, new MatrixView(to, type, rows, cols, cols + 3));
                AssertRows(source, back, 0, rows, cols * size, stride);
                int first = rows / 3, count = rows - first - (rows / 4);
                Array.Clear(back);
                packed.Unpack(workers, new MatrixView(to, type, count, cols, cols + 3), first);
                AssertRows(source, back, first, count, cols * size, stride);
            }
        }
    }

    private static void AssertRows(
        byte[] source, byte[] back, int first, int rows, int bytes, int stride)
    {
        for (int i = 0; i < rows; i++)
        {
            var expected = source.AsSpan((first + i) * stride, bytes);
            Assert.That(back.AsSpan(i * stride, bytes).SequenceEqual(expected), $"row {first + i}");
            var padding = back.AsSpan((i * stride) + bytes, stride - bytes);
            Assert.That(padding.IndexOfAnyExcept((byte)0), Is.EqualTo(-1), "wrote beyond the row");
        }
    }

    [Test]
    public void RangesOfRows([Values] bool packed)
    {
        using var workers = new Workers(2);
        using var gemm = new Gemm(workers);
        using var test =
            new GemmCase(new Random(14), 20, 100, 48, DType.F32, DType.BF16, false, true);
        test.Multiply(gemm);
        if (packed) test.Pack(workers);
        float* part = stackalloc float[20 * 36];
        gemm.Multiply(test.A, test.B.T.RowRange(64, 36).T, new MatrixView(part, DType.F32, 20, 36));
        for (int i = 0; i < 20; i++)
            for (int j = 0; j < 36; j++)
                Assert.That(
                    part[(i * 36) + j], Is.EqualTo(test.Result(i, 64 + j)).Within(1e-5));
    }

    [Test]
    public void WrongOperandsAreNamed()
    {
        using var workers = new Workers(1);
        using var gemm = new Gemm(workers);
        float* x = stackalloc float[64];
        MatrixView M(int rows, int cols, DType type = DType.F32) => new(x, type, rows, cols);
        var sizes = Assert.Throws<ShapeException>(() => gemm.Multiply(M(2, 3), M(4, 5), M(2, 5)));
        Assert.That(sizes!.Message, Does.Contain("[2, 3]").And.Contain("[4, 5]"));
        Assert.Throws<ShapeException>(() => gemm.Multiply(M(2, 3, DType.BF16), M(3, 5), M(2, 5)));
        Assert.Throws<ShapeException>(() => gemm.Multiply(M(2, 3), M(3, 2, DType.I32), M(2, 2)));
        Assert.Throws<ShapeException>(() => gemm.Multiply(M(2, 3), M(3, 2, DType.F64), M(2, 2)));
        Assert.Throws<ShapeException>(() => _ = new MatrixView(null, DType.F32, 2, 3, 2));
        Assert.Throws<ShapeException>(() => M(4, 4).RowRange(3, 2));
        var packed = new PackedMatrix(x, DType.F32, 2, 2);
        Assert.Throws<ShapeException>(() => gemm.Multiply(packed.View, M(2, 2), M(2, 2)));
        Assert.Throws<ShapeException>(() => packed.View.RowRange(1, 1));
        Assert.Throws<ShapeException>(() => PackedMatrix.Bytes(1, 1, DType.I32));
        Assert.Throws<ShapeException>(() => packed.Unpack(workers, M(2, 2, DType.BF16)));
    }
}
