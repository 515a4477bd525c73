using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>The cuBLAS stand-in: column-major products against double, and what it must
/// refuse.</summary>
[TestFixture]
public sealed unsafe class EmulatorBlasTests
{
    private const int InvalidValue = 7, NotSupported = 15;

    private static int Gemm(TestGpu gpu, int transA, int transB, int m, int n, int k, ulong a,
        int lda, ulong b, int ldb,
        ulong c, int ldc, float alpha = 1, float beta = 0, int type = CublasApi.F32,
        int typeC = CublasApi.F32)
    {
        var blas = gpu.Context.Api.Cublas;
        nint handle = 0;
        CublasApi.Check(blas.Create(&handle), "cublasCreate");
        CublasApi.Check(blas.SetStream(handle, gpu.Stream.Handle), "cublasSetStream");
        int status = blas.GemmEx(handle, transA, transB, m, n, k, &alpha, a, type, lda, b, type,
            ldb, &beta, c, typeC,
            ldc, CublasApi.Compute32F, CublasApi.DefaultAlgorithm);
        blas.Destroy(handle);
        return status;
    }

    [TestCase(0, 0)]
    [TestCase(1, 0)]
    [TestCase(0, 1)]
    [TestCase(1, 1)]
    public void ProductsOfEveryLayoutAccumulate(int transA, int transB)
    {
        const int m = 11, n = 7, k = 13, lda = 17, ldb = 15, ldc = 12;
        using var gpu = new TestGpu();
        float[] a = TestGpu.Numbers(lda * 17, 1), b = TestGpu.Numbers(ldb * 15, 2),
            c = TestGpu.Numbers(ldc * n, 3);
        ulong pc = gpu.Upload(c);
        Assert.That(Gemm(gpu, transA, transB, m, n, k, gpu.Upload(a), lda, gpu.Upload(b), ldb, pc,
            ldc, 0.5f, 2), Is.Zero);
        float[] got = gpu.Download<float>(pc, c.Length);
        for (int j = 0; j < n; j++)
            for (int i = 0; i < ldc; i++)
            {
                double sum = 0;
                for (int x = 0; x < k && i < m; x++)
                    sum += (double)a[transA == 0 ? i + (x * lda) : x + (i * lda)] * b[transB == 0
                        ? x + (j * ldb) : j + (x * ldb)];
                double expected = i < m ? (0.5 * sum) + (2.0 * c[i + (j * ldc)]) : c[i + (j * ldc)];
                Assert.That(got[i + (j * ldc)], Is.EqualTo(expected).Within(1e-5),
                    "rows behind m stay as they are");
            }
    }

    [Test]
    public void BrainInputsGiveBrainOrFloat()
    {
        using var gpu = new TestGpu();
        ushort[] a = TestGpu.Brain(TestGpu.Numbers(64, 1)),
            b = TestGpu.Brain(TestGpu.Numbers(64, 2));
        ulong pa = gpu.Upload(a), pb = gpu.Upload(b), wide = gpu.Allocate(256),
            narrow = gpu.Allocate(128);
        Assert.That(Gemm(gpu, 0, 0, 8, 8, 8, pa, 8, pb, 8, wide, 8, type: CublasApi.BF16), Is.Zero);
        Assert.That(Gemm(gpu, 0, 0, 8, 8, 8, pa, 8, pb, 8, narrow, 8, type: CublasApi.BF16,
            typeC: CublasApi.BF16), Is.Zero);
        float[] got = gpu.Download<float>(wide, 64);
        Assert.That(gpu.Download<ushort>(narrow, 64), Is.EqualTo(TestGpu.Brain(got)));
        double expected = Enumerable.Range(0, 8)
            .Sum(x => TestGpu.Widen(a[3 + (x * 8)]) * TestGpu.Widen(b[x + (5 * 8)]));
        Assert.That(got[3 + (5 * 8)], Is.EqualTo(expected).Within(1e-6));
    }

    [Test]
    public void StridedBatches()
    {
        using var gpu = new TestGpu();
        float[] a = TestGpu.Numbers(3 * 20, 1), b = TestGpu.Numbers(16, 2);
        ulong pa = gpu.Upload(a), pb = gpu.Upload(b), pc = gpu.Allocate(3 * 16 * 4);
        nint handle = 0;
        float one = 1, zero = 0;
        var blas = gpu.Context.Api.Cublas;
        blas.Create(&handle);
        blas.SetStream(handle, gpu.Stream.Handle);
        // The same B for all three: its stride is 0.
        Assert.That(blas.GemmStridedBatchedEx(handle, 0, 0, 4, 4, 4, &one, pa, CublasApi.F32, 4, 20,
            pb, CublasApi.F32, 4, 0,
            &zero, pc, CublasApi.F32, 4, 16, 3, CublasApi.Compute32F, CublasApi.DefaultAlgorithm),
            Is.Zero);
        float[] got = gpu.Download<float>(pc, 48);
        double expected = Enumerable.Range(0, 4)
            .Sum(x => (double)a[40 + 1 + (x * 4)] * b[x + (3 * 4)]);
        Assert.That(got[32 + 1 + (3 * 4)], Is.EqualTo(expected).Within(1e-6));
    }

    [Test]
    public void RefusesWhatTheLibraryRefuses()
    {
        using var gpu = new TestGpu();
        ulong x = gpu.Upload(new float[64]);
        Assert.That(Gemm(gpu, 0, 0, 8, 4, 4, x, 7, x, 4, x, 8), Is.EqualTo(InvalidValue),
            "lda < m");
        Assert.That(Gemm(gpu, 1, 0, 8, 4, 4, x, 3, x, 4, x, 8), Is.EqualTo(InvalidValue),
            "lda < k, transposed");
        Assert.That(Gemm(gpu, 0, 1, 4, 8, 4, x, 4, x, 7, x, 8), Is.EqualTo(InvalidValue),
            "ldb < n, transposed");
        Assert.That(Gemm(gpu, 0, 0, 8, 4, 4, x, 8, x, 4, x, 7), Is.EqualTo(InvalidValue),
            "ldc < m");
        Assert.That(Gemm(gpu, 0, 0, -1, 4, 4, x, 8, x, 4, x, 8), Is.EqualTo(InvalidValue));
        Assert.That(Gemm(gpu, 2, 0, 4, 4, 4, x, 4, x, 4, x, 4), Is.EqualTo(InvalidValue));
        Assert.That(Gemm(gpu, 0, 0, 4, 4, 4, 0, 4, x, 4, x, 4), Is.EqualTo(InvalidValue), "null A");
        Assert.That(Gemm(gpu, 0, 0, 4, 4, 4, x, 4, x, 4, x, 4, type: CublasApi.BF16,
            typeC: CublasApi.F16),
            Is.EqualTo(NotSupported));
        Assert.That(Gemm(gpu, 0, 0, 4, 4, 4, x, 4, x, 4, x, 4, type: 3), Is.EqualTo(NotSupported),
            "integers");
        Assert.That(gpu.Fault, Is.Null);
    }

    [TestCase(0ul, 17, Check.OutOfBounds)]
    [TestCase(2ul, 8, Check.Misaligned)]
    public void FindsMemoryItMayNotTouch(ulong shift, int leading, Check check)
    {
        using var gpu = new TestGpu();
        ulong a = gpu.Upload(new float[64]), c = gpu.Allocate(256);
        Assert.That(Gemm(gpu, 0, 0, 8, 8, 8, a + shift, leading, a, 8, c, 8), Is.Zero);
        Assert.That(gpu.Finding().Check, Is.EqualTo(check));
    }

    [Test]
    public void FindsInputsNobodyWrote()
    {
        using var gpu = new TestGpu();
        ulong a = gpu.Upload(new float[64]), b = gpu.Allocate(256), c = gpu.Allocate(256);
        Assert.That(Gemm(gpu, 0, 0, 8, 8, 8, a, 8, a, 8, c, 8, beta: 1), Is.Zero, "beta 1 reads C");
        Assert.That(gpu.Finding().Check, Is.EqualTo(Check.Uninitialised));
        using var second = Again(gpu);
        a = second.Upload(new float[64]);
        b = second.Allocate(256);
        Gemm(second, 0, 0, 8, 8, 8, a, 8, b, 8, a, 8);
        Assert.That(second.Finding().ToString(),
            Does.Contain("B[0, 0] was never written").And.Contain("cublasGemmEx"));
    }

    private static TestGpu Again(TestGpu first)
    {
        first.Dispose();
        return new();
    }
}
